// Asks the processor (cpuid; on Arm the system) what it has; the flags named here are the ones that CMakeLists.txt
// compiles each isa_*.cpp with.
#include "tables.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

std::vector<Table> puna_tables() {
    std::vector<Table> all;
    // __builtin_cpu_supports asks the operating system too (XGETBV): registers it does not save are not supported.
#if defined(PUNA_HAVE_AVX512) || defined(PUNA_HAVE_AVX512_BF16)
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#ifdef PUNA_HAVE_AVX512_BF16
    all.push_back({"avx512", &kernels_avx512_bf16, avx512 && __builtin_cpu_supports("avx512bf16") &&
                   __builtin_cpu_supports("avx512vnni"), "cpuid: AVX-512 F/BW/VL/DQ/VNNI/BF16"});
#endif
#ifdef PUNA_HAVE_AVX512
    all.push_back({"avx512", &kernels_avx512, avx512, "cpuid: AVX-512 F/BW/VL/DQ"});
#endif
#ifdef PUNA_HAVE_AVX2
    all.push_back({"avx2", &kernels_avx2,
                   __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
                   "cpuid: AVX2/FMA/F16C"});
#endif
#ifdef PUNA_HAVE_NEON_DOT
#ifdef __linux__
    constexpr unsigned long ASIMDDP = 1ul << 20;  // HWCAP_ASIMDDP, which older headers lack
    bool dot = getauxval(AT_HWCAP) & ASIMDDP;
#elif defined(__APPLE__)
    bool dot = true;  // every Mac with an Arm processor has it
#else
    bool dot = false;
#endif
    all.push_back({"neon", &kernels_neon_dot, dot, "Armv8.2: NEON dot product"});
#endif
#ifdef PUNA_HAVE_NEON
    all.push_back({"neon", &kernels_neon, true, "the baseline of 64-bit Arm"});
#endif
    all.push_back({"scalar", &kernels_scalar, true, "the compiler's baseline for this architecture"});
    return all;
}
