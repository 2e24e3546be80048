// The exported functions: check, split into tasks, run.
#include "interface.h"

#include "dispatch.h"
#include "ffn.h"
#include "step.h"
#include "threads.h"

#include <algorithm>
#include <atomic>
#include <new>

namespace tardis {
namespace {

bool is_number(int32_t type) { return type == TARDIS_BF16 || type == TARDIS_FP16 || type == TARDIS_FP32; }

// For columns of numbers in 16 bits; zero for other types.
int64_t together(int32_t type) {
    switch (type) {
        case TARDIS_BF16: case TARDIS_BF16_PANELS: return kBf16Together;
        case TARDIS_FP16: case TARDIS_FP16_PANELS: return kFp16Together;
        default: return 0;
    }
}

// Of codes, groups end where pieces of 64 inputs do, and none lies across a block.
bool can_be_in_panels(const TardisMatrix& m) {
    if (m.rows < 1 || m.columns < 1) return false;
    if (const int64_t columns = together(m.type)) return m.columns % columns == 0;
    const int64_t size = m.group_size;
    const bool bits = m.bits == 1 || m.bits == 2 || m.bits == 4 || m.bits == 8;
    const bool blocks = size % kBlockColumns == 0 || (size % 64 == 0 && kBlockColumns % size == 0);
    return is_low_bit(m) && bits && size >= 1 && (size >= m.columns || blocks);
}

bool can_be_code_rows(const TardisMatrix& m) {
    const bool fits = m.columns % 64 == 0 && (m.group_size % 64 == 0 || m.group_size >= m.columns);
    return is_low_bit(m) && (m.bits == 4 || m.bits == 8) && fits;
}

// Whether the instruction set in use multiplies panels of numbers, or of codes.
bool have_panels(const TardisMatrix& m) {
    return is_low_bit(m) ? kernels().low_bit_panels != nullptr : kernels().bf16.panels != nullptr;
}

bool is_valid(const TardisMatrix& m) {
    if (!m.data || m.rows < 1 || m.columns < 1) return false;
    if (in_panels(m) && !(have_panels(m) && can_be_in_panels(m))) return false;
    if (!is_low_bit(m)) return is_number(m.type) || in_panels(m);
    if (m.bits < 1 || m.bits > kMaxBits || (m.type == TARDIS_CODE_ROWS && !can_be_code_rows(m))) return false;
    const int32_t levels = 1 << m.bits;
    return m.scale && m.group_size >= 1 && (m.twice_zero == levels - 1 || (m.twice_zero == levels && !in_panels(m)));
}

bool are_bits(int32_t of_activations) { return of_activations == 8 || of_activations == 16; }

bool has_tokens(const TardisBatch& batch) { return batch.x && batch.y && batch.tokens >= 1; }

bool is_valid(const TardisBatch& batch) {
    return has_tokens(batch) && is_number(batch.type) && are_bits(batch.activation_bits) && batch.tokens <= kMaxTokens;
}

// Dense weights meet inputs of their own type only.
bool can_multiply(const TardisMatrix& m, const TardisBatch& batch) {
    if (m.type == TARDIS_BF16_PANELS) return batch.type == TARDIS_BF16;
    if (m.type == TARDIS_FP16_PANELS) return batch.type == TARDIS_FP16;
    return (is_low_bit(m) && m.type != TARDIS_CODE_ROWS) || m.type == batch.type;
}

bool has_activation(const TardisFFN& ffn) {
    return ffn.activation.kind >= TARDIS_GELU && ffn.activation.kind <= TARDIS_XIELU && (ffn.k == 1 || ffn.k == 2);
}

// Whether there is what neurons are tested with.
bool is_known(const TardisFFN& ffn) {
    const bool ranges = ffn.low.data && ffn.high.data && ffn.slope.data && ffn.offset.data;
    return ranges && has_activation(ffn) && are_bits(ffn.activation_bits) && ffn.predictor.rows % ffn.k == 0;
}

// What is kept of an FFN with inputs of d numbers, if anything is.
bool is_valid_kept(const TardisFFN& ffn, const TardisBatch& batch, int64_t d) {
    const TardisMatrix &up = ffn.kept_up, &down = ffn.kept_down;
    if (up.type == TARDIS_NONE) return down.type == TARDIS_NONE;
    const bool fit = up.columns == d && down.rows == d && down.columns * ffn.k == up.rows;
    return fit && is_valid(up) && is_valid(down) && can_multiply(up, batch) && can_multiply(down, batch);
}

bool is_valid(const TardisFFN& ffn, const TardisBatch& batch) {
    const bool predicts = ffn.predictor.type != TARDIS_NONE;
    const int64_t rows = ffn.predictor.rows, d = predicts ? ffn.predictor.columns : ffn.kept_up.columns;
    if (!has_activation(ffn) || !are_bits(ffn.activation_bits) || !is_valid_kept(ffn, batch, d)) return false;
    const auto fits = [&](const TardisMatrix& m, int64_t rows) {
        return is_valid(m) && m.rows == rows && m.columns == d;
    };
    const auto is = [&](const TardisMatrix& m, int64_t rows) { return fits(m, rows) && can_multiply(m, batch); };
    const bool up = ffn.up.type == TARDIS_NONE ? is_low_bit(ffn.down) : is(ffn.up, rows);
    const bool fold = ffn.fold.type == TARDIS_NONE || is(ffn.fold, d);
    const bool apart = !in_panels(ffn.up) && !in_panels(ffn.down);
    if (!predicts) return ffn.kept_up.type != TARDIS_NONE && fold;
    const bool predictor = is_known(ffn) && is_low_bit(ffn.predictor) && is(ffn.predictor, rows);
    const bool added = fits(ffn.down, rows / ffn.k) && (is_low_bit(ffn.down) || can_multiply(ffn.down, batch));
    return predictor && fold && up && apart && added;
}

bool is_valid(const TardisHead& head, const TardisBatch& batch) {
    const TardisMatrix &first = head.predictor, &rest = head.remainder;
    const bool fit = first.rows == rest.rows && first.columns == rest.columns;
    const bool low_bit = is_low_bit(first) && rest.type == TARDIS_LOW_BIT;
    return fit && low_bit && is_valid(first) && is_valid(rest) && can_multiply(first, batch) && head.top >= 1;
}

bool is_valid(const TardisOperation& op, const TardisBatch& batch, int64_t position) {
    if (!op.x.data || op.width < 1 || (op.kind != TARDIS_ADD && !op.of)) return false;
    switch (op.kind) {
        case TARDIS_PRODUCTS: {
            const auto* products = static_cast<const TardisProduct*>(op.of);
            return op.count >= 1 && op.count <= kMaxProducts && op.x.stride == op.width &&
                   std::all_of(products, products + op.count, [&](const TardisProduct& each) {
                       const TardisMatrix& m = each.weight;
                       return each.y && is_valid(m) && can_multiply(m, batch) && m.columns == op.width;
                   });
        }
        case TARDIS_FOLDED: {
            const auto& ffn = *static_cast<const TardisFFN*>(op.of);
            const bool contiguous = op.x.stride == op.width && op.y.stride == op.width;
            const bool predicts = ffn.predictor.type != TARDIS_NONE;
            const int64_t d = predicts ? ffn.predictor.columns : ffn.kept_up.columns;
            return op.y.data && contiguous && is_valid(ffn, batch) && d == op.width;
        }
        case TARDIS_HEAD: {
            const auto& head = *static_cast<const TardisHead*>(op.of);
            const bool contiguous = op.x.stride == op.width && op.y.stride == head.predictor.rows;
            return op.y.data && contiguous && is_valid(head, batch) && head.predictor.columns == op.width;
        }
        case TARDIS_ATTEND: {
            const auto& a = *static_cast<const TardisAttention*>(op.of);
            const bool sizes = a.size >= 1 && a.size <= kMaxHead && a.groups >= 1 && a.heads % a.groups == 0;
            return op.y.data && sizes && a.heads * a.size == op.width && position < a.capacity;
        }
        default: return op.y.data && op.kind >= TARDIS_NORM && op.kind <= TARDIS_HEAD;
    }
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

// A batch with the inputs and outputs of an operation.
TardisBatch rows_of(const TardisOperation& op, TardisBatch batch) {
    batch.x = op.x.data, batch.y = op.y.data;
    return batch;
}

}  // namespace
}  // namespace tardis

using namespace tardis;

extern "C" {

void tardis_use_openmp(void* parallel) { use_openmp(reinterpret_cast<OpenMP>(parallel)); }

int32_t tardis_linear(const TardisMatrix* weight, const TardisVector* bias, const TardisBatch* batch) {
    if (!is_valid(*weight) || !is_valid(*batch) || !can_multiply(*weight, *batch)) return TARDIS_BAD_ARGUMENT;
    return guarded([&] { linear(*weight, *bias, *batch); });
}

int32_t tardis_head(const TardisHead* of, const TardisBatch* batch) {
    if (!is_valid(*batch) || !is_valid(*of, *batch)) return TARDIS_BAD_ARGUMENT;
    return guarded([&] { head(*of, *batch); });
}

int32_t tardis_has_gemm() { return kernels().bf16.gemm != nullptr; }

int32_t tardis_has_low_bit_gemm() { return kernels().low_bit_gemm != nullptr; }

int32_t tardis_can_be_in_panels(const TardisMatrix* matrix) {
    return have_panels(*matrix) && can_be_in_panels(*matrix);
}
int32_t tardis_can_be_code_rows(const TardisMatrix* matrix) {
    return kernels().code_rows && can_be_code_rows(*matrix);
}

int32_t tardis_gemm(
    const TardisMatrix* weight, int32_t transposed, const TardisVector* bias, const TardisBatch* batch
) {
    const int64_t inputs = transposed ? weight->rows : weight->columns;
    const int64_t columns = together(batch->type);
    const bool dense = !is_low_bit(*weight) && can_multiply(*weight, *batch) && columns && inputs % columns == 0;
    const bool codes = weight->type == TARDIS_LOW_BIT_PANELS && batch->type == TARDIS_BF16 && kernels().low_bit_gemm;
    const bool in_order = (dense || codes) && !(transposed && in_panels(*weight));
    if (!tardis_has_gemm() || !is_valid(*weight) || !in_order || !has_tokens(*batch))
        return TARDIS_BAD_ARGUMENT;
    return guarded([&] { gemm(*weight, transposed, *bias, *batch); });
}

int32_t tardis_fixed(const TardisFFN* ffn, const TardisBatch* batch) {
    if (!is_valid(ffn->predictor) || !is_valid(*batch) || !can_multiply(ffn->predictor, *batch) || !is_known(*ffn))
        return TARDIS_BAD_ARGUMENT;
    return guarded([&] { fixed(*ffn, *batch); });
}

int32_t tardis_folded_ffn(const TardisFFN* ffn, const TardisBatch* batch) {
    if (!is_valid(*batch) || !is_valid(*ffn, *batch)) return TARDIS_BAD_ARGUMENT;
    return guarded([&] { folded_ffn(*ffn, *batch); });
}

int32_t tardis_has_exact_ffn(const TardisFFN* ffn) { return is_known(*ffn) && has_exact(*ffn); }

int32_t tardis_exact_ffn(const TardisFFN* ffn, const TardisVector* b2, const TardisBatch* batch) {
    const bool valid = has_tokens(*batch) && batch->type == TARDIS_BF16 && is_valid(*ffn, *batch) && has_exact(*ffn);
    if (!valid) return TARDIS_BAD_ARGUMENT;
    return guarded([&] { exact_ffn(*ffn, *b2, *batch); });
}

int32_t tardis_step(const TardisOperation* operations, int64_t count, const TardisBatch* batch, int64_t position) {
    const bool tokens = batch->tokens >= 1 && batch->tokens <= kMaxTokens && is_number(batch->type);
    if (!are_bits(batch->activation_bits) || !tokens || position < 0) return TARDIS_BAD_ARGUMENT;
    const TardisOperation* end = operations + count;
    const auto valid = [&](const TardisOperation& op) { return is_valid(op, rows_of(op, *batch), position); };
    if (!std::all_of(operations, end, valid)) return TARDIS_BAD_ARGUMENT;
    int32_t status = TARDIS_OK;
    Team team([&](const void* next, int thread) {
        return first_read(*static_cast<const TardisOperation*>(next), *batch, thread);
    });
    const auto all = [&] {
        for (const TardisOperation *op = operations, *next = op; op != end && status == TARDIS_OK; ++op) {
            if (next <= op) next = std::find_if(op + 1, end, reads_weights);
            team.announce(next == end ? nullptr : next);
            status = guarded([&] { run(*op, rows_of(*op, *batch), position); });
        }
    };
    team.lead(batch->threads, all);
    return status;
}

int32_t tardis_round_columns(const TardisRounding* rounding, int32_t threads) {
    const TardisRounding& r = *rounding;
    const bool given = r.target && r.scale && r.factor && r.change;
    if (!given || r.rows < 0 || r.columns < 1 || r.columns > kRoundedColumns) return TARDIS_BAD_ARGUMENT;
    round_columns(r, threads);
    return TARDIS_OK;
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
