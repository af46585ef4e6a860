// The interpreter's lock around a call of the kernels.
#pragma once

#include <nanobind/nanobind.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

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
        if (PyErr_CheckSignals()) throw nanobind::python_error();
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
        nanobind::gil_scoped_release release;
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
