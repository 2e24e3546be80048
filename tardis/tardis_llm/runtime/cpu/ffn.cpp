// The folded FFN in three passes over its weights, each shared out among the threads:
//
//   1. rows of the predictor, giving each token's fixed neurons, and rows of the fold;
//   2. W1 of the neurons that any token fixes, giving residuals;
//   3. W2 columns of these, added to the outputs; a thread owns some of the outputs' columns.
//
// Nothing depends on which thread does what, so results are the same for every number of threads.
#include "ffn.h"

#include "activations.h"
#include "dispatch.h"
#include "input.h"
#include "pool.h"

#include <algorithm>

namespace tardis {
namespace {

constexpr int64_t kBlockRows = 64;  // of a task
constexpr int64_t kAddColumns = 1024;  // of a task that adds dense rows: some rows and those ahead fit the first cache
constexpr int64_t kBytesPerThread = 1 << 16;  // waking a thread for less costs more than it brings

float number(const TardisVector& v, int64_t i) {
    switch (v.type) {
        case TARDIS_BF16: return from_bf16(static_cast<const uint16_t*>(v.data)[i]);
        case TARDIS_FP16: return from_fp16(static_cast<const uint16_t*>(v.data)[i]);
        case TARDIS_FP32: return static_cast<const float*>(v.data)[i];
        default: return 0;
    }
}

void store(const TardisBatch& batch, int64_t at, float value) {
    if (batch.type == TARDIS_FP32) {
        static_cast<float*>(batch.y)[at] = value;
    } else {
        static_cast<uint16_t*>(batch.y)[at] = to_bf16(value);
    }
}

int64_t row_bytes(const TardisMatrix& m) {
    if (m.type == TARDIS_LOW_BIT) return (m.columns + 7) / 8 * m.bits;
    return m.columns * (m.type == TARDIS_FP32 ? 4 : 2);
}

int threads_for(int64_t bytes, int threads) {
    return static_cast<int>(std::min<int64_t>(std::max(threads, 1), 1 + bytes / kBytesPerThread));
}

// Rows of a task: as many as keep every thread supplied, at most kBlockRows.
int64_t block_rows(int64_t rows, int threads) {
    const int64_t some = (rows / (threads * 8) + 3) / 4 * 4;
    return std::min(std::max<int64_t>(some, 4), kBlockRows);
}

int64_t blocks(int64_t rows, int64_t block) { return (rows + block - 1) / block; }

bool outside(float zhat, float low, float high) { return !(zhat >= low && zhat <= high); }

// Working memory of a thread that calls, kept from call to call.
template <typename T>
class Scratch {
public:
    T* get(int64_t count) {
        if (static_cast<int64_t>(values_.size()) < count) values_.resize(static_cast<size_t>(count));
        return values_.data();
    }

private:
    Numbers<T> values_;
};

// The neurons that some token fixes, in order.
struct FixedNeurons {
    int32_t* index;    // [count]
    uint64_t* tokens;  // [count], a bit per token
    float* z;          // [count, tokens]: predictions, then residuals
    int64_t count;
};

class Folded {
public:
    Folded(const TardisFFN& ffn, const TardisBatch& batch)
        : ffn_(ffn), batch_(batch), tokens_(batch.tokens), h_(ffn.predictor.rows), d_(ffn.predictor.columns),
          inputs_(batch, d_), x_(inputs_.for_matrix(ffn.predictor)), stride_(x_.stride) {
        static thread_local Scratch<int32_t> index, counts;
        static thread_local Scratch<uint64_t> tokens;
        static thread_local Scratch<float> z, y;
        fixed_ = {index.get(h_), tokens.get(h_), z.get(h_ * tokens_), 0};
        y_ = y.get(tokens_ * stride_);
        counts_ = counts.get(h_);
    }

    void run() {
        predict_and_fold();
        compact();
        residuals();
        add();
    }

private:
    // A task lists what its rows fix where the list of all rows would be.
    void predict_and_fold() {
        const Input &in = x_, &fold_in = inputs_.for_matrix(ffn_.fold);
        const int64_t bytes = h_ * row_bytes(ffn_.predictor) + d_ * row_bytes(ffn_.fold);
        const int threads = threads_for(bytes, batch_.threads);
        block_ = block_rows(h_, threads);
        const int64_t predicting = blocks(h_, block_), fold_block = block_rows(d_, threads);
        parallel(threads, predicting + blocks(d_, fold_block), [&](int64_t task) {
            if (task < predicting) {
                predict(in, task);
            } else {
                const int64_t begin = (task - predicting) * fold_block;
                fold(fold_in, begin, std::min(begin + fold_block, d_));
            }
        });
    }

    void predict(const Input& in, int64_t task) {
        const int64_t begin = task * block_, end = std::min(begin + block_, h_);
        float zhat[kBlockRows * kMaxTokens];
        product_of(ffn_.predictor)(ffn_.predictor, {nullptr, begin, end, h_}, in, zhat);
        int64_t at = begin;
        for (int64_t i = begin; i < end; ++i) {
            const float b1 = number(ffn_.b1, i), low = number(ffn_.low, i), high = number(ffn_.high, i);
            float* row = zhat + (i - begin) * tokens_;
            uint64_t out = 0;
            for (int64_t t = 0; t < tokens_; ++t) {
                row[t] += b1;
                out |= static_cast<uint64_t>(outside(row[t], low, high)) << t;
            }
            if (!out) continue;
            fixed_.index[at] = static_cast<int32_t>(i);
            fixed_.tokens[at] = out;
            std::copy(row, row + tokens_, fixed_.z + at * tokens_);
            ++at;
        }
        counts_[task] = static_cast<int32_t>(at - begin);
    }

    // Without a fold, the outputs begin at the bias.
    void fold(const Input& in, int64_t begin, int64_t end) {
        float out[kBlockRows * kMaxTokens] = {};
        if (ffn_.fold.type != TARDIS_NONE) product_of(ffn_.fold)(ffn_.fold, {nullptr, begin, end, d_}, in, out);
        for (int64_t j = begin; j < end; ++j) {
            const float bias = number(ffn_.bias, j);
            for (int64_t t = 0; t < tokens_; ++t) y_[t * stride_ + j] = out[(j - begin) * tokens_ + t] + bias;
        }
    }

    // Joins the tasks' lists.
    void compact() {
        int64_t to = 0;
        for (int64_t task = 0; task < blocks(h_, block_); ++task) {
            const int64_t from = task * block_, count = counts_[task];
            if (to != from) {
                std::copy(fixed_.index + from, fixed_.index + from + count, fixed_.index + to);
                std::copy(fixed_.tokens + from, fixed_.tokens + from + count, fixed_.tokens + to);
                std::copy(fixed_.z + from * tokens_, fixed_.z + (from + count) * tokens_, fixed_.z + to * tokens_);
            }
            to += count;
        }
        fixed_.count = to;
    }

    // Replaces predictions by residuals, zero where the token does not fix the neuron.
    void residuals() {
        const bool product = ffn_.up.type != TARDIS_NONE;
        const Input& in = product ? inputs_.for_matrix(ffn_.up) : x_;
        const int threads = threads_for(product ? fixed_.count * row_bytes(ffn_.up) : 0, batch_.threads);
        const int64_t block = block_rows(fixed_.count, threads);
        parallel(threads, blocks(fixed_.count, block), [&](int64_t task) {
            const int64_t begin = task * block, end = std::min(begin + block, fixed_.count);
            float z[kBlockRows * kMaxTokens] = {};
            if (product) product_of(ffn_.up)(ffn_.up, {fixed_.index, begin, end, fixed_.count}, in, z);
            for (int64_t e = begin; e < end; ++e) residual(e, z + (e - begin) * tokens_);
        });
    }

    // z: the product of entry e with what `up` holds, for each token.
    void residual(int64_t e, const float* z) {
        const bool predicted = ffn_.down.type == TARDIS_LOW_BIT;  // `up` is what the predictor leaves
        const int64_t i = fixed_.index[e];
        const float b1 = number(ffn_.b1, i), slope = number(ffn_.slope, i), offset = number(ffn_.offset, i);
        float* r = fixed_.z + e * tokens_;
        for (int64_t t = 0; t < tokens_; ++t) {
            const float at = z[t] + (predicted ? r[t] : b1);
            const bool out = (fixed_.tokens[e] >> t) & 1;
            r[t] = out ? activate(ffn_.activation, at) - slope * at - offset : 0;
        }
    }

    void add() {
        const bool low_bit = ffn_.down.type == TARDIS_LOW_BIT;
        const Layout* layout = low_bit ? &inputs_.layout_of(ffn_.down) : nullptr;
        const int64_t unit = low_bit ? 8 : 64;  // a line of memory or two, so that no two threads read the same one
        const int64_t width = low_bit ? layout->chunk_count : d_;
        const int threads = threads_for(fixed_.count * row_bytes(ffn_.down), batch_.threads);
        const int64_t share = std::min(width / (threads == 1 ? 1 : 2 * threads), low_bit ? width : kAddColumns);
        const int64_t step = std::max<int64_t>((share + unit - 1) / unit, 1) * unit;
        const Terms terms = {fixed_.index, fixed_.z, fixed_.count, tokens_};
        parallel(threads, blocks(width, step), [&](int64_t task) {
            const Range range = {task * step, std::min((task + 1) * step, width)};
            if (terms.count) accumulate_of(ffn_.down)(ffn_.down, layout, terms, range, y_, stride_);
            int64_t begin = range.begin, end = range.end;
            if (low_bit) {
                const Chunk& last = layout->chunks[end - 1];
                begin = layout->chunks[begin].first, end = last.first + last.count;
            }
            for (int64_t t = 0; t < tokens_; ++t)
                for (int64_t j = begin; j < end; ++j) store(batch_, t * d_ + j, y_[t * stride_ + j]);
        });
    }

    const TardisFFN& ffn_;
    const TardisBatch& batch_;
    const int64_t tokens_, h_, d_;
    Inputs inputs_;
    const Input& x_;
    const int64_t stride_;
    FixedNeurons fixed_;
    float* y_;
    int32_t* counts_;
    int64_t block_ = 0;
};

}  // namespace

void linear(const TardisMatrix& weight, const TardisVector& bias, const TardisBatch& batch) {
    Inputs inputs(batch, weight.columns);
    const Input& x = inputs.for_matrix(weight);
    const int threads = threads_for(weight.rows * row_bytes(weight), batch.threads);
    const int64_t block = block_rows(weight.rows, threads);
    parallel(threads, blocks(weight.rows, block), [&](int64_t task) {
        const int64_t begin = task * block, end = std::min(begin + block, weight.rows);
        float out[kBlockRows * kMaxTokens];
        product_of(weight)(weight, {nullptr, begin, end, weight.rows}, x, out);
        for (int64_t i = begin; i < end; ++i) {
            const float b = number(bias, i);
            for (int64_t t = 0; t < batch.tokens; ++t)
                store(batch, t * weight.rows + i, out[(i - begin) * batch.tokens + t] + b);
        }
    });
}

void fixed(const TardisFFN& ffn, const TardisBatch& batch) {
    const TardisMatrix& m = ffn.predictor;
    Inputs inputs(batch, m.columns);
    const Input& x = inputs.for_matrix(m);
    const int threads = threads_for(m.rows * row_bytes(m), batch.threads);
    const int64_t block = block_rows(m.rows, threads);
    parallel(threads, blocks(m.rows, block), [&](int64_t task) {
        const int64_t begin = task * block, end = std::min(begin + block, m.rows);
        float zhat[kBlockRows * kMaxTokens];
        product_of(m)(m, {nullptr, begin, end, m.rows}, x, zhat);
        for (int64_t i = begin; i < end; ++i) {
            const float b1 = number(ffn.b1, i), low = number(ffn.low, i), high = number(ffn.high, i);
            for (int64_t t = 0; t < batch.tokens; ++t)
                static_cast<uint8_t*>(batch.y)[t * m.rows + i] =
                    outside(zhat[(i - begin) * batch.tokens + t] + b1, low, high);
        }
    });
}

void folded_ffn(const TardisFFN& ffn, const TardisBatch& batch) { Folded(ffn, batch).run(); }

}  // namespace tardis
