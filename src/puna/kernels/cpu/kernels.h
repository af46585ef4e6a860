// What the translation units of the extension share: the table of ops one instruction set fills in, and the services
// of the thread pool (pool.cpp).
//
// What it is not: a place for inline functions. Each isa_*.cpp is compiled with its own instruction set; a function
// that two of them emit under one name could survive in its AVX-512 copy and crash on a smaller machine.
//
// Letters: H query heads, G key/value heads, D head size. All arrays are C-contiguous, float32 unless said otherwise, and aligned to their element only (weights lie in mapped files).
#pragma once

#include <stddef.h>
#include <stdint.h>

enum WeightType {
    F32, F16, BF16,
    // Blocks of ggml's types, as in a GGUF file; `| PANELS`: the same blocks with the words of 16 rows side by side.
    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS,
    // Not of ggml: 32 numbers as 2 float32 scales (16 numbers each) and 32 int8. Whatever has no kernel becomes this.
    I8,
    WEIGHT_TYPES,
    PANELS = 64
};

struct Weights {
    const void* data;  // null: absent (a bias that is not there)
    int type;          // a WeightType, or a packed one | PANELS
};

// What `probe` measures.
enum Probe { PROBE_READ, PROBE_FP32, PROBE_BF16, PROBE_INT8 };

// A matrix of `linear`: y [rows, out] = x · w [out, in]ᵀ + bias [out].
struct Product {
    Weights w;
    int64_t out;
    Weights bias;
    float* y;
};

// A matrix of `regroup`: packed [out, in], and where its panels go, a multiple of 64. `first_chunk` is regroup's own.
struct Regrouping {
    Weights packed;
    int64_t out, in;
    void* panels;
    int64_t first_chunk;
};

// How a block lies in memory: `half` is where its only 16-bit scale is, -1 where it has none (two of them are a word);
// all else is words of 32 bits, `words` of them, in their order. numbers = 0: not a packed type.
struct BlockShape {
    int numbers, bytes, half, words;
};
constexpr BlockShape BLOCKS[WEIGHT_TYPES] = {
    {0, 4, -1, 0},      {0, 2, -1, 0},      {0, 2, -1, 0},      {32, 18, 0, 4},     {32, 20, -1, 5},
    {32, 22, 0, 5},     {32, 24, -1, 6},    {32, 34, 0, 8},     {256, 84, -1, 21},  {256, 110, 108, 27},
    {256, 144, -1, 36}, {256, 176, -1, 44}, {256, 210, 208, 52}, {32, 18, 0, 4},    {256, 136, -1, 34},
    {32, 40, -1, 10},
};

// Panels: 16 rows of a matrix, then the next 16; missing rows are zero. A panel is one record for each 256 columns (the
// last may be shorter): the 16-bit scales of its blocks, [block][row], padded to 64 bytes; then word w of block b of all
// rows: [b][place_of(w)][row]. So 64 bytes hold 4 bytes of each of 16 rows, and the rows lie in the lanes of a vector.
constexpr int PANEL_ROWS = 16;
constexpr int RECORD = 256;

// Static, so that no unit's copy serves another.
static constexpr int64_t blocks_in_record(int type) { return RECORD / BLOCKS[type].numbers; }
static constexpr int64_t halves_bytes(int type, int64_t blocks) {  // the scales before the words
    return BLOCKS[type].half < 0 ? 0 : (blocks * PANEL_ROWS * 2 + 63) / 64 * 64;
}
static constexpr int64_t record_bytes(int type, int64_t blocks) {
    return halves_bytes(type, blocks) + blocks * BLOCKS[type].words * PANEL_ROWS * 4;
}
static constexpr int64_t panel_bytes(int type, int64_t in) {
    return in / RECORD * record_bytes(type, blocks_in_record(type)) +
           (in % RECORD ? record_bytes(type, in % RECORD / BLOCKS[type].numbers) : 0);
}

// Words stand in the order in which a product first reads them: the hardware foresees a stream that goes straight on,
// and fetches it better than any prefetch instruction did; Q6_K in ggml's order reached 45 % of the memory's bandwidth.
// Scales come first, and the words of upper bits (high) among those of lower bits (low) that they complete:
// Q2_K scales [4], low [2][8], d; Q3_K high [8], low [2][8], scales [3]; Q5_K scales [4], high [8], low [4][8];
// Q6_K low [2][16], high [2][8], scales [4].
static constexpr int place_of(int type, int w) {
    if (type == Q2_K) return w == 20 ? 0 : w + 1;
    if (type == Q3_K) return w >= 24 ? w - 24 : w < 8 ? 3 + w * 3 + 1 : 3 + w % 8 * 3 + w / 8 * 2 - 2;
    if (type == Q5_K) return w < 4 ? w : w < 12 ? 4 + (w - 4) * 5 : 4 + (w - 12) % 8 * 5 + 1 + (w - 12) / 8;
    if (type == Q6_K) {
        if (w >= 48) return w - 48;
        if (w >= 32) return 4 + (w - 32) / 8 * 24 + w % 8 * 2 + 1;
        return 4 + w / 16 * 24 + (w % 16 < 8 ? w % 16 * 2 : 8 + w % 16);
    }
    return w;
}

// Where the tokens of a call stand: sequences one after another, and the pages of each (layouts.PageTable). A cache is
// [pages, page, G, D]: position p of sequence b is row p % page of page pages[b, p / page].
struct PageTable {
    const int32_t* positions;  // [tokens], ascending by one within a sequence
    const int32_t* starts;     // [sequences + 1]: tokens starts[b] to starts[b + 1] are sequence b's; there may be none
    const int32_t* pages;      // [sequences, width]
    int64_t sequences, width;
    int64_t page;              // a multiple of LEAST_PAGE, or as much as the longest sequence has
};
constexpr int64_t LEAST_PAGE = 16;

// `shortlist` sums this many exponentials together.
constexpr int SUM_PART = 512;

struct Kernels {
    // out[i] = table[ids[i]]; the ids have been checked.
    void (*embedding)(Weights table, int64_t dim, const int32_t* ids, int64_t count, float* out);
    void (*rms_norm)(const float* x, Weights weight, int64_t rows, int64_t dim, float eps, float* out);
    // Several products of one x [rows, in]. With packed weights a row's result has the same bits whatever rows share the
    // call; with dense ones it has them among few rows, and again among many (linear.inl's MANY).
    void (*linear)(const float* x, int64_t rows, int64_t in, const Product* products, int count);
    // Packed blocks to panels, many matrices in one region. `mapped`: the blocks lie in mapped files, and nobody needs
    // their pages once they are read.
    void (*regroup)(Regrouping* matrices, int count, bool mapped);
    // x [tokens, heads, D] turned by cos and sin [tokens, D/2]
    void (*rope)(const float* x, const float* cos, const float* sin, int64_t tokens, int64_t heads, int64_t D,
                 bool interleaved, float* out);
    // Caches are F32, F16, BF16, or Q8_0 (then D is a multiple of 32): one type for keys and values. The table has been
    // checked: all pages that positions need are there. k and v [tokens, G, D]; no two of them go to the same place.
    void (*write_kv)(Weights cache_k, Weights cache_v, const float* k, const float* v, const PageTable& table,
                     int64_t G, int64_t D);
    // q and out [tokens, H, D]. A token's result has the same bits alone and among up to 8 of its sequence (decode), and
    // again among any larger number (prefill); between these two ways it differs by rounding, unless puna_invariant.
    // Other sequences and the size of a page never matter.
    // bf16: prefill may round what it multiplies to bfloat16, unless the cache is F32. A token at p sees the keys from
    // p / chunk * chunk on; chunk is a multiple of LEAST_PAGE, or 0: from 0 on.
    void (*attention)(const float* q, Weights k, Weights v, const PageTable& table, int64_t H, int64_t G, int64_t D,
                      bool bf16, int64_t chunk, float* out);
    void (*swiglu)(const float* gate, const float* up, int64_t count, float* out);
    void (*argmax)(const float* logits, int64_t rows, int64_t vocabulary, int32_t* out);
    // The k largest of each row, 1 <= k <= vocabulary, largest first, equals by lower id: ids and values [rows, k].
    void (*top_k)(const float* logits, int64_t rows, int64_t vocabulary, int64_t k, int32_t* ids, float* values);
    // The same k of each of `count` rows, and sums [count, parts] of exp((x - max) · scale) over parts of SUM_PART logits;
    // scales [count] are above 0, and neither so small nor so large that a product is NaN.
    void (*shortlist)(const float* const* rows, int64_t count, int64_t vocabulary, const float* scales, int64_t k,
                      int32_t* ids, float* values, float* sums);
    // The same sums of only those logits that are above the row's bound; tops [count] are the maxima.
    void (*above)(const float* const* rows, int64_t count, int64_t vocabulary, const float* scales, const float* tops,
                  const float* bounds, float* sums);
    // Copies of the rows with minus infinity where a mask's bit (i % 32 of word i / 32) is 0: out [count, vocabulary].
    void (*allowed)(const float* const* rows, const uint32_t* const* masks, int64_t count, int64_t vocabulary, float* out);
    // Packs finite numbers as `blocks` blocks of the WeightType `kind`, Q4_0 to Q6_K; false where a scale does not fit
    // float16 (then `out` means nothing).
    bool (*encode)(int kind, const float* x, int64_t blocks, uint8_t* out);
    // On all threads: read `amount` bytes at data, or multiply and add in `amount` equal pieces. Gives the bytes, or how
    // many products that were; 0 where the instruction set has no such instruction.
    int64_t (*probe)(int what, const void* data, int64_t amount);
};

// The tables, one a translation unit; which of them exist is known to tables.cpp by PUNA_HAVE_*.
extern const Kernels kernels_scalar, kernels_avx2, kernels_avx512, kernels_avx512_bf16, kernels_neon,
    kernels_neon_dot;

// Runs run(job, chunk, thread) for every chunk in [0, chunks), on the calling thread (number 0) and on idle threads of
// the pool (numbers below `threads`); returns when all chunks are done. Which thread gets which chunk is not fixed.
typedef void (*Run)(void* job, int64_t chunk, int thread);
extern "C" void puna_parallel(int64_t chunks, int threads, Run run, void* job);

// How many threads a region started now would have, the caller included.
extern "C" int puna_threads();

// At least `bytes` of scratch memory aligned to 64, the calling thread's own, valid until its next call of this
// function. Throws std::bad_alloc.
extern "C" void* puna_scratch(size_t bytes);

// Whether a token's bits must depend on its own sequence's tokens only: not on how many of them share a call either.
extern "C" bool puna_invariant();

// Gives back the pages from the one of `begin` to the one before that of `end`, which are of a mapped file: whoever
// reads them again gets them from the system's cache or the disk.
extern "C" void puna_release_pages(const void* begin, const void* end);
