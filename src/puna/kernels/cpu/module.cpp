// The Python module puna.kernels._cpu: checks every array, then calls the table of the chosen instruction set.
//
// What is surprising: nothing is converted. nanobind would turn a float64 array into a float32 copy, and results
// written to such a copy would be lost; here every type, shape and stride is compared, and a mismatch is a TypeError or
// a ValueError before any memory is touched.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <cstdlib>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "kernels.h"
#include "pool.h"

namespace nb = nanobind;
using In = nb::ndarray<nb::ro, nb::device::cpu>;
using Out = nb::ndarray<nb::device::cpu>;

namespace {

struct Table {
    const char* name;    // what --kernels calls it; of several with one name, the first that can run is taken
    const Kernels* kernels;
    bool runs;           // on this machine
    const char* reason;
};

std::vector<Table> tables() {
    std::vector<Table> all;
    // __builtin_cpu_supports asks the operating system too (XGETBV): registers it does not save are not supported.
#if defined(PUNA_HAVE_AVX512) || defined(PUNA_HAVE_AVX512_BF16)
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("fma");
#endif
#ifdef PUNA_HAVE_AVX512_BF16
    all.push_back({"avx512", &kernels_avx512_bf16, avx512 && __builtin_cpu_supports("avx512bf16"),
                   "cpuid: AVX-512 F/BW/VL/DQ/BF16"});
#endif
#ifdef PUNA_HAVE_AVX512
    all.push_back({"avx512", &kernels_avx512, avx512, "cpuid: AVX-512 F/BW/VL/DQ"});
#endif
#ifdef PUNA_HAVE_AVX2
    all.push_back({"avx2", &kernels_avx2,
                   __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
                   "cpuid: AVX2/FMA/F16C"});
#endif
#ifdef PUNA_HAVE_NEON
    all.push_back({"neon", &kernels_neon, true, "the baseline of 64-bit Arm"});
#endif
    all.push_back({"scalar", &kernels_scalar, true, "the compiler's baseline for this architecture"});
    return all;
}

const Kernels* active = &kernels_scalar;

// Index into tables() of what serves calls from now on.
void use(int index) {
    std::vector<Table> all = tables();
    if (index < 0 || index >= (int)all.size() || !all[index].runs) throw nb::value_error("no such table");
    active = all[index].kernels;
}

nb::list list_tables() {
    nb::list out;
    for (const Table& table : tables()) out.append(nb::make_tuple(table.name, table.runs, table.reason));
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

template <typename A>
std::string shape_of(const A& a) {
    std::string out = "[";
    for (size_t i = 0; i < a.ndim(); i++) out += (i ? ", " : "") + std::to_string(a.shape(i));
    return out + "]";
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

template <typename A>
void same_shape(const A& a, const char* name, const std::vector<int64_t>& shape) {
    bool same = a.ndim() == shape.size();
    for (size_t i = 0; same && i < shape.size(); i++) same = (int64_t)a.shape(i) == shape[i];
    if (same) return;
    std::string want = "[";
    for (size_t i = 0; i < shape.size(); i++) want += (i ? ", " : "") + std::to_string(shape[i]);
    bad_value(std::string(name) + " must have the shape " + want + "], not " + shape_of(a));
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
    ~Unlocked() {
        if (!state_) return;
        asking_++;
        if (ending_ && std::this_thread::get_id() != ender_) {
            asking_--;
            for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
        }
        PyEval_RestoreThread(state_);
        asking_--;
    }
    Unlocked(const Unlocked&) = delete;

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

void embedding(const In& table, bool bf16, const In& ids, const Out& out) {
    Weights w = weights(table, bf16, "embedding: table");
    dims(table, "embedding: table", 2, 2);
    const int32_t* id = checked<const int32_t>(ids, "embedding: ids");
    float* to = checked<float>(out, "embedding: out");
    int64_t rows = table.shape(0), dim = table.shape(1), count = ids.size();
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

void linear(const In& x, const In& weight, bool bf16, const std::optional<In>& bias, bool bias_bf16, const Out& out) {
    const float* from = checked<const float>(x, "linear: x");
    dims(x, "linear: x", 1, 64);
    dims(weight, "linear: weight", 2, 2);
    Weights w = weights(weight, bf16, "linear: weight"), b = {nullptr, F32};
    int64_t rows = product(x, 0, x.ndim() - 1), in = weight.shape(1), outs = weight.shape(0);
    if ((int64_t)x.shape(x.ndim() - 1) != in)
        bad_value("linear: x " + shape_of(x) + " and weight " + shape_of(weight) + " do not fit");
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
    active->linear(from, rows, in, w, outs, b, to);
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

void write_kv(const Out& cache_k, const Out& cache_v, const In& k, const In& v, const In& positions) {
    float *to_k = checked<float>(cache_k, "write_kv: cache_k"), *to_v = checked<float>(cache_v, "write_kv: cache_v");
    const float *from_k = checked<const float>(k, "write_kv: k"), *from_v = checked<const float>(v, "write_kv: v");
    dims(cache_k, "write_kv: cache_k", 4, 4);
    dims(k, "write_kv: k", 4, 4);
    int64_t B = k.shape(0), T = k.shape(1), G = k.shape(2), D = k.shape(3), S = cache_k.shape(1);
    same_shape(v, "write_kv: v", {B, T, G, D});
    same_shape(cache_k, "write_kv: cache_k", {B, S, G, D});
    same_shape(cache_v, "write_kv: cache_v", {B, S, G, D});
    const int32_t* p = checked_positions(positions, "write_kv: positions", B, T, S);
    int64_t row = G * D;
    for (int64_t b = 0; b < B; b++)
        for (int64_t t = 0; t < T; t++)
            if (int64_t at = p[b * T + t]; at >= 0) {
                std::memcpy(to_k + (b * S + at) * row, from_k + (b * T + t) * row, (size_t)row * sizeof(float));
                std::memcpy(to_v + (b * S + at) * row, from_v + (b * T + t) * row, (size_t)row * sizeof(float));
            }
}

void attention(const In& q, const In& k, const In& v, const std::optional<In>& positions, const Out& out) {
    const float* from = checked<const float>(q, "attention: q");
    const float *keys = checked<const float>(k, "attention: k"), *values = checked<const float>(v, "attention: v");
    dims(q, "attention: q", 4, 4);
    dims(k, "attention: k", 4, 4);
    int64_t B = q.shape(0), T = q.shape(1), H = q.shape(2), D = q.shape(3), S = k.shape(1), G = k.shape(2);
    same_shape(k, "attention: k", {B, S, G, D});
    same_shape(v, "attention: v", {B, S, G, D});
    if (G == 0 || H % G)
        bad_value("attention: " + std::to_string(H) + " query heads do not divide among " + std::to_string(G) + " key/value heads");
    const int32_t* p = nullptr;
    if (positions) p = checked_positions(*positions, "attention: positions", B, T, S);
    else if (T != S) bad_value("attention: without positions q and k must be equally long");
    float* to = checked<float>(out, "attention: out");
    like(out, "attention: out", q, "q", 4);
    if (q.size() == 0) return;
    Unlocked unlocked(B * T * H * D * S);
    active->attention(from, keys, values, p, B, T, S, H, G, D, to);
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
    m.def("embedding", embedding, arg().noconvert(), arg(), arg().noconvert(), arg().noconvert());
    m.def("rms_norm", rms_norm, arg().noconvert(), arg().noconvert(), arg(), arg(), arg().noconvert());
    m.def("linear", linear, arg().noconvert(), arg().noconvert(), arg(), arg().noconvert().none(), arg(),
          arg().noconvert());
    m.def("rope", rope, arg().noconvert(), arg().noconvert(), arg().noconvert(), arg(), arg().noconvert());
    m.def("write_kv", write_kv, arg().noconvert(), arg().noconvert(), arg().noconvert(), arg().noconvert(),
          arg().noconvert());
    m.def("attention", attention, arg().noconvert(), arg().noconvert(), arg().noconvert(), arg().noconvert().none(),
          arg().noconvert());
    m.def("swiglu", swiglu, arg().noconvert(), arg().noconvert(), arg().noconvert());
    m.def("argmax", argmax, arg().noconvert(), arg().noconvert());
}
