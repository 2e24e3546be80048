// The folded FFN in two passes over its weights, each shared out among the threads:
//
//   1. rows of the predictor, giving each token's fixed neurons; rows of the fold; and W1 of the neurons that any token
//      fixes, giving residuals, as soon as a thread has found some of them;
//   2. W2 columns of these, added to the outputs; a thread owns some of the outputs' columns.
//
// Nothing depends on which thread does what, so results are the same for every number of threads.
#include "ffn.h"

#include "dispatch.h"
#include "input.h"
#include "threads.h"

#include <algorithm>

namespace tardis {
namespace {

constexpr int64_t kAddEntries = 1024;  // of the list, that all tokens add before any adds the next
constexpr int64_t kMaxFound = kMaxTokens * kBlockRows * 3 / 2;  // pairs of rows and tokens that wait for their products
constexpr int64_t kAheadTokens = 8;  // from which on memory has time for rows of W1 while others are predicted
constexpr int64_t kReady = 1 << 17;  // bytes of such rows that are multiplied together
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
    if (m.type == TARDIS_LOW_BIT || m.type == TARDIS_LOW_BIT_PANELS) return (m.columns + 7) / 8 * m.bits;
    return m.columns * (m.type == TARDIS_FP32 ? 4 : 2);
}

// All or one: OpenMP ends threads and starts new ones when their number changes.
int threads_for(int64_t bytes, int threads) { return bytes < kShared ? 1 : std::max(threads, 1); }

// Rows of a task: as many as keep every thread supplied, at most kBlockRows.
int64_t block_rows(const TardisMatrix& m, int64_t rows, int threads) {
    const int64_t unit = in_panels(m) ? kPanelRows : 4, some = (rows / (threads * 8) + unit - 1) / unit * unit;
    return std::min(std::max(some, unit), kBlockRows);
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

    // Entry number e, and some that follow, are written soon.
    __attribute__((always_inline)) void prefetch(int64_t e, int64_t all_tokens) const {
        __builtin_prefetch(index + e, 1);
        __builtin_prefetch(tokens + e, 1);
        __builtin_prefetch(z + e * all_tokens, 1);
    }
};

class Folded {
public:
    Folded(const TardisFFN& ffn, const TardisBatch& batch)
        : ffn_(ffn), batch_(batch), tokens_(batch.tokens), h_(ffn.predictor.rows), d_(ffn.predictor.columns),
          inputs_(batch, d_), x_(inputs_.for_matrix(ffn.predictor, selecting_bits())), stride_(x_.stride),
          fold_x_(inputs_.for_matrix(ffn.fold, batch.activation_bits)),
          up_x_(inputs_.for_matrix(ffn.up, batch.activation_bits)),
          down_layout_(ffn.down.type == TARDIS_LOW_BIT ? &layout_for(ffn.down).view() : nullptr),
          threads_(threads_for(h_ * row_bytes(ffn.predictor) + d_ * row_bytes(ffn.fold), batch.threads)),
          block_(block_rows(ffn.predictor, h_, threads_)), fold_block_(block_rows(ffn.fold, d_, threads_)) {
        static thread_local Scratch<int32_t> index, counts;
        static thread_local Scratch<uint64_t> tokens;
        static thread_local Scratch<float> z, y;
        fixed_ = {index.get(h_), tokens.get(h_), z.get(h_ * tokens_), 0};
        y_ = y.get(tokens_ * stride_);
        counts_ = counts.get(h_);
    }

    void run() {
        const int64_t width = down_layout_ ? down_layout_->block_count : d_;
        const int64_t unit = down_layout_ ? 1 : 64;  // a line of memory or two, so that no two threads read the same one
        const int64_t step = blocks(blocks(width, threads_), unit) * unit;  // one task each: long runs of a row are fast
        Tasks first(blocks(h_, block_) + blocks(d_, fold_block_)), second(blocks(width, step));
        Gate joined;
        auto work = [&] {
            Worker worker(*this);
            const int64_t own = first.run([&](int64_t task) { worker.run(task); });
            worker.finish();
            if (first.finish(own)) join_lists(), joined.open();
            joined.wait();
            second.run([&](int64_t task) { add({task * step, std::min((task + 1) * step, width)}); });
        };
        on_threads(threads_, work);
    }

private:
    // Of the inputs where they meet the predictor: 8 will do for what only selects, as it is of few bits itself.
    int32_t selecting_bits() const { return ffn_.down.type == TARDIS_LOW_BIT ? batch_.activation_bits : 8; }

    // Pairs of a neuron and a token that fixes it, and the neuron's number in the list.
    struct Found {
        int32_t row[kMaxFound], token[kMaxFound], entry[kMaxFound];
        int64_t count = 0;
        void add(int32_t r, int32_t t, int32_t e) { row[count] = r, token[count] = t, entry[count++] = e; }
    };

    // A thread's part of the first pass. What it finds in one task, it multiplies after another: meanwhile rows of W1 come
    // from memory, for which predicting several tokens leaves time.
    class Worker {
    public:
        explicit Worker(Folded& ffn) : ffn_(ffn), ahead_(ffn.tokens_ >= kAheadTokens && ffn.up_bytes() > 0) {}

        // Evenly mixed: predicting is bound by arithmetic and folding by memory, so that threads do both at once.
        void run(int64_t task) {
            const int64_t folding = blocks(ffn_.d_, ffn_.fold_block_), all = blocks(ffn_.h_, ffn_.block_) + folding;
            const int64_t before = task * folding / all;
            if ((task + 1) * folding / all == before) predict(task - before);
            else ffn_.fold(before);
        }

        void finish() { multiply(found_.count); }

    private:
        // Asks for the rows that the last task has found.
        void predict(int64_t task) {
            if (found_.count + kBlockRows * ffn_.tokens_ > kMaxFound) multiply(found_.count);
            Fetch::Piece pieces[kBlockRows];
            const Fetch fetch = {pieces, ahead_ ? new_rows(pieces) : 0};
            const int64_t ready = found_.count;
            ffn_.predict(task, fetch, found_);
            asked_ = ready;
            if (ahead_ && ready * ffn_.up_bytes() >= kReady) multiply(ready);
        }

        int64_t new_rows(Fetch::Piece* pieces) const {
            const int64_t bytes = ffn_.up_bytes();
            const auto* data = static_cast<const char*>(ffn_.ffn_.up.data);
            int64_t count = 0;
            for (int64_t i = asked_; i < found_.count; ++i)
                if (i == asked_ || found_.row[i] != found_.row[i - 1])
                    pieces[count++] = {data + found_.row[i] * bytes, data + (found_.row[i] + 1) * bytes};
            return count;
        }

        // The first `count` pairs.
        void multiply(int64_t count) {
            if (count == 0) return;
            ffn_.multiply(found_, count);
            const int64_t left = found_.count - count;
            for (int32_t* list : {found_.row, found_.token, found_.entry})
                std::copy(list + count, list + found_.count, list);
            found_.count = left, asked_ -= std::min(asked_, count);
        }

        Folded& ffn_;
        const bool ahead_;
        Found found_;
        int64_t asked_ = 0;  // rows before this pair were asked for
    };

    int64_t up_bytes() const { return ffn_.up.type == TARDIS_NONE ? 0 : row_bytes(ffn_.up); }

    // Lists what a task's rows fix where the list of all rows would be.
    void predict(int64_t task, const Fetch& fetch, Found& found) {
        const int64_t begin = task * block_, end = std::min(begin + block_, h_);
        float zhat[kMaxTokens * kBlockRows];
        // What is read or written once for a task: each wait for it would be behind all rows that are asked for.
        for (const TardisVector* v : {&ffn_.b1, &ffn_.low, &ffn_.high}) prefetch(*v, begin, end);
        fixed_.prefetch(begin, tokens_);
        product_of(ffn_.predictor)(ffn_.predictor, {nullptr, begin, end, h_, &fetch}, x_, zhat);
        const OutOfRange out(ffn_, begin, end, tokens_, zhat);
        int64_t at = begin;
        for (uint64_t left = out.any; left; left &= left - 1, ++at) {
            const int i = __builtin_ctzll(left);
            uint64_t tokens = 0;
            for (int64_t t = 0; t < tokens_; ++t) {
                tokens |= ((out.token[t] >> i) & 1) << t;
                fixed_.z[at * tokens_ + t] = zhat[t * kBlockRows + i];
            }
            for (uint64_t some = tokens; some; some &= some - 1)
                found.add(static_cast<int32_t>(begin + i), __builtin_ctzll(some), static_cast<int32_t>(at));
            for (const TardisVector* v : {&ffn_.b1, &ffn_.slope, &ffn_.offset}) prefetch(*v, begin + i);
            fixed_.index[at] = static_cast<int32_t>(begin + i);
            fixed_.tokens[at] = tokens;
        }
        counts_[task] = static_cast<int32_t>(at - begin);
    }

    // Without a fold, the outputs begin at the bias.
    void fold(int64_t task) {
        const int64_t begin = task * fold_block_, end = std::min(begin + fold_block_, d_);
        float out[kMaxTokens * kBlockRows] = {};
        prefetch(ffn_.bias, begin, end);
        if (ffn_.fold.type != TARDIS_NONE) product_of(ffn_.fold)(ffn_.fold, {nullptr, begin, end, d_}, fold_x_, out);
        const Widened bias(ffn_.bias, begin, end);
        for (int64_t t = 0; t < tokens_; ++t)
            for (int64_t j = begin; j < end; ++j)
                y_[t * stride_ + j] = out[t * kBlockRows + j - begin] + bias.at[j - begin];
    }

    // Replaces predictions by residuals. Each product is one row's with one token, so that what a token gets does not
    // depend on the others in its batch.
    void multiply(const Found& found, int64_t count) {
        if (ffn_.up.type == TARDIS_LOW_BIT) return multiply_by_token(found, count);
        float z[kBlockRows] = {};
        for (int64_t begin = 0; begin < count; begin += kBlockRows) {
            const int64_t end = std::min(begin + kBlockRows, count);
            const Pairs pairs = {found.row, found.token, begin, end, count};
            if (up_bytes()) pair_product_of(ffn_.up)(ffn_.up, pairs, up_x_, z);
            residuals(found.entry + begin, found.token + begin, end - begin, z);
        }
    }

    // Products with low-bit rows take some of these and one token.
    void multiply_by_token(const Found& found, int64_t count) {
        int32_t row[kMaxFound], token[kMaxFound], entry[kMaxFound];
        int64_t ends[kMaxTokens + 1] = {};
        for (int64_t i = 0; i < count; ++i) ++ends[found.token[i] + 1];
        for (int64_t t = 0; t < tokens_; ++t) ends[t + 1] += ends[t];
        for (int64_t i = 0; i < count; ++i) {
            const int64_t to = ends[found.token[i]]++;
            row[to] = found.row[i], token[to] = found.token[i], entry[to] = found.entry[i];
        }
        float z[kBlockRows] = {};
        for (int64_t t = 0, begin = 0; t < tokens_; ++t)
            for (int64_t end; begin < ends[t]; begin = end) {
                end = std::min(begin + kBlockRows, ends[t]);
                product_of(ffn_.up)(ffn_.up, {row, begin, end, count}, of_token(up_x_, t), z);
                residuals(entry + begin, token + begin, end - begin, z);
            }
    }

    // Joins the tasks' lists.
    void join_lists() {
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

    bool fixes(int64_t e, int64_t t) const { return (fixed_.tokens[e] >> t) & 1; }

    // z: the products of some entries and tokens, kBlockRows at most, with what `up` holds.
    void residuals(const int32_t* entry, const int32_t* token, int64_t count, const float* z) {
        const bool predicted = ffn_.down.type == TARDIS_LOW_BIT;  // `up` is what the predictor leaves
        float at[kBlockRows], active[kBlockRows];
        for (int64_t i = 0; i < count; ++i) {
            const int64_t e = entry[i];
            at[i] = z[i] + (predicted ? fixed_.z[e * tokens_ + token[i]] : number(ffn_.b1, fixed_.index[e]));
        }
        std::copy(at, at + count, active);
        kernels().activate(ffn_.activation, active, count);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t e = entry[i], row = fixed_.index[e];
            const float line = number(ffn_.slope, row) * at[i] + number(ffn_.offset, row);
            fixed_.z[e * tokens_ + token[i]] = active[i] - line;
        }
    }

    // Columns of dense outputs, or blocks of columns.
    void add(Range range) {
        int64_t done[kMaxTokens] = {};
        for (int64_t e = 0; e < fixed_.count; e += kAddEntries)
            add_entries(down_layout_, std::min(e + kAddEntries, fixed_.count), done, range);
        if (down_layout_) {
            const Block &first = down_layout_->blocks[range.begin], &last = down_layout_->blocks[range.end - 1];
            range = {first.column, last.column + last.columns};
        }
        for (int64_t t = 0; t < tokens_; ++t)
            store(batch_, t * d_ + range.begin, y_ + t * stride_ + range.begin, range.end - range.begin);
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
    const Input &fold_x_, &up_x_;
    const Layout* down_layout_;
    const int threads_;
    const int64_t block_, fold_block_;  // rows of a task
    FixedNeurons fixed_;
    float* y_;
    int32_t* counts_;  // entries of each task
};

}  // namespace

void linear(const TardisMatrix& weight, const TardisVector& bias, const TardisBatch& batch) {
    Inputs inputs(batch, weight.columns);
    const Input& x = inputs.for_matrix(weight, batch.activation_bits);
    const int threads = threads_for(weight.rows * row_bytes(weight), batch.threads);
    const int64_t block = block_rows(weight, weight.rows, threads);
    parallel(threads, blocks(weight.rows, block), [&](int64_t task) {
        const int64_t begin = task * block, end = std::min(begin + block, weight.rows);
        float out[kMaxTokens * kBlockRows];
        prefetch(bias, begin, end);
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
    const bool panels = in_panels(weight);
    const auto* x = static_cast<const uint16_t*>(batch.x);
    const int threads = threads_for(2 * inputs * outputs, batch.threads);
    for (int64_t first = 0; first < batch.tokens; first += kGemmTokens) {
        const Tokens tokens = {x + first * inputs, std::min(kGemmTokens, batch.tokens - first), inputs};
        parallel(threads, blocks(outputs, step), [&](int64_t task) {
            const Range range = {task * step, std::min((task + 1) * step, outputs)};
            float out[kGemmTokens * kGemmOutputs], b[kGemmOutputs];
            if (panels) kernels().panels(weight, range, tokens, out, step);
            else kernels().gemm(weight, transposed, range, tokens, out, step);
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
    const int64_t block = block_rows(m, m.rows, threads);
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
