// Numbered tasks shared out among the threads of OpenMP that torch uses as well: threads of our own would fight for the
// cores with torch's, which go on spinning for a while after each of its operations.
#pragma once
#include <cstdint>

namespace tardis {

// `GOMP_parallel` of GNU's OpenMP, which LLVM's and Intel's have too: function(data) on `threads` threads.
using OpenMP = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

// From now on, run tasks on its threads; null: on the calling one only, as at first.
void use_openmp(OpenMP parallel);

using Task = void (*)(const void* context, int64_t number);

// Runs task(context, 0..count-1) on at most `threads` threads, the caller one of them; returns when all are done. A
// forked child whose parent has done so runs them one by one: it has none of its parent's threads. A task must not
// throw.
void run_tasks(int threads, int64_t count, Task task, const void* context);

// The same for anything that can be called with a number.
template <typename F>
void parallel(int threads, int64_t count, const F& body) {
    run_tasks(
        threads, count, [](const void* context, int64_t number) { (*static_cast<const F*>(context))(number); }, &body
    );
}

}  // namespace tardis
