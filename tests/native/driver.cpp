// Runs recorded cases through the table of every instruction set of this build that the machine has, without Python:
//
//     driver CASES [THREADS]
//     driver regions SECONDS [THREADS]
//
// CASES is a file of tests/native/cases.py, which describes the format. A line for each case that fails, one for each
// instruction set, and exit status 1 if anything failed or could not be read. `regions` has the thread pool run regions
// whose threads end and sleep at any moment, for so long; what it has lost shows as status 1, or as a call that never
// returns.
//
// What it is: what a cross-compiled build runs under an emulator, and what the sanitizers watch.
// What it is not: a second definition of the ops; the expected numbers come from puna.kernels.reference.
// What is surprising: every array ends where an unreadable page begins, so that a read past its end is a crash in any
// build, and weights begin at an odd byte, as they may in a mapped file. Each case has a thread of its own, so that the
// scratch memory of the ops is as small as the case needs it.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "experts.h"
#include "forward.h"
#include "kernels.h"
#include "pool.h"
#include "tables.h"

namespace {

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "driver: %s\n", what.c_str());
    std::exit(1);
}

// Bytes that end at an unreadable page, or `slack` bytes before it.
class Guarded {
  public:
    Guarded(size_t bytes, size_t slack) : bytes_(bytes) {
        size_t page = (size_t)sysconf(_SC_PAGESIZE);
        mapped_ = (bytes + slack + page - 1) / page * page + page;
        void* base = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED) fail("no memory");
        base_ = (char*)base;
        if (mprotect(base_ + mapped_ - page, page, PROT_NONE) != 0) fail("no guard page");
        data_ = base_ + mapped_ - page - slack - bytes;
    }
    Guarded(Guarded&& other) noexcept
        : base_(std::exchange(other.base_, nullptr)), data_(other.data_), bytes_(other.bytes_), mapped_(other.mapped_) {}
    Guarded(const Guarded&) = delete;
    ~Guarded() {
        if (base_) munmap(base_, mapped_);
    }

    char* data() const { return data_; }
    size_t bytes() const { return bytes_; }

  private:
    char *base_, *data_;
    size_t bytes_, mapped_;
};

// What an array holds that is no weight.
constexpr int INT32 = -1;

struct Array {
    int type;  // a WeightType or INT32
    Guarded memory;

    const float* floats() const { return (const float*)memory.data(); }
    // Null where the case has no such array.
    const int32_t* ints() const { return memory.bytes() ? (const int32_t*)memory.data() : nullptr; }
    Weights weights() const { return {memory.bytes() ? memory.data() : nullptr, type}; }
    std::string name() const { return type == INT32 ? "I32" : TYPE_NAMES[type]; }
};

struct Case {
    std::string op;
    std::vector<int64_t> numbers;        // sizes and flags, in the order of Kernels
    double tolerance, tolerance_bf16;    // times the largest expected number; 0: equal
    std::vector<Array> inputs, wanted;

    std::string label() const {
        std::string out = op;
        for (int64_t number : numbers) out += " " + std::to_string(number);
        for (const Array& array : inputs) out += " " + array.name();
        return out;
    }
};

// ---- the file ----

class Reader {
  public:
    explicit Reader(const char* path) : file_(std::fopen(path, "rb")) {
        if (!file_) fail(std::string("cannot open ") + path);
    }
    ~Reader() { std::fclose(file_); }
    Reader(const Reader&) = delete;

    bool ended() {
        int next = std::fgetc(file_);
        if (next == EOF) return true;
        std::ungetc(next, file_);
        return false;
    }
    void bytes(void* to, size_t count) {
        if (std::fread(to, 1, count, file_) != count) fail("the file ends within a case");
    }
    template <typename T>
    T number() {
        T value;
        bytes(&value, sizeof value);
        return value;
    }
    std::string word(size_t length) {
        std::string out(length, 0);
        bytes(&out[0], length);
        return out.c_str();
    }
    int type() {
        std::string name = word(8);
        if (name == "I32") return INT32;
        for (int type = 0; type < WEIGHT_TYPES; type++)
            if (name == TYPE_NAMES[type]) return type;
        fail("no such type: " + name);
    }
    std::vector<Array> arrays() {
        std::vector<Array> out;
        for (int64_t count = number<int64_t>(); count > 0; count--) {
            int kind = type();
            int64_t slack = number<int64_t>(), size = number<int64_t>();
            out.push_back({kind, Guarded((size_t)size, (size_t)slack)});
            bytes(out.back().memory.data(), (size_t)size);
        }
        return out;
    }

  private:
    std::FILE* file_;
};

std::vector<Case> read_cases(const char* path) {
    Reader reader(path);
    if (reader.word(8) != "PUNACASE") fail("not a file of cases");
    std::vector<Case> out;
    while (!reader.ended()) {
        Case test;
        test.op = reader.word(16);
        test.numbers.resize((size_t)reader.number<int64_t>());
        for (int64_t& number : test.numbers) number = reader.number<int64_t>();
        test.tolerance = reader.number<double>();
        test.tolerance_bf16 = reader.number<double>();
        test.inputs = reader.arrays();
        test.wanted = reader.arrays();
        out.push_back(std::move(test));
    }
    return out;
}

// ---- the ops ----

// A packed matrix as panels.
Guarded regrouped(const Kernels& k, Weights packed, int64_t out, int64_t in) {
    Guarded panels((size_t)((out + PANEL_ROWS - 1) / PANEL_ROWS * panel_bytes(packed.type, in)), 0);
    Regrouping matrix = {packed, out, in, panels.data(), 0};
    k.regroup(&matrix, 1, false);
    return panels;
}

// What must be the same bits as `linear` gave in `y`: from panels, as one of two products, and the first row alone.
// Returns what is not.
std::string other_ways(const Kernels& k, const Case& c, const float* y) {
    int64_t rows = c.numbers[0], in = c.numbers[1], out = c.numbers[2];
    Weights packed = c.inputs[1].weights(), bias = c.inputs[2].weights();
    Guarded panels = regrouped(k, packed, out, in);
    size_t row = (size_t)out * 4;
    Guarded first((size_t)rows * row, 0), second((size_t)rows * row, 0);
    Product products[2] = {{{panels.data(), packed.type | PANELS}, out, bias, (float*)first.data()},
                           {packed, out, bias, (float*)second.data()}};
    k.linear(c.inputs[0].floats(), rows, in, products, 2);
    if (std::memcmp(y, first.data(), first.bytes()) != 0) return "panels give other bits";
    if (std::memcmp(y, second.data(), second.bytes()) != 0) return "two products at once give other bits";
    k.linear(c.inputs[0].floats(), 1, in, products, 1);
    return std::memcmp(y, first.data(), row) ? "the first row alone gives other bits" : "";
}

// What is wrong with a result; empty where nothing is.
std::string mismatch(const Array& wanted, const Guarded& got, double tolerance) {
    if (std::memcmp(wanted.memory.data(), got.data(), got.bytes()) == 0) return "";
    if (wanted.type != F32) return "other bits";
    const float *want = wanted.floats(), *have = (const float*)got.data();
    int64_t count = (int64_t)got.bytes() / 4;
    double scale = 1e-30;
    for (int64_t i = 0; i < count; i++)
        if (std::isfinite(want[i])) scale = std::fmax(scale, std::fabs(want[i]));
    for (int64_t i = 0; i < count; i++) {
        bool same = std::isnan(want[i]) ? std::isnan(have[i]) : want[i] == have[i];
        double error = same ? 0 : std::fabs((double)have[i] - want[i]) / scale;
        if (!(error <= tolerance))
            return "[" + std::to_string(i) + "] is " + std::to_string(have[i]) + ", not " + std::to_string(want[i]);
    }
    return "";
}

// The table of a case: [sequences, width], page in its numbers, the arrays from the given one on.
PageTable page_table(const Case& c, size_t at) {
    const std::vector<Array>& in = c.inputs;
    return {in[at].ints(), in[at + 1].ints(), in[at + 2].ints(), c.numbers[0], c.numbers[1], c.numbers[2]};
}

// A whole forward, from panels where weights are packed. Numbers: sequences, width, page, vocabulary, dim, heads,
// kv_heads, D, hidden, layers, interleaved, whether hidden states are wanted; experts, how many a token, their width.
// Inputs: ids, cos, sin, positions, starts, pages, wanted, epsilon, temperatures, what each layer is (whether a mixture,
// chunk, rope, norm of queries and keys, temperature), embedding, norm, head, the leaves of the layers, then all keys
// and all values, or no cache.
void forward(const Kernels& k, const Case& c, float* out) {
    const std::vector<int64_t>& n = c.numbers;
    const std::vector<Array>& in = c.inputs;
    DecoderModel m = {};
    m.vocabulary = n[3], m.dim = n[4], m.heads = n[5], m.kv_heads = n[6], m.D = n[7], m.hidden = n[8];
    m.interleaved = n[10] != 0;
    m.eps = *in[7].floats();
    size_t layers = (size_t)n[9], next = 10;
    m.chosen = n[13];
    m.ones.assign((size_t)m.D, 1.0f);
    std::vector<Guarded> made;  // panels and caches
    auto vector = [&] { return in[next++].weights(); };
    auto matrix = [&](int64_t rows, int64_t columns) -> Weights {
        Weights w = in[next++].weights();
        if (w.type <= BF16) return w;
        made.push_back(regrouped(k, w, rows, columns));
        return {made.back().data(), w.type | PANELS};
    };
    auto linear = [&](int64_t rows, int64_t columns) {
        Weights w = matrix(rows, columns);
        return DecoderLinear{w, vector()};
    };
    m.embedding = matrix(m.vocabulary, m.dim);
    m.norm = vector();
    m.head = matrix(m.vocabulary, m.dim);
    for (size_t i = 0; i < layers; i++) {
        DecoderLayer layer;
        layer.attention_norm = vector();
        layer.q = linear(m.heads * m.D, m.dim);
        layer.k = linear(m.kv_heads * m.D, m.dim);
        layer.v = linear(m.kv_heads * m.D, m.dim);
        layer.o = linear(m.dim, m.heads * m.D);
        layer.mlp_norm = vector();
        const int32_t* manner = in[9].ints() + 5 * i;
        layer.chunk = manner[1];
        layer.turned = manner[2] != 0, layer.normed = manner[3] != 0, layer.tempered = manner[4] != 0;
        if (manner[0]) {
            auto gated = [&] {
                Gated part = {};
                part.hidden = n[14];
                part.gate = matrix(part.hidden, m.dim);
                part.up = matrix(part.hidden, m.dim);
                part.down = matrix(m.dim, part.hidden);
                return part;
            };
            layer.router = matrix(n[12], m.dim);
            layer.shared = gated();
            for (int64_t e = 0; e < n[12]; e++) layer.experts.push_back(gated());
        } else {
            layer.gate = linear(m.hidden, m.dim);
            layer.up = linear(m.hidden, m.dim);
            layer.down = linear(m.dim, m.hidden);
        }
        m.layers.push_back(layer);
    }
    std::vector<Weights> caches;
    for (; next < in.size(); next++) {
        made.emplace_back(in[next].memory.bytes(), 0);
        std::memcpy(made.back().data(), in[next].memory.data(), made.back().bytes());
        caches.push_back({made.back().data(), in[next].type});
    }
    DecoderCall call = {};
    call.ids = in[0].ints();
    call.cos = in[1].floats(), call.sin = in[2].floats();
    call.near = call.table = page_table(c, 3);
    call.temperatures = in[8].memory.bytes() ? in[8].floats() : nullptr;
    call.wanted = in[6].ints();
    call.count = (int64_t)in[6].memory.bytes() / 4;
    call.hidden = n[11] != 0;
    call.out = out;
    if (!caches.empty()) call.keys = caches.data(), call.values = caches.data() + layers;
    Guarded scratch(puna_forward_scratch(m, call) * sizeof(float), 0);
    puna_forward(k, m, call, (float*)scratch.data(), [] {});
}

// A mixture, from panels where weights are packed. Numbers: rows, experts a row, dim, the shared one's width, the others'
// width, how many. Inputs: x, chosen, scores, gate, up and down of the shared one and of each.
void experts(const Kernels& k, const Case& c, float* out) {
    int64_t rows = c.numbers[0], each = c.numbers[1], dim = c.numbers[2], count = c.numbers[5];
    std::vector<Guarded> made;
    size_t next = 3;
    auto gated = [&](int64_t hidden) {
        Gated part = {};
        part.hidden = hidden;
        for (Weights* to : {&part.gate, &part.up, &part.down}) {
            *to = c.inputs[next++].weights();
            if (to->type <= BF16) continue;
            bool down = to == &part.down;
            made.push_back(regrouped(k, *to, down ? dim : hidden, down ? hidden : dim));
            *to = {made.back().data(), to->type | PANELS};
        }
        return part;
    };
    Mixture mixture = {};
    mixture.shared = gated(c.numbers[3]);
    std::vector<Gated> parts;
    for (int64_t e = 0; e < count; e++) parts.push_back(gated(c.numbers[4]));
    mixture.experts = parts.data();
    mixture.count = count;
    Guarded scratch((size_t)puna_experts_scratch(mixture, rows, rows, dim) * sizeof(float), 0);
    puna_experts(k, mixture, c.inputs[0].floats(), c.inputs[1].ints(), c.inputs[2].floats(), rows, each, rows, dim,
                 (float*)scratch.data(), out);
}

// Calls the op of a case; `got` has the places of its results, as many and as large as the wanted ones. Returns what
// differs between several ways to the same result.
std::string call(const Kernels& k, const Case& c, const std::vector<Guarded>& got) {
    const std::vector<int64_t>& n = c.numbers;
    const std::vector<Array>& in = c.inputs;
    float* out = (float*)got[0].data();
    if (c.op == "embedding") {
        Weights table = in[0].weights();
        k.embedding(table, n[0], in[1].ints(), n[1], out);
        if (table.type > BF16) {
            Guarded panels = regrouped(k, table, n[2], n[0]), again(got[0].bytes(), 0);
            k.embedding({panels.data(), table.type | PANELS}, n[0], in[1].ints(), n[1], (float*)again.data());
            if (std::memcmp(out, again.data(), again.bytes()) != 0) return "panels give other bits";
        }
    } else if (c.op == "rms_norm") {
        k.rms_norm(in[0].floats(), in[1].weights(), n[0], n[1], *in[2].floats(), out);
    } else if (c.op == "linear") {
        Product product = {in[1].weights(), n[2], in[2].weights(), out};
        k.linear(in[0].floats(), n[0], n[1], &product, 1);
        if (product.w.type > BF16) return other_ways(k, c, out);
    } else if (c.op == "rope") {
        k.rope(in[0].floats(), in[1].floats(), in[2].floats(), n[0], n[1], n[2], n[3] != 0, out);
    } else if (c.op == "write_kv") {
        for (size_t i = 0; i < 2; i++) std::memcpy(got[i].data(), in[i].memory.data(), got[i].bytes());
        Weights keys = {got[0].data(), in[0].type}, values = {got[1].data(), in[1].type};
        k.write_kv(keys, values, in[2].floats(), in[3].floats(), page_table(c, 4), n[3], n[4]);
    } else if (c.op == "attention") {
        auto attend = [&](float* to) {
            k.attention(in[0].floats(), in[1].weights(), in[2].weights(), page_table(c, 3), n[3], n[4], n[5], n[6] != 0, n[7], to);
        };
        // The way of few rows for all tokens must come to the same, too: nearer than any rounding to bfloat16.
        puna_set_invariant(true);
        attend(out);
        puna_set_invariant(false);
        double near = in[1].type == Q8_0 ? 3e-4 : 3e-6;  // VNNI rounds to 15 bits over Q8_0
        if (std::string what = mismatch(c.wanted[0], got[0], near); !what.empty()) return "invariant: " + what;
        attend(out);
    } else if (c.op == "swiglu") {
        k.swiglu(in[0].floats(), in[1].floats(), n[0], out);
    } else if (c.op == "argmax") {
        k.argmax(in[0].floats(), n[0], n[1], (int32_t*)out);
    } else if (c.op == "top_k") {
        k.top_k(in[0].floats(), n[0], n[1], n[2], (int32_t*)out, (float*)got[1].data());
    } else if (c.op == "shortlist" || c.op == "above" || c.op == "allowed") {
        std::vector<const float*> rows;
        std::vector<const uint32_t*> masks;
        for (int64_t row = 0; row < n[0]; row++) {
            rows.push_back(in[0].floats() + row * n[1]);
            if (c.op == "allowed") masks.push_back((const uint32_t*)in[1].memory.data() + row * ((n[1] + 31) / 32));
        }
        if (c.op == "shortlist")
            k.shortlist(rows.data(), n[0], n[1], in[1].floats(), n[2], (int32_t*)out, (float*)got[1].data(), (float*)got[2].data());
        else if (c.op == "above")
            k.above(rows.data(), n[0], n[1], in[1].floats(), in[2].floats(), in[3].floats(), out);
        else
            k.allowed(rows.data(), masks.data(), n[0], n[1], out);
    } else if (c.op == "encode") {
        if (!k.encode(c.wanted[0].type, in[0].floats(), n[0], (uint8_t*)out)) return "a scale does not fit";
    } else if (c.op == "route") {
        puna_route(k, in[0].floats(), n[0], n[1], n[2], (int32_t*)out, (float*)got[1].data());
    } else if (c.op == "experts") {
        experts(k, c, out);
    } else if (c.op == "forward") {
        forward(k, c, out);
    } else if (c.op == "probe") {
        if (k.probe(PROBE_READ, in[0].memory.data(), (int64_t)in[0].memory.bytes()) != (int64_t)in[0].memory.bytes())
            return "not all was read";
        for (int what : {PROBE_FP32, PROBE_BF16, PROBE_INT8})
            if (int64_t products = k.probe(what, nullptr, n[0]); products < 0 || (what == PROBE_FP32 && products == 0))
                return "no products";
    } else {
        fail("no such op: " + c.op);
    }
    return "";
}

// The case at work, for whoever asks why the process died.
char at_work[256];

void died(int) {
    (void)!write(2, at_work, strnlen(at_work, sizeof at_work));
    _exit(1);
}

// Runs a case on a thread of its own; what went wrong, or nothing.
std::string run(const Table& table, const Case& test) {
    std::snprintf(at_work, sizeof at_work, "driver: died at %s: %s\n", table.reason, test.label().c_str());
    std::vector<Guarded> got;
    for (const Array& wanted : test.wanted) {
        got.emplace_back(wanted.memory.bytes(), 0);
        std::memset(got.back().data(), 0xff, got.back().bytes());  // NaN: what is not written is seen
    }
    std::string differs;
    std::thread([&] { differs = call(*table.kernels, test, got); }).join();
    double tolerance = std::strstr(table.reason, "BF16") ? test.tolerance_bf16 : test.tolerance;
    for (size_t i = 0; i < got.size(); i++)
        if (std::string what = mismatch(test.wanted[i], got[i], tolerance); !what.empty()) return what;
    return differs;
}

// ---- the pool ----

using Clock = std::chrono::steady_clock;

void spend(int64_t microseconds) {
    for (auto until = Clock::now() + std::chrono::microseconds(microseconds); Clock::now() < until;) continue;
}

constexpr int MOST_CHUNKS = 16;

struct Region {
    std::atomic<int> ran[MOST_CHUNKS];
    int64_t own, others;  // microseconds that a chunk takes the caller, and a worker
};

void region_chunk(void* data, int64_t chunk, int thread) {
    Region& region = *(Region*)data;
    region.ran[chunk].fetch_add(1, std::memory_order_relaxed);
    spend(thread ? region.others : region.own);
}

// Regions for so long: half of the time a chunk a thread, one after the other, so that a worker's chunk ends around the
// moment when the caller, which waits for 50 microseconds, goes to sleep; then more chunks with pauses between, which
// end around the moment when workers go to sleep. Whether every chunk ran once.
bool regions(double seconds, int threads) {
    uint32_t state = 1;
    auto below = [&](uint32_t bound) { return (state = state * 1664525u + 1013904223u) / 256 % bound; };
    int64_t count = 0, most = threads < MOST_CHUNKS ? threads : MOST_CHUNKS;
    auto start = Clock::now();
    for (;; count++) {
        double spent = std::chrono::duration<double>(Clock::now() - start).count();
        if (spent > seconds) break;
        bool pauses = spent > seconds / 2;
        Region region = {};
        int64_t chunks = pauses ? 1 + below(MOST_CHUNKS) : most;
        region.own = below(5), region.others = 40 + below(40);
        puna_parallel(chunks, threads, region_chunk, &region);
        for (int64_t i = 0; i < MOST_CHUNKS; i++)
            if (region.ran[i] != (i < chunks)) return false;
        if (pauses && below(2)) spend(below(100));
        if (pauses && below(8) == 0) usleep(below(200));
    }
    std::printf("%lld regions on %d threads\n", (long long)count, threads);
    return true;
}

}  // namespace

int main(int count, char** arguments) {
    if (count >= 3 && std::strcmp(arguments[1], "regions") == 0) {
        int threads = count > 3 ? std::atoi(arguments[3]) : 2;
        puna_set_threads(threads);
        return regions(std::atof(arguments[2]), threads) ? 0 : 1;
    }
    if (count != 2 && count != 3) fail("usage: driver CASES [THREADS] | driver regions SECONDS [THREADS]");
#ifndef __SANITIZE_ADDRESS__  // which reports it with the line
    for (int signal : {SIGSEGV, SIGBUS, SIGILL}) std::signal(signal, died);
#endif
    puna_set_threads(count == 3 ? std::atoi(arguments[2]) : 2);
    std::vector<Case> cases = read_cases(arguments[1]);
    bool clean = !cases.empty();
    for (const Table& table : puna_tables()) {
        if (!table.runs) {
            std::printf("%s (%s): not on this machine\n", table.name, table.reason);
            continue;
        }
        int64_t failed = 0;
        for (const Case& test : cases)
            if (std::string what = run(table, test); !what.empty()) {
                std::printf("%s: %s: %s\n", table.name, test.label().c_str(), what.c_str());
                failed++;
            }
        std::printf("%s (%s): %zu cases, %lld failed\n", table.name, table.reason, cases.size(), (long long)failed);
        std::fflush(stdout);
        clean = clean && failed == 0;
    }
    return clean ? 0 : 1;
}
