// The Python module puna.kernels._cpu: checks every array, then calls the table of the chosen instruction set.
//
// What is surprising: nothing is converted. nanobind would turn a float64 array into a float32 copy, and results
// written to such a copy would be lost; here every type, shape and stride is compared, and a mismatch is a TypeError or
// a ValueError before any memory is touched.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "forward.h"
#include "kernels.h"
#include "pool.h"
#include "tables.h"

namespace nb = nanobind;
using In = nb::ndarray<nb::ro, nb::device::cpu>;
using Out = nb::ndarray<nb::device::cpu>;

namespace {

const Kernels* active = &kernels_scalar;

// Index into puna_tables() of what serves calls from now on.
void use(int index) {
    std::vector<Table> all = puna_tables();
    if (index < 0 || index >= (int)all.size() || !all[index].runs) throw nb::value_error("no such table");
    active = all[index].kernels;
}

nb::list list_tables() {
    nb::list out;
    for (const Table& table : puna_tables()) out.append(nb::make_tuple(table.name, table.runs, table.reason));
    return out;
}

// ---- checks ----

std::string type_name(nb::dlpack::dtype type) {
    const char* code = "?";
    switch ((nb::dlpack::dtype_code)type.code) {
        case nb::dlpack::dtype_code::Int: code = "int"; break;
        case nb::dlpack::dtype_code::UInt: code = "uint"; break;
        case nb::dlpack::dtype_code::Float: code = "float"; break;
        case nb::dlpack::dtype_code::Bfloat: code = "bfloat"; break;
        case nb::dlpack::dtype_code::Complex: code = "complex"; break;
        case nb::dlpack::dtype_code::Bool: return "bool";
        default: break;
    }
    return code + std::to_string(type.bits);
}

std::string numbers(const std::vector<int64_t>& shape) {
    std::string out = "[";
    for (size_t i = 0; i < shape.size(); i++) out += (i ? ", " : "") + std::to_string(shape[i]);
    return out + "]";
}

template <typename A>
std::string shape_of(const A& a) {
    std::vector<int64_t> shape;
    for (size_t i = 0; i < a.ndim(); i++) shape.push_back((int64_t)a.shape(i));
    return numbers(shape);
}

[[noreturn]] void bad_type(const char* name, const char* needed, nb::dlpack::dtype type) {
    throw nb::type_error((std::string(name) + " must be " + needed + ", not " + type_name(type)).c_str());
}

[[noreturn]] void bad_value(const std::string& what) { throw nb::value_error(what.c_str()); }

template <typename A>
void contiguous(const A& a, const char* name) {
    if (a.size() == 0) return;
    int64_t step = 1;
    for (size_t i = a.ndim(); i-- > 0;) {
        if (a.shape(i) != 1 && a.stride(i) != step) bad_value(std::string(name) + " must be C-contiguous");
        step *= (int64_t)a.shape(i);
    }
}

template <typename T, typename A>
T* checked(const A& a, const char* name) {
    nb::dlpack::dtype type = a.dtype(), want = nb::dtype<std::remove_const_t<T>>();
    if (!(type == want)) bad_type(name, std::is_same_v<std::remove_const_t<T>, float> ? "float32" : "int32", type);
    contiguous(a, name);
    if ((uintptr_t)a.data() % alignof(T)) bad_value(std::string(name) + " must be aligned to its numbers");
    return (T*)a.data();
}

Weights weights(const In& a, bool bf16, const char* name) {
    nb::dlpack::dtype type = a.dtype();
    int kind;
    if (bf16 && type == nb::dtype<uint16_t>()) kind = BF16;
    else if (!bf16 && type == nb::dtype<float>()) kind = F32;
    else if (!bf16 && type.code == (uint8_t)nb::dlpack::dtype_code::Float && type.bits == 16 && type.lanes == 1) kind = F16;
    else bad_type(name, "float32, float16 or BF16", type);
    contiguous(a, name);
    return {a.data(), kind};
}

nb::dict packed_types() {
    nb::dict out;
    for (int type = BF16 + 1; type < WEIGHT_TYPES; type++) out[TYPE_NAMES[type]] = type;
    return out;
}

// The bytes of [rows, columns] in a packed type, `| PANELS` or not. ValueError where there is no such matrix.
int64_t packed_bytes(int type, int64_t rows, int64_t columns, const char* name) {
    int kind = type & ~PANELS;
    if (kind <= BF16 || kind >= WEIGHT_TYPES) bad_value(std::string(name) + ": no such type");
    if (rows < 0 || columns < 0 || rows > int64_t(1) << 31 || columns > int64_t(1) << 31 || columns % BLOCKS[kind].numbers)
        bad_value(std::string(name) + ": there is no matrix [" + std::to_string(rows) + ", " + std::to_string(columns) +
                  "] of type " + TYPE_NAMES[kind]);
    int64_t each = type & PANELS ? panel_bytes(kind, columns) : columns / BLOCKS[kind].numbers * BLOCKS[kind].bytes;
    int64_t bytes, count = type & PANELS ? (rows + PANEL_ROWS - 1) / PANEL_ROWS : rows;
    if (__builtin_mul_overflow(each, count, &bytes)) bad_value(std::string(name) + " is too large");
    return bytes;
}

// A matrix [rows, columns]: dense (`type` F32: as the array says; BF16) or packed.
Weights matrix(const In& a, int type, int64_t rows, int64_t columns, const char* name) {
    if (type == F32 || type == BF16) {
        Weights w = weights(a, type == BF16, name);
        if (a.ndim() != 2 || (int64_t)a.shape(0) != rows || (int64_t)a.shape(1) != columns)
            bad_value(std::string(name) + " " + shape_of(a) + " is not of the shape said");
        return w;
    }
    int64_t bytes = packed_bytes(type, rows, columns, name);
    if (!(a.dtype() == nb::dtype<uint8_t>())) bad_type(name, "uint8", a.dtype());
    contiguous(a, name);
    if ((int64_t)a.size() != bytes)
        bad_value(std::string(name) + " must have " + std::to_string(bytes) + " bytes, not " + std::to_string(a.size()));
    if (type & PANELS && (uintptr_t)a.data() % 64) bad_value(std::string(name) + ": panels must be aligned to 64 bytes");
    return {a.data(), type};
}

template <typename A>
void same_shape(const A& a, const char* name, const std::vector<int64_t>& shape) {
    bool same = a.ndim() == shape.size();
    for (size_t i = 0; same && i < shape.size(); i++) same = (int64_t)a.shape(i) == shape[i];
    if (!same) bad_value(std::string(name) + " must have the shape " + numbers(shape) + ", not " + shape_of(a));
}

template <typename A, typename C>
void like(const A& a, const char* name, const C& other, const char* other_name, size_t leading) {
    bool same = a.ndim() >= leading && other.ndim() >= leading;
    for (size_t i = 0; same && i < leading; i++) same = a.shape(i) == other.shape(i);
    if (!same)
        bad_value(std::string(name) + " " + shape_of(a) + " and " + other_name + " " + shape_of(other) + " do not fit");
}

template <typename A>
void dims(const A& a, const char* name, size_t least, size_t most) {
    if (a.ndim() < least || a.ndim() > most)
        bad_value(std::string(name) + " has the wrong number of dimensions: " + shape_of(a));
}

// The product of the dimensions from `first` to `last` exclusive.
template <typename A>
int64_t product(const A& a, size_t first, size_t last) {
    int64_t out = 1;
    for (size_t i = first; i < last; i++) out *= (int64_t)a.shape(i);
    return out;
}

// Lets other Python threads run during a call of some milliseconds (`work` in multiply-adds). Not during a shorter one:
// taking the lock back from a busy thread can cost several times an op of 0.1 ms, and between ops Python hands it over
// by itself every 5 ms.
//
// A daemon thread that asks for the lock when the interpreter has ended is unwound inside that call (before Python
// 3.14), which no C++ frame survives: the process would abort. From `end` on it sleeps instead, as 3.14 has it do.
class Unlocked {
  public:
    explicit Unlocked(int64_t work) {
        if (work > 1 << 24) state_ = PyEval_SaveThread();
    }
    ~Unlocked() { lock(); }
    Unlocked(const Unlocked&) = delete;

    // Raises what a signal's handler raises (KeyboardInterrupt), in the thread that handles signals.
    void signals() {
        bool released = state_ != nullptr;
        lock();
        if (PyErr_CheckSignals()) throw nb::python_error();
        if (released) state_ = PyEval_SaveThread();
    }

    void lock() {
        if (!state_) return;
        asking_++;
        if (ending_ && std::this_thread::get_id() != ender_) {
            asking_--;
            for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
        }
        PyEval_RestoreThread(state_);
        state_ = nullptr;
        asking_--;
    }

    // Called by the thread that ends the interpreter, while others still get the lock: those that ask already get it.
    // Not for ever: after a fork `asking_` may count threads that stayed behind.
    static void end() {
        ender_ = std::this_thread::get_id();
        ending_ = true;
        nb::gil_scoped_release release;
        for (int i = 0; i < 1000 && asking_ > 0; i++) std::this_thread::sleep_for(std::chrono::microseconds(100));
    }

  private:
    PyThreadState* state_ = nullptr;
    static inline std::atomic<int> asking_{0};
    static inline std::atomic<bool> ending_{false};
    static inline std::thread::id ender_;
};

// What one number of an op that only passes over memory costs, in multiply-adds of the others.
constexpr int64_t PER_NUMBER = 16;

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
    active->embedding(w, dim, id, count, to);
}

void rms_norm(const In& x, const In& weight, bool bf16, float eps, const Out& out) {
    const float* from = checked<const float>(x, "rms_norm: x");
    dims(x, "rms_norm: x", 1, 64);
    Weights w = weights(weight, bf16, "rms_norm: weight");
    size_t n = x.ndim();
    same_shape(weight, "rms_norm: weight", {(int64_t)x.shape(n - 1)});
    float* to = checked<float>(out, "rms_norm: out");
    like(out, "rms_norm: out", x, "x", n);
    if (x.size() == 0) return;
    Unlocked unlocked(x.size() * PER_NUMBER);
    active->rms_norm(from, w, product(x, 0, n - 1), x.shape(n - 1), eps, to);
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
    active->linear(from, rows, in, &p, 1);
}

// Panels live in memory of their own: aligned to huge pages, of which whole ones are asked for (a product walks
// through gigabytes, small pages cost it 10 %), the rest in small ones, so no more is taken than is used.
void* panel_memory(size_t bytes) {
    constexpr size_t HUGE_PAGE = size_t(2) << 20;
    size_t alignment = bytes >= HUGE_PAGE ? HUGE_PAGE : 64, size = (bytes + 63) / 64 * 64;
#ifdef _WIN32
    void* data = _aligned_malloc(size, alignment);
#else
    void* data = nullptr;
    if (posix_memalign(&data, alignment, size ? size : 64)) data = nullptr;
#endif
    if (!data) throw std::bad_alloc();
#ifdef __linux__
    if (alignment == HUGE_PAGE) (void)madvise(data, size / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#endif
    return data;
}

void free_panel_memory(void* data) noexcept {
#ifdef _WIN32
    _aligned_free(data);
#else
    std::free(data);
#endif
}

using Panelled = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;

Panelled regroup(const In& packed, int type, int64_t rows, int64_t columns) {
    if (type <= BF16 || type & PANELS) bad_value("regroup: no such type");
    Weights w = matrix(packed, type, rows, columns, "regroup: weight");
    size_t bytes = (size_t)packed_bytes(type | PANELS, rows, columns, "regroup: weight");
    void* data = panel_memory(bytes);
    nb::capsule owner(data, free_panel_memory);
    if (bytes) {
        Unlocked unlocked((int64_t)bytes);
        Regrouping matrix = {w, rows, columns, data, 0};
        active->regroup(&matrix, 1, false);
    }
    return {data, {bytes}, owner};
}

// Matrices of one mapped file, whose pages are given back as they are read, into one piece of memory, so that small
// matrices lie in huge pages too. One call for all of them, for another thread may hold the interpreter's lock for long
// (a tokenizer being built), and each call would wait for it.
std::vector<Panelled> regroup_mapped(const std::vector<std::tuple<In, int, int64_t, int64_t>>& matrices) {
    std::vector<Regrouping> wanted;
    std::vector<size_t> begins = {0}, sizes;
    for (const auto& [array, type, rows, columns] : matrices) {
        if (type <= BF16 || type & PANELS) bad_value("regroup_mapped: no such type");
        Weights packed = matrix(array, type, rows, columns, "regroup_mapped: weight");
        sizes.push_back((size_t)packed_bytes(type | PANELS, rows, columns, "regroup_mapped: weight"));
        size_t end;
        if (__builtin_add_overflow(begins.back(), (sizes.back() + 63) / 64 * 64, &end)) throw std::bad_alloc();
        wanted.push_back({packed, rows, columns, nullptr, 0});
        begins.push_back(end);
    }
    char* data = (char*)panel_memory(begins.back());
    nb::capsule owner(data, free_panel_memory);
    for (size_t i = 0; i < wanted.size(); i++) wanted[i].panels = data + begins[i];
    {
        Unlocked unlocked((int64_t)begins.back());
        active->regroup(wanted.data(), (int)wanted.size(), true);
    }
    std::vector<Panelled> out;
    for (size_t i = 0; i < sizes.size(); i++) out.push_back({data + begins[i], {sizes[i]}, owner});
    return out;
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
    like(out, "rope: out", x, "x", n);
    if (x.size() == 0) return;
    Unlocked unlocked(x.size() * PER_NUMBER);
    active->rope(from, c, s, product(x, 0, n - 2), x.shape(n - 2), x.shape(n - 1), interleaved, to);
}

// Positions [B, T], each -1 (padding) or below S.
const int32_t* checked_positions(const In& positions, const char* name, int64_t B, int64_t T, int64_t S) {
    const int32_t* p = checked<const int32_t>(positions, name);
    same_shape(positions, name, {B, T});
    for (int64_t i = 0; i < B * T; i++)
        if (p[i] < -1 || p[i] >= S)
            bad_value(std::string(name) + ": " + std::to_string(p[i]) + " is not in a cache of " + std::to_string(S));
    return p;
}

// A KV cache [B, S, G, D] of the type `kind`, a WeightType; Q8_0 as bytes, with the blocks of a head in the last
// dimension. `shape` gets its four numbers.
template <typename A>
Weights cache_of(const A& a, int kind, const char* name, std::vector<int64_t>& shape) {
    nb::dlpack::dtype type = a.dtype();
    bool half = type.code == (uint8_t)nb::dlpack::dtype_code::Float && type.bits == 16 && type.lanes == 1;
    bool fits = kind == F32 ? type == nb::dtype<float>() : kind == F16 ? half
              : kind == BF16 ? type == nb::dtype<uint16_t>() : kind == Q8_0 && type == nb::dtype<uint8_t>();
    if (!fits) bad_type(name, "float32, float16, BF16 or Packed Q8_0", type);
    dims(a, name, 4, 4);
    contiguous(a, name);
    shape = {(int64_t)a.shape(0), (int64_t)a.shape(1), (int64_t)a.shape(2), (int64_t)a.shape(3)};
    if (kind == Q8_0) {
        if (shape[3] % 34) bad_value(std::string(name) + " has heads that are not whole blocks of Q8_0");
        shape[3] = shape[3] / 34 * 32;
    }
    return {a.data(), kind};
}

void write_kv(const Out& cache_k, const Out& cache_v, int kind, const In& k, const In& v, const In& positions) {
    std::vector<int64_t> shape, shape_v;
    Weights to_k = cache_of(cache_k, kind, "write_kv: cache_k", shape);
    Weights to_v = cache_of(cache_v, kind, "write_kv: cache_v", shape_v);
    const float *from_k = checked<const float>(k, "write_kv: k"), *from_v = checked<const float>(v, "write_kv: v");
    dims(k, "write_kv: k", 4, 4);
    int64_t B = k.shape(0), T = k.shape(1), G = k.shape(2), D = k.shape(3), S = shape[1];
    same_shape(v, "write_kv: v", {B, T, G, D});
    if (shape != std::vector<int64_t>{B, S, G, D} || shape_v != shape)
        bad_value("write_kv: caches " + numbers(shape) + " and " + numbers(shape_v) + " and k " + shape_of(k) + " do not fit");
    const int32_t* p = checked_positions(positions, "write_kv: positions", B, T, S);
    if (k.size() == 0) return;
    Unlocked unlocked(k.size() * 2 * PER_NUMBER);
    active->write_kv(to_k, to_v, from_k, from_v, p, B, T, S, G, D);
}

void attention(const In& q, const In& k, const In& v, int kind, const std::optional<In>& positions, bool bf16,
               const Out& out) {
    const float* from = checked<const float>(q, "attention: q");
    std::vector<int64_t> shape, shape_v;
    Weights keys = cache_of(k, kind, "attention: k", shape), values = cache_of(v, kind, "attention: v", shape_v);
    dims(q, "attention: q", 4, 4);
    int64_t B = q.shape(0), T = q.shape(1), H = q.shape(2), D = q.shape(3), S = shape[1], G = shape[2];
    if (shape != std::vector<int64_t>{B, S, G, D} || shape_v != shape)
        bad_value("attention: q " + shape_of(q) + ", k " + numbers(shape) + " and v " + numbers(shape_v) + " do not fit");
    if (G == 0 || H % G)
        bad_value("attention: " + std::to_string(H) + " query heads do not divide among " + std::to_string(G) + " key/value heads");
    const int32_t* p = nullptr;
    if (positions) p = checked_positions(*positions, "attention: positions", B, T, S);
    else if (T != S) bad_value("attention: without positions q and k must be equally long");
    float* to = checked<float>(out, "attention: out");
    like(out, "attention: out", q, "q", 4);
    if (q.size() == 0) return;
    Unlocked unlocked(B * T * H * D * S);
    active->attention(from, keys, values, p, B, T, S, H, G, D, bf16, to);
}

void swiglu(const In& gate, const In& up, const Out& out) {
    const float *g = checked<const float>(gate, "swiglu: gate"), *u = checked<const float>(up, "swiglu: up");
    float* to = checked<float>(out, "swiglu: out");
    if (up.ndim() != gate.ndim()) bad_value("swiglu: gate " + shape_of(gate) + " and up " + shape_of(up) + " do not fit");
    like(up, "swiglu: up", gate, "gate", gate.ndim());
    like(out, "swiglu: out", gate, "gate", gate.ndim());
    if (gate.size() == 0) return;
    Unlocked unlocked(gate.size() * PER_NUMBER);
    active->swiglu(g, u, gate.size(), to);
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
    active->argmax(x, rows, vocabulary, to);
}

void top_k(const In& logits, const Out& ids, const Out& values) {
    const float* x = checked<const float>(logits, "top_k: logits");
    dims(logits, "top_k: logits", 1, 64);
    dims(ids, "top_k: ids", logits.ndim(), logits.ndim());
    size_t n = logits.ndim();
    int64_t rows = product(logits, 0, n - 1), vocabulary = logits.shape(n - 1), k = ids.shape(n - 1);
    if (k < 1 || k > vocabulary)
        bad_value("top_k: k = " + std::to_string(k) + " is not between 1 and the vocabulary of " + std::to_string(vocabulary));
    int32_t* to_ids = checked<int32_t>(ids, "top_k: ids");
    float* to_values = checked<float>(values, "top_k: values");
    like(ids, "top_k: ids", logits, "logits", n - 1);
    like(values, "top_k: values", ids, "ids", n);
    if (values.ndim() != n) bad_value("top_k: values has the wrong shape");
    Unlocked unlocked(logits.size() * PER_NUMBER);
    active->top_k(x, rows, vocabulary, k, to_ids, to_values);
}

// ---- a whole forward ----

// A weight of the decoder: its array, type, rows and columns, as `matrix` takes them; a vector has one column.
using Leaf = std::tuple<In, int, int64_t, int64_t>;
using Leaves = std::vector<std::optional<Leaf>>;

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
            const std::vector<Leaves>& layers, const Leaf& norm, const std::optional<Leaf>& head) {
        // Bounded, so that their products are what they seem.
        constexpr int64_t MOST = 1 << 20;
        if (heads < 1 || heads > MOST || kv_heads < 1 || heads % kv_heads || D < 2 || D > MOST || D % 2)
            bad_value("Decoder: " + std::to_string(heads) + " heads, " + std::to_string(kv_heads) +
                      " key/value heads, head size " + std::to_string(D));
        if (layers.empty() || layers[0].size() != PARTS || !layers[0][GATE]) bad_value("Decoder: a layer is not whole");
        m_.vocabulary = std::get<2>(embedding), m_.dim = std::get<3>(embedding);
        m_.hidden = std::get<2>(*layers[0][GATE]);
        m_.heads = heads, m_.kv_heads = kv_heads, m_.D = D, m_.eps = eps, m_.interleaved = interleaved;
        if (m_.vocabulary < 1 || m_.dim < 1 || m_.hidden < 1) bad_value("Decoder: a weight has no numbers");
        m_.embedding = held(embedding, {m_.vocabulary, m_.dim}, "embedding");
        m_.norm = held(norm, {m_.dim}, "norm");
        m_.head = head ? held(*head, {m_.vocabulary, m_.dim}, "head") : m_.embedding;
        for (size_t i = 0; i < layers.size(); i++) {
            std::string at = "layers." + std::to_string(i) + ".";
            if (layers[i].size() != PARTS) bad_value("Decoder: a layer is not whole");
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
            layer.gate = linear("gate", m_.hidden, m_.dim);
            layer.up = linear("up", m_.hidden, m_.dim);
            layer.down = linear("down", m_.dim, m_.hidden);
            m_.layers.push_back(layer);
        }
        parameters_ = (2 * heads + 2 * kv_heads) * D * m_.dim + 3 * m_.hidden * m_.dim;
        parameters_ *= (int64_t)m_.layers.size();
    }
    ~Decoder() { delete spare_.load(); }
    Decoder(const Decoder&) = delete;

    // ids and positions [B, T]; cos and sin [P, D/2], row p + 1 for position p; keys and values [B, S, G, D] a layer
    // of the type `kind`, or none; rows [n] of B·T, or null for the last of each sequence; out [n, V].
    void run(const In& ids, const In& positions, const In& cos, const In& sin, const std::vector<Out>& keys,
             const std::vector<Out>& values, int kind, const std::optional<In>& rows, const Out& out) {
        DecoderCall call;
        call.ids = checked<const int32_t>(ids, "ids");
        dims(ids, "ids", 2, 2);
        call.B = ids.shape(0), call.T = ids.shape(1);
        int64_t tokens = call.B * call.T, half = m_.D / 2;
        if (tokens == 0) bad_value("ids: no tokens");
        for (int64_t i = 0; i < tokens; i++)
            if (call.ids[i] < 0 || call.ids[i] >= m_.vocabulary)
                bad_value("ids: " + std::to_string(call.ids[i]) + " is not in a vocabulary of " + std::to_string(m_.vocabulary));
        dims(cos, "cos", 2, 2);
        call.cos = checked<const float>(cos, "cos");
        call.sin = checked<const float>(sin, "sin");
        same_shape(cos, "cos", {(int64_t)cos.shape(0), half});
        same_shape(sin, "sin", {(int64_t)cos.shape(0), half});
        call.S = (int64_t)cos.shape(0) - 1;
        size_t layers = m_.layers.size();
        int64_t capacity = 0;
        std::vector<Weights> cache(2 * layers);
        if (keys.size() != values.size() || (!keys.empty() && keys.size() != layers))
            bad_value("keys and values: " + std::to_string(keys.size()) + " and " + std::to_string(values.size()) +
                      " arrays for " + std::to_string(layers) + " layers");
        if (keys.empty()) {
            call.S = std::min(call.S, call.T);
        } else {
            std::vector<int64_t> shape;
            for (size_t i = 0; i < 2 * layers; i++) {
                const char* name = i < layers ? "keys" : "values";
                cache[i] = cache_of(i < layers ? keys[i] : values[i - layers], kind, name, shape);
                if (i == 0) capacity = shape[1];
                std::vector<int64_t> want = {call.B, capacity, m_.kv_heads, m_.D};
                if (shape != want)
                    bad_value(std::string(name) + " must have the shape " + numbers(want) + ", not " + numbers(shape));
            }
            call.S = std::min(call.S, capacity);
        }
        // Rope's tables may be shorter than the cache.
        call.positions = checked_positions(positions, "positions", call.B, call.T, call.S);
        if (!keys.empty()) call.S = capacity;
        call.keys = keys.empty() ? nullptr : cache.data();
        call.values = keys.empty() ? nullptr : cache.data() + layers;
        call.rows = nullptr;
        call.count = call.B;
        if (rows) {
            call.rows = checked<const int32_t>(*rows, "rows");
            dims(*rows, "rows", 1, 1);
            call.count = rows->shape(0);
            for (int64_t i = 0; i < call.count; i++)
                if (call.rows[i] < 0 || call.rows[i] >= tokens)
                    bad_value("rows: " + std::to_string(call.rows[i]) + " is not one of " + std::to_string(tokens));
        }
        call.logits = checked<float>(out, "out");
        same_shape(out, "out", {call.count, m_.vocabulary});
        const Kernels& kernels = *active;
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
    // attention_norm, q, k, v, o (weight and bias each), mlp_norm, gate, up, down (the same): models/tree.py's order.
    static constexpr size_t PARTS = 16, GATE = 10;
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

// Reads all of `data`, for whoever times it.
void probe_read(const In& data) {
    const float* from = checked<const float>(data, "probe_read: data");
    Unlocked unlocked(data.size() * PER_NUMBER);
    active->probe(PROBE_READ, from, data.size() * sizeof(float));
}

// How many products `pieces` equal pieces of work are; 0 where the instruction set has none of that kind.
int64_t probe_products(const std::string& kind, int64_t pieces) {
    int what = kind == "fp32" ? PROBE_FP32 : kind == "bf16" ? PROBE_BF16 : kind == "int8" ? PROBE_INT8 : -1;
    if (what < 0) bad_value("probe_products: no kind " + kind);
    if (pieces < 1 || pieces > 1 << 20) bad_value("probe_products: pieces must lie between 1 and 2^20");
    Unlocked unlocked(pieces << 20);
    return active->probe(what, nullptr, pieces);
}

// Whether every scale fits float16; the numbers are finite.
bool encode(int kind, const In& values, const Out& out) {
    const float* x = checked<const float>(values, "encode: values");
    if (!(out.dtype() == nb::dtype<uint8_t>())) bad_type("encode: out", "uint8", out.dtype());
    contiguous(out, "encode: out");
    if (kind < Q4_0 || kind > Q6_K) bad_value("encode: no type " + std::to_string(kind));
    int64_t numbers = BLOCKS[kind].numbers, blocks = values.size() / numbers;
    if (blocks * numbers != (int64_t)values.size() || blocks * BLOCKS[kind].bytes != (int64_t)out.size())
        bad_value("encode: values " + shape_of(values) + " and out " + shape_of(out) + " do not fit");
    if (blocks == 0) return true;
    Unlocked unlocked(values.size() * PER_NUMBER * 16);
    return active->encode(kind, x, blocks, (uint8_t*)out.data());
}

void set_threads(int threads) {
    if (threads < 1 || threads > 1024) bad_value("threads must lie between 1 and 1024");
    puna_set_threads(threads);
}

}  // namespace

// Has the C library keep freed memory for the next allocation. By default glibc gives large blocks back at once, and
// the zeroing of fresh pages for the activations costs a prefill of 512 tokens on a 1B model 6 % (0.3 of 2.6 s).
bool keep_freed_memory() {
#ifdef __GLIBC__
    // Blocks up to 32 MiB (all that older versions accept) come from the heap, which shrinks above 1 GiB of slack.
    return mallopt(M_MMAP_THRESHOLD, 32 << 20) && mallopt(M_TRIM_THRESHOLD, 1 << 30);
#else
    return false;
#endif
}

NB_MODULE(_cpu, m) {
    using nb::arg;
    m.doc() = "The ops of puna.kernels.reference for NumPy arrays; see puna.kernels.cpu for the checked interface.";
    nb::module_::import_("atexit").attr("register")(nb::cpp_function(&Unlocked::end));
    m.def("tables", list_tables);
    m.def("use", use);
    m.def("keep_freed_memory", keep_freed_memory);
    m.def("set_threads", set_threads);
    m.def("threads", puna_wanted_threads);
    m.def("packed_types", packed_types);
    m.attr("PANELS") = (int)PANELS;
    m.def("regroup", regroup, arg().noconvert(), arg(), arg(), arg());
    m.def("regroup_mapped", regroup_mapped);
    m.def("embedding", embedding, arg().noconvert(), arg(), arg(), arg(), arg().noconvert(), arg().noconvert());
    m.def("rms_norm", rms_norm, arg().noconvert(), arg().noconvert(), arg(), arg(), arg().noconvert());
    m.def("linear", linear, arg().noconvert(), arg().noconvert(), arg(), arg(), arg(), arg().noconvert().none(), arg(),
          arg().noconvert());
    m.def("rope", rope, arg().noconvert(), arg().noconvert(), arg().noconvert(), arg(), arg().noconvert());
    m.def("write_kv", write_kv, arg().noconvert(), arg().noconvert(), arg(), arg().noconvert(), arg().noconvert(),
          arg().noconvert());
    m.def("attention", attention, arg().noconvert(), arg().noconvert(), arg().noconvert(), arg(),
          arg().noconvert().none(), arg(), arg().noconvert());
    m.def("swiglu", swiglu, arg().noconvert(), arg().noconvert(), arg().noconvert());
    m.def("argmax", argmax, arg().noconvert(), arg().noconvert());
    m.def("top_k", top_k, arg().noconvert(), arg().noconvert(), arg().noconvert());
    m.def("probe_read", probe_read, arg().noconvert());
    m.def("probe_products", probe_products);
    nb::set_leak_warnings(false);  // a model that a module still holds at exit is no leak
    nb::class_<Decoder>(m, "Decoder")
        .def(nb::init<int64_t, int64_t, int64_t, float, bool, const Leaf&, const std::vector<Leaves>&, const Leaf&,
                      const std::optional<Leaf>&>(),
             arg("heads"), arg("kv_heads"), arg("head_dim"), arg("eps"), arg("interleaved"), arg("embedding"),
             arg("layers"), arg("norm"), arg("head").none())
        .def("run", &Decoder::run, arg("ids").noconvert(), arg("positions").noconvert(), arg("cos").noconvert(),
             arg("sin").noconvert(), arg("keys").noconvert(), arg("values").noconvert(), arg("kind"),
             arg("rows").noconvert().none(), arg("out").noconvert());
    m.def("encode", encode, arg(), arg().noconvert(), arg().noconvert());
}
