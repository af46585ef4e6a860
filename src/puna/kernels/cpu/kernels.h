// What the translation units of the extension share: the table of ops one instruction set fills in, and the services
// of the thread pool (pool.cpp).
//
// What it is not: a place for inline functions. Each isa_*.cpp is compiled with its own instruction set; a function
// that two of them emit under one name could survive in its AVX-512 copy and crash on a smaller machine.
//
// Letters: B sequences, T new tokens, S cached tokens, H query heads, G key/value heads, D head size. All arrays are
// C-contiguous, float32 unless said otherwise, and aligned to their element only (weights lie in mapped files).
#pragma once

#include <stddef.h>
#include <stdint.h>

enum WeightType { F32 = 0, F16 = 1, BF16 = 2 };

struct Weights {
    const void* data;  // null: absent (a bias that is not there)
    int type;          // a WeightType
};

struct Kernels {
    // out[i] = table[ids[i]]; the ids have been checked.
    void (*embedding)(Weights table, int64_t dim, const int32_t* ids, int64_t count, float* out);
    void (*rms_norm)(const float* x, Weights weight, int64_t rows, int64_t dim, float eps, float* out);
    // y [rows, out] = x [rows, in] · w [out, in]ᵀ + bias [out]
    void (*linear)(const float* x, int64_t rows, int64_t in, Weights w, int64_t out, Weights bias, float* y);
    // x [tokens, heads, D] turned by cos and sin [tokens, D/2]
    void (*rope)(const float* x, const float* cos, const float* sin, int64_t tokens, int64_t heads, int64_t D,
                 bool interleaved, float* out);
    // positions may be null: 0, 1, 2, ... in each sequence. They have been checked: -1 <= position < S.
    void (*attention)(const float* q, const float* k, const float* v, const int32_t* positions, int64_t B, int64_t T,
                      int64_t S, int64_t H, int64_t G, int64_t D, float* out);
    void (*swiglu)(const float* gate, const float* up, int64_t count, float* out);
    void (*argmax)(const float* logits, int64_t rows, int64_t vocabulary, int32_t* out);
};

// The tables, one a translation unit; which of them exist is known to module.cpp by PUNA_HAVE_*.
extern const Kernels kernels_scalar, kernels_avx2, kernels_avx512, kernels_avx512_bf16, kernels_neon;

// Runs run(job, chunk, thread) for every chunk in [0, chunks), on the calling thread (number 0) and on idle threads of
// the pool (numbers below `threads`); returns when all chunks are done. Which thread gets which chunk is not fixed.
typedef void (*Run)(void* job, int64_t chunk, int thread);
extern "C" void puna_parallel(int64_t chunks, int threads, Run run, void* job);

// How many threads a region started now would have, the caller included.
extern "C" int puna_threads();

// At least `bytes` of scratch memory aligned to 64, the calling thread's own, valid until its next call of this
// function. Throws std::bad_alloc.
extern "C" void* puna_scratch(size_t bytes);
