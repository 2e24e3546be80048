// The head of a model that predicts its logits in few bits, and computes only the greatest with all bits:
//
//   1. the predictor gives all logits, and the greatest of every kHeadRows;
//   2. the `top`-th of these is found, of each token;
//   3. for rows whose logits are no less, what the predictor leaves is added.
#include "ffn.h"

#include "dispatch.h"
#include "input.h"
#include "tasks.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace tardis {
namespace {

constexpr int64_t kTokens = 16;  // whose logits are kept at once
constexpr int64_t kCorrected = 128 * kHeadRows;  // rows of a task of corrections
constexpr int64_t kBins = 256;  // of numbers that are put in order
constexpr int64_t kLanes = 8;   // of maxima, which compilers keep in vector registers
constexpr float kLeast = -std::numeric_limits<float>::infinity();

int threads_of(const TardisHead& head, const TardisBatch& batch) {
    return threads_for(matrix_bytes(head.predictor), batch.threads);
}

// Rows of a task, of which kHeadRows together lie in no two.
int64_t rows_of_task(const TardisHead& head, int threads) {
    return blocks(block_rows(head.predictor, head.predictor.rows, threads), kHeadRows) * kHeadRows;
}

// Of one token.
struct Logits {
    Numbers<float> all, greatest, sorted;  // of all rows, and of every kHeadRows, also in another order
    float least;  // of those that are computed with all bits
};

// Without those that are NaN.
float greatest(const float* x, int64_t count) {
    float lanes[kLanes];
    std::fill(lanes, lanes + kLanes, kLeast);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
    for (; i < count; ++i) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
    return *std::max_element(lanes, lanes + kLanes);
}

// The k-th greatest of some numbers without NaN; `room` is for as many. Of equal stretches between the least and the
// greatest, only the numbers of one are put in order.
float greatest(const float* x, int64_t count, int64_t k, float* room) {
    const float least = *std::min_element(x, x + count), scale = (kBins - 1) / (greatest(x, count) - least);
    const auto nth = [&](int64_t n, float* end) {
        std::nth_element(room, room + (n - 1), end, std::greater<float>());
        return room[n - 1];
    };
    if (!(scale > 0 && scale < std::numeric_limits<float>::max())) return nth(k, std::copy_n(x, count, room));
    const auto bin_of = [&](float value) { return static_cast<int64_t>((value - least) * scale); };
    int64_t sizes[kBins] = {}, bin = kBins, reached = 0;
    for (int64_t i = 0; i < count; ++i) ++sizes[bin_of(x[i])];
    while (reached < k) reached += sizes[--bin];
    return nth(k - (reached - sizes[bin]), std::copy_if(x, x + count, room, [&](float v) { return bin_of(v) == bin; }));
}

class Head {
public:
    Head(const TardisHead& head, const TardisBatch& batch)
        : head_(head), batch_(batch), rows_(head.predictor.rows), threads_(threads_of(head, batch)),
          inputs_(batch, head.predictor.columns), x_(inputs_.for_matrix(head.predictor, batch.activation_bits)),
          rest_x_(inputs_.for_matrix(head.remainder, batch.activation_bits)), logits_(kept()) {
        for (int64_t t = 0; t < std::min(kTokens, batch.tokens); ++t) {
            grow(logits_[t].all, rows_);
            grow(logits_[t].greatest, blocks(rows_, kHeadRows)), grow(logits_[t].sorted, blocks(rows_, kHeadRows));
        }
    }

    void run() {
        const int64_t block = rows_of_task(head_, threads_), parts = blocks(rows_, kCorrected);
        for (int64_t first = 0; first < batch_.tokens; first += kTokens) {
            const int64_t tokens = std::min(kTokens, batch_.tokens - first);
            parallel(threads_, blocks(rows_, block), [&](int64_t task) {
                predict(first, tokens, task * block, std::min((task + 1) * block, rows_));
            });
            parallel(threads_, tokens, [&](int64_t t) { find_least(logits_[t]); });
            parallel(threads_, tokens * parts, [&](int64_t task) {
                const int64_t begin = task % parts * kCorrected;
                correct(first, task / parts, begin, std::min(begin + kCorrected, rows_));
            });
        }
    }

private:
    // The memory is the thread's, who uses it again.
    static Logits* kept() {
        static thread_local Logits all[kTokens];
        return all;
    }

    // Logits of rows begin..end-1, kBlockRows at most, of some tokens from number `first` on.
    void predict(int64_t first, int64_t tokens, int64_t begin, int64_t end) {
        float out[kTokens * kBlockRows];
        Input x = of_token(x_, first);
        x.tokens = tokens;
        prefetch(head_.bias, begin, end);
        product_of(head_.predictor)(head_.predictor, {nullptr, begin, end, rows_}, x, out);
        const Widened bias(head_.bias, begin, end);
        for (int64_t t = 0; t < tokens; ++t) {
            float *own = out + t * kBlockRows, *logits = &logits_[t].all[begin];
            for (int64_t i = 0; i < end - begin; ++i) logits[i] = own[i] + bias.at[i];
            for (int64_t i = begin; i < end; i += kHeadRows)
                logits_[t].greatest[i / kHeadRows] = greatest(logits + i - begin, std::min(kHeadRows, end - i));
            store(batch_, (first + t) * rows_ + begin, logits, end - begin);
        }
    }

    void find_least(Logits& of) const {
        const int64_t count = blocks(rows_, kHeadRows);
        of.least = greatest(of.greatest.data(), count, std::min(head_.top, count), of.sorted.data());
    }

    // Adds what the predictor leaves to a token's greatest logits among rows begin..end-1, kCorrected at most.
    void correct(int64_t first, int64_t t, int64_t begin, int64_t end) {
        const Logits& of = logits_[t];
        const Input x = of_token(rest_x_, first + t);
        float low[kHeadRows], high[kHeadRows], out[kBlockRows];
        std::fill(low, low + kHeadRows, kLeast), std::fill(high, high + kHeadRows, std::nextafter(of.least, kLeast));
        int32_t rows[kCorrected];
        int64_t count = 0;
        for (int64_t i = begin; i < end; i += kHeadRows) {
            if (!(of.greatest[i / kHeadRows] >= of.least)) continue;
            uint64_t left = kernels().outside(&of.all[i], low, high, std::min(kHeadRows, end - i));
            for (; left; left &= left - 1) rows[count++] = static_cast<int32_t>(i + __builtin_ctzll(left));
        }
        for (int64_t from = 0; from < count; from += kBlockRows) {
            const int64_t to = std::min(from + kBlockRows, count);
            product_of(head_.remainder)(head_.remainder, {rows, from, to, count}, x, out);
            for (int64_t i = from; i < to; ++i) {
                const float logit = of.all[rows[i]] + out[i - from];
                store(batch_, (first + t) * rows_ + rows[i], &logit, 1);
            }
        }
    }

    const TardisHead& head_;
    const TardisBatch& batch_;
    const int64_t rows_;
    const int threads_;
    Inputs inputs_;
    const Input &x_, &rest_x_;
    Logits* const logits_;
};

}  // namespace

void head(const TardisHead& head, const TardisBatch& batch) { Head(head, batch).run(); }

Stretch first_of_head(const TardisHead& head, const TardisBatch& batch, int thread, int64_t most) {
    const int threads = threads_of(head, batch);
    const int64_t block = rows_of_task(head, threads), tasks = blocks(head.predictor.rows, block);
    return stretch_of(head.predictor, std::min(thread * tasks / threads, tasks - 1) * block, head.predictor.rows, most);
}

}  // namespace tardis
