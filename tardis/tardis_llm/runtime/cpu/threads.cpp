#include "threads.h"

#include <atomic>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace tardis {
namespace {

std::atomic<OpenMP> openmp{nullptr};
std::atomic<bool> started{false};  // threads, by a call from here

struct Tasks {
    std::atomic<int64_t> next;
    const int64_t count;
    const Task task;
    const void* const context;

    static void work(void* tasks) {
        auto& all = *static_cast<Tasks*>(tasks);
        for (int64_t i; (i = all.next.fetch_add(1, std::memory_order_relaxed)) < all.count;) all.task(all.context, i);
    }
};

#ifndef _WIN32
void after_fork() {
    if (started) openmp = nullptr;
}

const int registered = pthread_atfork(nullptr, nullptr, after_fork);
#endif

}  // namespace

void use_openmp(OpenMP parallel) { openmp = parallel; }

void run_tasks(int threads, int64_t count, Task task, const void* context) {
    Tasks tasks{{0}, count, task, context};
    const OpenMP run = threads > 1 && count > 1 ? openmp.load(std::memory_order_relaxed) : nullptr;
    if (!run) return Tasks::work(&tasks);
    started = true;
    run(Tasks::work, &tasks, static_cast<unsigned>(threads), 0);
}

}  // namespace tardis
