/* Exits with 0 where AMX tiles really work.
 *
 * A CPU in a virtual machine may announce AMX (CPUID, hence -march=native) and still fault on its first tile
 * instruction with SIGILL. Only executing one tells. Built with -march=native, run in a process of its own. */

#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023 /* Linux: ask for an extended processor state ... */
#define XFEATURE_XTILEDATA  18     /* ... here the tile registers */

struct tile_config { /* the 64 bytes that LDTILECFG reads */
    uint8_t  palette;
    uint8_t  start_row;
    uint8_t  reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t  rows[16];
};

_Static_assert(sizeof(struct tile_config) == 64, "LDTILECFG reads 64 bytes");

int main(void) {
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) != 0) {
        return 1;
    }
    struct tile_config config = { .palette = 1 };
    config.bytes_per_row[0] = 64;
    config.rows[0] = 16;
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_release();
    return 0;
}
