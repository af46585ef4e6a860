// models/decoder.py, and the text of models/llama4.py, as one call: the same ops in the same order on the same shapes, so
// the same bits, without Python between them.
//
// What it is not: a second definition of any op. It sequences the table of the chosen instruction set (kernels.h) and
// adds; no flags of an instruction set here. A test compares it bit by bit with those files' `forward`.
//
// What is surprising: the last layer writes the keys and values of all tokens, and computes all else only for the rows of
// each sequence from the first wanted one to the last: of a prefill of 16 layers that saves nearly a sixteenth. Such a
// row then goes through products of few rows, whose sums may differ in the last bit.
#include "forward.h"

#include <string.h>

#include <initializer_list>
#include <vector>

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

Mixture mixture_of(const DecoderLayer& layer) {
    return {layer.experts.data(), nullptr, static_cast<int64_t>(layer.experts.size()), layer.shared};
}

// Where everything lies in the scratch, in floats. The feed-forward overlays what attention needed.
struct Plan {
    int64_t x, h, cos, sin, q, k, v, heads, gate, up, y, router, ids, scores, mixture, total;

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
        end = at > end ? at : end;
        at = overlaid;
        int64_t experts = 0, scratch = 0;
        for (const DecoderLayer& layer : m.layers) {
            if (layer.experts.empty()) continue;
            int64_t count = static_cast<int64_t>(layer.experts.size());
            int64_t needed = puna_experts_scratch(mixture_of(layer), tokens, tokens, m.dim);
            experts = count > experts ? count : experts;
            scratch = needed > scratch ? needed : scratch;
        }
        y = take(experts ? m.dim : 0);
        router = take(experts);
        ids = take(m.chosen);
        scores = take(m.chosen);
        mixture = at;
        at += padded(scratch);
        total = at > end ? at : end;
    }
};

// What the last layer computes: of each sequence the rows from the first wanted one to the last.
struct Kept {
    std::vector<int32_t> rows, positions, starts = {0}, wanted;  // `wanted`: as the call's, among these rows

    explicit Kept(const DecoderCall& call) {
        int64_t next = 0;
        for (int64_t b = 0; b < call.table.sequences; b++) {
            int32_t first = next < call.count ? call.wanted[next] : 0;
            for (; next < call.count && call.wanted[next] < call.table.starts[b + 1]; next++) {
                wanted.push_back(starts[b] + call.wanted[next] - first);
                for (int32_t row = first + (int32_t)rows.size() - starts[b]; row <= call.wanted[next]; row++) {
                    rows.push_back(row);
                    positions.push_back(call.table.positions[row]);
                }
            }
            starts.push_back((int32_t)rows.size());
        }
    }
};

}  // namespace

size_t puna_forward_scratch(const DecoderModel& model, const DecoderCall& call) {
    // The rows that are wanted are gathered behind the rest.
    int64_t tokens = call.table.starts[call.table.sequences];
    return static_cast<size_t>(Plan(model, tokens).total + 2 * padded(call.count * model.dim));
}

void puna_forward(const Kernels& kernels, const DecoderModel& m, const DecoderCall& call, float* scratch,
                  const std::function<void()>& between) {
    const int64_t D = m.D, half = D / 2, q_dim = m.heads * D, kv_dim = m.kv_heads * D;
    PageTable table = call.table, near = call.near;
    int64_t rows = table.starts[table.sequences];
    const int32_t *positions = table.positions, *wanted = call.wanted;
    Plan plan(m, rows);
    float *x = scratch + plan.x, *h = scratch + plan.h, *q = scratch + plan.q, *k = scratch + plan.k,
          *v = scratch + plan.v, *heads = scratch + plan.heads, *gate = scratch + plan.gate, *up = scratch + plan.up;
    float *picked = scratch + plan.total, *normed = call.hidden ? call.out : picked + padded(call.count * m.dim);

    kernels.embedding(m.embedding, m.dim, call.ids, rows, x);
    // The rows of rope's tables, in place where the tokens follow one another.
    const float *cos = call.cos + positions[0] * half, *sin = call.sin + positions[0] * half;
    bool following = true;
    for (int64_t i = 1; i < rows && following; i++) following = positions[i] == positions[0] + i;
    if (!following) {
        for (int64_t i = 0; i < rows; i++) {
            memcpy(scratch + plan.cos + i * half, call.cos + positions[i] * half, static_cast<size_t>(half) * 4);
            memcpy(scratch + plan.sin + i * half, call.sin + positions[i] * half, static_cast<size_t>(half) * 4);
        }
        cos = scratch + plan.cos;
        sin = scratch + plan.sin;
    }
    auto product = [](const DecoderLinear& of, int64_t out, float* to) { return Product{of.weight, out, of.bias, to}; };
    auto linear = [&](const float* from, int64_t in, std::initializer_list<Product> products) {
        kernels.linear(from, rows, in, products.begin(), static_cast<int>(products.size()));
    };
    Kept kept(call);
    for (size_t i = 0; i < m.layers.size(); i++) {
        between();
        const DecoderLayer& layer = m.layers[i];
        kernels.rms_norm(x, layer.attention_norm, rows, m.dim, m.eps, h);
        bool last = i + 1 == m.layers.size(), fewer = last && static_cast<int64_t>(kept.rows.size()) < rows;
        Product kv[] = {product(layer.k, kv_dim, k), product(layer.v, kv_dim, v)};
        if (fewer) linear(h, m.dim, {kv[0], kv[1]});
        else linear(h, m.dim, {product(layer.q, q_dim, q), kv[0], kv[1]});
        // Queries or keys [rows, heads, D], in place.
        auto turn = [&](float* of, int64_t count) {
            if (layer.turned) kernels.rope(of, cos, sin, rows, count, D, m.interleaved, of);
            if (layer.normed) kernels.rms_norm(of, {m.ones.data(), F32}, rows * count, D, m.eps, of);
        };
        turn(k, m.kv_heads);
        const PageTable& written = layer.chunk ? near : table;
        if (call.keys) kernels.write_kv(call.keys[i], call.values[i], k, v, written, m.kv_heads, D);
        if (last && call.count == 0) return;
        if (fewer) {
            rows = static_cast<int64_t>(kept.rows.size());
            for (int64_t to = 0; to < rows; to++) {
                int64_t from = kept.rows[to];  // never before `to`
                memmove(x + to * m.dim, x + from * m.dim, static_cast<size_t>(m.dim) * 4);
                memmove(h + to * m.dim, h + from * m.dim, static_cast<size_t>(m.dim) * 4);
                memmove(scratch + plan.cos + to * half, cos + from * half, static_cast<size_t>(half) * 4);
                memmove(scratch + plan.sin + to * half, sin + from * half, static_cast<size_t>(half) * 4);
            }
            cos = scratch + plan.cos;
            sin = scratch + plan.sin;
            table.positions = near.positions = kept.positions.data();
            table.starts = near.starts = kept.starts.data();
            wanted = kept.wanted.data();
            linear(h, m.dim, {product(layer.q, q_dim, q)});
        }
        turn(q, m.heads);
        if (layer.tempered)
            for (int64_t row = 0; row < rows; row++)
                if (float by = call.temperatures[fewer ? kept.rows[row] : row]; by != 1.0f)
                    for (int64_t d = 0; d < q_dim; d++) q[row * q_dim + d] *= by;
        const PageTable& seen = layer.chunk ? near : table;
        bool packed = layer.q.weight.type > BF16;  // see models/decoder.py
        Weights keys = {k, F32}, values = {v, F32};
        if (call.keys) keys = call.keys[i], values = call.values[i];
        kernels.attention(q, keys, values, seen, m.heads, m.kv_heads, D, packed, layer.chunk, heads);
        linear(heads, q_dim, {product(layer.o, m.dim, h)});
        add(x, h, rows * m.dim);
        kernels.rms_norm(x, layer.mlp_norm, rows, m.dim, m.eps, h);
        if (!layer.experts.empty()) {
            float *y = scratch + plan.y, *logits = scratch + plan.router, *scores = scratch + plan.scores;
            int32_t* ids = reinterpret_cast<int32_t*>(scratch + plan.ids);
            int64_t count = static_cast<int64_t>(layer.experts.size());
            linear(h, m.dim, {product({layer.router, {nullptr, F32}}, count, logits)});
            puna_route(kernels, logits, rows, count, m.chosen, ids, scores);
            puna_experts(kernels, mixture_of(layer), h, ids, scores, rows, m.chosen, rows, m.dim,
                         scratch + plan.mixture, y);
            add(x, y, rows * m.dim);
            continue;
        }
        linear(h, m.dim, {product(layer.gate, m.hidden, gate), product(layer.up, m.hidden, up)});
        kernels.swiglu(gate, up, rows * m.hidden, gate);
        linear(gate, m.hidden, {product(layer.down, m.dim, h)});
        add(x, h, rows * m.dim);
    }
    for (int64_t i = 0; i < call.count; i++)
        memcpy(picked + i * m.dim, x + wanted[i] * m.dim, static_cast<size_t>(m.dim) * 4);
    kernels.rms_norm(picked, m.norm, call.count, m.dim, m.eps, normed);
    if (call.hidden) return;
    rows = call.count;
    linear(normed, m.dim, {product({m.head, {nullptr, F32}}, m.vocabulary, call.out)});
}
