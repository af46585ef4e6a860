// models/decoder.py as one call: the same ops in the same order on the same shapes, so the same bits, without Python
// between them.
//
// What it is not: a second definition of any op. It sequences the table of the chosen instruction set (kernels.h) and
// adds; no flags of an instruction set here. A test compares it bit by bit with `decoder.forward`.
//
// What is surprising: where logits are asked for the last token of each sequence only, the last layer writes the keys
// and values of all tokens and computes all else for those few: of a prefill of 16 layers that saves nearly a
// sixteenth. Such a row then goes through products of few rows, whose sums may differ in the last bit.
#include "forward.h"

#include <string.h>

#include <initializer_list>

namespace {

constexpr int64_t ADD_CHUNK = 16 << 10;  // numbers, about 10 µs

struct AddJob {
    float* x;
    const float* y;
    int64_t count;
};

void add_chunk(void* data, int64_t chunk, int) {
    const AddJob& job = *static_cast<const AddJob*>(data);
    int64_t first = chunk * ADD_CHUNK, last = first + ADD_CHUNK < job.count ? first + ADD_CHUNK : job.count;
    float* __restrict x = job.x;
    const float* __restrict y = job.y;
    for (int64_t i = first; i < last; i++) x[i] += y[i];
}

// x += y
void add(float* x, const float* y, int64_t count) {
    AddJob job = {x, y, count};
    int64_t chunks = (count + ADD_CHUNK - 1) / ADD_CHUNK;
    if (chunks == 1) add_chunk(&job, 0, 0);
    else puna_parallel(chunks, puna_threads(), add_chunk, &job);
}

int64_t padded(int64_t floats) { return (floats + 15) / 16 * 16; }

// Where everything lies in the scratch, in floats. The feed-forward overlays what attention needed.
struct Plan {
    int64_t x, h, cos, sin, q, k, v, heads, gate, up, total;

    Plan(const DecoderModel& m, int64_t tokens) {
        int64_t at = 0;
        auto take = [&](int64_t floats) {
            int64_t from = at;
            at += padded(tokens * floats);
            return from;
        };
        x = take(m.dim);
        h = take(m.dim);
        cos = take(m.D / 2);
        sin = take(m.D / 2);
        int64_t overlaid = at;
        q = take(m.heads * m.D);
        k = take(m.kv_heads * m.D);
        v = take(m.kv_heads * m.D);
        heads = take(m.heads * m.D);
        int64_t end = at;
        at = overlaid;
        gate = take(m.hidden);
        up = take(m.hidden);
        total = at > end ? at : end;
    }
};

}  // namespace

size_t puna_forward_scratch(const DecoderModel& model, const DecoderCall& call) {
    // The rows whose logits are asked for are gathered, with their positions, behind the rest.
    return static_cast<size_t>(Plan(model, call.B * call.T).total + 2 * padded(call.count * model.dim) +
                               padded(call.count));
}

void puna_forward(const Kernels& kernels, const DecoderModel& m, const DecoderCall& call, float* scratch,
                  const std::function<void()>& between) {
    const int64_t B = call.B, D = m.D, half = D / 2, q_dim = m.heads * D, kv_dim = m.kv_heads * D;
    int64_t T = call.T, rows = B * T;
    const int32_t* positions = call.positions;
    Plan plan(m, rows);
    float *x = scratch + plan.x, *h = scratch + plan.h, *q = scratch + plan.q, *k = scratch + plan.k,
          *v = scratch + plan.v, *heads = scratch + plan.heads, *gate = scratch + plan.gate, *up = scratch + plan.up;
    float *picked = scratch + plan.total, *normed = picked + padded(call.count * m.dim);
    int32_t* picked_positions = reinterpret_cast<int32_t*>(normed + padded(call.count * m.dim));

    kernels.embedding(m.embedding, m.dim, call.ids, rows, x);
    // The rows of rope's tables, in place where the tokens follow one another.
    const float *cos = call.cos + (positions[0] + 1) * half, *sin = call.sin + (positions[0] + 1) * half;
    bool following = true;
    for (int64_t i = 1; i < rows && following; i++) following = positions[i] == positions[0] + i;
    if (!following) {
        for (int64_t i = 0; i < rows; i++) {
            memcpy(scratch + plan.cos + i * half, call.cos + (positions[i] + 1) * half, static_cast<size_t>(half) * 4);
            memcpy(scratch + plan.sin + i * half, call.sin + (positions[i] + 1) * half, static_cast<size_t>(half) * 4);
        }
        cos = scratch + plan.cos;
        sin = scratch + plan.sin;
    }
    auto product = [](const DecoderLinear& of, int64_t out, float* to) { return Product{of.weight, out, of.bias, to}; };
    auto linear = [&](const float* from, int64_t in, std::initializer_list<Product> products) {
        kernels.linear(from, rows, in, products.begin(), static_cast<int>(products.size()));
    };
    for (size_t i = 0; i < m.layers.size(); i++) {
        between();
        const DecoderLayer& layer = m.layers[i];
        kernels.rms_norm(x, layer.attention_norm, rows, m.dim, m.eps, h);
        bool last = i + 1 == m.layers.size(), only_cache = last && call.count == 0;
        // Here and below: only the last token of each sequence matters once the caches are written.
        bool only_ends = last && !call.rows && T > 1 && call.keys;
        Product kv[] = {product(layer.k, kv_dim, k), product(layer.v, kv_dim, v)};
        if (only_cache || only_ends) linear(h, m.dim, {kv[0], kv[1]});
        else linear(h, m.dim, {product(layer.q, q_dim, q), kv[0], kv[1]});
        kernels.rope(k, cos, sin, rows, m.kv_heads, D, m.interleaved, k);
        if (call.keys) kernels.write_kv(call.keys[i], call.values[i], k, v, positions, B, T, call.S, m.kv_heads, D);
        if (only_cache) return;
        if (only_ends) {
            for (int64_t b = 0; b < B; b++) {
                int64_t end = b * T + T - 1;
                picked_positions[b] = positions[end];
                memcpy(x + b * m.dim, x + end * m.dim, static_cast<size_t>(m.dim) * 4);
                memcpy(h + b * m.dim, h + end * m.dim, static_cast<size_t>(m.dim) * 4);
                memcpy(scratch + plan.cos + b * half, cos + end * half, static_cast<size_t>(half) * 4);
                memcpy(scratch + plan.sin + b * half, sin + end * half, static_cast<size_t>(half) * 4);
            }
            positions = picked_positions;
            cos = scratch + plan.cos;
            sin = scratch + plan.sin;
            T = 1;
            rows = B;
            linear(h, m.dim, {product(layer.q, q_dim, q)});
        }
        kernels.rope(q, cos, sin, rows, m.heads, D, m.interleaved, q);
        bool packed = layer.q.weight.type > BF16;  // see models/decoder.py
        if (call.keys)
            kernels.attention(q, call.keys[i], call.values[i], positions, B, T, call.S, m.heads, m.kv_heads, D, packed, heads);
        else kernels.attention(q, {k, F32}, {v, F32}, nullptr, B, T, T, m.heads, m.kv_heads, D, packed, heads);
        linear(heads, q_dim, {product(layer.o, m.dim, h)});
        add(x, h, rows * m.dim);
        kernels.rms_norm(x, layer.mlp_norm, rows, m.dim, m.eps, h);
        linear(h, m.dim, {product(layer.gate, m.hidden, gate), product(layer.up, m.hidden, up)});
        kernels.swiglu(gate, up, rows * m.hidden, gate);
        linear(gate, m.hidden, {product(layer.down, m.dim, h)});
        add(x, h, rows * m.dim);
    }
    for (int64_t i = 0; i < call.count; i++) {
        int64_t row = call.rows ? call.rows[i] : i * T + T - 1;
        memcpy(picked + i * m.dim, x + row * m.dim, static_cast<size_t>(m.dim) * 4);
    }
    kernels.rms_norm(picked, m.norm, call.count, m.dim, m.eps, normed);
    rows = call.count;
    linear(normed, m.dim, {product({m.head, {nullptr, F32}}, m.vocabulary, call.logits)});
}
