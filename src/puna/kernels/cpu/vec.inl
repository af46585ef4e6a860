// Vectors of WIDTH floats in the compiler's own notation (GCC and Clang's vector extension), so that each op is written
// once and compiled for 16 (AVX-512), 8 (AVX2) or 4 lanes (SSE2, NEON). Intrinsics stand only where the notation has no
// word: converting float16, partial loads, dot products, shuffles of whole vectors.
//
// What is surprising: no header of the C++ library is included, and everything is static: see kernels.h.

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(4 * WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t vu __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t vh __attribute__((vector_size(2 * WIDTH)));
typedef float f4 __attribute__((vector_size(16)));
typedef int32_t vi4 __attribute__((vector_size(16)));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi4){__VA_ARGS__})
#endif

// The same, wherever they lie (a tensor of a file may start at any byte) and whatever was stored there.
typedef float vf_any __attribute__((vector_size(4 * WIDTH), aligned(1), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * WIDTH), aligned(1), may_alias));
typedef float f4_any __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint32_t word_any __attribute__((aligned(1), may_alias));
typedef uint16_t half_any __attribute__((aligned(1), may_alias));
typedef float float_any __attribute__((aligned(1), may_alias));

constexpr int W = WIDTH;
#if WIDTH == 16 || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif
constexpr float INFINITE = __builtin_inff();

INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

INLINE vf splat(float x) { return x - (vf){}; }
INLINE vf load(const float* p) { return *(const vf_any*)p; }
INLINE void store(float* p, vf x) { *(vf_any*)p = x; }

// Keeps a loaded vector in a register where the compiler would load it again for each use: the loads are the limit.
INLINE void keep(vf& x) {
#ifdef __x86_64__
    asm("" : "+v"(x));
#else
    asm("" : "+w"(x));
#endif
}

INLINE vf select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }
INLINE vf absolute(vf x) { return (vf)((vi)x & 0x7fffffff); }

// The first n < W floats at p, then zeros; nothing beyond them is read.
INLINE vf load_part(const float* p, int64_t n) {
#if WIDTH == 16
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
    vf x = {};
    __builtin_memcpy(&x, p, (size_t)n * 4);
    return x;
#endif
}

INLINE void store_part(float* p, vf x, int64_t n) {
#if WIDTH == 16
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)x);
#else
    __builtin_memcpy(p, &x, (size_t)n * 4);
#endif
}

INLINE vf load_up_to(const float* p, int64_t n) { return n >= W ? load(p) : load_part(p, n); }
INLINE void store_up_to(float* p, vf x, int64_t n) {
    if (n >= W) store(p, x);
    else store_part(p, x, n);
}

// The sum of all lanes, halves first: the same tree for every caller, so equal rows give equal bits.
INLINE float sum(vf x) {
#if WIDTH == 16
    typedef float f8 __attribute__((vector_size(32)));
    f8 y = (f8)_mm512_castps512_ps256((__m512)x) + (f8)_mm512_extractf32x8_ps((__m512)x, 1);
    f4 z = (f4)_mm256_castps256_ps128((__m256)y) + (f4)_mm256_extractf128_ps((__m256)y, 1);
#elif WIDTH == 8
    f4 z = (f4)_mm256_castps256_ps128((__m256)x) + (f4)_mm256_extractf128_ps((__m256)x, 1);
#else
    f4 z = x;
#endif
    z += SHUFFLE(z, z, 2, 3, 0, 1);
    return z[0] + z[1];
}

// The largest lane, halves first; no lane is NaN.
INLINE float largest(vf x) {
#if WIDTH == 16
    return _mm512_reduce_max_ps((__m512)x);
#else
#if WIDTH == 8
    f4 a = (f4)_mm256_castps256_ps128((__m256)x), b = (f4)_mm256_extractf128_ps((__m256)x, 1);
    f4 z = a > b ? a : b;
#else
    f4 z = x;
#endif
    f4 swapped = SHUFFLE(z, z, 2, 3, 0, 1);
    z = z > swapped ? z : swapped;
    return z[0] > z[1] ? z[0] : z[1];
#endif
}

// A weight of each type, as vectors of float32.
template <int TYPE>
struct Words;

template <>
struct Words<F32> {
    typedef float_any word;
    INLINE vf widen(const word* p) { return *(const vf_any*)p; }
};

template <>
struct Words<BF16> {
    typedef half_any word;
    INLINE vf widen(const word* p) {
#if WIDTH == 16
        return (vf)((vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) << 16);
#elif WIDTH == 8
        return (vf)((vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
        return (vf)(__builtin_convertvector((vh)*(const vh_any*)p, vu) << 16);
#endif
    }
};

template <>
struct Words<F16> {
    typedef half_any word;
    INLINE vf widen(const word* p) {
#if WIDTH == 16
        return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif WIDTH == 8
        return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
        return (vf)vcvt_f32_f16(vreinterpret_f16_u16((uint16x4_t)*(const vh_any*)p));
#else
        // Shift the fields into float32's places and mend the exponent's bias, 127 - 15, by an exact product; it also
        // normalizes subnormals. An exponent of all ones (infinity, NaN) must become all ones.
        vu word = __builtin_convertvector((vh)*(const vh_any*)p, vu);
        vu rest = (word & 0x7fff) << 13;
        vf value = (vf)rest * 0x1p112f;
        vu special = (vu)(rest >= (0x7c00u << 13));
        return (vf)((vu)value | (special & 0x7f800000u) | ((word & 0x8000) << 16));
#endif
    }
};

// The first n < W weights at p, then zeros; nothing beyond them is read.
template <int TYPE>
INLINE vf widen_part(const typename Words<TYPE>::word* p, int64_t n) {
    typename Words<TYPE>::word padded[W] = {};
    __builtin_memcpy(padded, p, (size_t)n * sizeof padded[0]);
    return Words<TYPE>::widen(padded);
}

template <int TYPE>
INLINE vf widen_up_to(const typename Words<TYPE>::word* p, int64_t n) {
    return n >= W ? Words<TYPE>::widen(p) : widen_part<TYPE>(p, n);
}

// 2ˣ for x <= 127, relative error below 2e-7; 0 below -126 (-infinity included), NaN for NaN. x = n + r with n whole
// and |r| <= 1/2, and Taylor's series of e^(r ln 2) to the 7th power, whose remainder is 6e-9.
INLINE vf exponential2(vf x) {
#if WIDTH == 16
    // scalef multiplies by 2ⁿ and rounds to 0 by itself; the maximum (x second, for NaN) only tames -infinity.
    x = (vf)_mm512_max_ps((__m512)splat(-200.0f), (__m512)x);
    vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf r = x - n;
#else
    vi under = x < splat(-126.0f);
    vf tamed = select(under, splat(-126.0f), x);
    vf shifted = tamed + splat(12582912.0f);  // 1.5·2²³ leaves n in the low bits
    vf r = tamed - (shifted - splat(12582912.0f));
#endif
    vf p = splat(1.52527338e-5f);  // (ln 2)ᵏ / k!, k = 7 to 0
    p = p * r + splat(1.54035304e-4f);
    p = p * r + splat(1.33335581e-3f);
    p = p * r + splat(9.61812911e-3f);
    p = p * r + splat(5.55041087e-2f);
    p = p * r + splat(2.40226507e-1f);
    p = p * r + splat(6.93147181e-1f);
    p = p * r + splat(1.0f);
#if WIDTH == 16
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    vi exponent = (vi)shifted - (vi)splat(12582912.0f) + 127;
    return (vf)((vi)(p * (vf)(exponent << 23)) & ~under);
#endif
}

constexpr float LOG2_E = 1.44269504f;

INLINE void transpose4(f4& a, f4& b, f4& c, f4& d) {
    f4 ab_low = SHUFFLE(a, b, 0, 4, 1, 5), ab_high = SHUFFLE(a, b, 2, 6, 3, 7);
    f4 cd_low = SHUFFLE(c, d, 0, 4, 1, 5), cd_high = SHUFFLE(c, d, 2, 6, 3, 7);
    a = SHUFFLE(ab_low, cd_low, 0, 1, 4, 5);
    b = SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
    c = SHUFFLE(ab_high, cd_high, 0, 1, 4, 5);
    d = SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
}
