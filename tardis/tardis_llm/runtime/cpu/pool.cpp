#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace tardis {
namespace {

// Waiting this long without sleep spans the gap between the phases of one FFN, and costs little if nothing follows.
constexpr auto kSpin = std::chrono::microseconds(30);

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

// True as soon as `done()` is; false after a while.
template <typename F>
bool spin_until(const F& done) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; ++i) {
            if (done()) return true;
            relax();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

class Pool {
public:
    // Whoever gets it must run, then leave.
    bool enter() { return !busy_.exchange(true, std::memory_order_acquire); }
    void leave() { busy_.store(false, std::memory_order_release); }

    void run(int threads, int64_t count, Task task, const void* context) {
        grow(threads - 1);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_ = task, context_ = context, count_ = count;
            next_.store(0, std::memory_order_relaxed);
            places_ = threads - 1;
            round_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        work();
        std::unique_lock<std::mutex> lock(mutex_);
        places_ = 0;  // who wakes up now has come too late
        if (active_.load(std::memory_order_acquire) == 0) return;
        lock.unlock();
        const auto done = [this] { return active_.load(std::memory_order_acquire) == 0; };
        if (spin_until(done)) return;
        lock.lock();
        finished_.wait(lock, done);
    }

private:
    void grow(int workers) {
        for (; workers_ < workers; ++workers_) {
            try {
                std::thread([this] { serve(); }).detach();
            } catch (const std::system_error&) {
                return;  // with fewer threads, then
            }
        }
    }

    void serve() {
        uint64_t seen = 0;
        for (;;) {
            const auto called = [&] { return round_.load(std::memory_order_acquire) != seen; };
            const bool awake = spin_until(called);
            {
                std::unique_lock<std::mutex> lock(mutex_);
                if (!awake) wake_.wait(lock, called);
                seen = round_.load(std::memory_order_relaxed);
                if (places_ == 0) continue;
                --places_;
                active_.fetch_add(1, std::memory_order_relaxed);
            }
            work();
            std::lock_guard<std::mutex> lock(mutex_);
            if (active_.fetch_sub(1, std::memory_order_acq_rel) == 1) finished_.notify_all();
        }
    }

    void work() {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) task_(context_, i);
    }

    std::atomic<bool> busy_{false};
    std::mutex mutex_;
    std::condition_variable wake_, finished_;
    std::atomic<uint64_t> round_{0};
    std::atomic<int64_t> next_{0};
    std::atomic<int> active_{0};
    int places_ = 0, workers_ = 0;
    Task task_ = nullptr;
    const void* context_ = nullptr;
    int64_t count_ = 0;
};

std::atomic<Pool*> current{nullptr};

// Never destroyed: its threads may outlive `main`. A forked child, which has none of them, forgets it.
Pool* pool() {
    Pool* found = current.load(std::memory_order_acquire);
    if (found) return found;
    Pool* made = new (std::nothrow) Pool;
    if (!made) return nullptr;
    if (!current.compare_exchange_strong(found, made, std::memory_order_acq_rel)) {
        delete made;
        return found;
    }
    return made;
}

#ifndef _WIN32
const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr, std::memory_order_release); });
#endif

}  // namespace

void run_tasks(int threads, int64_t count, Task task, const void* context) {
    if (threads > count) threads = static_cast<int>(count);
    Pool* workers = threads > 1 ? pool() : nullptr;
    if (!workers || !workers->enter()) {
        for (int64_t i = 0; i < count; ++i) task(context, i);
        return;
    }
    workers->run(threads, count, task, context);
    workers->leave();
}

}  // namespace tardis
