// The folded FFN. Its neurons are shared out in parts, one for each thread, which takes them some rows at a time:
//
//   1. predictions give pairs of a neuron and a token that fixes it;
//   2. W1 rows of all pairs give residuals;
//   3. W2 columns times residuals are added to the part's own outputs.
//
// Then threads take rows of the fold, which even out what parts differ by, and at last the outputs are added up.
//
// Parts go by the number of threads and not by who does what, so results are the same from call to call, and what a
// token gets does not depend on its batch.
#include "ffn.h"

#include "dispatch.h"
#include "input.h"
#include "tasks.h"

#include <algorithm>

namespace tardis {
namespace {

constexpr int64_t kMaxFound = kMaxTokens * kBlockRows * 3 / 2;  // pairs of rows and tokens that wait for their products
constexpr int kMaxParts = 32;  // each has outputs of its own, which take memory and are added up
constexpr int64_t kSumColumns = 512;

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

// Pairs of a neuron and a token that fixes it, in the order of the neurons.
struct Found {
    int32_t row[kMaxFound], token[kMaxFound];
    float value[kMaxFound];  // predictions, then residuals
    int64_t count = 0;

    void add(int32_t r, int32_t t, float v) { row[count] = r, token[count] = t, value[count++] = v; }
};

// Neurons and what is known of them, token by token.
struct ByToken {
    int32_t row[kMaxFound + kMaxTokens * kTermsTogether];
    float value[kMaxFound + kMaxTokens * kTermsTogether];
    int64_t begin[kMaxTokens + 1];
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
          block_(block_rows(ffn.predictor, h_, threads_)), fold_block_(block_rows(ffn.fold, d_, threads_)),
          parts_(std::min<int64_t>(std::min(threads_, kMaxParts), blocks(h_, block_))) {
        static thread_local Numbers<float> kept;  // from call to call
        const auto size = static_cast<size_t>((parts_ + 1) * tokens_ * stride_);
        if (kept.size() < size) kept.resize(size);
        y_ = kept.data();
    }

    void run() {
        Tasks parts(parts_), folds(blocks(d_, fold_block_)), sums(blocks(d_, kSumColumns));
        Tasks all(parts_ + blocks(d_, fold_block_));  // of the first two kinds, to count
        Gate joined;
        auto work = [&] {
            int64_t own = parts.run([&](int64_t part) { fix(part); });
            own += folds.run([&](int64_t task) { fold(task); });
            if (all.finish(own)) joined.open();
            joined.wait();
            sums.run([&](int64_t task) { sum({task * kSumColumns, std::min((task + 1) * kSumColumns, d_)}); });
        };
        on_threads(threads_, work);
    }

private:
    // Of the inputs where they meet the predictor: 8 will do for what only selects, as it is of few bits itself.
    int32_t selecting_bits() const { return ffn_.down.type == TARDIS_LOW_BIT ? batch_.activation_bits : 8; }

    // What one thread does with some neurons.
    class Worker {
    public:
        Worker(const Folded& all, float* y) : all_(all), ffn_(all.ffn_), tokens_(all.tokens_), y_(y) {}

        void run(Range rows) {
            for (int64_t begin = rows.begin; begin < rows.end; begin += all_.block_) {
                if (found_.count + kBlockRows * tokens_ > kMaxFound) add_found(false);
                predict({begin, std::min(begin + all_.block_, rows.end)});
            }
            add_found(true);
        }

    private:
        void predict(Range rows) {
            float zhat[kMaxTokens * kBlockRows];
            for (const TardisVector* v : {&ffn_.b1, &ffn_.low, &ffn_.high}) prefetch(*v, rows.begin, rows.end);
            product_of(ffn_.predictor)(ffn_.predictor, {nullptr, rows.begin, rows.end, all_.h_}, all_.x_, zhat);
            const OutOfRange out(ffn_, rows.begin, rows.end, tokens_, zhat);
            for (uint64_t left = out.any; left; left &= left - 1) {
                const int i = __builtin_ctzll(left);
                const auto row = static_cast<int32_t>(rows.begin + i);
                uint64_t tokens = 0;
                for (int64_t t = 0; t < tokens_; ++t) tokens |= ((out.token[t] >> i) & 1) << t;
                for (; tokens; tokens &= tokens - 1) {
                    const int t = __builtin_ctzll(tokens);
                    found_.add(row, t, zhat[t * kBlockRows + i]);
                }
                for (const TardisVector* v : {&ffn_.b1, &ffn_.slope, &ffn_.offset}) prefetch(*v, row);
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
                const Terms terms = {sorted_.row + begin, sorted_.value + begin, some};
                if (some) accumulate(ffn_.down, all_.down_layout_, terms, {0, width}, y_ + t * all_.stride_);
                left_[t] = end - begin - some;
                std::copy(sorted_.row + begin + some, sorted_.row + end, left_row_[t]);
                std::copy(sorted_.value + begin + some, sorted_.value + end, left_value_[t]);
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
                std::copy(left_value_[t], left_value_[t] + left_[t], sorted_.value + sorted_.begin[t]);
            }
            for (int64_t i = 0; i < found_.count; ++i) {
                const int64_t to = at[found_.token[i]]++;
                sorted_.row[to] = found_.row[i], sorted_.value[to] = found_.value[i];
            }
        }

        // Replaces predictions by residuals. Each product is one row's with one token, so that what a token gets does
        // not depend on its batch.
        void multiply() {
            const Pairs pairs = {found_.row, found_.token, found_.count};
            if (ffn_.up.type == TARDIS_NONE) std::fill(z_, z_ + found_.count, 0.0f);
            else dense_of(ffn_.up).pairs(ffn_.up, pairs, all_.up_x_, z_);
            for (int64_t begin = 0; begin < found_.count; begin += kBlockRows) {
                const int64_t some = std::min(kBlockRows, found_.count - begin);
                residuals(found_.row + begin, z_ + begin, some, found_.value + begin);
            }
        }

        // Replaces predictions by residuals for some pairs of one token, whose W1 rows are in few bits.
        void multiply(int64_t token, Range some) {
            float z[kBlockRows] = {};
            const Input x = of_token(all_.up_x_, token);
            for (int64_t begin = some.begin; begin < some.end; begin += kBlockRows) {
                const int64_t end = std::min(begin + kBlockRows, some.end);
                product_of(ffn_.up)(ffn_.up, {sorted_.row, begin, end, some.end}, x, z);
                residuals(sorted_.row + begin, z, end - begin, sorted_.value + begin);
            }
        }

        // z: the products with what `up` holds of these rows, kBlockRows at most.
        void residuals(const int32_t* row, const float* z, int64_t count, float* value) const {
            const bool predicted = ffn_.down.type == TARDIS_LOW_BIT;  // `up` is what the predictor leaves
            float at[kBlockRows], active[kBlockRows];
            for (int64_t i = 0; i < count; ++i) at[i] = z[i] + (predicted ? value[i] : number(ffn_.b1, row[i]));
            std::copy(at, at + count, active);
            kernels().activate(ffn_.activation, active, count);
            for (int64_t i = 0; i < count; ++i)
                value[i] = active[i] - (number(ffn_.slope, row[i]) * at[i] + number(ffn_.offset, row[i]));
        }

        const Folded& all_;
        const TardisFFN& ffn_;
        const int64_t tokens_;
        float* const y_;
        Found found_;
        float z_[kMaxFound];
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
        float out[kMaxTokens * kBlockRows] = {};
        prefetch(ffn_.bias, begin, end);
        if (ffn_.fold.type != TARDIS_NONE) product_of(ffn_.fold)(ffn_.fold, {nullptr, begin, end, d_}, fold_x_, out);
        const Widened bias(ffn_.bias, begin, end);
        for (int64_t t = 0; t < tokens_; ++t)
            for (int64_t j = begin; j < end; ++j)
                y_[t * stride_ + j] = out[t * kBlockRows + j - begin] + bias.at[j - begin];
    }

    void sum(Range columns) const {
        for (int64_t t = 0; t < tokens_; ++t) {
            float* y = y_ + t * stride_;
            for (int64_t part = 0; part < parts_; ++part) {
                const float* more = outputs_of(part) + t * stride_;
                for (int64_t j = columns.begin; j < columns.end; ++j) y[j] += more[j];
            }
            store(batch_, t * d_ + columns.begin, y + columns.begin, columns.end - columns.begin);
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
    const int64_t parts_;
    float* y_;  // of the fold, then of the parts: [1 + parts, tokens, stride]
};

}  // namespace

void fixed(const TardisFFN& ffn, const TardisBatch& batch) {
    const int64_t h = ffn.predictor.rows;
    each_product(ffn.predictor, batch, ffn.b1, [&](int64_t begin, int64_t end, float* zhat) {
        const OutOfRange out(ffn, begin, end, batch.tokens, zhat);
        for (int64_t t = 0; t < batch.tokens; ++t)
            for (int64_t i = begin; i < end; ++i)
                static_cast<uint8_t*>(batch.y)[t * h + i] = (out.token[t] >> (i - begin)) & 1;
    });
}

void folded_ffn(const TardisFFN& ffn, const TardisBatch& batch) { Folded(ffn, batch).run(); }

}  // namespace tardis
