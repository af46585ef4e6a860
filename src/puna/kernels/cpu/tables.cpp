// Asks the processor (cpuid; on Arm the system) what it has; the flags named here are the ones that CMakeLists.txt
// compiles each isa_*.cpp with.
//
// What is surprising: __builtin_cpu_supports is not asked. It is as good as the library that comes with the compiler, and
// zig's (0.17) says no to everything.
#include "tables.h"

#include <atomic>

#ifdef __x86_64__
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace {

std::atomic<bool> invariant{false};

#ifdef __x86_64__
// What the instruction sets of this build need: bits of cpuid, and whether the system saves their registers (XCR0).
struct Processor {
    bool avx2 = false, avx512 = false, avx512_bf16 = false;

    Processor() {
        unsigned a, b, c1, b7, c7, a71 = 0, d;
        auto bit = [](unsigned word, int i) { return (word >> i & 1) != 0; };
        if (!__get_cpuid(1, &a, &b, &c1, &d) || !bit(c1, 27) || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d)) return;
        if (a >= 1) {
            unsigned b1, c, d1;
            __get_cpuid_count(7, 1, &a71, &b1, &c, &d1);
        }
        unsigned low, high;
        asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        bool saves_512 = (low & 0xe0) == 0xe0;
#ifdef __APPLE__
        saves_512 = true;  // from the first instruction that needs it on
#endif
        if ((low & 6) != 6 || !bit(c1, 28)) return;
        bool fma_f16c = bit(c1, 12) && bit(c1, 29);
        avx2 = fma_f16c && bit(b7, 5);
        avx512 = fma_f16c && saves_512 && bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31);  // F, DQ, BW, VL
        avx512_bf16 = avx512 && bit(a71, 5) && bit(c7, 11);                                          // and VNNI
    }
};
#endif

}  // namespace

void puna_set_invariant(bool wanted) { invariant.store(wanted); }

extern "C" bool puna_invariant() { return invariant.load(std::memory_order_relaxed); }

std::vector<Table> puna_tables() {
    std::vector<Table> all;
#ifdef __x86_64__
    [[maybe_unused]] const Processor has;
#endif
#ifdef PUNA_HAVE_AVX512_BF16
    all.push_back({"avx512", &kernels_avx512_bf16, has.avx512_bf16, "cpuid: AVX-512 F/BW/VL/DQ/VNNI/BF16"});
#endif
#ifdef PUNA_HAVE_AVX512
    all.push_back({"avx512", &kernels_avx512, has.avx512, "cpuid: AVX-512 F/BW/VL/DQ"});
#endif
#ifdef PUNA_HAVE_AVX2
    all.push_back({"avx2", &kernels_avx2, has.avx2, "cpuid: AVX2/FMA/F16C"});
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
