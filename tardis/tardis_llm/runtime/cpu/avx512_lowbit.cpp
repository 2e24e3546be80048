// Matrices in few bits, for processors with AVX-512: codes meet inputs, or residuals, that are integers as they are.
#include "avx512.h"

#if defined(TARDIS_AVX512)

namespace tardis {
namespace {

__m512i bytes_of(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }

// mask ? a : b, bit by bit.
__m512i select(int mask, __m512i a, __m512i b) { return _mm512_ternarylogic_epi64(bytes_of(mask), a, b, 0xca); }

// 64 bytes, or the first of them. A masked load of all of them would wait for memory several times as long.
inline TARDIS_INLINE __m512i load_bytes(const uint8_t* p, __mmask64 bytes) {
    return bytes == ~0ull ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(bytes, p);
}

// The codes of a block of a row, in B bits each, 1, 2, 4 or 8: register s has those of the bits k with k % B == s, from
// the lowest on.
template <int B>
struct Codes {
    __m512i line[B];

    // p: the bytes of the block in the first plane. Of planes, which come highest first, the first `missing` are zero,
    // which are B / 2 - 1 at most.
    TARDIS_INLINE void load(const uint8_t* p, int64_t plane, int missing, __mmask64 bytes) {
        each<B>([&](auto b) TARDIS_INLINE {
            const bool zero = b < B / 2 - 1 && b < missing;
            line[b] = zero ? _mm512_setzero_si512() : load_bytes(p + (b - missing) * plane, bytes);
        });
        join();
    }

    // Rows do not begin with a line of the cache: of a block's bytes in each plane, fetches the line in which they end,
    // which leaves the row's first to `prefetch_ends`.
    TARDIS_INLINE static void prefetch_planes(const uint8_t* p, int64_t plane, int missing) {
        each<B>([&](auto b) TARDIS_INLINE {
            if (b >= B / 2 - 1 || b >= missing) prefetch(p + (b - missing) * plane + 63);
        });
    }

    // Pairs of planes become pairs of registers of two-bit codes, and pairs of these of four-bit codes, and so on.
    TARDIS_INLINE void join() {
        if constexpr (B >= 2) each<B / 2>([&](auto b) TARDIS_INLINE { pair<1, 0xaa>(line[2 * b], line[2 * b + 1]); });
        if constexpr (B >= 4)
            each<B / 4>([&](auto b) TARDIS_INLINE {
                each<2>([&](auto s) TARDIS_INLINE { pair<2, 0xcc>(line[4 * b + s], line[4 * b + 2 + s]); });
            });
        if constexpr (B == 8) each<4>([&](auto s) TARDIS_INLINE { pair<4, 0xf0>(line[s], line[4 + s]); });
    }

    // Joins high and low halves of codes, `shift` bits each: the even places of both to `high`, the odd ones to `low`.
    template <int shift, int mask>
    TARDIS_INLINE static void pair(__m512i& high, __m512i& low) {
        const __m512i even = select(mask, _mm512_slli_epi16(high, shift), low);
        low = select(mask, high, _mm512_srli_epi16(low, shift));
        high = even;
    }

    template <int k>
    TARDIS_INLINE __m512i code() const {
        constexpr int shift = k / B * B;
        if constexpr (B == 8) return line[k];
        if constexpr (shift == 0) return _mm512_and_si512(line[k % B], bytes_of((1 << B) - 1));
        return bits_of_bytes<shift, B>(line[k % B]);
    }

    // The same for bit k of those left, below 2 * B, but where they lie: the upper half of them 1 << B times as large.
    // It leaves the ports free that products need.
    template <int k>
    TARDIS_INLINE __m512i code_in_place() const {
        return _mm512_and_si512(line[k % B], bytes_of(((1 << B) - 1) << k / B * B));
    }

    // Leaves out 2 * B bits, for B up to 4.
    TARDIS_INLINE void skip() {
        each<B>([&](auto s) TARDIS_INLINE { line[s] = _mm512_srli_epi16(line[s], 2 * B); });
    }

    // to: 64 codes for each bit.
    TARDIS_INLINE void store(uint8_t (*to)[64]) const {
        each<8>([&](auto k) TARDIS_INLINE { _mm512_store_si512(to[k], code<k>()); });
    }
};

// Of a row, the first line; of its scales, which usually fit one line and may lie in two, the first and the last.
inline TARDIS_INLINE void prefetch_ends(const uint8_t* row, const uint16_t* scale, int64_t groups) {
    prefetch(row), prefetch(scale), prefetch(scale + groups - 1);
}

constexpr int64_t kBytesAhead = 16384;  // of rows from a tile that is multiplied to one that is prefetched
constexpr int64_t kMaxSegments = 256;  // of a row, in these kernels

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
        const __m512 middle = _mm512_set1_ps(static_cast<float>((1 << m.bits) - 1) / -2);
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
    static constexpr int P = T * H == 1 && B < 8 ? 2 : 1;  // places in bytes of which codes are taken
    using Totals = __m512[R][T];
    using Sums = __m512i[R][T][H][P];

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
            if constexpr (k > 0 && next == 0) each<R>([&](auto r) TARDIS_INLINE { codes[r].skip(); });
            add_products<(P == 2 && next >= B)>(v + 64 * k, sum, [&](auto r) TARDIS_INLINE {
                if constexpr (P == 2) return codes[r].template code_in_place<next>();
                else return codes[r].template code<k>();
            });
            if (ends & (1 << k)) end_segment(f++, sum, total);
        });
    }

    TARDIS_INLINE void add_pieces(const Block& block, const Codes<B> (&codes)[R], Totals& total) const {
        const int8_t* v = values(block);
        const float* f = factor_ + block.segment;
        const Piece *piece = layout_.pieces + block.piece, *end = piece + block.pieces;
        Sums sum = {};
        each<8>([&](auto k) TARDIS_INLINE {
            for (; piece != end && piece->bit == k; ++piece, v += 64) {
                add_products<0>(v, sum, [&](auto r) TARDIS_INLINE { return codes[r].template code<k>(); });
                if (piece->last) end_segment(f++, sum, total);
            }
        });
    }

    template <int place, typename Code>
    TARDIS_INLINE void add_products(const int8_t* v, Sums& sum, const Code& code) const {
        __m512i own[R];
        each<R>([&](auto r) TARDIS_INLINE { own[r] = code(r); });
        each<T>([&](auto t) TARDIS_INLINE {
            each<H>([&](auto h) TARDIS_INLINE {
                const __m512i x = _mm512_load_si512(v + (t * H + h) * q_.stride);
                each<R>([&](auto r) TARDIS_INLINE { sum[r][t][h][place] = add_dot(sum[r][t][h][place], own[r], x); });
            });
        });
    }

    TARDIS_INLINE void end_segment(const float* f, Sums& sum, Totals& total) const {
        each<R>([&](auto r) TARDIS_INLINE {
            each<T>([&](auto t) TARDIS_INLINE {
                __m512i dot = joined(sum[r][t][0]);
                if constexpr (H == 2) dot = _mm512_add_epi32(_mm512_slli_epi32(dot, 8), joined(sum[r][t][1]));
                const __m512 both = _mm512_set1_ps(f[(r * T + t) * factors_]);
                total[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), both, total[r][t]);
                each<H>([&](auto h) TARDIS_INLINE {
                    each<P>([&](auto p) TARDIS_INLINE { sum[r][t][h][p] = _mm512_setzero_si512(); });
                });
            });
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
    return product_bits<8, H, E>(m, rows, x, out);
}

// Some rows that are added together. What a row's weights of a group are multiplied with, its residual times its scale,
// is an integer of 16 bits in both halves of which four rows' meet their codes at once.
constexpr int kTogether = kTermsTogether;

struct Factors {
    // Of four rows each, a byte per row.
    alignas(64) int32_t high[kTogether / 4][kMaxSegments], low[kTogether / 4][kMaxSegments];
    alignas(64) int32_t start[kMaxSegments];  // of sums, for the codes' middles
    alignas(64) float unit[kMaxSegments];

    // Of `groups` groups, for the rows' scales and residuals. What is not finite makes the unit NaN.
    TARDIS_INLINE void set(const uint16_t* const* scale, const float* r, int64_t groups, int32_t bits) {
        const __m512 top = _mm512_set1_ps(127.0f * 257.0f), tiny = _mm512_set1_ps(1e-30f);
        for (int64_t g = 0; g < groups; g += 16) {
            __m512 factor[kTogether], largest = _mm512_setzero_ps(), nan = largest;
            each<kTogether>([&](auto e) TARDIS_INLINE {
                const __m512 own = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first16(groups - g), scale[e] + g));
                factor[e] = _mm512_mul_ps(_mm512_set1_ps(r[e]), own);
                largest = _mm512_max_ps(largest, _mm512_abs_ps(factor[e]));
                nan = _mm512_fmadd_ps(factor[e], _mm512_setzero_ps(), nan);
            });
            const __m512 inverse = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(largest, tiny, _CMP_GT_OQ), top, largest);
            const __m512 step = _mm512_add_ps(_mm512_div_ps(largest, top), nan);
            __m512i total = _mm512_setzero_si512();
            each<kTogether / 4>([&](auto some) TARDIS_INLINE {
                __m512i highs = _mm512_setzero_si512(), lows = highs;
                each<4>([&](auto i) TARDIS_INLINE {
                    const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(factor[4 * some + i], inverse));
                    const __m512i below = _mm512_srai_epi32(_mm512_slli_epi32(value, 24), 24);
                    const __m512i above = _mm512_srai_epi32(_mm512_sub_epi32(value, below), 8);
                    constexpr __mmask64 byte = 0x1111111111111111ull << i;
                    highs = _mm512_mask_mov_epi8(highs, byte, _mm512_slli_epi32(above, 8 * i));
                    lows = _mm512_mask_mov_epi8(lows, byte, _mm512_slli_epi32(below, 8 * i));
                    total = _mm512_add_epi32(total, value);
                });
                _mm512_store_si512(high[some] + g, highs);
                _mm512_store_si512(low[some] + g, lows);
            });
            _mm512_store_ps(unit + g, step);
            const __m512i middles = _mm512_mullo_epi32(total, _mm512_set1_epi32(1 - (1 << bits)));
            _mm512_store_si512(start + g, _mm512_srai_epi32(middles, 1));
        }
    }
};

using Stored = uint8_t[kTogether][8][64];

// Four rows' codes side by side: vector i has, in its 128 bits number l, those of columns 16 * l + 4 * i and three
// following.
inline TARDIS_INLINE void interleave(const __m512i (&row)[4], __m512i (&four)[4]) {
    const __m512i low[] = {_mm512_unpacklo_epi8(row[0], row[1]), _mm512_unpacklo_epi8(row[2], row[3])};
    const __m512i high[] = {_mm512_unpackhi_epi8(row[0], row[1]), _mm512_unpackhi_epi8(row[2], row[3])};
    four[0] = _mm512_unpacklo_epi16(low[0], low[1]), four[1] = _mm512_unpackhi_epi16(low[0], low[1]);
    four[2] = _mm512_unpacklo_epi16(high[0], high[1]), four[3] = _mm512_unpackhi_epi16(high[0], high[1]);
}

// body(l, vector) with columns 16 * l and following, of vectors that have them as `interleave` leaves them.
template <typename F>
inline TARDIS_INLINE void in_order(const __m512 (&four)[4], const F& body) {
    const __m512 low[] = {_mm512_shuffle_f32x4(four[0], four[1], 0x44), _mm512_shuffle_f32x4(four[2], four[3], 0x44)};
    const __m512 high[] = {_mm512_shuffle_f32x4(four[0], four[1], 0xee), _mm512_shuffle_f32x4(four[2], four[3], 0xee)};
    body(Constant<0>{}, _mm512_shuffle_f32x4(low[0], low[1], 0x88));
    body(Constant<1>{}, _mm512_shuffle_f32x4(low[0], low[1], 0xdd));
    body(Constant<2>{}, _mm512_shuffle_f32x4(high[0], high[1], 0x88));
    body(Constant<3>{}, _mm512_shuffle_f32x4(high[0], high[1], 0xdd));
}

// y += the rows' factors times the codes of a piece; `whole`: that is 64 of them.
template <bool whole>
inline TARDIS_INLINE void add_piece(float* y, const Piece& piece, const Stored& stored, const Factors& factors) {
    const __mmask64 some = whole ? ~0ull : first64(piece.count) << piece.first;
    const __m512i start = _mm512_set1_epi32(factors.start[piece.group]);
    __m512i high[4] = {}, low[4] = {start, start, start, start};
    each<kTogether / 4>([&](auto half) TARDIS_INLINE {
        __m512i code[4], four[4];
        each<4>([&](auto e) TARDIS_INLINE {
            code[e] = _mm512_load_si512(stored[4 * half + e][piece.bit]);
            if constexpr (!whole) code[e] = _mm512_maskz_mov_epi8(some, code[e]);
        });
        interleave(code, four);
        const __m512i highs = _mm512_set1_epi32(factors.high[half][piece.group]);
        const __m512i lows = _mm512_set1_epi32(factors.low[half][piece.group]);
        each<4>([&](auto i) TARDIS_INLINE {
            high[i] = add_dot(high[i], four[i], highs), low[i] = add_dot(low[i], four[i], lows);
        });
    });
    __m512 sum[4];
    each<4>([&](auto i) TARDIS_INLINE {
        sum[i] = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[i], 8), low[i]));
    });
    const __m512 unit = _mm512_set1_ps(factors.unit[piece.group]);
    float* to = y + piece.column - piece.first;
    in_order(sum, [&](auto i, __m512 of) TARDIS_INLINE {
        float* at = to + 16 * i;
        const auto here = static_cast<__mmask16>(some >> 16 * i);
        if constexpr (whole) _mm512_storeu_ps(at, _mm512_fmadd_ps(unit, of, _mm512_loadu_ps(at)));
        else _mm512_mask_storeu_ps(at, here, _mm512_fmadd_ps(unit, of, _mm512_maskz_loadu_ps(here, at)));
    });
}

// Rows from number `first` of the terms on.
struct Added {
    const uint8_t *data[kTogether], *ahead[kTogether];
    const uint16_t *scale[kTogether], *scale_ahead[kTogether];
    float r[kTogether];

    Added(const TardisMatrix& m, const Layout& layout, const Terms& terms, int64_t first) {
        const auto row = [&](int64_t e) -> int64_t { return terms.index[e < terms.count ? e : terms.count - 1]; };
        for (int e = 0; e < kTogether; ++e) {
            const int64_t i = row(first + e), next = row(first + kTogether + e);
            const auto* all = static_cast<const uint8_t*>(m.data);
            data[e] = all + i * m.bits * layout.row_bytes, ahead[e] = all + next * m.bits * layout.row_bytes;
            scale[e] = m.scale + i * layout.groups, scale_ahead[e] = m.scale + next * layout.groups;
            r[e] = first + e < terms.count ? terms.r[first + e] : 0.0f;
        }
    }
};

template <int B>
void add_bits(const TardisMatrix& m, const Layout& layout, const Terms& terms, Range range, float* y) {
    Factors factors;
    alignas(64) Stored stored;
    for (int64_t first = 0; first < terms.count; first += kTogether) {
        const Added rows(m, layout, terms, first);
        each<kTogether>([&](auto e) TARDIS_INLINE {
            prefetch_ends(rows.ahead[e], rows.scale_ahead[e], layout.groups);
        });
        factors.set(rows.scale, rows.r, layout.groups, m.bits);
        for (int64_t b = range.begin; b < range.end; ++b) {
            const Block& block = layout.blocks[b];
            each<kTogether>([&](auto e) TARDIS_INLINE {
                Codes<B>::prefetch_planes(rows.ahead[e] + block.byte, layout.row_bytes, B - m.bits);
                Codes<B> codes;
                codes.load(rows.data[e] + block.byte, layout.row_bytes, B - m.bits, first64(block.bytes));
                codes.store(stored[e]);
            });
            const Piece* pieces = layout.pieces + block.piece;
            for (int32_t p = 0; p < block.pieces; ++p) {
                if (pieces[p].count == 64) add_piece<true>(y, pieces[p], stored, factors);
                else add_piece<false>(y, pieces[p], stored, factors);
            }
        }
    }
}

}  // namespace

// Rows of very many groups are for the plain kernels.
void product_low_bit_avx512(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    if (x.quantised.layout->segment_count > kMaxSegments) return portable_table()->low_bit(m, rows, x, out);
    if (x.quantised.halves == 2) return product_of_bits<2, 0>(m, rows, x, out);
    if (m.group_size == 256) return product_of_bits<1, kUsualEnds>(m, rows, x, out);
    product_of_bits<1, 0>(m, rows, x, out);
}

void add_low_bit_avx512(const TardisMatrix& m, const Layout* layout, const Terms& terms, Range range, float* y) {
    if (layout->groups > kMaxSegments) return portable_table()->add_low_bit(m, layout, terms, range, y);
    if (m.bits == 1) return add_bits<1>(m, *layout, terms, range, y);
    if (m.bits == 2) return add_bits<2>(m, *layout, terms, range, y);
    if (m.bits <= 4) return add_bits<4>(m, *layout, terms, range, y);
    add_bits<8>(m, *layout, terms, range, y);
}

}  // namespace tardis
#endif
