// Products with one matrix, and its rounding.
#include "ffn.h"

#include "tasks.h"

#include <algorithm>

namespace tardis {

void linear(const TardisMatrix& weight, const TardisVector& bias, const TardisBatch& batch) {
    each_product(weight, batch, bias, [&](int64_t begin, int64_t end, float* out) {
        const Widened b(bias, begin, end);
        for (int64_t t = 0; t < batch.tokens; ++t)
            store(batch, t * weight.rows + begin, out + t * kBlockRows, b.at, end - begin);
    });
}

// Rows of the weight are outputs, of which a task reads some from end to end; transposed, it reads long pieces of all.
void gemm(const TardisMatrix& weight, bool transposed, const TardisVector& bias, const TardisBatch& batch) {
    const int64_t inputs = transposed ? weight.rows : weight.columns;
    const int64_t outputs = transposed ? weight.columns : weight.rows, few = transposed ? kGemmOutputs : kBlockRows;
    const Dense& dense = dense_of(weight);
    const auto* x = static_cast<const uint16_t*>(batch.x);
    const int threads = threads_for(2 * inputs * outputs, batch.threads);
    const bool widened = batch.type != TARDIS_BF16;
    Numbers<float> wide(widened ? static_cast<size_t>(std::min(kGemmTokens, batch.tokens) * inputs) : 0);
    const PanelGemm panels = is_low_bit(weight) ? kernels().low_bit_gemm : in_panels(weight) ? dense.panels : nullptr;
    const int64_t step = panels && outputs >= 4 * threads * kGemmOutputs ? kGemmOutputs : few;  // of a task
    const int64_t most = panels ? kernels().panel_tokens : kGemmTokens;
    for (int64_t first = 0; first < batch.tokens; first += most) {
        const int64_t count = std::min(most, batch.tokens - first);
        if (widened) {
            parallel(threads_for(2 * count * inputs, batch.threads), count, [&](int64_t t) {
                kernels().widen({batch.x, batch.type, 0}, (first + t) * inputs, inputs, &wide[t * inputs]);
            });
        }
        const Tokens tokens = {x + first * inputs, wide.data(), count, inputs};
        parallel(threads, blocks(outputs, step), [&](int64_t task) {
            const Range range = {task * step, std::min((task + 1) * step, outputs)};
            float out[kGemmTokens * kGemmOutputs], b[kGemmOutputs];
            if (panels) panels(weight, range, tokens, out, step);
            else dense.gemm(weight, transposed, range, tokens, out, step);
            kernels().widen(bias, range.begin, range.end - range.begin, b);
            for (int64_t t = 0; t < tokens.count; ++t)
                store(batch, (first + t) * outputs + range.begin, out + t * step, b, range.end - range.begin);
        });
    }
}

void round_columns(const TardisRounding& rounding, int threads) {
    parallel(threads, blocks(rounding.rows, kBlockRows), [&](int64_t task) {
        const int64_t begin = task * kBlockRows;
        kernels().round_columns(rounding, begin, std::min(begin + kBlockRows, rounding.rows));
    });
}

}  // namespace tardis
