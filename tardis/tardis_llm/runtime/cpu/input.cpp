#include "input.h"

#include "dispatch.h"
#include "threads.h"

#include <algorithm>
#include <limits>

namespace tardis {
namespace {

int32_t small(int64_t value) { return static_cast<int32_t>(value); }

template <typename T>
int32_t small(const std::vector<T>& list) {
    return static_cast<int32_t>(list.size());
}

int64_t padded(int64_t columns) { return (columns + kPad - 1) / kPad * kPad + kPad; }

}  // namespace

GroupLayout::GroupLayout(int64_t columns, int64_t group_size, bool panels)
    : columns_(columns), group_size_(group_size), panels_(panels) {
    for (int64_t begin = 0; begin < columns; begin += kBlockColumns)
        add_block(begin, std::min(begin + kBlockColumns, columns));
    for (const Segment& segment : segments_) pieces_[segment.piece + segment.pieces - 1].last = 1;
    for (Block& block : blocks_)
        for (int32_t k = 0; block.whole && k < 8; ++k) block.ends |= pieces_[block.piece + k].last << k;
    const auto count = [](const auto& list) { return static_cast<int64_t>(list.size()); };
    layout_ = {
        blocks_.data(), pieces_.data(), segments_.data(), count(blocks_), count(pieces_), count(segments_),
        (columns + 7) / 8, segments_.back().group + 1,
    };
}

void GroupLayout::add_block(int64_t begin, int64_t end) {
    const int64_t bytes = panels_ ? 64 : (end - begin + 7) / 8;
    Block block = {};
    block.byte = small(begin / 8), block.bytes = small(bytes);
    block.column = small(begin), block.columns = small(end - begin);
    block.piece = small(pieces_), block.segment = small(segments_);
    for (int64_t bit = 0; bit < 8; ++bit) {
        const int64_t from = begin + bit * bytes, to = std::min(from + bytes, end);
        for (int64_t at = from; at < to;) {
            const int64_t stop = std::min((at / group_size_ + 1) * group_size_, to);
            add_piece(block, bit, at - from, at, stop - at);
            at = stop;
        }
    }
    block.pieces = small(pieces_) - block.piece;
    block.whole = end - begin == kBlockColumns && block.pieces == 8;
    blocks_.push_back(block);
}

void GroupLayout::add_piece(const Block& block, int64_t bit, int64_t first, int64_t column, int64_t count) {
    const int64_t group = column / group_size_;
    if (small(segments_) == block.segment || segments_.back().group != group)
        segments_.push_back({small(pieces_), 0, small(group)});
    ++segments_.back().pieces;
    pieces_.push_back({small(bit), small(first), small(count), small(column), small(group), 0});
}

const GroupLayout& layout_for(const TardisMatrix& m) {
    static thread_local std::vector<std::unique_ptr<const GroupLayout>> made;
    const bool panels = m.type == TARDIS_LOW_BIT_PANELS;
    for (const auto& each : made) {
        const bool same_groups = each->columns() == m.columns && each->group_size() == m.group_size;
        if (same_groups && each->panels() == panels) return *each;
    }
    made.push_back(std::make_unique<const GroupLayout>(m.columns, m.group_size, panels));
    return *made.back();
}

std::vector<std::unique_ptr<Inputs::Memory>>& Inputs::unused() {
    static thread_local std::vector<std::unique_ptr<Memory>> all;
    return all;
}

Inputs::Inputs(const TardisBatch& batch, int64_t columns) : plain_{}, threads_(batch.threads) {
    if (unused().empty()) unused().push_back(std::make_unique<Memory>());
    memory_ = std::move(unused().back());
    unused().pop_back();
    for (const auto& each : memory_->variants) each->quantised = false;
    const int64_t stride = padded(columns);
    grow(memory_->f32, batch.tokens * stride);
    grow(memory_->bf16, batch.type == TARDIS_BF16 ? batch.tokens * stride : 0);
    for (int64_t t = 0; t < batch.tokens; ++t) {
        float* wide = &memory_->f32[t * stride];
        kernels().widen({batch.x, batch.type, 0}, t * columns, columns, wide);
        std::fill(wide + columns, wide + stride, 0.0f);
        if (batch.type != TARDIS_BF16) continue;
        uint16_t* own = &memory_->bf16[t * stride];
        memcpy(own, static_cast<const uint16_t*>(batch.x) + t * columns, 2 * columns);
        std::fill(own + columns, own + stride, 0);
    }
    const uint16_t* bf16 = batch.type == TARDIS_BF16 ? memory_->bf16.data() : nullptr;
    plain_ = {batch.tokens, columns, stride, memory_->f32.data(), bf16, {}};
}

Inputs::~Inputs() { unused().push_back(std::move(memory_)); }

const Input& Inputs::for_matrix(const TardisMatrix& m, int32_t bits) {
    if (!is_low_bit(m)) return plain_;
    Variant& found = variant(m, bits == 8 ? 1 : 2);
    if (!found.quantised) quantise(found);
    return found.input;
}

Inputs::Variant& Inputs::variant(const TardisMatrix& m, int32_t halves) {
    auto& all = memory_->variants;
    for (const auto& each : all)
        if (&each->layout == &layout_for(m) && each->halves == halves) return *each;
    all.push_back(std::make_unique<Variant>(m, halves));
    return *all.back();
}

void Inputs::quantise(Variant& variant) {
    const Layout& layout = variant.layout.view();
    const int64_t stride = layout.piece_count * 64, tokens = plain_.tokens;
    grow(variant.values, tokens * variant.halves * stride);
    grow(variant.scale, tokens * layout.segment_count);
    grow(variant.sum, tokens * layout.segment_count);
    parallel(tokens * variant.layout.columns() < 65536 ? 1 : threads_, tokens, [&](int64_t t) {
        for (int64_t g = 0; g < layout.segment_count; ++g) quantise_segment(variant, t, g);
    });
    variant.input = plain_;
    variant.input.quantised = {
        &layout, variant.values.data(), variant.scale.data(), variant.sum.data(), stride, variant.halves,
    };
    variant.quantised = true;
}

// The largest becomes 127, or 127 * 257 of 16 bits, so that both halves fit int8. What is not finite makes every
// product with it NaN.
void Inputs::quantise_segment(Variant& variant, int64_t token, int64_t number) {
    const Layout& layout = variant.layout.view();
    const Segment& segment = layout.segments[number];
    const float* x = plain_.f32 + token * plain_.stride;
    const float top = variant.halves == 1 ? 127.0f : 127.0f * 257.0f;
    const int64_t begin = layout.pieces[segment.piece].column, last = segment.piece + segment.pieces - 1;
    const int64_t end = layout.pieces[last].column + layout.pieces[last].count;
    const float largest = kernels().largest(x + begin, end - begin);
    const bool finite = largest <= std::numeric_limits<float>::max(), zero = !finite || largest < 1e-30f;
    const float inverse = zero ? 0 : top / largest, unit = largest / top;
    const int64_t stride = layout.piece_count * 64;
    int8_t* values = variant.values.data() + token * variant.halves * stride;
    int64_t sum = 0;
    for (int64_t p = segment.piece; p <= last; ++p) {
        const Piece& piece = layout.pieces[p];
        int8_t *to = values + 64 * p + piece.first, *second = variant.halves == 2 ? to + stride : nullptr;
        if (!zero) {
            sum += kernels().round(x + piece.column, piece.count, inverse, to, second);
            continue;
        }
        std::fill(to, to + piece.count, 0);
        if (second) std::fill(second, second + piece.count, 0);
    }
    const size_t at = static_cast<size_t>(token * layout.segment_count + number);
    variant.scale[at] = finite ? unit : std::numeric_limits<float>::quiet_NaN();
    variant.sum[at] = static_cast<float>(sum) * variant.scale[at];
}

}  // namespace tardis
