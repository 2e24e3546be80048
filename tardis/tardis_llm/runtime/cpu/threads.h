// Numbered tasks shared out among the threads of OpenMP that torch uses as well: threads of our own would fight for the
// cores with torch's, which go on spinning for a while after each of its operations.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <utility>

namespace tardis {

// `GOMP_parallel` of GNU's OpenMP, which LLVM's and Intel's have too: function(data) on `threads` threads.
using OpenMP = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

// From now on, run tasks on its threads; null: on the calling one only, as at first.
void use_openmp(OpenMP parallel);

// Runs function(context) on at most `threads` threads at once, the caller one of them; returns when all have. A forked
// child whose parent has done so has none of its parent's threads, and runs it once. It must not throw. Who leads a
// `Team` shares it with that.
void run_on_threads(int threads, void (*function)(void*), void* context);

// Runs body() on at most `threads` threads at once, as `run_on_threads` does.
template <typename F>
void on_threads(int threads, F& body) {
    run_on_threads(threads, [](void* context) { (*static_cast<F*>(context))(); }, &body);
}

// Bytes that are read one after the other.
struct Stretch {
    const char *begin, *end;
};

// Threads that stay together while one of them leads. What it shares out they take at once, as they do not sleep in
// between; and while they wait, they fetch what they will read next into their caches.
class Team {
public:
    // What a thread of the team, 0 for its leader, reads first of what comes next.
    using First = std::function<Stretch(const void* next, int thread)>;

    explicit Team(First first) : first_(std::move(first)) {}

    // Runs body() on the calling thread, which leads up to `threads` - 1 others. It must not throw.
    template <typename F>
    void lead(int threads, const F& body) {
        lead(threads, [](void* context) { (*static_cast<const F*>(context))(); }, const_cast<F*>(&body));
    }

    // From now on, those who wait fetch the first of this.
    void announce(const void* next) { next_.store(next, std::memory_order_relaxed); }

    // Runs function(context) on the calling thread, which leads, and on all others that come before it is done.
    void share(void (*function)(void*), void* context);

private:
    void lead(int threads, void (*function)(void*), void* context);
    void serve();
    void take(uint64_t job);

    const First first_;
    std::atomic<const void*> next_{nullptr};
    std::atomic<uint64_t> job_{0};  // odd while there is one
    std::atomic<int> arrived_{0}, working_{0};
    std::atomic<bool> over_{false};
    void (*function_)(void*) = nullptr;
    void* context_ = nullptr;
};

// The number of this thread in the team that it is in; -1 if in none.
int number_in_team();

// Numbers 0..count-1, handed out to threads.
class Tasks {
public:
    explicit Tasks(int64_t count) : count_(count) {}

    // body(number) for as many as this thread gets: how many those were.
    template <typename F>
    int64_t run(F&& body) {
        int64_t own = 0;
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_; ++own) body(i);
        return own;
    }

    // Says that some are done. True if these were the last: for one thread only, which sees what all have done.
    bool finish(int64_t some) { return done_.fetch_add(some, std::memory_order_acq_rel) + some == count_ && some > 0; }

private:
    const int64_t count_;
    std::atomic<int64_t> next_{0}, done_{0};
};

// Lets threads pass once it is open.
class Gate {
public:
    void open() { open_.store(true, std::memory_order_release); }
    void wait() const;

private:
    std::atomic<bool> open_{false};
};

constexpr int kMaxShares = 64;

// Numbers of which a thread takes one after the other, so that what it fetches ahead is its own.
struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
};

// body(0..count-1) on at most `threads` threads: each begins with a share of its own, and then helps the others.
template <typename F>
void parallel(int threads, int64_t count, const F& body) {
    const int shares = threads < 1 ? 1 : threads < kMaxShares ? threads : kMaxShares;
    Share all[kMaxShares];
    for (int s = 0; s < shares; ++s) all[s].next = s * count / shares, all[s].end = (s + 1) * count / shares;
    std::atomic<int> arrived{0};
    auto run = [&] {
        const int number = number_in_team(), own = number < 0 ? arrived.fetch_add(1, std::memory_order_relaxed) : number;
        for (int k = 0; k < shares; ++k) {
            Share& share = all[(own + k) % shares];
            for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) body(i);
        }
    };
    on_threads(count > 1 ? threads : 1, run);
}

}  // namespace tardis
