// What happens to one token between and around the products: norms, rotary embeddings, attention, sums, gates. All of
// it is small beside reading the weights. One thread does it, but for gates and attention, which are shared where others
// are awake or there is much to do.
#include "step.h"

#include "attention.h"
#include "ffn.h"
#include "numbers.h"
#include "tasks.h"

#include <cmath>

namespace tardis {
namespace {

constexpr int64_t kFetched = 1 << 18;  // bytes at most that a thread fetches ahead: a part of its cache

// Sums run in lanes, which compilers keep in vector registers.
constexpr int64_t kLanes = 16;

template <typename F>
float sum_of(int64_t count, const F& term) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) lanes[j] += term(i + j);
    for (int64_t j = 0; i + j < count; ++j) lanes[j] += term(i + j);
    float sum = 0;
    for (float lane : lanes) sum += lane;
    return sum;
}

// Some numbers in fp32 at a time, kept by the thread from call to call.
float* scratch(int number, int64_t count) {
    static thread_local Numbers<float> kept[3];
    grow(kept[number], count);
    return kept[number].data();
}

void norm(const TardisNorm& of, const TardisOperation& op, const TardisBatch& batch) {
    const Number number(batch.type);
    const int64_t size = op.width / of.vectors;
    float *x = scratch(0, size), *factor = scratch(1, size), *bias = scratch(2, size);
    kernels().widen(of.factor, 0, size, factor);
    kernels().widen(of.bias, 0, size, bias);
    for (int64_t t = 0; t < batch.tokens; ++t) {
        for (int64_t v = 0; v < of.vectors; ++v) {
            number.load(op.x, t, v * size, size, x);
            const auto count = static_cast<float>(size);
            const float mean = of.centred ? sum_of(size, [&](int64_t i) { return x[i]; }) / count : 0;
            for (int64_t i = 0; i < size; ++i) x[i] -= mean;
            const float square = sum_of(size, [&](int64_t i) { return x[i] * x[i]; }) / count;
            const float inverse = 1 / std::sqrt(square + of.eps);
            for (int64_t i = 0; i < size; ++i) x[i] *= inverse;
            if (of.rounded_first) number.round(x, size);
            if (of.factor.data)
                for (int64_t i = 0; i < size; ++i) x[i] *= factor[i];
            for (int64_t i = 0; i < size; ++i) x[i] += bias[i];
            number.keep(op.y, t, v * size, size, x);
        }
    }
}

// How products are split: all share the threads, as small ones would have a thread each, and wait for it.
class Split {
public:
    Split(const TardisProduct* all, int32_t count, int most) : all_(all), count_(count) {
        int64_t bytes = 0;
        for (int32_t i = 0; i < count; ++i) bytes += matrix_bytes(all[i].weight);
        threads = threads_for(bytes, most);
        for (int32_t i = 0; i < count; ++i) {
            first_[i] = tasks, block_[i] = block_rows(all[i].weight, all[i].weight.rows, threads);
            tasks += blocks(all[i].weight.rows, block_[i]);
        }
    }

    // Rows begin..end-1 of matrix i.
    struct Task {
        int32_t i;
        int64_t begin, end;
    };
    Task task(int64_t number) const {
        int32_t i = count_ - 1;
        while (number < first_[i]) --i;
        const int64_t begin = (number - first_[i]) * block_[i];
        return {i, begin, std::min(begin + block_[i], all_[i].weight.rows)};
    }

    int threads;
    int64_t tasks = 0;

private:
    const TardisProduct* all_;
    const int32_t count_;
    int64_t first_[kMaxProducts], block_[kMaxProducts];  // number of a matrix' first task, and rows of each
};

void products(const TardisProduct* all, const TardisOperation& op, const TardisBatch& batch) {
    const Split split(all, op.count, batch.threads);
    Inputs inputs(batch, op.width);
    const Input* x[kMaxProducts];
    for (int32_t i = 0; i < op.count; ++i) x[i] = &inputs.for_matrix(all[i].weight, batch.activation_bits);
    parallel(split.threads, split.tasks, [&](int64_t number) {
        const auto [i, begin, end] = split.task(number);
        const TardisMatrix& m = all[i].weight;
        float out[kMaxTokens * kBlockRows];
        product_of(m)(m, {nullptr, begin, end, m.rows}, *x[i], out);
        const Widened bias(all[i].bias, begin, end);
        for (int64_t t = 0; t < batch.tokens; ++t)
            kernels().store({all[i].y, batch.type, 0}, t * m.rows + begin, end - begin, out + t * kBlockRows, bias.at);
    });
}

// Both products are rounded before they are added, as tensors would be.
void turn(const TardisTurn& of, const TardisOperation& op, const TardisBatch& batch, int64_t position) {
    const Number number(batch.type);
    const int64_t turned = of.turned, half = turned / 2;
    float *x = scratch(0, 3 * turned), *straight = x + turned, *across = straight + turned;
    float *cosine = scratch(1, turned), *sine = scratch(2, turned);
    kernels().widen(of.cosine, position * turned, turned, cosine);
    kernels().widen(of.sine, position * turned, turned, sine);
    for (int64_t t = 0; t < batch.tokens; ++t) {
        for (int64_t h = 0; h < of.heads; ++h) {
            number.load(op.x, t, h * of.size, turned, x);
            for (int64_t i = 0; i < turned; ++i) straight[i] = x[i] * cosine[i];
            for (int64_t i = 0; i < half; ++i) across[i] = -x[half + i] * sine[i];
            for (int64_t i = 0; i < half; ++i) across[half + i] = x[i] * sine[half + i];
            number.round(straight, turned);
            number.round(across, turned);
            for (int64_t i = 0; i < turned; ++i) straight[i] += across[i];
            number.keep(op.y, t, h * of.size, turned, straight);
        }
    }
}

void add(const TardisOperation& op, const TardisBatch& batch) {
    const Number number(batch.type);
    float *x = scratch(0, op.width), *other = scratch(1, op.width);
    for (int64_t t = 0; t < batch.tokens; ++t) {
        number.load(op.x, t, 0, op.width, x);
        number.load(op.other, t, 0, op.width, other);
        for (int64_t i = 0; i < op.width; ++i) x[i] += other[i];
        number.keep(op.y, t, 0, op.width, x);
    }
}

constexpr int64_t kGated = 256;  // numbers of a task

void gate(const TardisActivation& of, const TardisOperation& op, const TardisBatch& batch) {
    const Number number(batch.type);
    const int64_t parts = blocks(op.width, kGated);
    parallel(threads_for(2 * batch.tokens * op.width * 4, batch.threads), batch.tokens * parts, [&](int64_t task) {
        const int64_t t = task / parts, first = task % parts * kGated, count = std::min(kGated, op.width - first);
        float x[kGated], other[kGated];
        number.load(op.x, t, first, count, x);
        if (op.other.data) number.load(op.other, t, first, count, other);
        number.hide(of, x, op.other.data ? other : nullptr, count);
        number.keep(op.y, t, first, count, x);
    });
}

}  // namespace

bool reads_weights(const TardisOperation& op) {
    return op.kind == TARDIS_PRODUCTS || op.kind == TARDIS_FOLDED || op.kind == TARDIS_HEAD;
}

Stretch first_read(const TardisOperation& op, const TardisBatch& batch, int thread) {
    if (op.kind == TARDIS_FOLDED)
        return first_of_folded(*static_cast<const TardisFFN*>(op.of), batch, thread, kFetched);
    if (op.kind == TARDIS_HEAD) return first_of_head(*static_cast<const TardisHead*>(op.of), batch, thread, kFetched);
    const auto* all = static_cast<const TardisProduct*>(op.of);
    const Split split(all, op.count, batch.threads);
    const auto [i, begin, end] = split.task(std::min(thread * split.tasks / split.threads, split.tasks - 1));
    return stretch_of(all[i].weight, begin, all[i].weight.rows, kFetched);
}

void run(const TardisOperation& op, const TardisBatch& batch, int64_t position) {
    switch (op.kind) {
        case TARDIS_NORM: return norm(*static_cast<const TardisNorm*>(op.of), op, batch);
        case TARDIS_PRODUCTS: return products(static_cast<const TardisProduct*>(op.of), op, batch);
        case TARDIS_TURN: return turn(*static_cast<const TardisTurn*>(op.of), op, batch, position);
        case TARDIS_ATTEND: return attend(*static_cast<const TardisAttention*>(op.of), op, batch, position);
        case TARDIS_ADD: return add(op, batch);
        case TARDIS_GATE: return gate(*static_cast<const TardisActivation*>(op.of), op, batch);
        case TARDIS_HEAD: return head(*static_cast<const TardisHead*>(op.of), batch);
        default: return folded_ffn(*static_cast<const TardisFFN*>(op.of), batch);
    }
}

}  // namespace tardis
