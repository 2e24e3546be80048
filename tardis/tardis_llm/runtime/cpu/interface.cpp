// The exported functions: check, split into tasks, run.
#include "interface.h"

#include "activations.h"
#include "dispatch.h"
#include "ffn.h"
#include "threads.h"

#include <algorithm>
#include <atomic>
#include <new>

namespace tardis {
namespace {

// Groups end where blocks of 64 inputs do, and none lies across a block of 512.
bool fit_panels(const TardisMatrix& m) {
    const int64_t size = m.group_size;
    const bool bits = m.bits == 1 || m.bits == 2 || m.bits == 4 || m.bits == 8;
    return bits && (size >= m.columns || size % 512 == 0 || (size % 64 == 0 && 512 % size == 0));
}

bool is_number(int32_t type) { return type == TARDIS_BF16 || type == TARDIS_FP16 || type == TARDIS_FP32; }

bool sound(const TardisMatrix& m) {
    if (!m.data || m.rows < 1 || m.columns < 1) return false;
    if (is_number(m.type)) return true;
    if (m.type == TARDIS_BF16_PANELS) return tardis_has_panels() && m.columns % 2 == 0;
    if (m.type == TARDIS_FP16_PANELS) return tardis_has_panels();
    const bool codes = m.scale && m.bits >= 1 && m.bits <= 8 && m.group_size >= 1;
    if (m.type == TARDIS_LOW_BIT_PANELS) return codes && tardis_has_panels() && fit_panels(m);
    return codes && m.type == TARDIS_LOW_BIT;
}

bool sound(const TardisBatch& batch) {
    const bool bits = batch.activation_bits == 8 || batch.activation_bits == 16;
    return batch.x && batch.y && is_number(batch.type) && bits && batch.tokens >= 1 && batch.tokens <= kMaxTokens;
}

// Dense weights meet inputs of their own type only.
bool fits(const TardisMatrix& m, const TardisBatch& batch) {
    if (m.type == TARDIS_BF16_PANELS) return batch.type == TARDIS_BF16;
    if (m.type == TARDIS_FP16_PANELS) return batch.type == TARDIS_FP16;
    return m.type == TARDIS_LOW_BIT || m.type == TARDIS_LOW_BIT_PANELS || m.type == batch.type;
}

bool sound(const TardisFFN& ffn, const TardisBatch& batch) {
    const int64_t h = ffn.predictor.rows, d = ffn.predictor.columns;
    const auto is = [&](const TardisMatrix& m, int64_t rows) {
        return sound(m) && m.rows == rows && m.columns == d && fits(m, batch);
    };
    const bool ranges = ffn.low.data && ffn.high.data && ffn.slope.data && ffn.offset.data;
    const bool up = ffn.up.type == TARDIS_NONE ? ffn.down.type == TARDIS_LOW_BIT : is(ffn.up, h);
    const bool fold = ffn.fold.type == TARDIS_NONE || is(ffn.fold, d);
    const bool rows = !in_panels(ffn.up) && !in_panels(ffn.down);
    const bool predictor = ffn.predictor.type == TARDIS_LOW_BIT || ffn.predictor.type == TARDIS_LOW_BIT_PANELS;
    return is(ffn.predictor, h) && predictor && fold && up && rows && is(ffn.down, h) && ranges &&
           ffn.activation >= 0 && ffn.activation < kActivations;
}

// What runs in tasks allocates nothing, so this is all that can fail.
template <typename F>
int32_t guarded(const F& body) {
    try {
        body();
        return TARDIS_OK;
    } catch (const std::bad_alloc&) {
        return TARDIS_NO_MEMORY;
    } catch (...) {
        return TARDIS_BAD_ARGUMENT;
    }
}

}  // namespace
}  // namespace tardis

using namespace tardis;

extern "C" {

int32_t tardis_abi() { return 6; }

void tardis_use_openmp(void* parallel) { use_openmp(reinterpret_cast<OpenMP>(parallel)); }

int32_t tardis_linear(const TardisMatrix* weight, const TardisVector* bias, const TardisBatch* batch) {
    if (!sound(*weight) || !sound(*batch) || !fits(*weight, *batch)) return TARDIS_BAD_ARGUMENT;
    return guarded([&] { linear(*weight, *bias, *batch); });
}

int32_t tardis_has_gemm() { return kernels().bf16.gemm != nullptr; }

int32_t tardis_has_panels() { return kernels().bf16.panels != nullptr; }

int32_t tardis_gemm(
    const TardisMatrix* weight, int32_t transposed, const TardisVector* bias, const TardisBatch* batch
) {
    const int64_t inputs = transposed ? weight->rows : weight->columns;
    const bool bf16 = batch->type == TARDIS_BF16, fp16 = batch->type == TARDIS_FP16;
    const bool dense = fits(*weight, *batch) && !(transposed && in_panels(*weight)) && ((bf16 && inputs % 2 == 0) || fp16);
    if (!tardis_has_gemm() || !sound(*weight) || !dense || !batch->x || !batch->y || batch->tokens < 1)
        return TARDIS_BAD_ARGUMENT;
    return guarded([&] { gemm(*weight, transposed, *bias, *batch); });
}

int32_t tardis_fixed(const TardisFFN* ffn, const TardisBatch* batch) {
    const bool ranges = ffn->low.data && ffn->high.data;
    if (!sound(ffn->predictor) || !sound(*batch) || !fits(ffn->predictor, *batch) || !ranges)
        return TARDIS_BAD_ARGUMENT;
    return guarded([&] { fixed(*ffn, *batch); });
}

int32_t tardis_folded_ffn(const TardisFFN* ffn, const TardisBatch* batch) {
    if (!sound(*batch) || !sound(*ffn, *batch)) return TARDIS_BAD_ARGUMENT;
    return guarded([&] { folded_ffn(*ffn, *batch); });
}

uint64_t tardis_read(const uint64_t* data, int64_t words, int32_t threads) {
    constexpr int64_t kBlock = 1 << 17, kAhead = 2048;
    std::atomic<uint64_t> total{0};
    parallel(threads, (words + kBlock - 1) / kBlock, [&](int64_t number) {
        uint64_t sums[8] = {};
        const int64_t end = std::min(words, (number + 1) * kBlock);
        int64_t i = number * kBlock;
        for (; i + 8 <= end; i += 8) {
            __builtin_prefetch(data + i + kAhead);
            for (int j = 0; j < 8; ++j) sums[j] += data[i + j];
        }
        for (; i < end; ++i) sums[0] += data[i];
        for (int j = 1; j < 8; ++j) sums[0] += sums[j];
        total.fetch_add(sums[0], std::memory_order_relaxed);
    });
    return total.load();
}
}
