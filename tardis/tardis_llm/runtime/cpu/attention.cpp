// Queries of heads that share keys are the tokens of a product with these keys, and the sum over values is what fixing
// does with rows of W2: both go through the kernels for dense matrices.
#include "attention.h"

#include "step.h"
#include "tasks.h"

#include <numeric>

namespace tardis {
namespace {

// exp(x) for x <= 0, to a few units in the last place; without branches or calls, so that loops of it are vectorised.
float exponential(float x) {
    x = x < -87 ? -87 : x;
    const auto power = static_cast<int32_t>(x * 1.44269504f - 0.5f);  // towards zero, so to the nearest
    const auto n = static_cast<float>(power);
    const float rest = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact
    float sum = 1.0f / 720;
    for (float coefficient : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * rest + coefficient;
    const int32_t bits = (power + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return sum * scale;
}

// Scores become weights that are not divided by their sum yet, which is returned. NaN stays NaN.
float weigh(float* scores, int64_t count) {
    float most = scores[0];
    for (int64_t i = 1; i < count; ++i) most = scores[i] > most ? scores[i] : most;
    for (int64_t i = 0; i < count; ++i) scores[i] = exponential(scores[i] - most);
    return std::accumulate(scores, scores + count, 0.0f);
}

class Attention {
public:
    Attention(const TardisAttention& of, const TardisOperation& op, const TardisBatch& batch, int64_t position)
        : of_(of), op_(op), batch_(batch), bytes_(batch.type == TARDIS_FP32 ? 4 : 2), position_(position),
          first_(of.window > 0 ? std::max<int64_t>(0, position + 1 - of.window) : 0),
          length_(position + 1 - first_), shared_(of.heads / of.groups) {
        static thread_local Numbers<float> scores;
        static thread_local Numbers<int32_t> index;
        static thread_local Numbers<char> queries;
        grow(scores, batch.tokens * of.heads * length_);
        if (static_cast<int64_t>(index.size()) < length_) {
            index.resize(static_cast<size_t>(2 * length_));
            std::iota(index.begin(), index.end(), 0);
        }
        const int64_t row = of.heads * of.size * bytes_;
        grow(queries, batch.tokens * row);
        for (int64_t t = 0; t < batch.tokens; ++t) memcpy(&queries[t * row], at(op.x.data, t * op.x.stride), row);
        scores_ = scores.data(), index_ = index.data(), queries_ = queries.data();
    }

    void run() {
        for (int64_t t = 0; t < batch_.tokens; ++t) {
            for (int64_t g = 0; g < of_.groups; ++g) {
                keep(of_.key, of_.keys, t, g);
                keep(of_.value, of_.values, t, g);
            }
        }
        TardisBatch heads = batch_;
        heads.x = queries_, heads.tokens = batch_.tokens * of_.heads;
        Inputs inputs(heads, of_.size);
        const Input& x = inputs.for_matrix(rows(of_.keys, 0, 0), 8);
        const int64_t each = batch_.tokens * of_.groups;
        const int threads = threads_for(2 * each * length_ * of_.size * bytes_, batch_.threads);
        const int64_t parts = std::min(shared_, std::max(blocks(threads, each), blocks(shared_, kMaxTokens)));
        const int64_t some = blocks(shared_, parts);
        parallel(threads, each * parts, [&](int64_t task) {
            const int64_t t = task / parts / of_.groups, g = task / parts % of_.groups;
            const int64_t begin = task % parts * some, end = std::min(begin + some, shared_);
            if (begin < end) run(x, t, g, begin, end);
        });
    }

private:
    char* at(const void* data, int64_t number) const {
        return static_cast<char*>(const_cast<void*>(data)) + number * bytes_;
    }

    // Where the kept rows of a token's group begin.
    int64_t kept(int64_t t, int64_t g) const { return (t * of_.groups + g) * of_.capacity * of_.size; }

    void keep(const TardisRows& from, void* to, int64_t t, int64_t g) const {
        const char* row = at(from.data, t * from.stride + g * of_.size);
        memcpy(at(to, kept(t, g) + position_ * of_.size), row, of_.size * bytes_);
    }

    // What is seen of keys or values.
    TardisMatrix rows(const void* all, int64_t t, int64_t g) const {
        TardisMatrix m = {};
        m.data = at(all, kept(t, g) + first_ * of_.size);
        m.rows = length_, m.columns = m.group_size = of_.size, m.type = batch_.type;
        return m;
    }

    // Heads begin..end-1 of those that share a group.
    void run(const Input& x, int64_t t, int64_t g, int64_t begin, int64_t end) const {
        const int64_t first = t * of_.heads + g * shared_ + begin, count = end - begin;
        const TardisMatrix keys = rows(of_.keys, t, g), values = rows(of_.values, t, g);
        Input queries = of_token(x, first);
        queries.tokens = count;
        for (int64_t b = 0; b < length_; b += kBlockRows) {
            const int64_t stop = std::min(b + kBlockRows, length_);
            float out[kMaxTokens * kBlockRows];
            product_of(keys)(keys, {nullptr, b, stop, length_}, queries, out);
            for (int64_t h = 0; h < count; ++h)
                for (int64_t i = b; i < stop; ++i)
                    scores_[(first + h) * length_ + i] = out[h * kBlockRows + i - b] * of_.scale;
        }
        for (int64_t h = 0; h < count; ++h) {
            float* weights = scores_ + (first + h) * length_;
            const float inverse = 1 / weigh(weights, length_);
            alignas(64) float y[kMaxHead + kPad] = {};
            accumulate_of(values)(values, nullptr, {index_, weights, length_}, {0, of_.size}, y);
            for (int64_t i = 0; i < of_.size; ++i) y[i] *= inverse;
            const int64_t head = g * shared_ + begin + h;
            kernels().store({op_.y.data, batch_.type, 0}, t * op_.y.stride + head * of_.size, of_.size, y, nullptr);
        }
    }

    const TardisAttention& of_;
    const TardisOperation& op_;
    const TardisBatch& batch_;
    const int64_t bytes_, position_, first_, length_, shared_;
    float* scores_;
    const int32_t* index_;
    const char* queries_;
};

}  // namespace

void attend(const TardisAttention& of, const TardisOperation& op, const TardisBatch& batch, int64_t position) {
    Attention(of, op, batch, position).run();
}

}  // namespace tardis
