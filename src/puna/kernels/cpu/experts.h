// A mixture's feed-forward over one table of kernels: who of `experts` each row goes to, and what they give.
//
// What it is not: checks (module.cpp and decoder.cpp make them), or an op of its own: it sequences `top_k`, `linear` and
// `swiglu`.
#pragma once

#include <cstdint>

#include "kernels.h"

// gate and up [hidden, dim], down [dim, hidden].
struct Gated {
    Weights gate, up, down;
    int64_t hidden;
};

// The k largest of each row of logits [rows, count], and sigmoid of those: both [rows, k].
void puna_route(const Kernels& kernels, const float* logits, int64_t rows, int64_t count, int64_t k, int32_t* ids,
                float* scores);

struct Mixture {
    const Gated* experts;
    const int32_t* ids;  // of each of the experts, ascending; null: their numbers
    int64_t count;
    Gated shared;
};

// How many floats of scratch the call below takes, where no expert has more than `most` places of `chosen`.
int64_t puna_experts_scratch(const Mixture& mixture, int64_t rows, int64_t most, int64_t dim);

// out = SwiGLU of x [rows, dim] by the shared one, and for each place of `chosen` [rows, k] SwiGLU of score · x by that
// expert, added in the order of the experts. out is not x.
void puna_experts(const Kernels& kernels, const Mixture& mixture, const float* x, const int32_t* chosen,
                  const float* scores, int64_t rows, int64_t k, int64_t most, int64_t dim, float* scratch, float* out);
