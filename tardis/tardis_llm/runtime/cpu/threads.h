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

    // body(number) for as many as this thread gets.
    template <typename F>
    void run(const F& body) {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) body(i);
    }

private:
    const int64_t count_;
    std::atomic<int64_t> next_{0};
};

// The same in shares of consecutive ones: a thread begins with its own, so that what it fetches ahead it reads itself,
// and then helps the others.
class Shares {
public:
    Shares(int threads, int64_t count) : shares_(threads < 1 ? 1 : threads < kMost ? threads : kMost) {
        for (int s = 0; s < shares_; ++s) all_[s].next = s * count / shares_, all_[s].end = (s + 1) * count / shares_;
    }

    // body(number) for as many as this thread gets.
    template <typename F>
    void run(const F& body) {
        const int number = number_in_team();
        const int own = number < 0 ? arrived_.fetch_add(1, std::memory_order_relaxed) : number;
        for (int k = 0; k < shares_; ++k) {
            Share& share = all_[(own + k) % shares_];
            for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) body(i);
        }
    }

private:
    static constexpr int kMost = 64;
    struct alignas(64) Share {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };
    const int shares_;
    Share all_[kMost];
    std::atomic<int> arrived_{0};
};

// body(0..count-1) on at most `threads` threads, in shares.
template <typename F>
void parallel(int threads, int64_t count, const F& body) {
    Shares shares(threads, count);
    auto run = [&] { shares.run(body); };
    on_threads(count > 1 ? threads : 1, run);
}

}  // namespace tardis
