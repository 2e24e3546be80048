// Products of many neurons in bf16 with a W2 in planes, which has a row per neuron, for processors with AMX.
#include "amx.h"

#if defined(TARDIS_AMX_TILES)

namespace tardis {
namespace {

constexpr int64_t kNeuronsAtOnce = 512;  // whose rows are written out; with the tokens' they stay in the second cache
constexpr int64_t kAhead = 6;  // rows from what is written out to what is asked for

// Rows of W2 as bf16 numbers in panels of 32 columns.
template <int B>
class WrittenOutRows {
public:
    WrittenOutRows(const TardisMatrix& m, Range columns)
        : m_(m), columns_(columns), row_bytes_((m.columns + 7) / 8),
          groups_((m.columns + m.group_size - 1) / m.group_size) {
        const int64_t block = columns.begin / kBlockColumns * kBlockColumns, left = m.columns - block;
        bytes_ = (left < kBlockColumns ? left : kBlockColumns) / 8, first_byte_ = block / 8;
        begin_ = (columns.begin - block) / bytes_, end_ = (columns.end - block) / bytes_;
    }

    // Writes out rows begin..end-1, two by two.
    void write(int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row += 2) {
            for (int64_t i = 0; i < 2; ++i) read(row + i, in_order_[i]);
            write_pair(row, (row - begin) / 2);
        }
    }

    // Of columns 32 * panel on.
    const char* panel(int64_t panel) const { return wide_ + panel * kPanel; }

private:
    static constexpr int64_t kPanel = kNeuronsAtOnce / 2 * 4 * kPanelRows;

    TARDIS_INLINE const uint8_t* at(int64_t row) const {
        return static_cast<const uint8_t*>(m_.data) + row * m_.bits * row_bytes_ + first_byte_;
    }

    // The codes of a row, in the order of the columns.
    TARDIS_INLINE void read(int64_t row, uint8_t* to) const {
        const int64_t ahead = row + kAhead < m_.rows ? row + kAhead : row;
        prefetch(at(ahead)), Codes<B>::prefetch_planes(at(ahead), row_bytes_, B - m_.bits);
        Codes<B> codes;
        codes.load(at(row), row_bytes_, B - m_.bits, first64(bytes_));
        each<8>([&](auto k) TARDIS_INLINE {
            if (k >= begin_ && k < end_) _mm512_storeu_si512(to + (k - begin_) * bytes_, codes.template code<k>());
        });
    }

    TARDIS_INLINE void write_pair(int64_t row, int64_t pair) {
        const float half = static_cast<float>(m_.twice_zero) / 2;
        const uint16_t* scales = m_.scale + row * groups_;
        for (int64_t c = 0; c < columns_.end - columns_.begin; c += 16) {
            const int64_t group = (columns_.begin + c) / m_.group_size;
            const auto numbers = [&](int64_t i) TARDIS_INLINE {
                const __m512 scale = _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(scales[i * groups_ + group])));
                const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in_order_[i] + c));
                const __m512 level = _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)), _mm512_set1_ps(half));
                return _mm512_mul_ps(level, scale);
            };
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(numbers(1), numbers(0));
            char* to = wide_ + c / kPanelRows * kPanel + pair * 4 * kPanelRows + c % kPanelRows * 4;
            _mm512_store_si512(to, side_by_side(both));
        }
    }

    const TardisMatrix& m_;
    const Range columns_;
    const int64_t row_bytes_, groups_;
    int64_t bytes_, first_byte_, begin_, end_;  // of the block: bytes of a plane, and the bits of them that are wanted
    uint8_t in_order_[2][kBlockColumns / 2 + 64];
    alignas(64) char wide_[kDownColumns / kPanelRows * kPanel];
};

template <int B>
void multiply(const TardisMatrix& m, Range columns, const Tokens& x, float* out, int64_t stride) {
    WrittenOutRows<B> rows(m, columns);
    for (int64_t begin = 0; begin < m.rows; begin += kNeuronsAtOnce) {
        const int64_t end = begin + kNeuronsAtOnce < m.rows ? begin + kNeuronsAtOnce : m.rows;
        rows.write(begin, end);
        for (int64_t panel = 0; panel < (columns.end - columns.begin) / kPanelRows; ++panel) {
            const Part part = {rows.panel(panel), x.bf16 + begin, x.stride, (end - begin) / kStep};
            add_part_to_all(part, x.count, begin == 0, out + panel * kPanelRows, stride);
        }
    }
    _tile_release();
}

}  // namespace

void down_gemm_amx(const TardisMatrix& m, Range columns, const Tokens& x, float* out, int64_t stride) {
    if (m.bits == 1) return multiply<1>(m, columns, x, out, stride);
    if (m.bits == 2) return multiply<2>(m, columns, x, out, stride);
    if (m.bits <= 4) return multiply<4>(m, columns, x, out, stride);
    multiply<8>(m, columns, x, out, stride);
}

}  // namespace tardis
#endif
