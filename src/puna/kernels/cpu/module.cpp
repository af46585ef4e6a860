// The Python module puna.kernels._cpu: its ops, each of which checks its arrays (checks.h) and calls the table of the
// chosen instruction set. packing.cpp and decoder.cpp add what is no op of that table.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "binding.h"
#include "checks.h"
#include "experts.h"
#include "kernels.h"
#include "memory.h"
#include "pool.h"
#include "tables.h"
#include "unlocked.h"

const Kernels* puna_active = &kernels_scalar;

namespace {

// ---- which table ----

// Index into puna_tables() of what serves calls from now on.
void use(int index) {
    std::vector<Table> all = puna_tables();
    if (index < 0 || index >= (int)all.size() || !all[index].runs) throw nb::value_error("no such table");
    puna_active = all[index].kernels;
}

nb::list list_tables() {
    nb::list out;
    for (const Table& table : puna_tables()) out.append(nb::make_tuple(table.name, table.runs, table.reason));
    return out;
}

void set_threads(int threads) {
    if (threads < 1 || threads > 1024) bad_value("threads must lie between 1 and 1024");
    puna_set_threads(threads);
}

// ---- ops ----

void embedding(const In& table, int type, int64_t rows, int64_t dim, const In& ids, const Out& out) {
    Weights w = matrix(table, type, rows, dim, "embedding: table");
    const int32_t* id = checked<const int32_t>(ids, "embedding: ids");
    float* to = checked<float>(out, "embedding: out");
    int64_t count = ids.size();
    like(out, "embedding: out", ids, "ids", ids.ndim());
    if ((int64_t)out.size() != count * dim) bad_value("embedding: out has the wrong shape");
    for (int64_t i = 0; i < count; i++)
        if (id[i] < 0 || id[i] >= rows)
            bad_value("embedding: id " + std::to_string(id[i]) + " is not in a table of " + std::to_string(rows) + " rows");
    Unlocked unlocked(count * dim * PER_NUMBER);
    puna_active->embedding(w, dim, id, count, to);
}

void rms_norm(const In& x, const In& weight, bool bf16, float eps, const Out& out) {
    const float* from = checked<const float>(x, "rms_norm: x");
    dims(x, "rms_norm: x", 1, 64);
    Weights w = weights(weight, bf16, "rms_norm: weight");
    size_t n = x.ndim();
    same_shape(weight, "rms_norm: weight", {(int64_t)x.shape(n - 1)});
    float* to = checked<float>(out, "rms_norm: out");
    like(out, "rms_norm: out", x, "x");
    if (x.size() == 0) return;
    Unlocked unlocked(x.size() * PER_NUMBER);
    puna_active->rms_norm(from, w, product(x, 0, n - 1), x.shape(n - 1), eps, to);
}

void linear(const In& x, const In& weight, int type, int64_t outs, int64_t in, const std::optional<In>& bias,
            bool bias_bf16, const Out& out) {
    const float* from = checked<const float>(x, "linear: x");
    dims(x, "linear: x", 1, 64);
    Weights w = matrix(weight, type, outs, in, "linear: weight"), b = {nullptr, F32};
    int64_t rows = product(x, 0, x.ndim() - 1);
    if ((int64_t)x.shape(x.ndim() - 1) != in)
        bad_value("linear: x " + shape_of(x) + " and weight [" + std::to_string(outs) + ", " + std::to_string(in) + "] do not fit");
    if (bias) {
        b = weights(*bias, bias_bf16, "linear: bias");
        same_shape(*bias, "linear: bias", {outs});
    }
    float* to = checked<float>(out, "linear: out");
    like(out, "linear: out", x, "x", x.ndim() - 1);
    if ((int64_t)out.size() != rows * outs) bad_value("linear: out has the wrong shape");
    if (out.size() == 0) return;
    if (in == 0) bad_value("linear: x has no columns");
    Unlocked unlocked(in * outs * rows);
    Product p = {w, outs, b, to};
    puna_active->linear(from, rows, in, &p, 1);
}

void rope(const In& x, const In& cos, const In& sin, bool interleaved, const Out& out) {
    const float* from = checked<const float>(x, "rope: x");
    dims(x, "rope: x", 3, 64);
    size_t n = x.ndim();
    if (x.shape(n - 1) % 2) bad_value("rope: the head size must be even: " + shape_of(x));
    const float *c = checked<const float>(cos, "rope: cos"), *s = checked<const float>(sin, "rope: sin");
    for (const In* table : {&cos, &sin}) {
        dims(*table, "rope: cos or sin", n - 1, n - 1);
        like(*table, "rope: cos or sin", x, "x", n - 2);
        if (table->shape(n - 2) * 2 != x.shape(n - 1))
            bad_value("rope: cos or sin " + shape_of(*table) + " and x " + shape_of(x) + " do not fit");
    }
    float* to = checked<float>(out, "rope: out");
    like(out, "rope: out", x, "x");
    if (x.size() == 0) return;
    Unlocked unlocked(x.size() * PER_NUMBER);
    puna_active->rope(from, c, s, product(x, 0, n - 2), x.shape(n - 2), x.shape(n - 1), interleaved, to);
}

void write_kv(const Out& cache_k, const Out& cache_v, int kind, const In& k, const In& v, const TableArrays& table) {
    std::vector<int64_t> shape, shape_v;
    Weights to_k = cache_of(cache_k, kind, "write_kv: cache_k", shape);
    Weights to_v = cache_of(cache_v, kind, "write_kv: cache_v", shape_v);
    const float *from_k = checked<const float>(k, "write_kv: k"), *from_v = checked<const float>(v, "write_kv: v");
    dims(k, "write_kv: k", 3, 3);
    int64_t tokens = k.shape(0), G = k.shape(1), D = k.shape(2);
    same_shape(v, "write_kv: v", {tokens, G, D});
    if (shape != std::vector<int64_t>{shape[0], shape[1], G, D} || shape_v != shape)
        bad_value("write_kv: caches " + numbers(shape) + " and " + numbers(shape_v) + " and k " + shape_of(k) + " do not fit");
    PageTable where = checked_table(table, "write_kv: ", tokens, shape[0], shape[1], 1);
    if (k.size() == 0) return;
    Unlocked unlocked(k.size() * 2 * PER_NUMBER);
    puna_active->write_kv(to_k, to_v, from_k, from_v, where, G, D);
}

void attention(const In& q, const In& k, const In& v, int kind, const std::optional<TableArrays>& table, bool bf16,
               int64_t chunk, const Out& out) {
    const float* from = checked<const float>(q, "attention: q");
    std::vector<int64_t> shape, shape_v;
    Weights keys = cache_of(k, kind, "attention: k", shape), values = cache_of(v, kind, "attention: v", shape_v);
    size_t n = table ? 3 : 4;
    dims(q, "attention: q", n, n);
    int64_t H = q.shape(n - 2), D = q.shape(n - 1), G = shape[2], tokens = product(q, 0, n - 2);
    bool fit = shape[3] == D && shape_v == shape;
    if (!table) fit = fit && shape[0] == (int64_t)q.shape(0) && shape[1] == (int64_t)q.shape(1);
    if (!fit)
        bad_value("attention: q " + shape_of(q) + ", k " + numbers(shape) + " and v " + numbers(shape_v) + " do not fit");
    if (G == 0 || H % G)
        bad_value("attention: " + std::to_string(H) + " query heads do not divide among " + std::to_string(G) + " key/value heads");
    if (chunk < 0 || chunk % LEAST_PAGE)
        bad_value("attention: a chunk of " + std::to_string(chunk) + " is no multiple of " + std::to_string(LEAST_PAGE));
    float* to = checked<float>(out, "attention: out");
    like(out, "attention: out", q, "q");
    if (q.size() == 0) return;
    PageTable where;
    int64_t work = 0;
    std::vector<int32_t> positions, starts, pages;  // without a table: one page each
    if (table) {
        where = checked_table(*table, "attention: ", tokens, shape[0], shape[1], chunk);
        for (int64_t i = 0; i < tokens; i++) work += (chunk ? where.positions[i] % chunk : where.positions[i]) + 1;
    } else {
        int64_t T = shape[1];
        work = tokens * (chunk && chunk < T ? chunk : T);
        for (int64_t i = 0; i < tokens; i++) positions.push_back((int32_t)(i % T));
        for (int64_t b = 0; b <= shape[0]; b++) starts.push_back((int32_t)(b * T)), pages.push_back((int32_t)b);
        where = {positions.data(), starts.data(), pages.data(), shape[0], 1, T};
    }
    Unlocked unlocked(work * H * D);
    puna_active->attention(from, keys, values, where, H, G, D, bf16, chunk, to);
}

void swiglu(const In& gate, const In& up, const Out& out) {
    const float *g = checked<const float>(gate, "swiglu: gate"), *u = checked<const float>(up, "swiglu: up");
    float* to = checked<float>(out, "swiglu: out");
    like(up, "swiglu: up", gate, "gate");
    like(out, "swiglu: out", gate, "gate");
    if (gate.size() == 0) return;
    Unlocked unlocked(gate.size() * PER_NUMBER);
    puna_active->swiglu(g, u, gate.size(), to);
}

void argmax(const In& logits, const Out& out) {
    const float* x = checked<const float>(logits, "argmax: logits");
    dims(logits, "argmax: logits", 1, 64);
    size_t n = logits.ndim();
    int64_t rows = product(logits, 0, n - 1), vocabulary = logits.shape(n - 1);
    if (vocabulary == 0) bad_value("argmax: no logits to choose from");
    int32_t* to = checked<int32_t>(out, "argmax: out");
    if ((int64_t)out.size() != rows) bad_value("argmax: out has the wrong shape");
    Unlocked unlocked(logits.size() * PER_NUMBER);
    puna_active->argmax(x, rows, vocabulary, to);
}

// What `top_k` is given, checked.
struct Chosen {
    const float* logits;
    int64_t rows, vocabulary, k;
    int32_t* ids;
    float* values;
};

Chosen chosen_of(const In& logits, const Out& ids, const Out& values) {
    Chosen c;
    c.logits = checked<const float>(logits, "top_k: logits");
    dims(logits, "top_k: logits", 1, 64);
    dims(ids, "top_k: ids", logits.ndim(), logits.ndim());
    size_t n = logits.ndim();
    c.rows = product(logits, 0, n - 1), c.vocabulary = logits.shape(n - 1), c.k = ids.shape(n - 1);
    if (c.k < 1 || c.k > c.vocabulary)
        bad_value("top_k: k = " + std::to_string(c.k) + " is not between 1 and the vocabulary of " + std::to_string(c.vocabulary));
    c.ids = checked<int32_t>(ids, "top_k: ids");
    c.values = checked<float>(values, "top_k: values");
    like(ids, "top_k: ids", logits, "logits", n - 1);
    like(values, "top_k: values", ids, "ids");
    return c;
}

void top_k(const In& logits, const Out& ids, const Out& values) {
    Chosen c = chosen_of(logits, ids, values);
    Unlocked unlocked(logits.size() * PER_NUMBER);
    puna_active->top_k(c.logits, c.rows, c.vocabulary, c.k, c.ids, c.values);
}

// The k largest of each row, and sigmoid of those.
void route(const In& logits, const Out& ids, const Out& scores) {
    Chosen c = chosen_of(logits, ids, scores);
    Unlocked unlocked(logits.size() * PER_NUMBER);
    puna_route(*puna_active, c.logits, c.rows, c.vocabulary, c.k, c.ids, c.values);
}

// A matrix as Python hands it over: its array, type, rows and columns.
using MatrixOf = std::tuple<In, int, int64_t, int64_t>;

Gated gated(const std::tuple<MatrixOf, MatrixOf, MatrixOf>& of, int64_t dim) {
    auto checked_matrix = [](const MatrixOf& m) {
        return matrix(std::get<0>(m), std::get<1>(m), std::get<2>(m), std::get<3>(m), "experts: weight");
    };
    const auto& [gate, up, down] = of;
    int64_t hidden = std::get<2>(gate);
    if (std::get<3>(gate) != dim || std::get<2>(up) != hidden || std::get<3>(up) != dim || std::get<2>(down) != dim ||
        std::get<3>(down) != hidden || hidden < 1)
        bad_value("experts: the three matrices of one, and x of " + std::to_string(dim) + " columns, do not fit");
    return {checked_matrix(gate), checked_matrix(up), checked_matrix(down), hidden};
}

// `puna_experts` of x [rows, dim], with a part for each of the ids `used`.
void experts(const In& x, const In& chosen, const In& scores, const std::vector<int32_t>& used,
             const std::vector<std::tuple<MatrixOf, MatrixOf, MatrixOf>>& parts,
             const std::tuple<MatrixOf, MatrixOf, MatrixOf>& shared, const Out& out) {
    const float *from = checked<const float>(x, "experts: x"), *score = checked<const float>(scores, "experts: scores");
    const int32_t* ids = checked<const int32_t>(chosen, "experts: chosen");
    dims(x, "experts: x", 2, 2);
    dims(chosen, "experts: chosen", 2, 2);
    like(scores, "experts: scores", chosen, "chosen");
    float* to = checked<float>(out, "experts: out");
    like(out, "experts: out", x, "x");
    int64_t rows = x.shape(0), dim = x.shape(1), k = chosen.shape(1);
    same_shape(chosen, "experts: chosen", {rows, k});
    if (parts.size() != used.size()) bad_value("experts: as many parts as experts are used must be given");
    if (out.size() == 0) return;
    std::vector<Gated> each;
    int64_t most = 0, found = 0, work = 0;
    for (size_t e = 0; e < used.size(); e++) {
        each.push_back(gated(parts[e], dim));
        int64_t count = 0;
        for (int64_t i = 0; i < rows * k; i++) count += ids[i] == used[e];
        most = count > most ? count : most;
        found += count;
        work += count * each[e].hidden;
    }
    if (found != rows * k) bad_value("experts: each id chosen must be among those used, once");
    Mixture mixture = {each.data(), used.data(), (int64_t)used.size(), gated(shared, dim)};
    Unlocked unlocked((work + rows * mixture.shared.hidden) * dim * 3);
    std::unique_ptr<float[]> scratch(new float[(size_t)puna_experts_scratch(mixture, rows, most, dim)]);
    puna_experts(*puna_active, mixture, from, ids, score, rows, k, most, dim, scratch.get(), to);
}

// Rows of logits that lie anywhere, all of one length.
std::vector<const float*> logit_rows(const std::vector<In>& rows, const char* name) {
    if (rows.empty()) bad_value(std::string(name) + ": no rows");
    std::vector<const float*> out;
    for (const In& row : rows) {
        out.push_back(checked<const float>(row, name));
        dims(row, name, 1, 1);
        like(row, name, rows[0], name, 1);
    }
    return out;
}

void shortlist(const std::vector<In>& rows, const In& scales, const Out& ids, const Out& values, const Out& sums) {
    std::vector<const float*> from = logit_rows(rows, "shortlist: rows");
    const float* by = checked<const float>(scales, "shortlist: scales");
    int32_t* to_ids = checked<int32_t>(ids, "shortlist: ids");
    float* to_values = checked<float>(values, "shortlist: values");
    float* to_sums = checked<float>(sums, "shortlist: sums");
    int64_t count = (int64_t)rows.size(), vocabulary = rows[0].shape(0), parts = (vocabulary + SUM_PART - 1) / SUM_PART;
    dims(ids, "shortlist: ids", 2, 2);
    dims(values, "shortlist: values", 2, 2);
    dims(sums, "shortlist: sums", 2, 2);
    int64_t k = ids.shape(1);
    if (k < 1 || k > vocabulary)
        bad_value("shortlist: k = " + std::to_string(k) + " is not between 1 and the vocabulary of " + std::to_string(vocabulary));
    if (scales.ndim() != 1 || (int64_t)scales.shape(0) != count) bad_value("shortlist: scales has the wrong shape");
    if ((int64_t)ids.shape(0) != count) bad_value("shortlist: ids has the wrong shape");
    like(values, "shortlist: values", ids, "ids", 2);
    if ((int64_t)sums.shape(0) != count || (int64_t)sums.shape(1) != parts) bad_value("shortlist: sums has the wrong shape");
    Unlocked unlocked(count * vocabulary * PER_NUMBER);
    puna_active->shortlist(from.data(), count, vocabulary, by, k, to_ids, to_values, to_sums);
}

void above(const std::vector<In>& rows, const In& scales, const In& tops, const In& bounds, const Out& sums) {
    std::vector<const float*> from = logit_rows(rows, "above: rows");
    int64_t count = (int64_t)rows.size(), vocabulary = rows[0].shape(0), parts = (vocabulary + SUM_PART - 1) / SUM_PART;
    const float *by = checked<const float>(scales, "above: scales"), *most = checked<const float>(tops, "above: tops");
    const float* least = checked<const float>(bounds, "above: bounds");
    for (const In* each : {&scales, &tops, &bounds})
        if (each->ndim() != 1 || (int64_t)each->shape(0) != count) bad_value("above: one scale, top and bound a row");
    float* to = checked<float>(sums, "above: sums");
    dims(sums, "above: sums", 2, 2);
    if ((int64_t)sums.shape(0) != count || (int64_t)sums.shape(1) != parts) bad_value("above: sums has the wrong shape");
    Unlocked unlocked(count * vocabulary * PER_NUMBER);
    puna_active->above(from.data(), count, vocabulary, by, most, least, to);
}

void allowed(const std::vector<In>& rows, const std::vector<In>& masks, const Out& out) {
    std::vector<const float*> from = logit_rows(rows, "allowed: rows");
    int64_t count = (int64_t)rows.size(), vocabulary = rows[0].shape(0);
    if ((int64_t)masks.size() != count) bad_value("allowed: not as many masks as rows");
    std::vector<const uint32_t*> bits;
    for (const In& mask : masks) {
        if (!(mask.dtype() == nb::dtype<uint32_t>())) bad_type("allowed: masks", "uint32", mask.dtype());
        contiguous(mask, "allowed: masks");
        if ((uintptr_t)mask.data() % alignof(uint32_t)) bad_value("allowed: masks must be aligned to their numbers");
        if (mask.ndim() != 1 || (int64_t)mask.shape(0) != (vocabulary + 31) / 32)
            bad_value("allowed: a mask of the vocabulary of " + std::to_string(vocabulary) + " is [" +
                      std::to_string((vocabulary + 31) / 32) + "], not " + shape_of(mask));
        bits.push_back((const uint32_t*)mask.data());
    }
    float* to = checked<float>(out, "allowed: out");
    dims(out, "allowed: out", 2, 2);
    if ((int64_t)out.shape(0) != count || (int64_t)out.shape(1) != vocabulary) bad_value("allowed: out has the wrong shape");
    Unlocked unlocked(count * vocabulary * PER_NUMBER);
    puna_active->allowed(from.data(), bits.data(), count, vocabulary, to);
}

// Reads all of `data`, for whoever times it.
void probe_read(const In& data) {
    const float* from = checked<const float>(data, "probe_read: data");
    Unlocked unlocked(data.size() * PER_NUMBER);
    puna_active->probe(PROBE_READ, from, data.size() * sizeof(float));
}

// How many products `pieces` equal pieces of work are; 0 where the instruction set has none of that kind.
int64_t probe_products(const std::string& kind, int64_t pieces) {
    int what = kind == "fp32" ? PROBE_FP32 : kind == "bf16" ? PROBE_BF16 : kind == "int8" ? PROBE_INT8 : -1;
    if (what < 0) bad_value("probe_products: no kind " + kind);
    if (pieces < 1 || pieces > 1 << 20) bad_value("probe_products: pieces must lie between 1 and 2^20");
    Unlocked unlocked(pieces << 20);
    return puna_active->probe(what, nullptr, pieces);
}

}  // namespace

NB_MODULE(_cpu, m) {
    using nb::arg;
    m.doc() = "The ops of puna.kernels.reference for NumPy arrays; see puna.kernels.cpu for the checked interface.";
    nb::module_::import_("atexit").attr("register")(nb::cpp_function(&Unlocked::end));
    m.def("tables", list_tables);
    m.def("use", use);
    m.def("keep_freed_memory", keep_freed_memory);
    m.def("set_threads", set_threads);
    m.def("threads", puna_wanted_threads);
    m.def("set_invariant", puna_set_invariant);
    m.def("embedding", embedding, arg().noconvert(), arg(), arg(), arg(), arg().noconvert(), arg().noconvert());
    m.def("rms_norm", rms_norm, arg().noconvert(), arg().noconvert(), arg(), arg(), arg().noconvert());
    m.def("linear", linear, arg().noconvert(), arg().noconvert(), arg(), arg(), arg(), arg().noconvert().none(), arg(),
          arg().noconvert());
    m.def("rope", rope, arg().noconvert(), arg().noconvert(), arg().noconvert(), arg(), arg().noconvert());
    m.def("write_kv", write_kv, arg().noconvert(), arg().noconvert(), arg(), arg().noconvert(), arg().noconvert(),
          arg().noconvert());
    m.def("attention", attention, arg().noconvert(), arg().noconvert(), arg().noconvert(), arg(),
          arg().noconvert().none(), arg(), arg(), arg().noconvert());
    m.def("swiglu", swiglu, arg().noconvert(), arg().noconvert(), arg().noconvert());
    m.def("argmax", argmax, arg().noconvert(), arg().noconvert());
    m.def("top_k", top_k, arg().noconvert(), arg().noconvert(), arg().noconvert());
    m.def("route", route, arg().noconvert(), arg().noconvert(), arg().noconvert());
    m.def("experts", experts, arg().noconvert(), arg().noconvert(), arg().noconvert(), arg().noconvert(),
          arg().noconvert(), arg().noconvert(), arg().noconvert());
    m.def("shortlist", shortlist);
    m.def("above", above);
    m.def("allowed", allowed);
    m.def("probe_read", probe_read, arg().noconvert());
    m.def("probe_products", probe_products);
    puna_bind_packing(m);
    puna_bind_decoder(m);
    nb::set_leak_warnings(false);  // a model that a module still holds at exit is no leak
}
