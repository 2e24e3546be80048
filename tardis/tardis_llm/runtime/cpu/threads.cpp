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

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#endif
}

#ifndef _WIN32
void after_fork() {
    if (started) openmp = nullptr;
}

const int registered = pthread_atfork(nullptr, nullptr, after_fork);
#endif

}  // namespace

void use_openmp(OpenMP parallel) { openmp = parallel; }

void run_on_threads(int threads, void (*function)(void*), void* context) {
    const OpenMP run = threads > 1 ? openmp.load(std::memory_order_relaxed) : nullptr;
    if (!run) return function(context);
    started = true;
    run(function, context, static_cast<unsigned>(threads), 0);
}

// Mostly not long: what is waited for are tasks that other threads have begun, and small ones come last.
void Gate::wait() const {
    for (int spins = 0; !open_.load(std::memory_order_acquire); ++spins) {
        if (spins < kSpins) pause();
        else std::this_thread::yield();
    }
}

}  // namespace tardis
