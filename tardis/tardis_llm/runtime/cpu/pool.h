// Threads that share out numbered tasks. They sleep between calls, and a forked child starts its own.
#pragma once
#include <cstdint>

namespace tardis {

using Task = void (*)(const void* context, int64_t number);

// Runs task(context, 0..count-1) on at most `threads` threads, the caller one of them; returns when all are done. While
// another thread is inside, the caller does all by itself. A task must not throw.
void run_tasks(int threads, int64_t count, Task task, const void* context);

// The same for anything that can be called with a number.
template <typename F>
void parallel(int threads, int64_t count, const F& body) {
    run_tasks(
        threads, count, [](const void* context, int64_t number) { (*static_cast<const F*>(context))(number); }, &body
    );
}

}  // namespace tardis
