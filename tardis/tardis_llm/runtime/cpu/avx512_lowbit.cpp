// Products with matrices in few bits, for processors with AVX-512: codes meet inputs that are integers as they are.
#include "avx512_lowbit.h"

#if defined(TARDIS_AVX512)

namespace tardis {
namespace {

constexpr int64_t kBytesAhead = 16384;  // of rows from a tile that is multiplied to one that is prefetched

// The ends of a block's segments where groups have 256 columns, as they have unless told otherwise.
constexpr int kUsualEnds = 0x88;

// Some rows and T tokens of H halves, a block of columns after the other: weights and inputs come from memory and the
// first cache, sums and totals stay in registers. E: the ends of segments in all whole blocks, or 0.
template <int B, int H, int T, int E>
class Tile {
public:
    static constexpr int R = T * H == 1 ? 4 : 8 / (T * H);

    Tile(const Quantised& quantised, int64_t first_token)
        : q_(quantised), layout_(*quantised.layout), token_(first_token),
          factors_((layout_.segment_count + 15) / 16 * 16) {}

    // Rows from number `first` on, as far as they go.
    void multiply(const TardisMatrix& m, const Rows& rows, int64_t first, float* out) {
        const int64_t row_bytes = m.bits * layout_.row_bytes, tiles_ahead = 1 + kBytesAhead / (R * row_bytes);
        const auto* data = static_cast<const uint8_t*>(m.data);
        const uint8_t *w[R], *ahead[R];
        const uint16_t* scale[R];
        each<R>([&](auto r) TARDIS_INLINE {
            const int64_t row = rows.at(first + r), next = rows.at(first + r + tiles_ahead * R);
            w[r] = data + row * row_bytes, ahead[r] = data + next * row_bytes;
            scale[r] = m.scale + row * layout_.groups;
            if (token_ == 0) prefetch_ends(ahead[r], m.scale + next * layout_.groups, layout_.groups);
        });
        Totals total = {};
        const __m512 middle = _mm512_set1_ps(static_cast<float>(m.twice_zero) / -2);
        for (int64_t g = 0; g < layout_.segment_count; g += 16) begin(g, scale, middle, total);
        for (int64_t b = 0; b < layout_.block_count; ++b) {
            const Block& block = layout_.blocks[b];
            const __mmask64 bytes = block.whole ? ~0ull : first64(block.bytes);
            Codes<B> codes[R];
            each<R>([&](auto r) TARDIS_INLINE {
                codes[r].load(w[r] + block.byte, layout_.row_bytes, B - m.bits, bytes);
                if (token_ > 0) return;
                Codes<B>::prefetch_planes(ahead[r] + block.byte, layout_.row_bytes, B - m.bits);
            });
            if (block.whole) add_whole(block, codes, total);
            else add_pieces(block, codes, total);
        }
        each<R>([&](auto r) TARDIS_INLINE {
            if (first + r >= rows.end) return;
            each<T>([&](auto t) TARDIS_INLINE { out[t * kBlockRows + r] = _mm512_reduce_add_ps(total[r][t]); });
        });
    }

private:
    static constexpr int P = T * H == 1 && B < 8 && kQuickBytes ? 2 : 1;  // places in bytes of which codes are taken
    using Totals = __m512[R][T];
    using Sums = __m512i[R][T * H][P];

    // For 16 segments from number g on: the rows' scales times the tokens', and what codes' middles take from products.
    TARDIS_INLINE void begin(int64_t g, const uint16_t* const (&scale)[R], __m512 middle, Totals& total) {
        const int64_t count = layout_.segment_count;
        const __mmask16 some = first16(count - g);
        __m512 sums[T], units[T];
        each<T>([&](auto t) TARDIS_INLINE {
            const int64_t at = (token_ + t) * count + g;
            sums[t] = _mm512_mul_ps(middle, _mm512_maskz_loadu_ps(some, q_.sum + at));
            units[t] = _mm512_maskz_loadu_ps(some, q_.scale + at);
        });
        each<R>([&](auto r) TARDIS_INLINE {
            const __m512 own = scales(scale[r], g, some);
            each<T>([&](auto t) TARDIS_INLINE {
                total[r][t] = _mm512_fmadd_ps(own, sums[t], total[r][t]);
                _mm512_store_ps(factor_ + (r * T + t) * factors_ + g, _mm512_mul_ps(own, units[t]));
            });
        });
    }

    // Of the segments from number g on, in fp32.
    TARDIS_INLINE __m512 scales(const uint16_t* scale, int64_t g, __mmask16 some) const {
        const int64_t count = layout_.segment_count;
        if (count == layout_.groups) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, scale + g));
        if (layout_.groups == 1) return _mm512_set1_ps(_cvtsh_ss(scale[0]));
        alignas(32) uint16_t own[16] = {};
        for (int j = 0; j < 16 && g + j < count; ++j) own[j] = scale[layout_.segments[g + j].group];
        return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(own)));
    }

    TARDIS_INLINE const int8_t* values(const Block& block) const {
        return q_.values + token_ * H * q_.stride + 64 * block.piece;
    }

    TARDIS_INLINE void add_whole(const Block& block, Codes<B> (&codes)[R], Totals& total) const {
        const int8_t* v = values(block);
        const float* f = factor_ + block.segment;
        const int ends = E ? E : block.ends;
        Sums sum = {};
        each<8>([&](auto k) TARDIS_INLINE {
            constexpr int next = P == 2 ? k % (2 * B) : k;
            if constexpr (k > 0 && next == 0) each<R>([&](auto r) TARDIS_INLINE { codes[r].template skip<2 * B>(); });
            add_products<(P == 2 && next >= B)>(v + 64 * k, sum, [&](auto r) TARDIS_INLINE {
                if constexpr (P == 2) return codes[r].template code_in_place<next>();
                else return codes[r].template code<k>();
            });
            if (ends & (1 << k)) end_segment(f++, sum, total);
        });
    }

    TARDIS_INLINE void add_pieces(const Block& block, Codes<B> (&codes)[R], Totals& total) const {
        const int8_t* v = values(block);
        const float* f = factor_ + block.segment;
        const Piece *piece = layout_.pieces + block.piece, *end = piece + block.pieces;
        Sums sum = {};
        for (int first = 0; first < 8; first += B) {
            each<B>([&](auto k) TARDIS_INLINE {
                for (; piece != end && piece->bit == first + k; ++piece, v += 64) {
                    add_products<0>(v, sum, [&](auto r) TARDIS_INLINE { return codes[r].template code<k>(); });
                    if (piece->last) end_segment(f++, sum, total);
                }
            });
            each<R>([&](auto r) TARDIS_INLINE { codes[r].template skip<B>(); });
        }
    }

    template <int place, typename Code>
    TARDIS_INLINE void add_products(const int8_t* v, Sums& sum, const Code& code) const {
        __m512i own[R];
        each<R>([&](auto r) TARDIS_INLINE { own[r] = code(r); });
        __m512i x;
        each<T * H * R>([&](auto i) TARDIS_INLINE {
            constexpr int n = i / R, r = i % R;
            if constexpr (r == 0) x = _mm512_load_si512(v + n * q_.stride);
            __m512i& dot = sum[r][n][place];
            dot = add_dot<P == 2 ? 8 : B>(dot, own[r], x);
        });
    }

    TARDIS_INLINE void end_segment(const float* f, Sums& sum, Totals& total) const {
        each<R * T>([&](auto i) TARDIS_INLINE {
            constexpr int r = i / T, t = i % T;
            __m512i dot = joined(sum[r][t * H]);
            if constexpr (H == 2) dot = _mm512_add_epi32(_mm512_slli_epi32(dot, 8), joined(sum[r][t * H + 1]));
            const __m512 both = _mm512_set1_ps(f[i * factors_]);
            total[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), both, total[r][t]);
            each<H * P>([&](auto j) TARDIS_INLINE { sum[r][t * H + j / P][j % P] = _mm512_setzero_si512(); });
        });
    }

    // Of all places.
    TARDIS_INLINE static __m512i joined(const __m512i (&sum)[P]) {
        if constexpr (P == 1) return sum[0];
        else return _mm512_add_epi32(sum[0], _mm512_srai_epi32(sum[1], B));
    }

    const Quantised& q_;
    const Layout& layout_;
    const int64_t token_, factors_;  // how far the factors of a row and token are from the next
    alignas(64) float factor_[R * T * kMaxSegments];
};

template <int B, int H, int T, int E>
void sweep(const TardisMatrix& m, const Rows& rows, const Input& x, int64_t token, float* out) {
    Tile<B, H, T, E> tile(x.quantised, token);
    for (int64_t i = rows.begin; i < rows.end; i += tile.R)
        tile.multiply(m, rows, i, out + token * kBlockRows + i - rows.begin);
}

template <int B, int H, int E>
void product_bits(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    int64_t t = 0;
    for (; t + 4 <= x.tokens; t += 4) sweep<B, H, 4, E>(m, rows, x, t, out);
    for (; t + 2 <= x.tokens; t += 2) sweep<B, H, 2, E>(m, rows, x, t, out);
    for (; t < x.tokens; ++t) sweep<B, H, 1, E>(m, rows, x, t, out);
}

// Codes of 3 bits are taken as of 4, and those of 5 to 7 as of 8.
template <int H, int E>
void product_of_bits(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    if (m.bits == 1) return product_bits<1, H, E>(m, rows, x, out);
    if (m.bits == 2) return product_bits<2, H, E>(m, rows, x, out);
    if (m.bits <= 4) return product_bits<4, H, E>(m, rows, x, out);
    return product_bits<8, H, 0>(m, rows, x, out);  // with so many planes to join, known ends gain nothing
}

}  // namespace

void TARDIS_AVX512_SET::product_low_bit(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    if (x.quantised.layout->segment_count > kMaxSegments) return portable_table()->low_bit(m, rows, x, out);
    if (x.quantised.halves == 2) return product_of_bits<2, 0>(m, rows, x, out);
    if (m.group_size == 256) return product_of_bits<1, kUsualEnds>(m, rows, x, out);
    product_of_bits<1, 0>(m, rows, x, out);
}

const LowBit TARDIS_AVX512_SET::kLowBit = {product_low_bit, low_bit_panels, add_low_bit};

}  // namespace tardis
#endif
