// A whole forward of the dense decoder over one table of kernels: what it is given, checked by decoder.cpp.
#pragma once

#include <functional>
#include <vector>

#include "kernels.h"

struct DecoderLinear {
    Weights weight, bias;
};

struct DecoderLayer {
    Weights attention_norm, mlp_norm;
    DecoderLinear q, k, v, o, gate, up, down;
};

struct DecoderModel {
    int64_t vocabulary, dim, heads, kv_heads, D, hidden;
    float eps;
    bool interleaved;
    Weights embedding, norm, head;
    std::vector<DecoderLayer> layers;
};

struct DecoderCall {
    const int32_t* ids;            // [tokens], checked
    PageTable table;               // where they stand, checked; without a cache one sequence from 0, in one page
    const float *cos, *sin;        // row p is position p
    const Weights *keys, *values;  // a layer each, [pages, page, G, D]; null: no cache
    const int32_t* wanted;         // rows of the tokens, ascending
    int64_t count;                 // how many they are
    bool hidden;                   // what is wanted of them: hidden states, not logits
    float* out;                    // [count, dim or vocabulary]
};

// How many floats of scratch the call needs, and the call. `between` is called from time to time, without the pool or
// a lock held; what it throws ends the call.
size_t puna_forward_scratch(const DecoderModel& model, const DecoderCall& call);
void puna_forward(const Kernels& kernels, const DecoderModel& model, const DecoderCall& call, float* scratch,
                  const std::function<void()>& between);
