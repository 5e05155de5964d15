"""The probe for AMX beside whatever its host does with children and signals."""

from pathlib import Path

import pytest
from test_build import PROBE, run_c, write, x86

pytestmark = pytest.mark.build

# A host that includes the probe. It ends by SIGALRM where the probe hangs.
HOST = """\
#include <errno.h>
#include <immintrin.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
%(definitions)s
#include "%(probe)s"

static volatile sig_atomic_t n_calls = 0;
static void count(int number) { (void) number; ++n_calls; }
static void leave(int number) { (void) number; _exit(0); }

int main(void) {
    alarm(10);
    (void) count, (void) leave;
    %(body)s
}
"""

# what stands in for tiles that work: no CPU is needed that has them
WORKS = """\
#undef SYS_arch_prctl
#define SYS_arch_prctl SYS_sched_yield
#undef _tile_loadconfig
#define _tile_loadconfig(config) (void) (config)
#undef _tile_zero
#define _tile_zero(tile)
#undef _tile_loadd
#define _tile_loadd(tile, base, stride)
#undef _tile_dpbssd
#define _tile_dpbssd(sum, a, b)
#undef _tile_stored
#define _tile_stored(tile, base, stride) *(base) = 4
#undef _tile_release
#define _tile_release()
"""
NO_CHILD = """\
#define fork() ((pid_t) -1)
#undef SYS_clone
#define SYS_clone -1
"""
FAULT = """\
#undef _tile_zero
#define _tile_zero(tile) raise(%s)
"""


def run(folder: Path, definitions: str, body: str) -> int:
    """Run a host; return its exit status."""
    write(folder / "host.c", HOST % {"definitions": definitions, "probe": PROBE, "body": body})
    return run_c(folder / "host.c", folder / "host", "-O1", "-Wall", "-Werror")


@x86
@pytest.mark.parametrize("handler", ["SIG_DFL", "SIG_IGN", "count"])
def test_what_works_is_found_whatever_the_host_does_with_sigchld(handler: str, tmp_path: Path) -> None:
    body = f"signal(SIGCHLD, {handler}); return !amx_probe() || n_calls != 0;"
    assert run(tmp_path, WORKS, body) == 0


@x86
def test_without_a_child_it_waits_for_none_of_the_hosts(tmp_path: Path) -> None:
    body = """\
    const pid_t child = syscall(SYS_fork);
    if (child == 0) { pause(); _exit(0); }
    const int wrong = amx_probe() || waitpid(child, NULL, WNOHANG) != 0;
    kill(child, SIGKILL);
    return wrong;"""
    assert run(tmp_path, WORKS + NO_CHILD, body) == 0


@x86
@pytest.mark.parametrize("fault", ["SIGILL", "SIGSEGV", "SIGBUS"])
@pytest.mark.parametrize("blocked", [False, True])
def test_a_fault_meets_no_handler_of_the_hosts(fault: str, blocked: bool, tmp_path: Path) -> None:
    block = f"sigset_t set; sigemptyset(&set); sigaddset(&set, {fault}); sigprocmask(SIG_BLOCK, &set, NULL);"
    body = f"signal({fault}, leave); {block if blocked else ''} return amx_probe();"
    assert run(tmp_path, WORKS + FAULT % fault, body) == 0


@x86
def test_the_hosts_signals_are_as_they_were(tmp_path: Path) -> None:
    body = """\
    sigset_t before, after;
    sigprocmask(SIG_SETMASK, NULL, &before);
    sigaddset(&before, SIGUSR1);
    sigprocmask(SIG_SETMASK, &before, NULL);
    amx_probe();
    sigprocmask(SIG_SETMASK, NULL, &after);
    for (int i = 1; i < SIGRTMIN; ++i) {
        if (sigismember(&before, i) != sigismember(&after, i) || signal(i, SIG_DFL) == amx_probe_faulted) {
            return 1;
        }
    }
    return waitpid(-1, NULL, __WALL) != -1 || errno != ECHILD;"""
    assert run(tmp_path, WORKS, body) == 0
