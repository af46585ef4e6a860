// A whole forward of a decoder over one table of kernels: what it is given, checked by decoder.cpp.
#pragma once

#include <functional>
#include <vector>

#include "experts.h"
#include "kernels.h"

struct DecoderLinear {
    Weights weight, bias;
};

struct DecoderLayer {
    Weights attention_norm, mlp_norm;
    DecoderLinear q, k, v, o;
    DecoderLinear gate, up, down;  // of a dense layer
    Weights router;                // [experts, dim], and the two below: of a mixture
    std::vector<Gated> experts;
    Gated shared;
    int64_t chunk = 0;  // of what it sees; 0: everything
    // Queries and keys by rope and then by a norm, and queries by their temperature.
    bool turned = true, normed = false, tempered = false;
};

struct DecoderModel {
    int64_t vocabulary, dim, heads, kv_heads, D, hidden;
    float eps;
    bool interleaved;
    int64_t chosen = 0;       // experts a token
    std::vector<float> ones;  // [D]: the weights of the norm of queries and keys
    Weights embedding, norm, head;
    std::vector<DecoderLayer> layers;
};

struct DecoderCall {
    const int32_t* ids;            // [tokens], checked
    PageTable table;               // where they stand, checked; without a cache one sequence from 0, in one page
    PageTable near;                // of layers with a chunk: the same, but for their own pages where they have some
    const float* temperatures;     // [tokens], of layers that are tempered
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
