// The thread pool: one for the process, for regions of tens of microseconds.
//
// A region is a number of chunks, handed out one by one from a counter, so a thread that is slow or held up by a busy
// neighbour takes fewer. The caller works too, and never waits for a worker that has not joined: a sleeping or
// preempted worker costs nothing but its help. Idle workers spin for at most 50 µs, then sleep; so does a caller that
// waits for a worker's last chunk.
//
// What is surprising:
// - Two threads may call at once: the second finds the pool taken and does its chunks alone.
// - The pool is never destroyed, only replaced (by set_threads, and in the child after fork, where the workers are
//   gone): a condition variable destroyed at exit under a sleeping worker would hang the process.
// - Joining: the ticket is odd while a region is open. A worker counts itself in (`inside`) *before* it looks at the
//   ticket, the caller closes the ticket *before* it waits for `inside` to be 0. So a worker that sees an odd ticket
//   has a region that cannot end without it. Workers start at ticket 0, not at the present one: the first region may
//   have opened before they run.
// - Sleeping: a worker writes `asleep` and then reads the ticket, the caller writes the ticket and then reads `asleep`;
//   the caller writes `waiting` and then reads `inside`, a worker writes `inside` and then reads `waiting`. All of it is
//   sequentially consistent, so one of the two, whose write comes second in the one order of them all, reads the
//   other's: either who would sleep sees that there is no reason to, or the other sees the sleeper. It then takes and
//   releases the mutex before it notifies, and the sleeper holds the mutex from its write until it is in the queue of
//   the condition, so it has read what it waits for, or gets the notice. `inside` may rise again meanwhile, from workers
//   that look in: whoever brings it back to 0 notifies anew.
// - All four writes are read-modify-writes, also where a store would do: qemu-user (7.2) makes stlr and ldar of Arm a
//   plain store and a plain load of x86, which may pass each other; the caller then slept for ever, and tests with it.
#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <string>
#include <thread>

#include "kernels.h"

#ifdef __linux__
#include <sched.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;
constexpr auto SPIN = std::chrono::microseconds(50);

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Pool {
    // Every atomic that threads write in turn has a cache line of its own.
    alignas(64) std::atomic<uint32_t> ticket{0};
    alignas(64) std::atomic<int> inside{0};
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int> asleep{0};
    std::atomic<bool> retired{false};
    std::mutex region;  // held by the thread whose region is open
    std::mutex sleep;
    std::condition_variable wake;
    std::atomic<bool> waiting{false};  // the caller sleeps until `inside` is 0
    std::condition_variable done;
    int threads = 1;
    // The open region; written while no worker is inside.
    int64_t chunks = 0;
    int limit = 0;
    Run run = nullptr;
    void* job = nullptr;

    void take_chunks(int thread) {
        for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) run(job, chunk, thread);
    }

    bool open_since(uint32_t seen) const {
        uint32_t now = ticket.load();
        return (now & 1) && now != seen;
    }

    void work(int thread) {
        uint32_t seen = 0;
        while (!retired.load()) {
            auto until = Clock::now() + SPIN;
            bool found = false;
            do {
                for (int i = 0; i < 32 && !found; i++) {
                    found = open_since(seen);
                    if (!found) relax();
                }
            } while (!found && Clock::now() < until);
            if (!found) {
                std::unique_lock<std::mutex> lock(sleep);
                asleep.fetch_add(1);
                wake.wait(lock, [&] { return open_since(seen) || retired.load(); });
                asleep.fetch_sub(1);
            }
            inside.fetch_add(1);
            uint32_t now = ticket.load();
            if (now & 1) {
                if (thread < limit) take_chunks(thread);
                seen = now;
            }
            if (inside.fetch_sub(1) == 1 && waiting.load()) {
                { std::lock_guard<std::mutex> lock(sleep); }
                done.notify_all();
            }
        }
    }

    void parallel(int64_t count, int most, Run what, void* with) {
        chunks = count;
        limit = most;
        run = what;
        job = with;
        next.store(0, std::memory_order_relaxed);
        ticket.fetch_add(1);
        if (asleep.load() > 0) {
            { std::lock_guard<std::mutex> lock(sleep); }
            wake.notify_all();
        }
        take_chunks(0);
        ticket.fetch_add(1);
        auto until = Clock::now() + SPIN;
        for (int i = 1; inside.load() > 0; i++) {
            relax();
            if (i % 32 || Clock::now() < until) continue;
            // A worker was preempted within its last chunk. Sleeping gives it this core: the scheduler moves a waiting
            // thread to a core that has nothing to do, where yielding would only have it wait for its turn on the other.
            std::unique_lock<std::mutex> lock(sleep);
            waiting.exchange(true);  // no store: see the top
            done.wait(lock, [&] { return inside.load() == 0; });
            waiting.store(false);
        }
    }
};

std::atomic<Pool*> the_pool{nullptr};
std::mutex* building = new std::mutex;  // held while the pool is replaced
std::atomic<int> wanted{0};             // 0: not chosen yet

// How many processors the scheduler lets this process use, and the quota of its control groups (version 1 or 2),
// rounded up: 1.5 processors are two threads.
int allowed() {
    int count = static_cast<int>(std::thread::hardware_concurrency());
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) count = CPU_COUNT(&set);
    double quota = -1;
    auto narrow = [&](double limit, double period) {
        if (limit > 0 && period > 0 && (quota < 0 || limit / period < quota)) quota = limit / period;
    };
    auto read = [](const std::string& path, const char* format, auto... out) {
        std::FILE* file = std::fopen(path.c_str(), "r");
        if (!file) return false;
        bool all = std::fscanf(file, format, out...) == static_cast<int>(sizeof...(out));
        std::fclose(file);
        return all;
    };
    if (std::FILE* groups = std::fopen("/proc/self/cgroup", "r")) {
        char line[4096];
        while (std::fgets(line, sizeof line, groups)) {
            line[std::strcspn(line, "\n")] = 0;
            const char* controllers = std::strchr(line, ':');
            if (!controllers) continue;
            const char* name = std::strchr(++controllers, ':');
            if (!name) continue;
            std::string list(controllers, name), path(name + 1);
            bool unified = list.empty(), cpu = ("," + list + ",").find(",cpu,") != std::string::npos;
            if (!unified && !cpu) continue;
            // The limit of any ancestor holds; inside a container the path may name groups that are not mounted.
            for (;;) {
                double limit = 0, period = 0;
                if (unified && read("/sys/fs/cgroup" + path + "/cpu.max", "%lf %lf", &limit, &period)) narrow(limit, period);
                std::string v1 = "/sys/fs/cgroup/cpu" + path;
                if (cpu && read(v1 + "/cpu.cfs_quota_us", "%lf", &limit) && read(v1 + "/cpu.cfs_period_us", "%lf", &period))
                    narrow(limit, period);
                if (path.empty()) break;
                path.erase(path.find_last_of('/') == std::string::npos ? 0 : path.find_last_of('/'));
            }
        }
        std::fclose(groups);
    }
    if (quota > 0) {
        int whole = static_cast<int>(quota) + (quota > static_cast<int>(quota));
        if (whole < count) count = whole;
    }
#endif
    return count < 1 ? 1 : count;
}

// Replaces the pool by one of `threads`; `building` is held.
Pool* build(int threads) {
    Pool* pool = new Pool;  // never deleted: see above
    pool->threads = 1;
    for (int i = 1; i < threads; i++) {
        try {
            std::thread([pool, i] { pool->work(i); }).detach();
        } catch (const std::system_error&) {
            break;  // the system gives no more threads; fewer do the same work
        }
        pool->threads = i + 1;
    }
    the_pool.store(pool);
    return pool;
}

Pool* current() {
    Pool* pool = the_pool.load(std::memory_order_acquire);
    if (pool) return pool;
    std::lock_guard<std::mutex> lock(*building);
    pool = the_pool.load();
    return pool ? pool : build(puna_wanted_threads());
}

#ifndef _WIN32
[[maybe_unused]] const int fork_handlers = pthread_atfork(
    [] { building->lock(); }, [] { building->unlock(); },
    [] {
        // Threads do not survive a fork, and locks may be held by ones that are gone: start anew.
        building = new std::mutex;
        the_pool.store(nullptr);
    });
#endif

struct Scratch {
    void* data = nullptr;
    size_t bytes = 0;
    ~Scratch() { std::free(data); }
};
thread_local Scratch scratch;

}  // namespace

int puna_wanted_threads() {
    int threads = wanted.load();
    if (threads == 0) {
        threads = allowed();
        wanted.store(threads);
    }
    return threads;
}

void puna_set_threads(int threads) {
    std::lock_guard<std::mutex> lock(*building);
    wanted.store(threads);
    Pool* old = the_pool.load();
    if (!old) return;
    if (old->threads != threads) {
        // Whoever still holds the old pool finds no workers in it and works alone.
        build(threads);
        old->retired.store(true);
        { std::lock_guard<std::mutex> sleeping(old->sleep); }
        old->wake.notify_all();
    }
}

extern "C" int puna_threads() { return current()->threads; }

extern "C" void puna_parallel(int64_t chunks, int threads, Run run, void* job) {
    if (chunks > 1 && threads > 1) {
        Pool* pool = current();
        std::unique_lock<std::mutex> lock(pool->region, std::try_to_lock);
        if (lock.owns_lock() && pool->threads > 1) {
            pool->parallel(chunks, threads, run, job);
            return;
        }
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++) run(job, chunk, 0);
}

extern "C" void* puna_scratch(size_t bytes) {
    if (scratch.bytes >= bytes) return scratch.data;
    std::free(scratch.data);
    scratch.data = nullptr;
    scratch.bytes = 0;
    constexpr size_t HUGE_PAGE = size_t(2) << 20;
    size_t alignment = bytes >= HUGE_PAGE ? HUGE_PAGE : 64, size = (bytes + alignment - 1) / alignment * alignment;
    void* data = std::aligned_alloc(alignment, size);
    if (!data) throw std::bad_alloc();
#ifdef __linux__
    // Panels are read at large strides; small pages would miss in the TLB. A refusal costs only that.
    if (alignment == HUGE_PAGE) (void)madvise(data, size, MADV_HUGEPAGE);
#endif
    scratch.data = data;
    scratch.bytes = size;
    return data;
}

extern "C" void puna_release_pages(const void* begin, const void* end) {
#ifndef _WIN32
    static const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t first = (uintptr_t)begin / page * page, last = (uintptr_t)end / page * page;
    // A refusal costs only memory.
    if (first < last) (void)madvise((void*)first, last - first, MADV_DONTNEED);
#else
    (void)begin, (void)end;
#endif
}
