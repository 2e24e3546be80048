// How products and folded FFNs are split into tasks, and what tasks read and write.
#pragma once
#include "dispatch.h"
#include "threads.h"

#include <algorithm>

namespace tardis {

constexpr int64_t kShared = 1 << 17;  // bytes; waking threads for less costs more than it brings

// Some numbers of a vector, in fp32.
struct Widened {
    float at[kBlockRows];
    Widened(const TardisVector& v, int64_t begin, int64_t end) { kernels().widen(v, begin, end - begin, at); }
};

// Number i is read soon.
inline __attribute__((always_inline)) void prefetch(const TardisVector& v, int64_t i) {
    const int64_t size = v.type == TARDIS_FP32 ? 4 : 2;
    if (v.type != TARDIS_NONE) __builtin_prefetch(static_cast<const char*>(v.data) + i * size);
}

// Numbers begin..end-1.
inline __attribute__((always_inline)) void prefetch(const TardisVector& v, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += 16) prefetch(v, i);
}

// Outputs from number `at` on, in the type of the batch.
inline void store(const TardisBatch& batch, int64_t at, const float* values, int64_t count) {
    auto* f32 = static_cast<float*>(batch.y) + at;
    auto* half = static_cast<uint16_t*>(batch.y) + at;
    switch (batch.type) {
        case TARDIS_BF16: std::transform(values, values + count, half, to_bf16); break;
        case TARDIS_FP16: std::transform(values, values + count, half, to_fp16); break;
        default: std::copy(values, values + count, f32);
    }
}

// The same with a bias added.
inline void store(const TardisBatch& batch, int64_t at, float* values, const float* bias, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] += bias[i];
    store(batch, at, values, count);
}

inline int64_t row_bytes(const TardisMatrix& m) {
    if (is_low_bit(m)) return (m.columns + 7) / 8 * m.bits;
    return m.columns * (m.type == TARDIS_FP32 ? 4 : 2);
}

// All or one: OpenMP ends threads and starts new ones when their number changes.
inline int threads_for(int64_t bytes, int threads) { return bytes < kShared ? 1 : std::max(threads, 1); }

// Rows of a task: as many as keep every thread supplied, at most kBlockRows.
inline int64_t block_rows(const TardisMatrix& m, int64_t rows, int threads) {
    const int64_t unit = in_panels(m) ? kPanelRows : 4, some = (rows / (threads * 8) + unit - 1) / unit * unit;
    return std::min(std::max(some, unit), kBlockRows);
}

inline int64_t blocks(int64_t rows, int64_t block) { return (rows + block - 1) / block; }

}  // namespace tardis
