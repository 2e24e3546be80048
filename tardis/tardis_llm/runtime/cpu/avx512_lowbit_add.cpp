// Sums of rows in few bits, for processors with AVX-512: codes meet integers, which stand for residuals times scales.
#include "avx512_lowbit.h"

#if defined(TARDIS_AVX512)

namespace tardis {
namespace {

// Some rows that are added together. What a row's weights of a group are multiplied with, its residual times its scale,
// is an integer of 16 bits in both halves of which four rows' meet their codes at once.
constexpr int kTogether = kTermsTogether;

struct Factors {
    // Of four rows each, a byte per row.
    alignas(64) int32_t high[kTogether / 4][kMaxSegments], low[kTogether / 4][kMaxSegments];
    alignas(64) int32_t start[kMaxSegments];  // of sums, for the codes' middles
    alignas(64) float unit[kMaxSegments];

    // Of `groups` groups, for the rows' scales and residuals. What is not finite makes the unit NaN.
    TARDIS_INLINE void set(const uint16_t* const* scale, const float* r, int64_t groups, int32_t twice_zero) {
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
            const __m512i middles = _mm512_mullo_epi32(total, _mm512_set1_epi32(-twice_zero));
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

// y += the rows' factors times the codes of a piece, of B bits; `whole`: that is 64 of them.
template <int B, bool whole>
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
            high[i] = add_dot<B>(high[i], four[i], highs), low[i] = add_dot<B>(low[i], four[i], lows);
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
        factors.set(rows.scale, rows.r, layout.groups, m.twice_zero);
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
                if (pieces[p].count == 64) add_piece<B, true>(y, pieces[p], stored, factors);
                else add_piece<B, false>(y, pieces[p], stored, factors);
            }
        }
    }
}

}  // namespace

void TARDIS_AVX512_SET::add_low_bit(
    const TardisMatrix& m, const Layout* layout, const Terms& terms, Range range, float* y
) {
    if (layout->groups > kMaxSegments) return portable_table()->add_low_bit(m, layout, terms, range, y);
    if (m.bits == 1) return add_bits<1>(m, *layout, terms, range, y);
    if (m.bits == 2) return add_bits<2>(m, *layout, terms, range, y);
    if (m.bits <= 4) return add_bits<4>(m, *layout, terms, range, y);
    add_bits<8>(m, *layout, terms, range, y);
}

}  // namespace tardis
#endif
