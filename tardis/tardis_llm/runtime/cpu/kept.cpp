#include "kept.h"

#include "ffn.h"
#include "tasks.h"

#include <algorithm>

namespace tardis {
namespace {

constexpr int kMost = 2;  // up-projections per neuron

// For the activations; the thread's, from call to call.
char* room(int64_t bytes) {
    static thread_local Numbers<char> all;
    grow(all, bytes);
    return all.data();
}

}  // namespace

Kept::Kept(const TardisFFN& ffn, const TardisBatch& batch, Inputs& inputs, int threads)
    : ffn_(ffn), batch_(batch), count_(ffn.kept_up.rows / ffn.k),
      block_(block_neurons(ffn.kept_up, count_, ffn.k, threads)),
      x_(inputs.for_matrix(ffn.kept_up, batch.activation_bits)), hidden_(batch) {
    hidden_.x = room(batch.tokens * count_ * (batch.type == TARDIS_FP32 ? 4 : 2));
}

int64_t Kept::tasks() const { return blocks(count_, block_); }

void Kept::hide(int64_t task) const {
    const int64_t begin = task * block_, end = std::min(begin + block_, count_), some = end - begin;
    const Number number(batch_.type);
    const TardisRows to = {const_cast<void*>(hidden_.x), count_};
    float v[kMost][kMaxTokens * kBlockRows];
    for (int j = 0; j < ffn_.k; ++j) {
        prefetch(ffn_.kept_bias, j * count_ + begin, j * count_ + end);
        multiply(ffn_.kept_up, j * count_ + begin, j * count_ + end, x_, v[j]);
        const Widened bias(ffn_.kept_bias, j * count_ + begin, j * count_ + end);
        for (int64_t t = 0; t < batch_.tokens; ++t) {
            float* own = v[j] + t * kBlockRows;
            for (int64_t i = 0; i < some; ++i) own[i] += bias.at[i];
            number.round(own, some);
        }
    }
    for (int64_t t = 0; t < batch_.tokens; ++t) {
        float *own = v[0] + t * kBlockRows, *other = v[1] + t * kBlockRows;
        number.hide(ffn_.activation, own, ffn_.k > 1 ? other : nullptr, some);
        number.keep(to, t, begin, some, own);
    }
}

void Kept::gather() {
    if (!count_) return;
    inputs_.emplace(hidden_, count_);
    hidden_x_ = &inputs_->for_matrix(ffn_.kept_down, batch_.activation_bits);
}

void Kept::add(int64_t begin, int64_t end, float* out) const {
    if (!count_) return;
    float more[kMaxTokens * kBlockRows];
    product_of(ffn_.kept_down)(ffn_.kept_down, {nullptr, begin, end, ffn_.kept_down.rows}, *hidden_x_, more);
    for (int64_t t = 0; t < batch_.tokens; ++t)
        for (int64_t i = 0; i < end - begin; ++i) out[t * kBlockRows + i] += more[t * kBlockRows + i];
}

}  // namespace tardis
