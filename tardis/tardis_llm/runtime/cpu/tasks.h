// How products and folded FFNs are split into tasks, and what tasks read and write.
#pragma once
#include "dispatch.h"
#include "input.h"
#include "threads.h"

#include <algorithm>

namespace tardis {

constexpr int64_t kShared = 1 << 17;  // bytes; waking threads for less costs more than it brings
constexpr int64_t kSharedInTeam = 1 << 14;  // where they are awake

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

// Outputs from number `at` on, in the type of the batch, with a bias if one is given.
inline void store(const TardisBatch& batch, int64_t at, const float* values, const float* bias, int64_t count) {
    kernels().store({batch.y, batch.type, 0}, at, count, values, bias);
}

inline void store(const TardisBatch& batch, int64_t at, const float* values, int64_t count) {
    store(batch, at, values, nullptr, count);
}

inline int64_t row_bytes(const TardisMatrix& m) {
    if (is_low_bit(m)) return (m.columns + 7) / 8 * m.bits;
    return m.columns * (m.type == TARDIS_FP32 ? 4 : 2);
}

inline int64_t matrix_bytes(const TardisMatrix& m) { return m.rows * row_bytes(m); }

// A row, not in panels, is read soon.
inline __attribute__((always_inline)) void prefetch_row(const TardisMatrix& m, int64_t row) {
    constexpr int64_t kLine = 64;
    const int64_t bytes = row_bytes(m);
    const char* data = static_cast<const char*>(m.data) + row * bytes;
    for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(data + i, 0, 2);
    __builtin_prefetch(data + bytes - 1, 0, 2);
    if (!m.scale) return;
    const int64_t groups = (m.columns + m.group_size - 1) / m.group_size;
    for (int64_t i = 0; i < groups; i += kLine / 2) __builtin_prefetch(m.scale + row * groups + i, 0, 2);
}

// Bytes of the rows of a panel.
inline int64_t panel_bytes(const TardisMatrix& m) {
    const int64_t line = is_low_bit(m) ? 8 * kLineBytes / m.bits : 1;
    return (m.columns + line - 1) / line * (is_low_bit(m) ? kLineBytes : 2) * kPanelRows;
}

// What rows begin..end-1 lie in, no more than so many bytes of it.
inline Stretch stretch_of(const TardisMatrix& m, int64_t begin, int64_t end, int64_t most) {
    const auto* data = static_cast<const char*>(m.data);
    const int64_t unit = in_panels(m) ? kPanelRows : 1, bytes = in_panels(m) ? panel_bytes(m) : row_bytes(m);
    const int64_t first = begin / unit * bytes, last = (end + unit - 1) / unit * bytes;
    return {data + first, data + std::min(last, first + most)};
}

// Part number i of `count` with as many rows each, of a matrix that is not in panels.
inline TardisMatrix part_of(const TardisMatrix& m, int64_t i, int64_t count) {
    TardisMatrix part = m;
    part.rows = m.rows / count;
    const int64_t first = i * part.rows;
    part.data = static_cast<const char*>(m.data) + first * row_bytes(m);
    if (m.scale) part.scale = m.scale + first * ((m.columns + m.group_size - 1) / m.group_size);
    return part;
}

// All or one: OpenMP ends threads and starts new ones when their number changes.
inline int threads_for(int64_t bytes, int threads) {
    return bytes < (number_in_team() < 0 ? kShared : kSharedInTeam) ? 1 : std::max(threads, 1);
}

// Rows of a task: as many as keep every thread supplied, at most kBlockRows.
inline int64_t block_rows(const TardisMatrix& m, int64_t rows, int threads) {
    const int64_t unit = in_panels(m) ? kPanelRows : 4, some = (rows / (threads * 8) + unit - 1) / unit * unit;
    return std::min(std::max(some, unit), kBlockRows);
}

// The products with rows begin..end-1, kBlockRows at most. Panels are multiplied from the first row on.
inline void multiply(const TardisMatrix& m, int64_t begin, int64_t end, const Input& x, float* out) {
    const int64_t before = in_panels(m) ? begin % kPanelRows : 0;
    product_of(m)(m, {nullptr, begin - before, end, m.rows}, x, out);
    for (int64_t t = 0; before && t < x.tokens; ++t) {
        float* own = out + t * kBlockRows;
        std::copy(own + before, own + before + end - begin, own);
    }
}

// Neurons of a task, whose up-projections are `k` times `count` rows: rows of a block are those of a panel, and of the
// next one where the others' begin within a panel.
inline int64_t block_neurons(const TardisMatrix& up, int64_t count, int32_t k, int threads) {
    const bool within = in_panels(up) && k > 1 && count % kPanelRows != 0;
    return within ? kPanelRows : block_rows(up, count, threads);
}

inline int64_t blocks(int64_t rows, int64_t block) { return (rows + block - 1) / block; }

// body(begin, end, products) for some rows of a matrix at a time: those of the batch with rows begin..end-1, as a
// `Product` gives them. Numbers begin..end-1 of `vector`, which the body reads, are fetched meanwhile.
template <typename F>
void each_product(const TardisMatrix& m, const TardisBatch& batch, const TardisVector& vector, const F& body) {
    Inputs inputs(batch, m.columns);
    const Input& x = inputs.for_matrix(m, batch.activation_bits);
    const int threads = threads_for(matrix_bytes(m), batch.threads);
    const int64_t block = block_rows(m, m.rows, threads);
    parallel(threads, blocks(m.rows, block), [&](int64_t task) {
        const int64_t begin = task * block, end = std::min(begin + block, m.rows);
        float products[kMaxTokens * kBlockRows];
        prefetch(vector, begin, end);
        product_of(m)(m, {nullptr, begin, end, m.rows}, x, products);
        body(begin, end, products);
    });
}

}  // namespace tardis
