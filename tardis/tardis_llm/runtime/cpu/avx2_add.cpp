// Sums of rows in few bits, for processors with AVX2: codes meet integers, which stand for residuals times scales.
#include "avx2_lowbit.h"

#if defined(TARDIS_AVX2)

namespace tardis {
namespace {

// Some rows that are added together. What a row's weights of a group are multiplied with, its residual times its scale,
// is an integer of 16 bits, in both halves of which two rows' meet their codes at once.
constexpr int kTogether = kTermsTogether, kPairs = kTogether / 2;
constexpr int64_t kMaxGroups = 256;  // of a row; those of more are for the plain kernels

struct Factors {
    // Of two rows each, a byte per row.
    alignas(32) uint16_t high[kPairs][kMaxGroups], low[kPairs][kMaxGroups];
    alignas(32) int32_t start[kMaxGroups];  // of sums, for the codes' middles
    alignas(32) float unit[kMaxGroups];

    // Of `groups` groups, for the rows' scales and residuals. What is not finite makes the unit NaN.
    TARDIS_INLINE void set(const uint16_t* const* scale, const float* r, int64_t groups, int32_t twice_zero) {
        const __m256 top = _mm256_set1_ps(127.0f * 257.0f), tiny = _mm256_set1_ps(1e-30f);
        const __m256 sign = _mm256_set1_ps(-0.0f), zero = _mm256_setzero_ps();
        for (int64_t g = 0; g < groups; g += 8) {
            const int64_t some = groups - g < 8 ? groups - g : 8;
            __m256 factor[kTogether], largest = zero, nan = zero;
            each<kTogether>([&](auto e) TARDIS_INLINE {
                factor[e] = _mm256_mul_ps(_mm256_set1_ps(r[e]), scales_at(scale[e] + g, some));
                largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, factor[e]));
                nan = _mm256_fmadd_ps(factor[e], zero, nan);
            });
            const __m256 inverse = _mm256_and_ps(_mm256_cmp_ps(largest, tiny, _CMP_GT_OQ), _mm256_div_ps(top, largest));
            _mm256_store_ps(unit + g, _mm256_add_ps(_mm256_div_ps(largest, top), nan));
            __m256i total = _mm256_setzero_si256();
            each<kPairs>([&](auto p) TARDIS_INLINE {
                __m256i above[2], below[2];
                each<2>([&](auto i) TARDIS_INLINE {
                    const __m256i value = _mm256_cvtps_epi32(_mm256_mul_ps(factor[2 * p + i], inverse));
                    below[i] = _mm256_srai_epi32(_mm256_slli_epi32(value, 24), 24);
                    above[i] = _mm256_srai_epi32(_mm256_sub_epi32(value, below[i]), 8);
                    total = _mm256_add_epi32(total, value);
                });
                put(high[p] + g, above), put(low[p] + g, below);
            });
            const __m256i middles = _mm256_mullo_epi32(total, _mm256_set1_epi32(-twice_zero));
            _mm256_store_si256(reinterpret_cast<__m256i*>(start + g), _mm256_srai_epi32(middles, 1));
        }
    }

    // Of 8 groups, the lowest bytes of two numbers each side by side.
    TARDIS_INLINE static void put(uint16_t* to, const __m256i (&two)[2]) {
        const __m256i first = _mm256_and_si256(two[0], _mm256_set1_epi32(0xff));
        const __m256i both = _mm256_or_si256(first, _mm256_and_si256(_mm256_slli_epi32(two[1], 8), _mm256_set1_epi32(0xff00)));
        const __m128i small = _mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), small);
    }
};

using Stored = uint8_t[kTogether][8][64];

// Sums of 16 bits for 16 columns, 0 to 7 and 16 to 23 of 32 and the others.
struct Sums {
    __m256i high[2], low[2];
};

// The sums for 32 columns; of codes of 8 bits those of a part.
template <int B, int part>
inline TARDIS_INLINE Sums sums_of(const Stored& stored, int bit, int64_t first, const Factors& factors, int64_t group) {
    Sums sums = {};
    each<kPairs>([&](auto p) TARDIS_INLINE {
        __m256i row[2];
        each<2>([&](auto i) TARDIS_INLINE {
            const uint8_t* from = stored[2 * p + i][bit] + first;
            row[i] = part_of<B, part>(_mm256_load_si256(reinterpret_cast<const __m256i*>(from)));
        });
        const __m256i two[] = {_mm256_unpacklo_epi8(row[0], row[1]), _mm256_unpackhi_epi8(row[0], row[1])};
        const __m256i highs = _mm256_set1_epi16(static_cast<int16_t>(factors.high[p][group]));
        const __m256i lows = _mm256_set1_epi16(static_cast<int16_t>(factors.low[p][group]));
        each<2>([&](auto i) TARDIS_INLINE {
            sums.high[i] = add_products(sums.high[i], two[i], highs);
            sums.low[i] = add_products(sums.low[i], two[i], lows);
        });
    });
    return sums;
}

// What sums are together, in columns 0 to 7, 8 to 15, and so on.
inline TARDIS_INLINE void add_whole(const Sums& sums, int worth, __m256i (&to)[4]) {
    const __m256i both = _mm256_set1_epi32(256 * worth | worth << 16);
    each<2>([&](auto i) TARDIS_INLINE {
        // the lower halves of these have columns below 16, the upper ones those from there on
        const __m256i first = _mm256_madd_epi16(_mm256_unpacklo_epi16(sums.high[i], sums.low[i]), both);
        const __m256i other = _mm256_madd_epi16(_mm256_unpackhi_epi16(sums.high[i], sums.low[i]), both);
        to[i] = _mm256_add_epi32(to[i], _mm256_permute2x128_si256(first, other, 0x20));
        to[2 + i] = _mm256_add_epi32(to[2 + i], _mm256_permute2x128_si256(first, other, 0x31));
    });
}

// Of 8 columns from one on, those from `begin` to end - 1 and zeros.
inline TARDIS_INLINE __m256i within(__m256i sums, int64_t column, int64_t begin, int64_t end) {
    const __m256i order = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const __m256i at = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int32_t>(column)), order);
    const __m256i from = _mm256_cmpgt_epi32(at, _mm256_set1_epi32(static_cast<int32_t>(begin) - 1));
    const __m256i until = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(end)), at);
    return _mm256_and_si256(sums, _mm256_and_si256(from, until));
}

// y += the rows' factors times the codes of a piece, of B bits; `whole`: that is 64 of them.
template <int B, bool whole>
inline TARDIS_INLINE void add_piece(float* y, const Piece& piece, const Stored& stored, const Factors& factors) {
    const int64_t begin = piece.first, end = begin + piece.count;
    const __m256 unit = _mm256_set1_ps(factors.unit[piece.group]);
    const __m256i start = _mm256_set1_epi32(factors.start[piece.group]);
    for (int64_t first = whole ? 0 : begin / 32 * 32; first < end; first += 32) {
        __m256i sum[4] = {start, start, start, start};
        each<kParts<B>>([&](auto p) TARDIS_INLINE {
            add_whole(sums_of<B, p>(stored, piece.bit, first, factors, piece.group), p ? 16 : 1, sum);
        });
        each<4>([&](auto v) TARDIS_INLINE {
            const __m256i own = whole ? sum[v] : within(sum[v], first + 8 * v, begin, end);
            float* at = y + piece.column - begin + first + 8 * v;
            _mm256_storeu_ps(at, _mm256_fmadd_ps(_mm256_cvtepi32_ps(own), unit, _mm256_loadu_ps(at)));
        });
    }
}

// Rows from number `first` of the terms on.
struct Added {
    const uint8_t *data[kTogether], *ahead[kTogether];
    const uint16_t* scale[kTogether];
    float r[kTogether];

    Added(const TardisMatrix& m, const Layout& layout, const Terms& terms, int64_t first) {
        const int64_t row_bytes = m.bits * layout.row_bytes, last = terms.count - 1;
        const auto* all = static_cast<const uint8_t*>(m.data);
        for (int64_t e = 0; e < kTogether; ++e) {
            const int64_t at = first + e, row = terms.index[at < last ? at : last];
            const int64_t next = terms.index[at + kTogether < last ? at + kTogether : last];
            data[e] = all + row * row_bytes, ahead[e] = all + next * row_bytes;
            scale[e] = m.scale + row * layout.groups;
            prefetch_ends(ahead[e], m.scale + next * layout.groups, layout.groups);
            r[e] = at <= last ? terms.r[at] : 0.0f;
        }
    }
};

template <int B>
void add_bits(const TardisMatrix& m, const Layout& layout, const Terms& terms, Range range, float* y) {
    Factors factors;
    alignas(32) Stored stored;
    for (int64_t first = 0; first < terms.count; first += kTogether) {
        const Added rows(m, layout, terms, first);
        factors.set(rows.scale, rows.r, layout.groups, m.twice_zero);
        for (int64_t b = range.begin; b < range.end; ++b) {
            const Block& block = layout.blocks[b];
            for (int e = 0; e < kTogether; ++e) {
                Codes<B>::prefetch_planes(rows.ahead[e] + block.byte, layout.row_bytes, B - m.bits);
                for (int64_t at = 0; at < 64; at += 32) {
                    Codes<B> codes;
                    codes.load(rows.data[e] + block.byte + at, layout.row_bytes, B - m.bits, block.bytes - at);
                    each<8>([&](auto k) TARDIS_INLINE {
                        auto* to = reinterpret_cast<__m256i*>(stored[e][k] + at);
                        _mm256_store_si256(to, codes.template code<k>());
                    });
                }
            }
            const Piece* pieces = layout.pieces + block.piece;
            for (int32_t p = 0; p < block.pieces; ++p) {
                if (pieces[p].count == 64) add_piece<B, true>(y, pieces[p], stored, factors);
                else add_piece<B, false>(y, pieces[p], stored, factors);
            }
        }
    }
}

}  // namespace

void add_low_bit_avx2(const TardisMatrix& m, const Layout* layout, const Terms& terms, Range range, float* y) {
    if (layout->groups > kMaxGroups) return portable_table()->add_low_bit(m, layout, terms, range, y);
    if (m.bits == 1) return add_bits<1>(m, *layout, terms, range, y);
    if (m.bits == 2) return add_bits<2>(m, *layout, terms, range, y);
    if (m.bits <= 4) return add_bits<4>(m, *layout, terms, range, y);
    add_bits<8>(m, *layout, terms, range, y);
}

}  // namespace tardis
#endif
