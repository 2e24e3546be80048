// The folded FFN. Its neurons are shared out in parts, one for each thread, which takes them some rows at a time:
//
//   1. predictions give pairs of a neuron and a token that fixes it;
//   2. W1 rows of all pairs, one or two per neuron, give residuals;
//   3. W2 columns times residuals are added to the part's own outputs.
//
// Then threads take neurons that are kept, and rows of the fold, which even out what parts differ by, and at last the
// outputs are added up.
//
// Parts go by the number of threads and not by who does what, so results are the same from call to call, and what a
// token gets does not depend on its batch.
#include "ffn.h"

#include "dispatch.h"
#include "input.h"
#include "kept.h"
#include "tasks.h"

#include <algorithm>

namespace tardis {
namespace {

constexpr int64_t kMaxFound = kMaxTokens * kBlockRows * 3 / 2;  // pairs of rows and tokens that wait for their products
constexpr int64_t kFetched = 48;  // of these pairs whose rows are fetched as they are found
constexpr int kMaxParts = 32;  // each has outputs of its own, which take memory and are added up
constexpr int kMost = 2;  // up-projections per neuron

// Of the inputs where they meet the predictor: 8 will do for what only selects, as it is of few bits itself.
int32_t selecting_bits(const TardisFFN& ffn) { return is_low_bit(ffn.down) ? ffn.activation_bits : 8; }

int64_t neurons(const TardisFFN& ffn) { return ffn.predictor.rows / ffn.k; }

// Of inputs and outputs.
int64_t width(const TardisFFN& ffn) { return neurons(ffn) ? ffn.predictor.columns : ffn.kept_up.columns; }

// Of some neurons, kBlockRows at most, in fp32.
struct Lines {
    float slope[kMost][kBlockRows], offset[kBlockRows];

    // Of neurons begin..end-1.
    Lines(const TardisFFN& ffn, int64_t begin, int64_t end) {
        const int64_t h = neurons(ffn);
        for (int j = 0; j < ffn.k; ++j) kernels().widen(ffn.slope, j * h + begin, end - begin, slope[j]);
        kernels().widen(ffn.offset, begin, end - begin, offset);
    }

    // Of those that are listed.
    Lines(const TardisFFN& ffn, const int32_t* row, int64_t count) {
        const int64_t h = neurons(ffn);
        for (int64_t i = 0; i < count; ++i) {
            for (int j = 0; j < ffn.k; ++j) slope[j][i] = number(ffn.slope, j * h + row[i]);
            offset[i] = number(ffn.offset, row[i]);
        }
    }
};

// out: value - line of some neurons, for their up-projections v.
void residuals(const TardisFFN& ffn, const Lines& lines, const float* const (&v)[kMost], int64_t count, float* out) {
    const float *first = v[0], *second = v[1];
    std::copy(first, first + count, out);
    kernels().activate(ffn.activation, out, count);
    for (int64_t i = 0; ffn.k > 1 && i < count; ++i) out[i] = (out[i] - lines.slope[1][i]) * second[i];
    for (int64_t i = 0; i < count; ++i) out[i] -= lines.slope[0][i] * first[i] + lines.offset[i];
}

constexpr int64_t kSpan = 16;  // blocks whose gates are predicted before the others: memory reads long stretches faster

int64_t span_blocks(const TardisFFN& ffn, int64_t tokens) {
    return ffn.k == 1 ? 1 : std::max<int64_t>(std::min(kSpan, kMaxTokens / tokens), 1);
}

// The predictions of some neurons, which are `span_blocks` blocks at most.
class Predictions {
public:
    Predictions(const TardisFFN& ffn, const Input& x, Range some, int64_t block) : tokens_(x.tokens) {
        const int64_t h = neurons(ffn);
        for (int j = 0; j < ffn.k; ++j) {
            for (int64_t begin = some.begin, number = 0; begin < some.end; begin += block, ++number) {
                const int64_t end = std::min(begin + block, some.end);
                fetch(ffn, j, begin, end);
                multiply(ffn.predictor, j * h + begin, j * h + end, x, at(j, number));
                const Widened b1(ffn.b1, j * h + begin, j * h + end);
                for (int64_t t = 0; t < x.tokens; ++t)
                    for (int64_t i = 0; i < end - begin; ++i) at(j, number)[t * kBlockRows + i] += b1.at[i];
            }
        }
    }

    // Of up-projection j in a block, [tokens, kBlockRows].
    float* at(int j, int64_t block) { return v_[j] + block * tokens_ * kBlockRows; }

private:
    // What the test reads: it comes from memory while the products are computed. Inlined as `prefetch` is.
    static inline __attribute__((always_inline)) void fetch(const TardisFFN& ffn, int j, int64_t begin, int64_t end) {
        const int64_t h = neurons(ffn);
        prefetch(ffn.b1, j * h + begin, j * h + end);
        if (ffn.k > 1) prefetch(ffn.slope, j * h + begin, j * h + end);
        if (j + 1 < ffn.k) return;
        for (const TardisVector* each : {&ffn.low, &ffn.high}) prefetch(*each, begin, end);
        if (ffn.k > 1) prefetch(ffn.offset, begin, end);
    }

    const int64_t tokens_;
    float v_[kMost][kMaxTokens * kBlockRows];
};

// Which of neurons begin..end-1 are out of their hot ranges by their predictions v: bits by token, and their union.
struct OutOfRange {
    uint64_t token[kMaxTokens], any = 0;

    OutOfRange(const TardisFFN& ffn, int64_t begin, int64_t end, int64_t tokens, const float* const (&v)[kMost]) {
        const Widened low(ffn.low, begin, end), high(ffn.high, begin, end);
        const auto each = [&](const auto& tested) {
            for (int64_t t = 0; t < tokens; ++t) {
                token[t] = kernels().outside(tested(t * kBlockRows), low.at, high.at, end - begin);
                any |= token[t];
            }
        };
        if (ffn.k == 1) {
            each([&](int64_t at) { return v[0] + at; });
            return;
        }
        const Lines lines(ffn, begin, end);
        float residual[kBlockRows];
        each([&](int64_t at) {
            residuals(ffn, lines, {v[0] + at, v[1] + at}, end - begin, residual);
            return residual;
        });
    }
};

// body(begin, end, v, out of range) for some neurons, block by block.
template <typename F>
void each_block(const TardisFFN& ffn, const Input& x, Range some, int64_t block, const F& body) {
    const int64_t span = block * span_blocks(ffn, x.tokens);
    for (int64_t first = some.begin; first < some.end; first += span) {
        const int64_t last = std::min(first + span, some.end);
        Predictions predictions(ffn, x, {first, last}, block);
        for (int64_t begin = first, number = 0; begin < last; begin += block, ++number) {
            const int64_t end = std::min(begin + block, last);
            const float* v[kMost] = {predictions.at(0, number), predictions.at(1, number)};
            body(begin, end, v, OutOfRange(ffn, begin, end, x.tokens, v));
        }
    }
}

// Pairs of a neuron and a token that fixes it, in the order of the neurons.
struct Found {
    int32_t row[kMaxFound], token[kMaxFound];
    float value[kMost][kMaxFound];  // predictions, then in the first residuals
    int64_t count = 0;
};

// Neurons and what is known of them, token by token.
struct ByToken {
    int32_t row[kMaxFound + kMaxTokens * kTermsTogether];
    float value[kMost][kMaxFound + kMaxTokens * kTermsTogether];  // as those found
    int64_t begin[kMaxTokens + 1];
};

class Folded {
public:
    Folded(const TardisFFN& ffn, const TardisBatch& batch)
        : ffn_(ffn), batch_(batch), tokens_(batch.tokens), h_(neurons(ffn)), d_(width(ffn)),
          inputs_(batch, d_), x_(inputs_.for_matrix(ffn.predictor, selecting_bits(ffn))), stride_(x_.stride),
          fold_x_(inputs_.for_matrix(ffn.fold, ffn.activation_bits)),
          up_x_(inputs_.for_matrix(ffn.up, ffn.activation_bits)),
          down_layout_(ffn.down.type == TARDIS_LOW_BIT ? &layout_for(ffn.down).view() : nullptr),
          threads_(threads(ffn, batch)), kept_(ffn, batch, inputs_, threads_),
          block_(block_neurons(ffn.predictor, h_, ffn.k, threads_)), fold_block_(block_rows(ffn.fold, d_, threads_)),
          parts_(std::min<int64_t>(std::min(threads_, kMaxParts), blocks(h_, block_))) {
        static thread_local Numbers<float> kept;  // from call to call
        grow(kept, (parts_ + 1) * tokens_ * stride_);
        y_ = kept.data();
    }

    static int threads(const TardisFFN& ffn, const TardisBatch& batch) {
        const int64_t bytes = matrix_bytes(ffn.predictor) + width(ffn) * row_bytes(ffn.fold);
        return threads_for(bytes + matrix_bytes(ffn.kept_up) + matrix_bytes(ffn.kept_down), batch.threads);
    }

    void run() {
        Tasks parts(parts_);
        Shares hides(threads_, kept_.tasks()), folds(threads_, blocks(d_, fold_block_));
        auto work = [&] {
            parts.run([&](int64_t part) { fix(part); });
            hides.run([&](int64_t task) { kept_.hide(task); });
            folds.run([&](int64_t task) { fold(task); });
        };
        on_threads(threads_, work);
        kept_.gather();
        const int64_t block = block_rows(ffn_.kept_down, d_, threads_);
        const int64_t bytes = matrix_bytes(ffn_.kept_down) + parts_ * tokens_ * d_ * 4;
        parallel(threads_for(bytes, batch_.threads), blocks(d_, block), [&](int64_t task) {
            sum(task * block, std::min((task + 1) * block, d_));
        });
    }

private:
    // What one thread does with some neurons.
    class Worker {
    public:
        Worker(const Folded& all, float* y) : all_(all), ffn_(all.ffn_), tokens_(all.tokens_), y_(y) {}

        void run(Range neurons) {
            each_block(ffn_, all_.x_, neurons, all_.block_, [&](int64_t begin, int64_t, const auto& v, const auto& out) {
                if (found_.count + kBlockRows * tokens_ > kMaxFound) add_found(false);
                find(begin, v, out);
            });
            add_found(true);
        }

    private:
        void find(int64_t begin, const float* const (&v)[kMost], const OutOfRange& out) {
            for (uint64_t left = out.any; left; left &= left - 1) {
                const int i = __builtin_ctzll(left);
                uint64_t tokens = 0;
                for (int64_t t = 0; t < tokens_; ++t) tokens |= ((out.token[t] >> i) & 1) << t;
                for (; tokens; tokens &= tokens - 1) {
                    const int t = __builtin_ctzll(tokens);
                    found_.row[found_.count] = static_cast<int32_t>(begin + i), found_.token[found_.count] = t;
                    for (int j = 0; j < ffn_.k; ++j) found_.value[j][found_.count] = v[j][t * kBlockRows + i];
                    ++found_.count;
                }
                for (int j = 0; j < ffn_.k; ++j)
                    for (const TardisVector* each : {&ffn_.b1, &ffn_.slope}) prefetch(*each, j * all_.h_ + begin + i);
                prefetch(ffn_.offset, begin + i);
                if (found_.count > kFetched) continue;  // products ask for later rows themselves
                for (int j = 0; j < ffn_.k; ++j) prefetch_row(ffn_.up, j * all_.h_ + begin + i);
                prefetch_row(ffn_.down, begin + i);
            }
        }

        // Adds the residuals times W2 columns of the pairs found so far. Of each token a multiple of what kernels round
        // together, but for the last ones, so that what it gets does not depend on its batch.
        void add_found(bool last) {
            if (ffn_.up.type != TARDIS_LOW_BIT) multiply();
            sort();
            const int64_t width = all_.down_layout_ ? all_.down_layout_->block_count : all_.d_;
            const Accumulate accumulate = accumulate_of(ffn_.down);
            for (int64_t t = 0; t < tokens_; ++t) {
                const int64_t begin = sorted_.begin[t], end = sorted_.begin[t + 1];
                if (ffn_.up.type == TARDIS_LOW_BIT) multiply(t, {begin + left_[t], end});
                const int64_t some = last ? end - begin : (end - begin) / kTermsTogether * kTermsTogether;
                const Terms terms = {sorted_.row + begin, sorted_.value[0] + begin, some};
                if (some) accumulate(ffn_.down, all_.down_layout_, terms, {0, width}, y_ + t * all_.stride_);
                left_[t] = end - begin - some;
                std::copy(sorted_.row + begin + some, sorted_.row + end, left_row_[t]);
                std::copy(sorted_.value[0] + begin + some, sorted_.value[0] + end, left_value_[t]);
            }
            found_.count = 0;
        }

        // Puts the pairs in the order of their tokens: of each those left from before, then those that are new.
        void sort() {
            int64_t sizes[kMaxTokens] = {}, at[kMaxTokens];
            for (int64_t i = 0; i < found_.count; ++i) ++sizes[found_.token[i]];
            sorted_.begin[0] = 0;
            for (int64_t t = 0; t < tokens_; ++t) {
                at[t] = sorted_.begin[t] + left_[t];
                sorted_.begin[t + 1] = at[t] + sizes[t];
                std::copy(left_row_[t], left_row_[t] + left_[t], sorted_.row + sorted_.begin[t]);
                std::copy(left_value_[t], left_value_[t] + left_[t], sorted_.value[0] + sorted_.begin[t]);
            }
            for (int64_t i = 0; i < found_.count; ++i) {
                const int64_t to = at[found_.token[i]]++;
                sorted_.row[to] = found_.row[i];
                for (int j = 0; j < ffn_.k; ++j) sorted_.value[j][to] = found_.value[j][i];
            }
        }

        // Replaces predictions by residuals. Each product is one row's with one token, so that what a token gets does
        // not depend on its batch.
        void multiply() {
            const Pairs pairs = {found_.row, found_.token, found_.count};
            for (int j = 0; j < ffn_.k; ++j) {
                if (ffn_.up.type == TARDIS_NONE) std::fill(z_[j], z_[j] + found_.count, 0.0f);
                else dense_of(ffn_.up).pairs(part_of(ffn_.up, j, ffn_.k), pairs, all_.up_x_, z_[j]);
            }
            for (int64_t begin = 0; begin < found_.count; begin += kBlockRows) {
                const int64_t some = std::min(kBlockRows, found_.count - begin);
                replace(found_.row + begin, {z_[0] + begin, z_[1] + begin}, some, found_.value, begin);
            }
        }

        // Replaces predictions by residuals for some pairs of one token, whose W1 rows are in few bits.
        void multiply(int64_t token, Range some) {
            float z[kMost][kBlockRows] = {};
            const Input x = of_token(all_.up_x_, token);
            for (int64_t begin = some.begin; begin < some.end; begin += kBlockRows) {
                const int64_t end = std::min(begin + kBlockRows, some.end);
                for (int j = 0; j < ffn_.k; ++j)
                    product_of(ffn_.up)(part_of(ffn_.up, j, ffn_.k), {sorted_.row, begin, end, some.end}, x, z[j]);
                replace(sorted_.row + begin, {z[0], z[1]}, end - begin, sorted_.value, begin);
            }
        }

        // Replaces predictions by residuals for some neurons, kBlockRows at most. z: the products with what `up` holds
        // of them. value: from number `first` on.
        template <int64_t N>
        void replace(
            const int32_t* row, const float* const (&z)[kMost], int64_t count, float (&value)[kMost][N], int64_t first
        ) const {
            const bool predicted = is_low_bit(ffn_.down);  // `up` is what the predictor leaves
            float at[kMost][kBlockRows];
            for (int j = 0; j < ffn_.k; ++j)
                for (int64_t i = 0; i < count; ++i)
                    at[j][i] = z[j][i] + (predicted ? value[j][first + i] : number(ffn_.b1, j * all_.h_ + row[i]));
            residuals(ffn_, Lines(ffn_, row, count), {at[0], at[1]}, count, value[0] + first);
        }

        const Folded& all_;
        const TardisFFN& ffn_;
        const int64_t tokens_;
        float* const y_;
        Found found_;
        float z_[kMost][kMaxFound];
        ByToken sorted_;
        int64_t left_[kMaxTokens] = {};  // numbers of pairs
        int32_t left_row_[kMaxTokens][kTermsTogether];
        float left_value_[kMaxTokens][kTermsTogether];
    };

    float* outputs_of(int64_t part) const { return y_ + (part + 1) * tokens_ * stride_; }

    void fix(int64_t part) const {
        float* y = outputs_of(part);
        std::fill(y, y + tokens_ * stride_, 0.0f);
        const int64_t all = blocks(h_, block_);
        Worker(*this, y).run({part * all / parts_ * block_, std::min((part + 1) * all / parts_ * block_, h_)});
    }

    // Without a fold, the outputs begin at the bias.
    void fold(int64_t task) const {
        const int64_t begin = task * fold_block_, end = std::min(begin + fold_block_, d_);
        float out[kMaxTokens * kBlockRows];
        prefetch(ffn_.bias, begin, end);
        if (ffn_.fold.type == TARDIS_NONE) std::fill(out, out + tokens_ * kBlockRows, 0.0f);
        else product_of(ffn_.fold)(ffn_.fold, {nullptr, begin, end, d_}, fold_x_, out);
        const Widened bias(ffn_.bias, begin, end);
        for (int64_t t = 0; t < tokens_; ++t)
            for (int64_t j = begin; j < end; ++j)
                y_[t * stride_ + j] = out[t * kBlockRows + j - begin] + bias.at[j - begin];
    }

    // All that outputs begin..end-1 get, kBlockRows at most.
    void sum(int64_t begin, int64_t end) const {
        float out[kMaxTokens * kBlockRows];
        for (int64_t t = 0; t < tokens_; ++t) {
            float* own = out + t * kBlockRows;
            std::copy(y_ + t * stride_ + begin, y_ + t * stride_ + end, own);
            for (int64_t part = 0; part < parts_; ++part) {
                const float* more = outputs_of(part) + t * stride_;
                for (int64_t j = begin; j < end; ++j) own[j - begin] += more[j];
            }
        }
        kept_.add(begin, end, out);
        for (int64_t t = 0; t < tokens_; ++t) store(batch_, t * d_ + begin, out + t * kBlockRows, end - begin);
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
    Kept kept_;
    const int64_t block_, fold_block_;  // rows of a task
    const int64_t parts_;
    float* y_;  // of the fold, then of the parts: [1 + parts, tokens, stride]
};

}  // namespace

void fixed(const TardisFFN& ffn, const TardisBatch& batch) {
    Inputs inputs(batch, ffn.predictor.columns);
    const Input& x = inputs.for_matrix(ffn.predictor, ffn.activation_bits);
    const int threads = threads_for(matrix_bytes(ffn.predictor), batch.threads);
    const int64_t h = neurons(ffn), block = block_neurons(ffn.predictor, h, ffn.k, threads);
    const int64_t some = block * span_blocks(ffn, batch.tokens);
    parallel(threads, blocks(h, some), [&](int64_t task) {
        const Range own = {task * some, std::min((task + 1) * some, h)};
        each_block(ffn, x, own, block, [&](int64_t begin, int64_t end, const auto&, const OutOfRange& out) {
            for (int64_t t = 0; t < batch.tokens; ++t)
                for (int64_t i = begin; i < end; ++i)
                    static_cast<uint8_t*>(batch.y)[t * h + i] = (out.token[t] >> (i - begin)) & 1;
        });
    });
}

void folded_ffn(const TardisFFN& ffn, const TardisBatch& batch) { Folded(ffn, batch).run(); }

Stretch first_of_folded(const TardisFFN& ffn, const TardisBatch& batch, int thread, int64_t most) {
    const int threads = Folded::threads(ffn, batch);
    const TardisMatrix& first = neurons(ffn) ? ffn.predictor : ffn.kept_up;
    const int64_t count = first.rows / ffn.k, block = block_neurons(first, count, ffn.k, threads);
    return stretch_of(first, std::min(thread * blocks(count, block) / threads * block, count), count, most);
}

}  // namespace tardis
