/* Exits with 0 where AMX works: what the build for this machine asks, and ggml's choice of a CPU variant asks too. */

#include "../files/ggml/src/ggml-cpu/arch/x86/amx-probe.h"

int main(void) {
    return amx_probe() ? 0 : 1;
}
