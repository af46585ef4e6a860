// Integer products of panels (see kernels.h) with activations of 8 bits: what one record of 256 columns contributes.
//
// The idea: the 16 rows of a panel lie in the lanes. 64 bytes are 4 consecutive columns of 16 rows, a *quad*; one
// instruction multiplies a quad by the same 4 columns of one activation row and adds the sums to 16 integers. A quad is
// unpacked once, in registers, for up to GROUP activation rows. After each sub-block (16 or 32 columns) its integers
// are scaled in float32.
//
// - Weights are unsigned: stored value = true value + 2^SHIFT. The integers start from -2^SHIFT · Σ activations instead
//   of zero, so the offset costs nothing. Types with minimums (value · scale - minimum) subtract minimum · Σ activations.
// - Activations: blocks of 32 share a scale beside types of 32 (Q4_0, Q8_0, ...), blocks of 256 beside types of 256
//   ("super" types: the K types, IQ4_XS), as in llama.cpp.
// - For many activation rows a record is unpacked to whole bytes first (`Plain`), and the same code runs on that. The
//   operations on a row are the same ones in the same order, so its bits do not depend on how many rows there are.
//
// What is surprising: without VNNI, a product of two bytes above 7 bits would saturate (vpmaddubsw), so types of 8 bits
// are signed there (SIGN_DOT). The integers are the same on every instruction set.

typedef uint32_t vu_row __attribute__((vector_size(4 * WIDTH), may_alias));
typedef int8_t vc __attribute__((vector_size(WIDTH)));
typedef int8_t vc_any __attribute__((vector_size(WIDTH), aligned(1), may_alias));

#if WIDTH == 16 && defined(__AVX512VNNI__)
constexpr bool SIGN_DOT = false;
#elif WIDTH > 4 || defined(__aarch64__)
constexpr bool SIGN_DOT = true;
#else
constexpr bool SIGN_DOT = false;
#endif

constexpr int PARTS = PANEL_ROWS / W;             // vectors in a panel's 16 rows
constexpr int GROUP = REGISTERS == 32 ? 12 : 4;   // activation rows at a time: their sums fill the registers

INLINE vu row(const uint8_t* p, int64_t w) { return *(const vu_row*)(p + w * PANEL_ROWS * 4); }
INLINE vi splat_word(const char* p) { return (vi)((vu){} + *(const word_any*)p); }
INLINE vf splat_float(const char* p) {
    uint32_t word = *(const word_any*)p;
    float x;
    __builtin_memcpy(&x, &word, 4);
    return splat(x);
}
INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

// a · b + c, rounded once where the machine can: the same everywhere in one translation unit.
INLINE vf fused(vf a, vf b, vf c) {
#if WIDTH == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif WIDTH == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// The lower and the upper half of each word, as float16.
INLINE vf low_half(vu x) {
    vh half = __builtin_convertvector(x, vh);
    return Words<F16>::widen((const uint16_t*)&half);
}
INLINE vf high_half(vu x) { return low_half(x >> 16); }

// sums += the 4 bytes of each word of w times the 4 signed bytes at x. w is unsigned, below 128 where SIGN_DOT holds;
// with SIGNED it is signed.
template <bool SIGNED>
INLINE void dot(vi& sums, vu w, const char* x) {
#if WIDTH == 16 && defined(__AVX512VNNI__)
    // In assembly: gcc 12 spills the sums around the intrinsic.
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(w), "m"(*(const word_any*)x));
#elif WIDTH == 16
    __m512i v = (__m512i)w, a = (__m512i)splat_word(x);
    if (SIGNED) {
        a = _mm512_mask_sub_epi8(a, _mm512_movepi8_mask(v), _mm512_setzero_si512(), a);
        v = _mm512_abs_epi8(v);
    }
    sums += (vi)_mm512_madd_epi16(_mm512_maddubs_epi16(v, a), _mm512_set1_epi16(1));
#elif WIDTH == 8
    __m256i v = (__m256i)w, a = (__m256i)splat_word(x);
    if (SIGNED) {
        a = _mm256_sign_epi8(a, v);
        v = _mm256_abs_epi8(v);
    }
    sums += (vi)_mm256_madd_epi16(_mm256_maddubs_epi16(v, a), _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
    sums = (vi)vdotq_s32((int32x4_t)sums, (int8x16_t)w, (int8x16_t)splat_word(x));
#elif defined(__aarch64__)
    int8x16_t v = (int8x16_t)w, a = (int8x16_t)splat_word(x);
    int16x8_t low = vmull_s8(vget_low_s8(v), vget_low_s8(a)), high = vmull_high_s8(v, a);
    sums += (vi)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
#else
    // Bytes 0 and 2, then 1 and 3, as 16-bit products: at most 255 · 127.
    typedef int16_t vs __attribute__((vector_size(4 * WIDTH)));
    vu a = (vu)splat_word(x);
    vi even = (vi)((vs)(w & 0x00ff00ff) * (((vs)a << 8) >> 8)), odd = (vi)((vs)((w >> 8) & 0x00ff00ff) * ((vs)a >> 8));
    sums += ((even << 16) >> 16) + (even >> 16) + ((odd << 16) >> 16) + (odd >> 16);
#endif
}

// sums += the two 16-bit halves of each word of w times those at x; both signed.
INLINE void dot_halves(vi& sums, vi w, const char* x) {
#if WIDTH == 16 && defined(__AVX512VNNI__)
    asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(w), "m"(*(const word_any*)x));
#elif WIDTH == 16
    sums += (vi)_mm512_madd_epi16((__m512i)w, (__m512i)splat_word(x));
#elif WIDTH == 8
    sums += (vi)_mm256_madd_epi16((__m256i)w, (__m256i)splat_word(x));
#else
    vi a = splat_word(x);
    sums += ((w << 16) >> 16) * ((a << 16) >> 16) + (w >> 16) * (a >> 16);
#endif
}

// 8-bit weights as `dot` wants them, from signed bytes.
INLINE vu wide(vu x) { return SIGN_DOT ? x : x ^ 0x80808080; }

// IQ4's 16 values, by the lower 4 bits of each byte; as `wide`.
alignas(64) static const int8_t IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
INLINE vu iq4(vu x) {
#if WIDTH == 16
    return wide((vu)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(*(const __m128i*)IQ4_VALUES), (__m512i)x));
#elif WIDTH == 8
    return wide((vu)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(*(const __m128i*)IQ4_VALUES), (__m256i)x));
#elif defined(__aarch64__)
    return wide((vu)vqtbl1q_s8(vld1q_s8(IQ4_VALUES), (uint8x16_t)x));
#else
    typedef uint8_t vb __attribute__((vector_size(4 * WIDTH)));
    vb out;
    for (int i = 0; i < 4 * W; i++) out[i] = (uint8_t)IQ4_VALUES[((vb)x)[i]];
    return wide((vu)out);
#endif
}

INLINE vu nibble(vu x, int shift) { return (x >> shift) & 0x0f0f0f0f; }

// The lower or the upper nibbles, the upper ones left where they are: 16 times too large, which IN_PLACE mends in the
// scale, exactly. One operation instead of two. Signed products have no room for it.
INLINE vu nibble_in_place(vu x, int upper) {
    return SIGN_DOT ? nibble(x, upper * 4) : x & (upper ? 0xf0f0f0f0 : 0x0f0f0f0f);
}
constexpr float IN_PLACE = SIGN_DOT ? 1.0f : 0.0625f;

// The 4 bits of x above `shift`, one into bit 4 of each byte: the products do not overlap.
INLINE vu fifth_bits(vu x, int shift) { return ((((x >> shift) & 0xf) * 0x00204081) & 0x01010101) << 4; }

// ---- scales ----

// The scales of a record in float32, for W of its rows.
template <bool SUPER, int SUB, bool MINS>
struct Scales {
    vf scale[RECORD / SUB];
    vf least[MINS ? (SUPER ? 1 : 8) : 1];       // the minimum of a block of 32; SUPER: dmin, negated
    vi pairs[MINS && SUPER ? RECORD / SUB / 2 : 1];  // SUPER: minimums of sub-blocks j and j + 2 (see `pair_of`) in a word
};

// Sub-block j's minimum is in word pair_of(j), in its upper half where j & 2. So 4 bytes make 2 words by masks.
constexpr int pair_of(int j) { return j / 4 * 2 + j % 2; }

// 4 bytes are the scales of 4 sub-blocks (as integers to be multiplied by d), or their minimums.
template <bool IS_SIGNED>
INLINE void four_scales(vf* to, vf d, vu bytes, int minus) {
    UNROLL for (int b = 0; b < 4; b++) {
        vi one = IS_SIGNED ? (vi)(bytes << (24 - 8 * b)) >> 24 : (vi)((bytes >> (8 * b)) & 0xff);
        to[b] = to_float(one - minus) * d;
    }
}
INLINE void four_minimums(vi* to, vu bytes) {
    to[0] = (vi)(bytes & 0x00ff00ff);
    to[1] = (vi)((bytes >> 8) & 0x00ff00ff);
}

// Q4_K and Q5_K: 8 scales and 8 minimums of 6 bits.
template <typename S>
INLINE void scales_of_4_and_5(const uint8_t* words, S& to) {
    vu d = row(words, 0), a = row(words, 1), b = row(words, 2), c = row(words, 3);
    four_scales<false>(to.scale, low_half(d), a & 0x3f3f3f3f, 0);
    four_scales<false>(to.scale + 4, low_half(d), (c & 0x0f0f0f0f) | ((a >> 2) & 0x30303030), 0);
    four_minimums(to.pairs, b & 0x3f3f3f3f);
    four_minimums(to.pairs + 2, nibble(c, 4) | ((b >> 2) & 0x30303030));
    to.least[0] = -high_half(d);
}

// ---- types ----

// What the code below needs to know of a type. quad(words, n, i, q): columns 4q to 4q + 3 of step n · SPAN + i, a step
// being 32 columns; i and q are constants where it is called.
template <bool SUPER_, int SUB_, int SHIFT_, bool MINS_, int SPAN_ = 1>
struct Traits {
    static constexpr bool SUPER = SUPER_, MINS = MINS_;
    static constexpr int SUB = SUB_, SHIFT = SHIFT_, SPAN = SPAN_;  // SUB columns share a scale; SHIFT -1: no offset
    static constexpr bool SIGNED = SIGN_DOT && SHIFT == 7;
    typedef Scales<SUPER, SUB, MINS> Scale;
};

template <int TYPE>
struct Kind;

// Scales of types of 32: one 16-bit number a block, or a word of a scale and a minimum.
INLINE void half_scales(const uint8_t* halves, int64_t blocks, vf* to) {
    for (int64_t b = 0; b < blocks; b++) to[b] = Words<F16>::widen((const uint16_t*)(halves + b * PANEL_ROWS * 2));
}
template <int WORDS, typename S>
INLINE void word_scales(const uint8_t* words, int64_t blocks, S& to) {
    for (int64_t b = 0; b < blocks; b++) {
        to.scale[b] = low_half(row(words, b * WORDS));
        to.least[b] = high_half(row(words, b * WORDS));
    }
}

template <>
struct Kind<Q4_0> : Traits<false, 32, 3, false> {
    INLINE vu quad(const uint8_t* words, int s, int, int q) { return nibble(row(words, s * 4 + q % 4), q / 4 * 4); }
    INLINE void scales(const uint8_t* halves, const uint8_t*, int64_t blocks, Scale& to) { half_scales(halves, blocks, to.scale); }
};

template <>
struct Kind<Q4_1> : Traits<false, 32, -1, true> {
    INLINE vu quad(const uint8_t* words, int s, int, int q) { return nibble(row(words, s * 5 + 1 + q % 4), q / 4 * 4); }
    INLINE void scales(const uint8_t*, const uint8_t* words, int64_t blocks, Scale& to) { word_scales<5>(words, blocks, to); }
};

template <>
struct Kind<Q5_0> : Traits<false, 32, 4, false> {
    INLINE vu quad(const uint8_t* words, int s, int, int q) {
        return nibble(row(words, s * 5 + 1 + q % 4), q / 4 * 4) | fifth_bits(row(words, s * 5), q * 4);
    }
    INLINE void scales(const uint8_t* halves, const uint8_t*, int64_t blocks, Scale& to) { half_scales(halves, blocks, to.scale); }
};

template <>
struct Kind<Q5_1> : Traits<false, 32, -1, true> {
    INLINE vu quad(const uint8_t* words, int s, int, int q) {
        return nibble(row(words, s * 6 + 2 + q % 4), q / 4 * 4) | fifth_bits(row(words, s * 6 + 1), q * 4);
    }
    INLINE void scales(const uint8_t*, const uint8_t* words, int64_t blocks, Scale& to) { word_scales<6>(words, blocks, to); }
};

template <>
struct Kind<Q8_0> : Traits<false, 32, 7, false> {
    INLINE vu quad(const uint8_t* words, int s, int, int q) { return wide(row(words, s * 8 + q)); }
    INLINE void scales(const uint8_t* halves, const uint8_t*, int64_t blocks, Scale& to) { half_scales(halves, blocks, to.scale); }
};

template <>
struct Kind<IQ4_NL> : Traits<false, 32, 7, false> {
    INLINE vu quad(const uint8_t* words, int s, int, int q) { return iq4(nibble(row(words, s * 4 + q % 4), q / 4 * 4)); }
    INLINE void scales(const uint8_t* halves, const uint8_t*, int64_t blocks, Scale& to) { half_scales(halves, blocks, to.scale); }
};

template <>
struct Kind<I8> : Traits<false, 16, 7, false> {
    INLINE vu quad(const uint8_t* words, int s, int, int q) { return wide(row(words, s * 10 + 2 + q)); }
    INLINE void scales(const uint8_t*, const uint8_t* words, int64_t blocks, Scale& to) {
        for (int64_t b = 0; b < blocks; b++)
            UNROLL for (int i = 0; i < 2; i++) to.scale[b * 2 + i] = (vf)row(words, b * 10 + i);
    }
};

template <>
struct Kind<Q2_K> : Traits<true, 16, -1, true, 4> {
    INLINE vu quad(const uint8_t* words, int n, int i, int q) { return (row(words, 5 + n * 8 + q) >> (i * 2)) & 0x03030303; }
    INLINE void scales(const uint8_t*, const uint8_t* words, int64_t, Scale& to) {
        vu d = row(words, 0);
        vf scale = low_half(d);
        UNROLL for (int w = 0; w < 4; w++) {
            four_scales<false>(to.scale + w * 4, scale, nibble(row(words, 1 + w), 0), 0);
            four_minimums(to.pairs + w * 2, nibble(row(words, 1 + w), 4));
        }
        to.least[0] = -high_half(d);
    }
};

template <>
struct Kind<Q3_K> : Traits<true, 16, 2, false, 4> {
    INLINE vu quad(const uint8_t* words, int n, int i, int q) {
        vu low = (row(words, 3 + q * 3 + n * 2) >> (i * 2)) & 0x03030303;
        return low | (((row(words, 3 + q * 3 + 1) >> (n * 4 + i)) & 0x01010101) << 2);
    }
    INLINE void scales(const uint8_t* halves, const uint8_t* words, int64_t, Scale& to) {
        vf d;
        half_scales(halves, 1, &d);
        vu a = row(words, 0), b = row(words, 1), c = row(words, 2);
        four_scales<false>(to.scale, d, nibble(a, 0) | ((c & 0x03030303) << 4), 32);
        four_scales<false>(to.scale + 4, d, nibble(b, 0) | (((c >> 2) & 0x03030303) << 4), 32);
        four_scales<false>(to.scale + 8, d, nibble(a, 4) | (((c >> 4) & 0x03030303) << 4), 32);
        four_scales<false>(to.scale + 12, d, nibble(b, 4) | (((c >> 6) & 0x03030303) << 4), 32);
    }
};

template <>
struct Kind<Q4_K> : Traits<true, 32, -1, true, 2> {
    INLINE vu quad(const uint8_t* words, int n, int i, int q) { return nibble_in_place(row(words, 4 + n * 8 + q), i); }
    INLINE void scales(const uint8_t*, const uint8_t* words, int64_t, Scale& to) {
        scales_of_4_and_5(words, to);
        for (int j = 1; j < 8; j += 2) to.scale[j] *= IN_PLACE;
    }
};

template <>
struct Kind<Q5_K> : Traits<true, 32, -1, true, 2> {
    INLINE vu quad(const uint8_t* words, int n, int i, int q) {
        return nibble(row(words, 5 + q * 5 + n), i * 4) | (((row(words, 4 + q * 5) >> (n * 2 + i)) & 0x01010101) << 4);
    }
    INLINE void scales(const uint8_t*, const uint8_t* words, int64_t, Scale& to) { scales_of_4_and_5(words, to); }
};

template <>
struct Kind<Q6_K> : Traits<true, 16, 5, false, 4> {
    // Half n of 128 columns: low bits in the halves of 16 words, high bits in 8, among the first of them.
    INLINE vu quad(const uint8_t* words, int n, int i, int q) {
        int half = 4 + n * 24;
        vu low = row(words, half + (i % 2 ? 16 + q : q * 2)) >> (i / 2 * 4), high = row(words, half + q * 2 + 1);
        high = i < 2 ? high << (4 - 2 * i) : high >> (2 * i - 4);
        return (low & 0x0f0f0f0f) | (high & 0x30303030);
    }
    INLINE void scales(const uint8_t* halves, const uint8_t* words, int64_t, Scale& to) {
        vf d;
        half_scales(halves, 1, &d);
        UNROLL for (int w = 0; w < 4; w++) four_scales<true>(to.scale + w * 4, d, row(words, w), 0);
    }
};

template <>
struct Kind<IQ4_XS> : Traits<true, 32, 7, false> {
    INLINE vu quad(const uint8_t* words, int s, int, int q) { return iq4(nibble(row(words, 2 + s * 4 + q % 4), q / 4 * 4)); }
    INLINE void scales(const uint8_t*, const uint8_t* words, int64_t, Scale& to) {
        vu d = row(words, 0), low = row(words, 1);
        vf scale = low_half(d);
        UNROLL for (int j = 0; j < 8; j++) {
            vi six = (vi)(((low >> (4 * j)) & 0xf) | (((d >> (16 + 2 * j)) & 3) << 4));
            to.scale[j] = to_float(six - 32) * scale;
        }
    }
};

// What the sums of activations are multiplied by before they are stored, as the start of the integers: 2 to this power,
// which fits the types that matter most (Q6_K, and all of 8 bits).
constexpr int start_shift(bool super, int sub) { return super && sub == 16 ? 5 : 7; }

// A record unpacked to bytes: quad q of step s is row 8 s + q. Without minimums the offset is 2^start_shift.
template <bool SUPER, int SUB, bool MINS>
struct Plain : Traits<SUPER, SUB, MINS ? -1 : start_shift(SUPER, SUB), MINS> {
    INLINE vu quad(const uint8_t* words, int s, int, int q) { return row(words, s * 8 + q); }
};
template <class K>
struct PlainRecord {
    uint8_t quads[RECORD * PANEL_ROWS] __attribute__((aligned(64)));
    typename K::Scale scales[PARTS];
};

template <int TYPE>
INLINE void scales_at(const uint8_t* record, int64_t blocks, int part, typename Kind<TYPE>::Scale& to) {
    Kind<TYPE>::scales(record + part * W * 2, record + halves_bytes(TYPE, blocks) + part * W * 4, blocks, to);
}

template <int TYPE>
static void unpack_record(const uint8_t* record, int64_t blocks, PlainRecord<Kind<TYPE>>& to) {
    typedef Kind<TYPE> K;
    for (int part = 0; part < PARTS; part++) {
        const uint8_t* words = record + halves_bytes(TYPE, blocks) + part * W * 4;
        constexpr int TO = start_shift(K::SUPER, K::SUB);
        for (int n = 0; n < blocks * BLOCKS[TYPE].numbers / 32 / K::SPAN; n++)
            UNROLL for (int i = 0; i < K::SPAN; i++) UNROLL for (int q = 0; q < 8; q++) {
                vu quad = K::quad(words, n, i, q);
                if (K::SHIFT >= 0 && K::SHIFT < TO) {
                    quad += ((1 << TO) - (1 << K::SHIFT)) * 0x01010101u;
                    if (SIGN_DOT && TO == 7) quad ^= 0x80808080;
                }
                *(vu_row*)(to.quads + (((n * K::SPAN + i) * 8 + q) * PANEL_ROWS + part * W) * 4) = quad;
            }
        scales_at<TYPE>(record, blocks, part, to.scales[part]);
    }
}

// ---- activations ----

// The activations of M rows (a group) lie as the product reads them. A record is 8 steps of 32 columns:
//   quad q of row m, int8 x 4, at (q · M + m) · 4; then for each row, int32: -Σ · 2^start_shift of all 32 columns, of the
//   first, of the last 16;
//   not SUPER: float32 scale of each row, then scale · Σ.
// SUPER, after the steps: pairs (see pair_of) of Σ of 16 columns [8][M], of 32 columns [4][M], int16; float32 scales.
constexpr int64_t step_bytes(bool super) { return super ? 44 : 52; }          // for one row
constexpr int64_t activation_bytes(bool super) { return super ? 404 : 416; }  // of a record, for one row

// The largest |x| as its bits; NaN is larger than infinity.
INLINE vu larger_bits(vu best, vf x) {
    vu bits = (vu)x & 0x7fffffff;
    return bits > best ? bits : best;
}
INLINE float largest_of(vu bits) {
#if WIDTH == 16
    uint32_t best = _mm512_reduce_max_epu32((__m512i)bits);
#else
    uint32_t best = 0;
    for (int i = 0; i < W; i++) best = bits[i] > best ? bits[i] : best;
#endif
    float x;
    __builtin_memcpy(&x, &best, 4);
    return x;
}

INLINE void put(char* p, int32_t x) { *(word_any*)p = (uint32_t)x; }
INLINE void put(char* p, float x) { __builtin_memcpy(p, &x, 4); }
INLINE int32_t two_halves(int32_t low, int32_t high) { return (low & 0xffff) | (int32_t)((uint32_t)high << 16); }

// `count` numbers in 8 bits; returns their scale. Where the largest is infinite or NaN the scale is too, and with it
// every result; below 1e-30 (127 / largest must be finite) all is zero.
INLINE float quantize(const float* x, int64_t count, int8_t* to) {
    vu bits = {};
    for (int64_t k = 0; k < count; k += W) bits = larger_bits(bits, load(x + k));
    float most = largest_of(bits);
    if (!(most >= 1e-30f && most < INFINITE)) {
        for (int64_t k = 0; k < count; k++) to[k] = 0;
        return most < 1e-30f ? 0.0f : most;
    }
    float inverse = 127.0f / most;
    for (int64_t k = 0; k < count; k += W) {
        vf scaled = load(x + k) * inverse;
        keep(scaled);  // rounded here on every machine
        vi number = (vi)(scaled + splat(12582912.0f)) - 0x4b400000;  // 1.5 · 2²³: to nearest, ties to even
        *(vc_any*)(to + k) = __builtin_convertvector(number, vc);
    }
    return most / 127.0f;
}

// Row m of M of a record: `count` columns at x (null: a row of zeros).
template <bool SUPER>
static void quantize_record(const float* x, int64_t count, char* to, int64_t m, int64_t M) {
    int8_t bytes[RECORD] __attribute__((aligned(64)));
    int32_t quads[RECORD / 4] __attribute__((aligned(64))), sums[RECORD / 16];
    float scales[RECORD / 32] = {};
    constexpr int64_t BLOCK = SUPER ? RECORD : 32;
    if (x)
        for (int64_t b = 0; b < count / BLOCK; b++) scales[b] = quantize(x + b * BLOCK, BLOCK, bytes + b * BLOCK);
    else
        __builtin_memset(bytes, 0, sizeof bytes);
    for (int64_t q = 0; q < count / 4; q += W) {
        vi four = (vi)row((const uint8_t*)(bytes + q * 4), 0);
        *(vi*)(quads + q) = ((four << 24) >> 24) + ((four << 16) >> 24) + ((four << 8) >> 24) + (four >> 24);
    }
    for (int64_t i = 0; i < count / 16; i++) sums[i] = quads[i * 4] + quads[i * 4 + 1] + quads[i * 4 + 2] + quads[i * 4 + 3];
    for (int64_t s = 0; s < count / 32; s++) {
        char* step = to + s * step_bytes(SUPER) * M + m * 4;
        UNROLL for (int q = 0; q < 8; q++) put(step + q * M * 4, (int32_t) * (const word_any*)(bytes + s * 32 + q * 4));
        int32_t first = sums[s * 2], last = sums[s * 2 + 1];
        put(step + 8 * M * 4, -(first + last) * (1 << start_shift(SUPER, 32)));
        put(step + 9 * M * 4, -first * (1 << start_shift(SUPER, 16)));
        put(step + 10 * M * 4, -last * (1 << start_shift(SUPER, 16)));
        if (!SUPER) {
            put(step + 11 * M * 4, scales[s]);
            put(step + 12 * M * 4, scales[s] * (float)(first + last));
        }
    }
    if (!SUPER) return;
    char* after = to + 8 * step_bytes(true) * M + m * 4;
    for (int p = 0; p < 8; p++) {
        int j = p / 2 * 4 + p % 2;
        put(after + p * M * 4, two_halves(sums[j], sums[j + 2]));
    }
    for (int p = 0; p < 4; p++) {
        int j = (p / 2 * 4 + p % 2) * 2;
        put(after + (8 + p) * M * 4, two_halves(sums[j] + sums[j + 1], sums[j + 4] + sums[j + 5]));
    }
    put(after + 12 * M * 4, scales[0]);
}

// ---- the product ----

constexpr int64_t FETCH_AHEAD = 6 << 10;

// tile[m][lane] += what `steps` · 32 columns contribute, for M activation rows and the W rows at tile, words, scales.
// At each step the next `LINES` lines of memory at `fetch` are fetched into L2.
template <class K, int M, int LINES>
INLINE void record_dots(const uint8_t* words, const typename K::Scale& scales, const char* x, int64_t steps, float* tile,
                        const uint8_t* fetch) {
    constexpr int CHAINS = M <= 2 ? 2 : 1;  // sums of even and odd quads, where one alone would wait for itself
    constexpr int PER_STEP = 32 / K::SUB, QUADS = 8 / PER_STEP;
    constexpr bool FROM_ZERO = K::SHIFT < 0 || K::SIGNED;
    constexpr int LESS = FROM_ZERO ? 0 : start_shift(K::SUPER, K::SUB) - K::SHIFT;
    vf sums[M];
    UNROLL for (int m = 0; m < M; m++) sums[m] = K::SUPER ? (vf){} : load(tile + m * PANEL_ROWS);
    const char* at = x;
    for (int64_t n = 0; n < steps / K::SPAN; n++)
        UNROLL for (int i = 0; i < K::SPAN; i++, at += step_bytes(K::SUPER) * M) {
            int64_t s = n * K::SPAN + i;
            // Steps of a span read the same words. They load them again: kept in registers they would push out the sums.
            const uint8_t* from = words;
            asm("" : "+r"(from));
            UNROLL for (int line = 0; line < LINES; line++) __builtin_prefetch(fetch + (s * LINES + line) * 64, 0, 2);
            UNROLL for (int sub = 0; sub < PER_STEP; sub++) {
                vi dots[CHAINS][M];
                UNROLL for (int m = 0; m < M; m++) {
                    const char* start = at + ((PER_STEP == 1 ? 8 : 9 + sub) * M + m) * 4;
                    dots[0][m] = FROM_ZERO ? (vi){} : splat_word(start) >> LESS;
                    if (CHAINS > 1) dots[CHAINS - 1][m] = (vi){};
                }
                UNROLL for (int q = sub * QUADS; q < sub * QUADS + QUADS; q++) {
                    vu quad = K::quad(from, (int)n, i, q);
                    UNROLL for (int m = 0; m < M; m++) dot<K::SIGNED>(dots[q % CHAINS][m], quad, at + (q * M + m) * 4);
                }
                vf scale = scales.scale[s * PER_STEP + sub];
                UNROLL for (int m = 0; m < M; m++) {
                    vf number = to_float(CHAINS > 1 ? dots[0][m] + dots[CHAINS - 1][m] : dots[0][m]);
                    if (K::SUPER) sums[m] = fused(number, scale, sums[m]);
                    else sums[m] = fused(number, scale * splat_float(at + (11 * M + m) * 4), sums[m]);
                }
            }
            if (!K::SUPER && K::MINS)
                UNROLL for (int m = 0; m < M; m++)
                    sums[m] = fused(scales.least[s], splat_float(at + (12 * M + m) * 4), sums[m]);
        }
    if (!K::SUPER) {
        UNROLL for (int m = 0; m < M; m++) store(tile + m * PANEL_ROWS, sums[m]);
        return;
    }
    vi least[M];
    if (K::MINS) {
        constexpr int PAIRS = RECORD / K::SUB / 2, FIRST = K::SUB == 16 ? 0 : 8;
        UNROLL for (int m = 0; m < M; m++) least[m] = (vi){};
        UNROLL for (int p = 0; p < PAIRS; p++)
            UNROLL for (int m = 0; m < M; m++) dot_halves(least[m], scales.pairs[p], at + ((FIRST + p) * M + m) * 4);
    }
    UNROLL for (int m = 0; m < M; m++) {
        vf scale = splat_float(at + (12 * M + m) * 4), before = load(tile + m * PANEL_ROWS);
        vf after = fused(sums[m], scale, before);
        if (K::MINS) after = fused(to_float(least[m]), scales.least[0] * scale, after);
        store(tile + m * PANEL_ROWS, after);
    }
}

// tile [M][16] = one panel times M activation rows, from the panel as it lies in memory; `stride` bytes of x a record.
template <int TYPE, int M>
static void panel_dots(const uint8_t* panel, const char* x, int64_t stride, int64_t in, float* tile) {
    typedef Kind<TYPE> K;
    constexpr int64_t BYTES = record_bytes(TYPE, blocks_in_record(TYPE));
    // The more rows, the slower the walk, and the less the hardware fetches ahead by itself. One or two rows go faster
    // without.
    constexpr int LINES = M <= 2 ? 0 : (BYTES / 8 + 63) / 64;
    for (int64_t i = 0; i < M * PANEL_ROWS; i += W) store(tile + i, (vf){});
    for (int64_t k = 0; k < in; k += RECORD, panel += BYTES, x += stride) {
        int64_t columns = K::SUPER ? RECORD : smaller(RECORD, in - k), blocks = columns / BLOCKS[TYPE].numbers;
        for (int part = 0; part < PARTS; part++) {
            typename K::Scale scales;
            scales_at<TYPE>(panel, blocks, part, scales);
            record_dots<K, M, LINES>(panel + halves_bytes(TYPE, blocks) + part * W * 4, scales, x, columns / 32, tile + part * W,
                                     panel + FETCH_AHEAD);
        }
    }
}

// tiles [groups][M][16] += an unpacked record of `columns` times groups · M activation rows.
template <class K, int M>
static void plain_dots(const PlainRecord<K>& record, const char* x, int64_t groups, int64_t columns, float* tiles) {
    for (int64_t g = 0; g < groups; g++, x += activation_bytes(K::SUPER) * M, tiles += M * PANEL_ROWS)
        for (int part = 0; part < PARTS; part++)
            record_dots<K, M, 0>(record.quads + part * W * 4, record.scales[part], x, columns / 32, tiles + part * W, nullptr);
}

// ---- by type and number of rows ----

// Activation rows come in groups of these sizes; missing ones are zero.
constexpr int group_size(int64_t rows) {
    return rows >= GROUP ? GROUP : rows <= 2 ? (int)rows : rows <= 4 ? 4 : rows <= 8 ? 8 : 12;
}

template <int TYPE>
struct Packed {
    typedef Kind<TYPE> K;
    typedef Plain<K::SUPER, K::SUB, K::MINS> P;

    static void few(int M, const uint8_t* panel, const char* x, int64_t stride, int64_t in, float* tile) {
        switch (M) {
            case 1: panel_dots<TYPE, 1>(panel, x, stride, in, tile); break;
            case 2: panel_dots<TYPE, 2>(panel, x, stride, in, tile); break;
            case 4: panel_dots<TYPE, 4>(panel, x, stride, in, tile); break;
#if WIDTH == 16 || defined(__aarch64__)
            case 8: panel_dots<TYPE, 8>(panel, x, stride, in, tile); break;
            default: panel_dots<TYPE, 12>(panel, x, stride, in, tile); break;
#endif
        }
    }

    static void unpack(const uint8_t* record, int64_t columns, void* to) {
        unpack_record<TYPE>(record, columns / BLOCKS[TYPE].numbers, *(PlainRecord<K>*)to);
    }

    // A record unpacked before.
    static void many(int M, const void* record, const char* x, int64_t groups, int64_t columns, float* tiles) {
        const PlainRecord<P>& r = *(const PlainRecord<P>*)record;
        switch (M) {
            case 1: plain_dots<P, 1>(r, x, groups, columns, tiles); break;
            case 2: plain_dots<P, 2>(r, x, groups, columns, tiles); break;
            case 4: plain_dots<P, 4>(r, x, groups, columns, tiles); break;
#if WIDTH == 16 || defined(__aarch64__)
            case 8: plain_dots<P, 8>(r, x, groups, columns, tiles); break;
            default: plain_dots<P, 12>(r, x, groups, columns, tiles); break;
#endif
        }
    }

    // One row of a record in float32, as the type's definition computes it: scale · integer, then the minimum.
    static void values(const uint8_t* record, int64_t columns, int64_t lane, float* to) {
        constexpr int OFFSET = start_shift(K::SUPER, K::SUB);
        PlainRecord<K> plain;
        unpack_record<TYPE>(record, columns / BLOCKS[TYPE].numbers, plain);
        const typename K::Scale& scales = plain.scales[lane / W];
        for (int64_t k = 0; k < columns; k++) {
            uint8_t byte = plain.quads[(k / 4 * PANEL_ROWS + lane) * 4 + k % 4];
            int number = K::MINS ? byte : SIGN_DOT && OFFSET == 7 ? (int8_t)byte : byte - (1 << OFFSET);
            vf value = splat(scales.scale[k / K::SUB][lane % W] * (float)number);
            keep(value);  // not contracted with the sum
            if (K::MINS && K::SUPER) {
                int j = (int)(k / K::SUB);
                int minimum = scales.pairs[pair_of(j)][lane % W] >> (j % 4 / 2 * 16) & 0xff;
                vf least = splat(scales.least[0][lane % W] * (float)minimum);
                keep(least);
                value += least;
            } else if (K::MINS) {
                value += splat(scales.least[k / 32][lane % W]);
            }
            to[k] = value[0];
        }
    }
};

struct PackedOps {
    void (*few)(int M, const uint8_t* panel, const char* x, int64_t stride, int64_t in, float* tile);
    void (*unpack)(const uint8_t* record, int64_t columns, void* to);
    void (*many)(int M, const void* record, const char* x, int64_t groups, int64_t columns, float* tiles);
    void (*values)(const uint8_t* record, int64_t columns, int64_t lane, float* to);
    int64_t unpacked_bytes;  // of a record
    bool super;
};

template <int TYPE>
constexpr PackedOps packed_ops() {
    typedef Packed<TYPE> T;
    return {T::few, T::unpack, T::many, T::values, (int64_t)sizeof(PlainRecord<typename T::P>), T::K::SUPER};
}

// Indexed by the type.
static const PackedOps PACKED[WEIGHT_TYPES] = {
    {}, {}, {},
    packed_ops<Q4_0>(), packed_ops<Q4_1>(), packed_ops<Q5_0>(), packed_ops<Q5_1>(), packed_ops<Q8_0>(),
    packed_ops<Q2_K>(), packed_ops<Q3_K>(), packed_ops<Q4_K>(), packed_ops<Q5_K>(), packed_ops<Q6_K>(),
    packed_ops<IQ4_NL>(), packed_ops<IQ4_XS>(), packed_ops<I8>(),
};
