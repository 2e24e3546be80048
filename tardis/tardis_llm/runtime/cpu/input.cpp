#include "input.h"

#include "pool.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace tardis {
namespace {

int64_t padded(int64_t columns) { return (columns + kPad - 1) / kPad * kPad + kPad; }

float widened(const TardisBatch& batch, int64_t at) {
    if (batch.type == TARDIS_FP32) return static_cast<const float*>(batch.x)[at];
    return from_bf16(static_cast<const uint16_t*>(batch.x)[at]);
}

}  // namespace

GroupLayout::GroupLayout(int64_t columns, int64_t group_size) : columns_(columns), group_size_(group_size) {
    int32_t group = 0;
    for (int64_t begin = 0; begin < columns; begin += group_size)
        add_group(group++, begin, std::min(begin + group_size, columns));
    const auto count = [](const auto& list) { return static_cast<int64_t>(list.size()); };
    layout_ = {chunks_.data(), segments_.data(), count(chunks_), count(segments_), (columns + 7) / 8, group};
}

// Chunks begin at bytes: the first of a group may share its byte with the group before.
void GroupLayout::add_group(int32_t group, int64_t begin, int64_t end) {
    const int64_t last_byte = std::max<int64_t>((columns_ + 7) / 8 - 8, 0);
    int64_t first = begin, byte = begin / 8;
    for (int32_t chunk = 0; first < end; ++chunk, byte += 8) {
        const int64_t from = std::min(byte, last_byte), stop = std::min(8 * from + 64, end);
        if (chunk % kSegmentChunks == 0) segments_.push_back({static_cast<int32_t>(chunks_.size()), 0, group});
        ++segments_.back().chunks;
        const auto small = [](int64_t value) { return static_cast<int32_t>(value); };
        chunks_.push_back({small(from), small(first - 8 * from), small(first), small(stop - first), group});
        first = stop;
    }
}

Inputs::Inputs(const TardisBatch& batch, int64_t columns)
    : plain_{}, halves_(batch.activation_bits == 8 ? 1 : 2), threads_(batch.threads) {
    const int64_t stride = padded(columns);
    f32_.resize(static_cast<size_t>(batch.tokens * stride));
    if (batch.type == TARDIS_BF16) bf16_.resize(f32_.size());
    for (int64_t t = 0; t < batch.tokens; ++t) {
        for (int64_t j = 0; j < columns; ++j) f32_[t * stride + j] = widened(batch, t * columns + j);
        if (batch.type == TARDIS_BF16)
            memcpy(&bf16_[t * stride], static_cast<const uint16_t*>(batch.x) + t * columns, 2 * columns);
    }
    plain_ = {batch.tokens, columns, stride, f32_.data(), bf16_.empty() ? nullptr : bf16_.data(), {}};
}

const Input& Inputs::for_matrix(const TardisMatrix& m) {
    if (m.type != TARDIS_LOW_BIT) return plain_;
    Variant& found = variant(m);
    if (!found.quantised) quantise(found);
    return found.input;
}

const Layout& Inputs::layout_of(const TardisMatrix& m) { return variant(m).layout.view(); }

Inputs::Variant& Inputs::variant(const TardisMatrix& m) {
    for (const auto& each : variants_)
        if (each->layout.columns() == m.columns && each->layout.group_size() == m.group_size) return *each;
    variants_.push_back(std::make_unique<Variant>(m.columns, m.group_size));
    return *variants_.back();
}

void Inputs::quantise(Variant& variant) {
    const Layout& layout = variant.layout.view();
    const int64_t stride = layout.chunk_count * 64, tokens = plain_.tokens;
    variant.values.resize(static_cast<size_t>(tokens * halves_ * stride));
    variant.scale.resize(static_cast<size_t>(tokens * layout.segment_count));
    variant.sum.resize(variant.scale.size());
    parallel(tokens * variant.layout.columns() < 65536 ? 1 : threads_, tokens, [&](int64_t t) {
        for (int64_t g = 0; g < layout.segment_count; ++g) quantise_segment(variant, t, g);
    });
    variant.input = plain_;
    variant.input.quantised = {
        &layout, variant.values.data(), variant.scale.data(), variant.sum.data(), stride, halves_,
    };
    variant.quantised = true;
}

// The largest becomes 127, or 127 * 257 of 16 bits, so that both halves fit int8. What is not finite makes every
// product with it NaN.
void Inputs::quantise_segment(Variant& variant, int64_t token, int64_t number) {
    const Layout& layout = variant.layout.view();
    const Segment& segment = layout.segments[number];
    const Chunk* chunks = layout.chunks + segment.chunk;
    const int64_t stride = layout.chunk_count * 64;
    const float* x = plain_.f32 + token * plain_.stride;
    const float top = halves_ == 1 ? 127.0f : 127.0f * 257.0f;
    const Chunk& last = chunks[segment.chunks - 1];
    float largest = 0;
    bool finite = true;
    for (int64_t j = chunks[0].first; j < last.first + last.count; ++j) {
        const float size = std::fabs(x[j]);
        finite &= size <= std::numeric_limits<float>::max();
        largest = std::max(largest, size);
    }
    const bool zero = !finite || largest < 1e-30f;
    const float inverse = zero ? 0 : top / largest;
    int8_t* values = variant.values.data() + token * halves_ * stride + segment.chunk * 64;
    int64_t sum = 0;
    for (int32_t c = 0; c < segment.chunks && !zero; ++c) {
        const Chunk& chunk = chunks[c];
        for (int32_t j = chunk.shift; j < chunk.shift + chunk.count; ++j) {
            const int32_t value = static_cast<int32_t>(std::lrintf(x[8 * chunk.byte + j] * inverse));
            int8_t* to = values + 64 * c + (j & ~7) + 7 - (j & 7);
            sum += value;
            if (halves_ == 1) {
                *to = static_cast<int8_t>(value);
            } else {
                const int8_t low = static_cast<int8_t>(value & 0xff);
                to[0] = static_cast<int8_t>((value - low) >> 8);
                to[stride] = low;
            }
        }
    }
    const size_t at = static_cast<size_t>(token * layout.segment_count + number);
    variant.scale[at] = finite ? largest / top : std::numeric_limits<float>::quiet_NaN();
    variant.sum[at] = static_cast<float>(sum);
}

}  // namespace tardis
