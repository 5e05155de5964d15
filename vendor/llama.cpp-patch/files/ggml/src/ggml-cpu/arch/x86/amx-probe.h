// Does AMX really work here? CPUID does not tell: in a virtual machine it may announce AMX while the first tile
// instruction faults. So one tile product is executed and its result checked.
//
// A child process executes it. A signal handler in this process would do too, but it would be every thread's handler
// meanwhile, and the permission that Linux gives for the tile registers cannot be handed back: from then on each
// signal frame and each alternate signal stack must have room for their 8 KiB. The child takes all of that with it,
// and it may end in any way. It calls nothing that other threads of this process could have locked.
//
// It is none of the host's children: it is cloned to end without a signal. The host's handler of SIGCHLD is not called,
// nobody who waits for any child gets this one, and it can be waited for where SIGCHLD is ignored. No function that was
// registered for forks runs, and no handler of the host's runs in the child.
//
// Built without -mamx-*: whoever asks may run on any x86 CPU. Ask only where CPUID announces AMX.

#pragma once

#include <stdbool.h>

#if defined(__linux__)

#include <errno.h>
#include <immintrin.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

struct amx_probe_config { // what LDTILECFG reads
    uint8_t  palette;
    uint8_t  start_row;
    uint8_t  reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t  rows[16];
};

// One 4-byte row a tile: tile 0 += the dot product of four int8 in tile 1 and four in tile 2.
__attribute__((target("amx-tile,amx-int8")))
static inline bool amx_probe_product(void) {
    struct amx_probe_config config = { 1, 0, { 0 }, { 4, 4, 4 }, { 1, 1, 1 } };
    const int8_t a[4] = { 1, 2, -3, 4 };
    const int8_t b[4] = { 5, -6, 7, 8 };
    int32_t sum = 0;
    // GCC 12.2 does not know that the tile instructions read all of these, and would drop the stores to them.
    __asm__ volatile("" : : "r"(&config), "r"(a), "r"(b) : "memory");
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_loadd(1, a, 4);
    _tile_loadd(2, b, 4);
    _tile_dpbssd(0, 1, 2);
    _tile_stored(0, &sum, 4);
    _tile_release();
    return sum == 4; // 5 - 12 - 21 + 32
}

static inline void amx_probe_faulted(int signal_number) {
    (void) signal_number;
    _exit(1); // no core file, no line in the kernel's log
}

static inline void amx_probe_run_child(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; // arch_prctl: ask for the tile registers

    const int faults[] = { SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGTRAP };
    sigset_t set;
    sigemptyset(&set);
    for (size_t i = 0; i < sizeof(faults)/sizeof(faults[0]); ++i) {
        signal(faults[i], amx_probe_faulted);
        sigaddset(&set, faults[i]);
    }
    sigprocmask(SIG_UNBLOCK, &set, NULL);
    _exit(syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 && amx_probe_product() ? 0 : 1);
}

static inline bool amx_probe(void) {
    // the child begins with all signals blocked, so that none finds a handler of the host's there
    sigset_t all, before;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &before);
    const pid_t child = (pid_t) syscall(SYS_clone, 0UL, NULL, NULL, NULL, 0UL);
    if (child == 0) {
        amx_probe_run_child();
    }
    sigprocmask(SIG_SETMASK, &before, NULL);
    if (child < 0) {
        return false; // not known to work
    }
    int status = 1;
    pid_t ended;
    do {
        ended = waitpid(child, &status, __WCLONE);
    } while (ended < 0 && errno == EINTR);
    return ended == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

#else

static inline bool amx_probe(void) {
#if defined(_WIN32)
    return true; // as ggml-cpu/amx takes it
#else
    return false; // no permission to ask for, so none to use them
#endif
}

#endif
