// An FFN with the weights that stand for its dense ones in few bits, for many tokens in bf16: every neuron is computed,
// and no fold. Tokens go through in blocks, whose hidden activations are kept in bf16.
#include "ffn.h"

#include "dispatch.h"
#include "input.h"
#include "tasks.h"

#include <algorithm>

namespace tardis {
namespace {

constexpr int kMost = 2;  // up-projections per neuron
constexpr int64_t kNeurons = 4 * kBlockRows;  // of a task

class Exact {
public:
    Exact(const TardisFFN& ffn, const TardisVector& b2, const TardisBatch& batch)
        : ffn_(ffn), b2_(b2), batch_(batch), h_(ffn.predictor.rows / ffn.k), d_(ffn.predictor.columns),
          most_(std::min(kernels().panel_tokens, batch.tokens)), hidden_(static_cast<size_t>(most_ * h_)) {}

    void run() {
        for (int64_t first = 0; first < batch_.tokens; first += most_) {
            const int64_t count = std::min(most_, batch_.tokens - first);
            const auto* x = static_cast<const uint16_t*>(batch_.x) + first * d_;
            parallel(batch_.threads, blocks(h_, kNeurons), [&](int64_t task) {
                hide({x, nullptr, count, d_}, {task * kNeurons, std::min((task + 1) * kNeurons, h_)});
            });
            parallel(batch_.threads, 2 * blocks(d_, kBlockColumns), [&](int64_t task) {
                add_up({hidden_.data(), nullptr, count, h_}, first, halves(task));
            });
        }
    }

private:
    // The columns of half a block of a plane.
    Range halves(int64_t task) const {
        const int64_t block = task / 2 * kBlockColumns, half = std::min(d_ - block, kBlockColumns) / 2;
        const int64_t begin = block + task % 2 * half;
        return {begin, begin + half};
    }

    // The hidden activations of some neurons.
    void hide(const Tokens& x, Range neurons) {
        alignas(64) float v[kMost][kGemmTokens * kNeurons];
        for (int j = 0; j < ffn_.k; ++j) {
            const Range rows = {j * h_ + neurons.begin, j * h_ + neurons.end};
            kernels().sum_gemm(ffn_.predictor, ffn_.up, rows, x, v[j], kNeurons);
        }
        for (int64_t begin = neurons.begin; begin < neurons.end; begin += kBlockRows) {
            const int64_t count = std::min(kBlockRows, neurons.end - begin), at = begin - neurons.begin;
            const int64_t other = (ffn_.k - 1) * h_ + begin;  // the row of W1 that a gate is before
            const Widened first_bias(ffn_.b1, begin, begin + count), second_bias(ffn_.b1, other, other + count);
            for (int64_t t = 0; t < x.count; ++t) {
                float *first = v[0] + t * kNeurons + at, *second = v[1] + t * kNeurons + at;
                for (int64_t i = 0; i < count; ++i) first[i] += first_bias.at[i];
                kernels().activate(ffn_.activation, first, count);
                for (int64_t i = 0; ffn_.k > 1 && i < count; ++i) first[i] *= second[i] + second_bias.at[i];
                kernels().store({hidden_.data(), TARDIS_BF16, 0}, t * h_ + begin, count, first, nullptr);
            }
        }
    }

    // Some columns of the outputs.
    void add_up(const Tokens& hidden, int64_t first, Range columns) {
        alignas(64) float out[kGemmTokens * kDownColumns];
        float bias[kDownColumns];
        const int64_t count = columns.end - columns.begin;
        kernels().down_gemm(ffn_.down, columns, hidden, out, kDownColumns);
        kernels().widen(b2_, columns.begin, count, bias);
        for (int64_t t = 0; t < hidden.count; ++t)
            store(batch_, (first + t) * d_ + columns.begin, out + t * kDownColumns, bias, count);
    }

    const TardisFFN& ffn_;
    const TardisVector& b2_;
    const TardisBatch& batch_;
    const int64_t h_, d_, most_;
    Numbers<uint16_t> hidden_;  // [tokens, h]
};

}  // namespace

bool has_exact(const TardisFFN& ffn) {
    const TardisMatrix &predictor = ffn.predictor, &up = ffn.up, &down = ffn.down;
    if (!kernels().sum_gemm || !kernels().down_gemm || predictor.type != TARDIS_LOW_BIT_PANELS) return false;
    const bool rest = up.type == TARDIS_NONE || (up.type == TARDIS_LOW_BIT && up.group_size == predictor.group_size);
    const bool sizes = predictor.columns % 64 == 0 && predictor.rows / ffn.k % kPanelRows == 0;
    const bool lies = down.type == (kernels().code_rows ? TARDIS_CODE_ROWS : TARDIS_LOW_BIT);
    return rest && sizes && lies && down.group_size % 16 == 0;
}

void exact_ffn(const TardisFFN& ffn, const TardisVector& b2, const TardisBatch& batch) { Exact(ffn, b2, batch).run(); }

}  // namespace tardis
