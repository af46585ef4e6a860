// A whole forward of the dense decoder over one table of kernels: what it is given, checked by module.cpp.
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
    int64_t B, T;
    const int32_t *ids, *positions;  // [B, T], checked
    const float *cos, *sin;          // row p + 1 is position p: padding has a row too
    int64_t S;                       // positions of the cache
    const Weights *keys, *values;    // a layer each, [B, S, G, D]; null: no cache, positions 0 to T - 1
    const int32_t* rows;             // which of the B·T rows get logits; null: the last of each sequence
    int64_t count;                   // how many they are
    float* logits;                   // [count, vocabulary]
};

// How many floats of scratch the call needs, and the call. `between` is called from time to time, without the pool or
// a lock held; what it throws ends the call.
size_t puna_forward_scratch(const DecoderModel& model, const DecoderCall& call);
void puna_forward(const Kernels& kernels, const DecoderModel& model, const DecoderCall& call, float* scratch,
                  const std::function<void()>& between);
