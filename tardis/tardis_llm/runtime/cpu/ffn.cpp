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
#include "threads.h"

#include <algorithm>

namespace tardis {
namespace {

constexpr int64_t kAddEntries = 1024;  // of the list, that all tokens add before any adds the next
constexpr int64_t kSlice = 8;  // rows of the predictor between which rows of the fold are prefetched
constexpr int64_t kFetched = 20480;  // bytes of the fold in a task that predicts
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

// Outputs from number `at` on, in the type of the batch.
void store(const TardisBatch& batch, int64_t at, const float* values, int64_t count) {
    auto* f32 = static_cast<float*>(batch.y) + at;
    auto* bf16 = static_cast<uint16_t*>(batch.y) + at;
    if (batch.type == TARDIS_FP32) std::copy(values, values + count, f32);
    else std::transform(values, values + count, bf16, to_bf16);
}

// The same with a bias added.
void store(const TardisBatch& batch, int64_t at, float* values, const float* bias, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] += bias[i];
    store(batch, at, values, count);
}

int64_t row_bytes(const TardisMatrix& m) {
    if (m.type == TARDIS_LOW_BIT) return (m.columns + 7) / 8 * m.bits;
    return m.columns * (m.type == TARDIS_FP32 ? 4 : 2);
}

// All or one: OpenMP ends threads and starts new ones when their number changes.
int threads_for(int64_t bytes, int threads) { return bytes < kShared ? 1 : std::max(threads, 1); }

// Rows of a task: as many as keep every thread supplied, at most kBlockRows.
int64_t block_rows(int64_t rows, int threads) {
    const int64_t some = (rows / (threads * 8) + 3) / 4 * 4;
    return std::min(std::max<int64_t>(some, 4), kBlockRows);
}

int64_t blocks(int64_t rows, int64_t block) { return (rows + block - 1) / block; }

// What leaves its range of the predictions of rows begin..end-1, to which b1 is added: bits by token, and their union.
struct OutOfRange {
    uint64_t token[kMaxTokens], any;
    OutOfRange(const TardisFFN& ffn, int64_t begin, int64_t end, int64_t tokens, float* zhat) : any(0) {
        const Widened b1(ffn.b1, begin, end), low(ffn.low, begin, end), high(ffn.high, begin, end);
        for (int64_t t = 0; t < tokens; ++t) {
            float* z = zhat + t * kBlockRows;
            for (int64_t i = 0; i < end - begin; ++i) z[i] += b1.at[i];
            token[t] = kernels().outside(z, low.at, high.at, end - begin);
            any |= token[t];
        }
    }
};

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
          inputs_(batch, d_), x_(inputs_.for_matrix(ffn.predictor, selecting_bits())), stride_(x_.stride) {
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
    // Of the inputs where they meet the predictor: 8 will do for what only selects, as it is of few bits itself.
    int32_t selecting_bits() const { return ffn_.down.type == TARDIS_LOW_BIT ? batch_.activation_bits : 8; }

    // A task lists what its rows fix where the list of all rows would be.
    void predict_and_fold() {
        const Input &in = x_, &fold_in = inputs_.for_matrix(ffn_.fold, batch_.activation_bits);
        const int64_t bytes = h_ * row_bytes(ffn_.predictor) + d_ * row_bytes(ffn_.fold);
        const int threads = threads_for(bytes, batch_.threads);
        block_ = block_rows(h_, threads);
        const int64_t fold_block = block_rows(d_, threads), folding = blocks(d_, fold_block);
        const int64_t all = blocks(h_, block_) + folding;
        // Evenly mixed: predicting is bound by arithmetic and folding by memory, so that threads do both at once.
        parallel(threads, all, [&](int64_t task) {
            const int64_t before = task * folding / all;
            if ((task + 1) * folding / all == before) {
                const int64_t since = task - (before * all + folding - 1) / folding;  // the last fold task
                return predict(in, task - before, before * fold_block * row_bytes(ffn_.fold) + since * kFetched);
            }
            fold(fold_in, before * fold_block, std::min((before + 1) * fold_block, d_));
        });
    }

    // Memory has time for bytes `soon` and following of the fold meanwhile.
    void predict(const Input& in, int64_t task, int64_t soon) {
        const int64_t begin = task * block_, end = std::min(begin + block_, h_);
        const Product product = product_of(ffn_.predictor);
        float zhat[kMaxTokens * kBlockRows];
        const int64_t slice = ffn_.fold.type == TARDIS_NONE ? kBlockRows : kSlice;
        for (int64_t i = begin; i < end; i += slice) {
            product(ffn_.predictor, {nullptr, i, std::min(i + slice, end), h_}, in, zhat + i - begin);
            prefetch_fold(soon + (i - begin) * kFetched / kBlockRows, slice * kFetched / kBlockRows);
        }
        const OutOfRange out(ffn_, begin, end, tokens_, zhat);
        int64_t at = begin;
        for (uint64_t left = out.any; left; left &= left - 1, ++at) {
            const int i = __builtin_ctzll(left);
            uint64_t tokens = 0;
            for (int64_t t = 0; t < tokens_; ++t) {
                tokens |= ((out.token[t] >> i) & 1) << t;
                fixed_.z[at * tokens_ + t] = zhat[t * kBlockRows + i];
            }
            for (const TardisVector* v : {&ffn_.b1, &ffn_.slope, &ffn_.offset}) prefetch(*v, begin + i);
            fixed_.index[at] = static_cast<int32_t>(begin + i);
            fixed_.tokens[at] = tokens;
        }
        counts_[task] = static_cast<int32_t>(at - begin);
    }

    inline __attribute__((always_inline)) void prefetch_fold(int64_t from, int64_t bytes) const {
        const auto* data = static_cast<const char*>(ffn_.fold.data);
        const int64_t end = data ? std::min(from + bytes, d_ * row_bytes(ffn_.fold)) : 0;
        for (int64_t at = from; at < end; at += 64) __builtin_prefetch(data + at, 0, 2);
    }

    // Without a fold, the outputs begin at the bias.
    void fold(const Input& in, int64_t begin, int64_t end) {
        float out[kMaxTokens * kBlockRows] = {};
        if (ffn_.fold.type != TARDIS_NONE) product_of(ffn_.fold)(ffn_.fold, {nullptr, begin, end, d_}, in, out);
        const Widened bias(ffn_.bias, begin, end);
        for (int64_t t = 0; t < tokens_; ++t)
            for (int64_t j = begin; j < end; ++j)
                y_[t * stride_ + j] = out[t * kBlockRows + j - begin] + bias.at[j - begin];
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

    // Entries of the list and the tokens that fix them.
    struct FixedPairs {
        int32_t *entry, *row, *token;
        float* z;
        int64_t count;
        void add(int64_t e, int32_t neuron, int64_t t) {
            entry[count] = static_cast<int32_t>(e), row[count] = neuron;
            token[count++] = static_cast<int32_t>(t);
        }
    };

    // Replaces predictions by residuals, for the tokens that fix the neuron. Each product is one row's with one token, so
    // that what a token gets does not depend on the others in its batch.
    void residuals() {
        const int64_t bytes = ffn_.up.type == TARDIS_NONE ? 0 : row_bytes(ffn_.up);
        const Input& in = bytes ? inputs_.for_matrix(ffn_.up, batch_.activation_bits) : x_;
        const bool low_bit = ffn_.up.type == TARDIS_LOW_BIT;
        const FixedPairs pairs = low_bit ? pairs_by_token() : pairs_by_row();
        const int threads = threads_for(fixed_.count * bytes, batch_.threads);
        const int64_t block = block_rows(pairs.count, threads);
        parallel(threads, blocks(pairs.count, block), [&](int64_t task) {
            const int64_t begin = task * block, end = std::min(begin + block, pairs.count);
            const Pairs some = {pairs.row, pairs.token, begin, end, pairs.count};
            if (low_bit) multiply_rows(in, pairs, begin, end);
            else if (bytes) pair_product_of(ffn_.up)(ffn_.up, some, in, pairs.z + begin);
            for (int64_t i = begin; i < end; ++i) residual(pairs.entry[i], pairs.token[i], bytes ? pairs.z[i] : 0);
        });
    }

    // Row by row, so that each is read from memory once.
    FixedPairs pairs_by_row() {
        FixedPairs pairs = no_pairs();
        for (int64_t e = 0; e < fixed_.count; ++e)
            for (uint64_t left = fixed_.tokens[e]; left; left &= left - 1)
                pairs.add(e, fixed_.index[e], __builtin_ctzll(left));
        return pairs;
    }

    // Token by token: products with low-bit rows take some of these and one token.
    FixedPairs pairs_by_token() {
        FixedPairs pairs = no_pairs();
        for (int64_t t = 0; t < tokens_; ++t)
            for (int64_t e = 0; e < fixed_.count; ++e)
                if (fixes(e, t)) pairs.add(e, fixed_.index[e], t);
        return pairs;
    }

    // With room for those that are fixed.
    FixedPairs no_pairs() const {
        static thread_local Scratch<int32_t> numbers;
        static thread_local Scratch<float> z;
        int64_t count = 0;
        for (int64_t e = 0; e < fixed_.count; ++e) count += __builtin_popcountll(fixed_.tokens[e]);
        int32_t* at = numbers.get(3 * count);
        return {at, at + count, at + 2 * count, z.get(count), 0};
    }

    // Pairs begin..end-1, those of a token together.
    void multiply_rows(const Input& in, const FixedPairs& pairs, int64_t begin, int64_t end) {
        for (int64_t i = begin, next; i < end; i = next) {
            const int32_t t = pairs.token[i];
            for (next = i + 1; next < end && pairs.token[next] == t;) ++next;
            product_of(ffn_.up)(ffn_.up, {pairs.row, i, next, pairs.count}, of_token(in, t), pairs.z + i);
        }
    }

    bool fixes(int64_t e, int64_t t) const { return (fixed_.tokens[e] >> t) & 1; }

    // z: the product of entry e with what `up` holds.
    void residual(int64_t e, int64_t t, float z) {
        const bool predicted = ffn_.down.type == TARDIS_LOW_BIT;  // `up` is what the predictor leaves
        const int64_t i = fixed_.index[e];
        float& r = fixed_.z[e * tokens_ + t];
        const float at = z + (predicted ? r : number(ffn_.b1, i));
        r = activate(ffn_.activation, at) - number(ffn_.slope, i) * at - number(ffn_.offset, i);
    }

    void add() {
        const bool low_bit = ffn_.down.type == TARDIS_LOW_BIT;
        const Layout* layout = low_bit ? &inputs_.layout_of(ffn_.down) : nullptr;
        const int64_t unit = low_bit ? 1 : 64;  // a line of memory or two, so that no two threads read the same one
        const int64_t width = low_bit ? layout->block_count : d_;
        const int threads = threads_for(fixed_.count * row_bytes(ffn_.down), batch_.threads);
        const int64_t step = blocks(blocks(width, threads), unit) * unit;  // one task each: long runs of a row are fast
        parallel(threads, blocks(width, step), [&](int64_t task) {
            const Range range = {task * step, std::min((task + 1) * step, width)};
            int64_t done[kMaxTokens] = {};
            for (int64_t e = 0; e < fixed_.count; e += kAddEntries)
                add_entries(layout, std::min(e + kAddEntries, fixed_.count), done, range);
            int64_t begin = range.begin, end = range.end;
            if (low_bit) {
                const Block& last = layout->blocks[end - 1];
                begin = layout->blocks[begin].column, end = last.column + last.columns;
            }
            for (int64_t t = 0; t < tokens_; ++t)
                store(batch_, t * d_ + begin, y_ + t * stride_ + begin, end - begin);
        });
    }

    // Of each token a multiple of what kernels round together, but at the end of the list, so that what it gets does not
    // depend on the others in its batch. done: how far each token is.
    void add_entries(const Layout* layout, int64_t end, int64_t* done, Range range) {
        const Accumulate accumulate = accumulate_of(ffn_.down);
        for (int64_t t = 0; t < tokens_; ++t) {
            int32_t index[kAddEntries + kTermsTogether], entry[kAddEntries + kTermsTogether];
            float r[kAddEntries + kTermsTogether];
            int64_t count = 0;
            for (int64_t e = done[t]; e < end; ++e) {
                entry[count] = static_cast<int32_t>(e), index[count] = fixed_.index[e];
                r[count] = fixed_.z[e * tokens_ + t];
                count += fixes(e, t);  // not a branch, which would go wrong for every neuron that is fixed
            }
            const int64_t kept = end < fixed_.count ? count % kTermsTogether : 0;
            done[t] = kept ? entry[count - kept] : end;
            if (count > kept) accumulate(ffn_.down, layout, {index, r, count - kept}, range, y_ + t * stride_);
        }
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
    const Input& x = inputs.for_matrix(weight, batch.activation_bits);
    const int threads = threads_for(weight.rows * row_bytes(weight), batch.threads);
    const int64_t block = block_rows(weight.rows, threads);
    parallel(threads, blocks(weight.rows, block), [&](int64_t task) {
        const int64_t begin = task * block, end = std::min(begin + block, weight.rows);
        float out[kMaxTokens * kBlockRows];
        product_of(weight)(weight, {nullptr, begin, end, weight.rows}, x, out);
        const Widened b(bias, begin, end);
        for (int64_t t = 0; t < batch.tokens; ++t)
            store(batch, t * weight.rows + begin, out + t * kBlockRows, b.at, end - begin);
    });
}

// Rows of the weight are outputs, and a task reads some of them from end to end; transposed, it reads long pieces of all.
void gemm(const TardisMatrix& weight, bool transposed, const TardisVector& bias, const TardisBatch& batch) {
    const int64_t inputs = transposed ? weight.rows : weight.columns;
    const int64_t outputs = transposed ? weight.columns : weight.rows, step = transposed ? kGemmOutputs : kBlockRows;
    const auto* x = static_cast<const uint16_t*>(batch.x);
    for (int64_t first = 0; first < batch.tokens; first += kGemmTokens) {
        const Tokens tokens = {x + first * inputs, std::min(kGemmTokens, batch.tokens - first), inputs};
        parallel(batch.threads, blocks(outputs, step), [&](int64_t task) {
            const Range range = {task * step, std::min((task + 1) * step, outputs)};
            float out[kGemmTokens * kGemmOutputs], b[kGemmOutputs];
            kernels().gemm(weight, transposed, range, tokens, out, step);
            kernels().widen(bias, range.begin, range.end - range.begin, b);
            for (int64_t t = 0; t < tokens.count; ++t)
                store(batch, (first + t) * outputs + range.begin, out + t * step, b, range.end - range.begin);
        });
    }
}

void fixed(const TardisFFN& ffn, const TardisBatch& batch) {
    const TardisMatrix& m = ffn.predictor;
    Inputs inputs(batch, m.columns);
    const Input& x = inputs.for_matrix(m, batch.activation_bits);
    const int threads = threads_for(m.rows * row_bytes(m), batch.threads);
    const int64_t block = block_rows(m.rows, threads);
    parallel(threads, blocks(m.rows, block), [&](int64_t task) {
        const int64_t begin = task * block, end = std::min(begin + block, m.rows);
        float zhat[kMaxTokens * kBlockRows];
        product_of(m)(m, {nullptr, begin, end, m.rows}, x, zhat);
        const OutOfRange out(ffn, begin, end, batch.tokens, zhat);
        for (int64_t t = 0; t < batch.tokens; ++t)
            for (int64_t i = begin; i < end; ++i)
                static_cast<uint8_t*>(batch.y)[t * m.rows + i] = (out.token[t] >> (i - begin)) & 1;
    });
}

void folded_ffn(const TardisFFN& ffn, const TardisBatch& batch) { Folded(ffn, batch).run(); }

}  // namespace tardis
