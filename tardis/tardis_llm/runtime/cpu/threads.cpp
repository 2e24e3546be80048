#include "threads.h"

#include <atomic>
#include <thread>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif

namespace tardis {
namespace {

std::atomic<OpenMP> openmp{nullptr};
std::atomic<bool> started{false};  // threads, by a call from here

constexpr int kSpins = 4096;  // before a waiting thread lets others have its processor
constexpr int kLine = 64, kLinesAtOnce = 4;

thread_local Team* leading = nullptr;  // none while it shares something out: what is shared out is not again
thread_local int number = -1;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");  // `yield` returns at once on most
#endif
}

// A moment of waiting.
inline void wait_a_little(int spins) {
    if (spins < kSpins) pause();
    else std::this_thread::yield();
}

#ifndef _WIN32
void after_fork() {
    if (started) openmp = nullptr;
}

const int registered = pthread_atfork(nullptr, nullptr, after_fork);
#endif

}  // namespace

void use_openmp(OpenMP parallel) { openmp = parallel; }

int number_in_team() { return number; }

void Team::lead(int threads, void (*function)(void*), void* context) {
    const OpenMP run = threads > 1 ? openmp.load(std::memory_order_relaxed) : nullptr;
    if (!run) return function(context);
    struct Call {
        Team* team;
        void (*function)(void*);
        void* context;
        std::thread::id leader;
    } call = {this, function, context, std::this_thread::get_id()};
    started = true;
    run([](void* data) {
        const Call& own = *static_cast<Call*>(data);
        if (std::this_thread::get_id() != own.leader) return own.team->serve();
        leading = own.team, number = 0;
        own.function(own.context);
        leading = nullptr, number = -1;
        own.team->over_.store(true, std::memory_order_release);
    }, &call, static_cast<unsigned>(threads), 0);
}

void Team::share(void (*function)(void*), void* context) {
    leading = nullptr;
    function_ = function, context_ = context;
    job_.fetch_add(1, std::memory_order_seq_cst);
    function(context);
    job_.fetch_add(1, std::memory_order_seq_cst);  // none begins it any more; those who have are waited for
    for (int spins = 0; working_.load(std::memory_order_seq_cst) > 0; ++spins) wait_a_little(spins);
    leading = this;
}

// Does its part of a job, if it is still there.
void Team::take(uint64_t job) {
    working_.fetch_add(1, std::memory_order_seq_cst);
    if (job_.load(std::memory_order_seq_cst) == job) function_(context_);
    working_.fetch_sub(1, std::memory_order_release);
}

void Team::serve() {
    number = 1 + arrived_.fetch_add(1, std::memory_order_relaxed);
    const void* known = nullptr;
    Stretch left = {};
    uint64_t last = 0;
    for (int spins = 0; !over_.load(std::memory_order_acquire); ++spins) {
        const uint64_t job = job_.load(std::memory_order_acquire);
        if (job % 2 == 1 && job != last) {
            take(last = job);
            spins = 0;
        }
        if (const void* next = next_.load(std::memory_order_relaxed); next != known) {
            known = next;
            left = next ? first_(next, number) : Stretch{};
        }
        for (int i = 0; i < kLinesAtOnce && left.begin < left.end; ++i, left.begin += kLine)
            __builtin_prefetch(left.begin, 0, 2);
        if (left.begin >= left.end) wait_a_little(spins);
    }
    number = -1;
}

void run_on_threads(int threads, void (*function)(void*), void* context) {
    if (threads > 1 && leading) return leading->share(function, context);
    const OpenMP run = threads > 1 ? openmp.load(std::memory_order_relaxed) : nullptr;
    if (!run) return function(context);
    started = true;
    run(function, context, static_cast<unsigned>(threads), 0);
}

}  // namespace tardis
