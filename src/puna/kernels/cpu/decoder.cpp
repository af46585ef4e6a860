// The module's Decoder: the weights of a whole model, checked once, and a forward as one call (forward.h).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "binding.h"
#include "checks.h"
#include "forward.h"
#include "kernels.h"
#include "memory.h"
#include "unlocked.h"

namespace {

// A weight of the decoder: its array, type, rows and columns, as `matrix` takes them; a vector has one column.
using Leaf = std::tuple<In, int, int64_t, int64_t>;
using Leaves = std::vector<std::optional<Leaf>>;
// Of a layer: how many experts (0: dense), its chunk (0: none), rope, norm of queries and keys, temperature.
using Manner = std::tuple<int64_t, int64_t, bool, bool, bool>;

// Memory for activations.
class Buffer {
  public:
    explicit Buffer(size_t bytes) : data_(panel_memory(bytes)), bytes_(bytes) {}
    ~Buffer() { free_panel_memory(data_); }
    Buffer(const Buffer&) = delete;
    float* data() const { return static_cast<float*>(data_); }
    size_t bytes() const { return bytes_; }

  private:
    void* data_;
    size_t bytes_;
};

// The weights of a decoder, checked once; a call checks only what the call brings.
class Decoder {
  public:
    Decoder(int64_t heads, int64_t kv_heads, int64_t D, float eps, bool interleaved, const Leaf& embedding,
            const std::vector<Leaves>& layers, const std::vector<Manner>& manners, int64_t chosen, const Leaf& norm,
            const std::optional<Leaf>& head) {
        // Bounded, so that their products are what they seem.
        constexpr int64_t MOST = 1 << 20;
        if (heads < 1 || heads > MOST || kv_heads < 1 || heads % kv_heads || D < 2 || D > MOST || D % 2)
            bad_value("Decoder: " + std::to_string(heads) + " heads, " + std::to_string(kv_heads) +
                      " key/value heads, head size " + std::to_string(D));
        if (layers.empty() || layers.size() != manners.size()) bad_value("Decoder: a layer is not whole");
        m_.vocabulary = std::get<2>(embedding), m_.dim = std::get<3>(embedding);
        m_.hidden = 0, m_.chosen = chosen, m_.ones.assign(static_cast<size_t>(D), 1.0f);
        m_.heads = heads, m_.kv_heads = kv_heads, m_.D = D, m_.eps = eps, m_.interleaved = interleaved;
        if (m_.vocabulary < 1 || m_.dim < 1) bad_value("Decoder: a weight has no numbers");
        m_.embedding = held(embedding, {m_.vocabulary, m_.dim}, "embedding");
        m_.norm = held(norm, {m_.dim}, "norm");
        m_.head = head ? held(*head, {m_.vocabulary, m_.dim}, "head") : m_.embedding;
        parameters_ = (2 * heads + 2 * kv_heads) * D * m_.dim * static_cast<int64_t>(layers.size());
        for (size_t i = 0; i < layers.size(); i++) {
            std::string at = "layers." + std::to_string(i) + ".";
            const auto& [experts, chunk, turned, normed, tempered] = manners[i];
            if (experts < 0 || experts > MOST || layers[i].size() != (experts ? MIXED + 3 * static_cast<size_t>(experts) : PARTS))
                bad_value("Decoder: a layer is not whole");
            if (experts && (chosen < 1 || chosen > experts))
                bad_value("Decoder: " + std::to_string(chosen) + " of " + std::to_string(experts) + " experts");
            if (chunk < 0 || chunk % LEAST_PAGE)
                bad_value("Decoder: a chunk of " + std::to_string(chunk) + " is no multiple of " + std::to_string(LEAST_PAGE));
            size_t next = 0;
            auto vector = [&](const char* name) {
                const std::optional<Leaf>& leaf = layers[i][next++];
                if (!leaf) bad_value(at + name + " is missing");
                return held(*leaf, {m_.dim}, at + name);
            };
            auto linear = [&](const char* name, int64_t out, int64_t in) {
                const std::optional<Leaf>&weight = layers[i][next++], &bias = layers[i][next++];
                std::string whole = at + name;
                if (!weight) bad_value(whole + ".weight is missing");
                return DecoderLinear{held(*weight, {out, in}, whole + ".weight"),
                                     bias ? held(*bias, {out}, whole + ".bias") : Weights{nullptr, F32}};
            };
            DecoderLayer layer;
            layer.attention_norm = vector("attention_norm");
            layer.q = linear("q", heads * D, m_.dim);
            layer.k = linear("k", kv_heads * D, m_.dim);
            layer.v = linear("v", kv_heads * D, m_.dim);
            layer.o = linear("o", m_.dim, heads * D);
            layer.mlp_norm = vector("mlp_norm");
            layer.chunk = chunk, layer.turned = turned, layer.normed = normed, layer.tempered = tempered;
            auto width = [&] {  // the rows of the matrix that comes next
                if (!layers[i][next]) bad_value(at + "gate.weight is missing");
                int64_t rows = std::get<2>(*layers[i][next]);
                if (rows < 1) bad_value("Decoder: a weight has no numbers");
                return rows;
            };
            auto bare = [&](const std::string& name, int64_t out, int64_t in) {
                const std::optional<Leaf>& weight = layers[i][next++];
                if (!weight) bad_value(at + name + ".weight is missing");
                return held(*weight, {out, in}, at + name + ".weight");
            };
            auto gated = [&](const std::string& name) {
                Gated part;
                part.hidden = width();
                part.gate = bare(name + "gate", part.hidden, m_.dim);
                part.up = bare(name + "up", part.hidden, m_.dim);
                part.down = bare(name + "down", m_.dim, part.hidden);
                return part;
            };
            if (experts) {
                layer.router = bare("router", experts, m_.dim);
                layer.shared = gated("shared.");
                for (int64_t e = 0; e < experts; e++) layer.experts.push_back(gated("experts." + std::to_string(e) + "."));
                parameters_ += 3 * m_.dim * (layer.shared.hidden + chosen * layer.experts[0].hidden);
            } else {
                if (!m_.hidden) m_.hidden = width();
                layer.gate = linear("gate", m_.hidden, m_.dim);
                layer.up = linear("up", m_.hidden, m_.dim);
                layer.down = linear("down", m_.dim, m_.hidden);
                parameters_ += 3 * m_.hidden * m_.dim;
            }
            m_.layers.push_back(layer);
        }
    }
    ~Decoder() { delete spare_.load(); }
    Decoder(const Decoder&) = delete;

    // ids [N], which stand where `table` says; cos and sin [P, D/2], row p for position p; keys and values
    // [pages, page, G, D] a layer of the type `kind`; none of them, and no table: one sequence from 0. wanted [n] rows;
    // out [n, V], or with `hidden` [n, dim].
    // `near`: the table of layers with a chunk, where they have pages of their own. temperatures [N]: of layers that
    // are tempered.
    void run(const In& ids, const std::optional<TableArrays>& table, const std::optional<TableArrays>& near,
             const std::optional<In>& temperatures, const In& cos, const In& sin,
             const std::vector<Out>& keys, const std::vector<Out>& values, int kind, const In& wanted, bool hidden,
             const Out& out) {
        DecoderCall call;
        call.ids = checked<const int32_t>(ids, "ids");
        dims(ids, "ids", 1, 1);
        int64_t tokens = ids.shape(0), half = m_.D / 2;
        if (tokens == 0) bad_value("ids: no tokens");
        for (int64_t i = 0; i < tokens; i++)
            if (call.ids[i] < 0 || call.ids[i] >= m_.vocabulary)
                bad_value("ids: " + std::to_string(call.ids[i]) + " is not in a vocabulary of " + std::to_string(m_.vocabulary));
        size_t layers = m_.layers.size();
        std::vector<Weights> cache(2 * layers);
        if (keys.size() != values.size() || keys.size() != (table ? layers : 0))
            bad_value("keys and values: " + std::to_string(keys.size()) + " and " + std::to_string(values.size()) +
                      " arrays for " + std::to_string(layers) + " layers" + (table ? "" : " and no table"));
        std::vector<int32_t> following, one = {0, static_cast<int32_t>(tokens)};
        if (table) {
            // Layers with a chunk may have other pages than the rest, and another number of them.
            std::vector<int64_t> shape, of_rest, of_near;
            for (size_t i = 0; i < 2 * layers; i++) {
                const char* name = i < layers ? "keys" : "values";
                cache[i] = cache_of(i < layers ? keys[i] : values[i - layers], kind, name, shape);
                std::vector<int64_t>& first = near && m_.layers[i % layers].chunk ? of_near : of_rest;
                if (first.empty()) first = {shape[0], shape[1], m_.kv_heads, m_.D};
                if (shape != first)
                    bad_value(std::string(name) + " must have the shape " + numbers(first) + ", not " + numbers(shape));
            }
            // For every layer, whose chunk says which pages must be there; most have that of the one before.
            auto checked_for = [&](const TableArrays& arrays, const std::vector<int64_t>& of, bool other) {
                PageTable found = {};
                int64_t last = -1;
                for (const DecoderLayer& layer : m_.layers) {
                    if (other != (near && layer.chunk) || layer.chunk == last) continue;
                    last = layer.chunk;
                    found = checked_table(arrays, "", tokens, of[0], of[1], last);
                }
                return found;
            };
            if (!of_rest.empty()) call.table = checked_for(*table, of_rest, false);
            call.near = of_near.empty() ? call.table : checked_for(*near, of_near, true);
            if (of_rest.empty()) call.table = call.near;
        } else {
            for (int64_t i = 0; i < tokens; i++) following.push_back(static_cast<int32_t>(i));
            call.near = call.table = {following.data(), one.data(), one.data(), 1, 1, tokens};
        }
        call.temperatures = nullptr;
        if (temperatures) {
            call.temperatures = checked<const float>(*temperatures, "temperatures");
            same_shape(*temperatures, "temperatures", {tokens});
        }
        for (const DecoderLayer& layer : m_.layers)
            if (layer.tempered && !temperatures) bad_value("temperatures are missing");
        dims(cos, "cos", 2, 2);
        call.cos = checked<const float>(cos, "cos");
        call.sin = checked<const float>(sin, "sin");
        same_shape(cos, "cos", {(int64_t)cos.shape(0), half});
        same_shape(sin, "sin", {(int64_t)cos.shape(0), half});
        for (int64_t i = 0; i < tokens; i++)
            if (call.table.positions[i] >= (int64_t)cos.shape(0))
                bad_value("cos has no row for position " + std::to_string(call.table.positions[i]));
        call.keys = table ? cache.data() : nullptr;
        call.values = table ? cache.data() + layers : nullptr;
        call.wanted = checked<const int32_t>(wanted, "wanted");
        dims(wanted, "wanted", 1, 1);
        call.count = wanted.shape(0);
        for (int64_t i = 0; i < call.count; i++)
            if (call.wanted[i] < 0 || call.wanted[i] >= tokens || (i && call.wanted[i] <= call.wanted[i - 1]))
                bad_value("wanted: " + std::to_string(call.wanted[i]) + " is not one of " + std::to_string(tokens) +
                          " rows, or not above the one before");
        call.hidden = hidden;
        call.out = checked<float>(out, "out");
        same_shape(out, "out", {call.count, hidden ? m_.dim : m_.vocabulary});
        const Kernels& kernels = *puna_active;
        std::unique_ptr<Buffer> scratch(spare_.exchange(nullptr));
        size_t bytes = puna_forward_scratch(m_, call) * sizeof(float);
        if (!scratch || scratch->bytes() < bytes) {
            scratch.reset();
            scratch.reset(new Buffer(bytes));
        }
        {
            Unlocked unlocked(tokens * parameters_ + call.count * m_.vocabulary * m_.dim);
            auto asked = std::chrono::steady_clock::now();
            puna_forward(kernels, m_, call, scratch->data(), [&] {
                auto now = std::chrono::steady_clock::now();
                if (now - asked < std::chrono::milliseconds(100)) return;
                asked = now;
                unlocked.signals();
            });
        }
        if (scratch->bytes() <= KEPT) delete spare_.exchange(scratch.release());
    }

  private:
    // attention_norm, q, k, v, o (weight and bias each), mlp_norm, gate, up, down (the same): models/tree.py's order. Of
    // a mixture, after mlp_norm: the router, and gate, up and down of the shared one and of each expert, no biases.
    static constexpr size_t PARTS = 16, MIXED = 14;
    // What stays allocated between calls; a larger one (the logits of a whole long text) goes back.
    static constexpr size_t KEPT = size_t(256) << 20;

    Weights held(const Leaf& leaf, const std::vector<int64_t>& shape, const std::string& name) {
        const auto& [array, type, rows, columns] = leaf;
        arrays_.push_back(array);
        if (shape.size() == 1) {
            Weights w = weights(array, type == BF16, name.c_str());
            same_shape(array, name.c_str(), shape);
            return w;
        }
        Weights w = matrix(array, type, rows, columns, name.c_str());
        if (rows != shape[0] || columns != shape[1])
            bad_value(name + " must have the shape " + numbers(shape) + ", not " + numbers({rows, columns}));
        return w;
    }

    DecoderModel m_;
    int64_t parameters_;
    std::vector<In> arrays_;  // keeps their memory
    // Scratch of a call that is over. A call takes it away, so a second thread's call, or one in a process that was
    // forked meanwhile, makes its own: nobody waits.
    std::atomic<Buffer*> spare_{nullptr};
};

}  // namespace

void puna_bind_decoder(nb::module_& m) {
    using nb::arg;
    nb::class_<Decoder>(m, "Decoder")
        .def(nb::init<int64_t, int64_t, int64_t, float, bool, const Leaf&, const std::vector<Leaves>&,
                      const std::vector<Manner>&, int64_t, const Leaf&, const std::optional<Leaf>&>(),
             arg("heads"), arg("kv_heads"), arg("head_dim"), arg("eps"), arg("interleaved"), arg("embedding"),
             arg("layers"), arg("manners"), arg("chosen"), arg("norm"), arg("head").none())
        .def("run", &Decoder::run, arg("ids").noconvert(), arg("table").noconvert().none(),
             arg("near").noconvert().none(), arg("temperatures").noconvert().none(), arg("cos").noconvert(),
             arg("sin").noconvert(), arg("keys").noconvert(), arg("values").noconvert(), arg("kind"),
             arg("wanted").noconvert(), arg("hidden"), arg("out").noconvert());
}
