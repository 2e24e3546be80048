// Sums of rows in few bits, for processors with AVX2: two rows' factors meet their codes at once.
#include "avx2_lowbit.h"

#if defined(TARDIS_AVX2)

namespace tardis {
namespace {

constexpr int kTuple = 2;
using Tuple = uint16_t;

inline TARDIS_INLINE Floats where(Floats mask, Floats x) { return _mm256_and_ps(mask, x); }
inline TARDIS_INLINE void store(int32_t* p, Integers x) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), x); }
inline TARDIS_INLINE void store(uint8_t* p, Bytes x) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), x); }
inline TARDIS_INLINE Integers every(int64_t value) { return _mm256_set1_epi32(static_cast<int32_t>(value)); }
inline TARDIS_INLINE Integers order() { return _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0); }
inline TARDIS_INLINE Integers more(Integers a, Integers b) { return _mm256_cmpgt_epi32(a, b); }
inline TARDIS_INLINE Integers both(Integers a, Integers b) { return _mm256_and_si256(a, b); }

// x factor / 2
inline TARDIS_INLINE Integers half_product(Integers x, int32_t factor) {
    return _mm256_srai_epi32(_mm256_mullo_epi32(x, every(factor)), 1);
}

// Of 8 groups, the lowest bytes of two numbers each side by side.
inline TARDIS_INLINE void put(uint16_t* to, const Integers (&two)[2]) {
    const Integers first = both(two[0], every(0xff));
    const Integers all = _mm256_or_si256(first, both(_mm256_slli_epi32(two[1], 8), every(0xff00)));
    const __m128i small = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), small);
}

// Sums of 16 bits for 16 columns, 0 to 7 and 16 to 23 of 32 and the others.
struct Sums {
    __m256i high[2], low[2];
};

// The sums for 32 columns; of codes of 8 bits those of a part.
template <int B, int part, typename F>
inline TARDIS_INLINE Sums sums_of(const Stored& stored, int bit, int64_t first, const F& factors, int64_t group) {
    Sums sums = {};
    each<kTermsTogether / 2>([&](auto p) TARDIS_INLINE {
        Bytes row[2];
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
inline TARDIS_INLINE void add_whole(const Sums& sums, int worth, Integers (&to)[4]) {
    const __m256i both = _mm256_set1_epi32(256 * worth | worth << 16);
    each<2>([&](auto i) TARDIS_INLINE {
        // the lower halves of these have columns below 16, the upper ones those from there on
        const __m256i first = _mm256_madd_epi16(_mm256_unpacklo_epi16(sums.high[i], sums.low[i]), both);
        const __m256i other = _mm256_madd_epi16(_mm256_unpackhi_epi16(sums.high[i], sums.low[i]), both);
        to[i] = plus(to[i], _mm256_permute2x128_si256(first, other, 0x20));
        to[2 + i] = plus(to[2 + i], _mm256_permute2x128_si256(first, other, 0x31));
    });
}

// Adds what the rows give for 32 columns.
template <int B, typename F>
inline TARDIS_INLINE void add_rows(
    const Stored& stored, int bit, int64_t first, const F& factors, int64_t group, Integers (&sum)[4]
) {
    each<kParts<B>>([&](auto p) TARDIS_INLINE {
        add_whole(sums_of<B, p>(stored, bit, first, factors, group), p ? 16 : 1, sum);
    });
}

}  // namespace
}  // namespace tardis

#include "lowbit_add.inc"

namespace tardis {
namespace {

// y += the rows' factors times the codes of 32 bytes of each: words of two rows meet side by side. A register gets the
// codes of 8 consecutive columns.
template <int B>
inline TARDIS_INLINE void add_line(
    const Added& rows, int64_t byte, const int32_t (&factors)[kTuples][kMaxGroups], const Units& units, int64_t g, float* y
) {
    constexpr int n = 16 / B;
    const Integers start = every(units.start[g]);
    Integers sum[2 * n];
    each<2 * n>([&](auto i) TARDIS_INLINE { sum[i] = _mm256_slli_epi32(start, i % n * B % 8); });
    each<kTuples>([&](auto p) TARDIS_INLINE {
        const auto* first = reinterpret_cast<const __m256i*>(rows.data[2 * p] + byte);
        const auto* second = reinterpret_cast<const __m256i*>(rows.data[2 * p + 1] + byte);
        const __m256i a = _mm256_loadu_si256(first), b = _mm256_loadu_si256(second);
        const __m256i words[] = {_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b)};
        const __m256i both = every(factors[p][g]);
        each<2 * n>([&](auto i) TARDIS_INLINE {
            sum[i] = plus(sum[i], _mm256_madd_epi16(code_of_words<B, i % n>(words[i / n]), both));
        });
    });
    each<2 * n>([&](auto i) TARDIS_INLINE {
        const Floats unit = constant(units.unit[g] / worth<B, i % n>);
        store(y + 8 * i, plus_product(load(y + 8 * i), floats(sum[i]), unit));
    });
}

template <int B>
void add_rows_of_codes(const TardisMatrix& m, const Terms& terms, float* y) {
    constexpr int64_t kLineColumns = 8 * sizeof(__m256i) / B;
    const int64_t groups = (m.columns + m.group_size - 1) / m.group_size, bytes = m.columns * B / 8;
    const int32_t twice_middle = m.twice_zero;
    Units units;
    alignas(kBytes) int32_t factors[kTuples][kMaxGroups];
    for (int64_t first = 0; first < terms.count; first += kTogether) {
        const Added rows(m, bytes, groups, terms, first);
        units.set(rows.scale, rows.r, groups, twice_middle, [&](int64_t g, const Integers (&value)[kTogether]) TARDIS_INLINE {
            each<kTuples>([&](auto p) TARDIS_INLINE {
                store(factors[p] + g, _mm256_blend_epi16(value[2 * p], _mm256_slli_epi32(value[2 * p + 1], 16), 0xaa));
            });
        });
        for (int64_t column = 0, g = 0; column < m.columns; ++g) {
            const int64_t end = column + m.group_size < m.columns ? column + m.group_size : m.columns;
            for (; column < end; column += kLineColumns) {
                const int64_t byte = column * B / 8;
                if (byte % 64 == 0) each<kTogether>([&](auto e) TARDIS_INLINE { prefetch_far(rows.ahead[e] + byte + 63); });
                add_line<B>(rows, byte, factors, units, g, y + column);
            }
        }
    }
}

}  // namespace
}  // namespace tardis

void tardis::avx2::add_code_rows(const TardisMatrix& m, const Layout* layout, const Terms& terms, Range range, float* y) {
    if (m.columns > kMaxGroups * m.group_size) return portable_table()->add_code_rows(m, layout, terms, range, y);
    if (m.bits == 4) add_rows_of_codes<4>(m, terms, y);
    else add_rows_of_codes<8>(m, terms, y);
}

void tardis::avx2::add_low_bit(
    const TardisMatrix& m, const Layout* layout, const Terms& terms, Range range, float* y
) {
    add_rows_of_bits(m, layout, terms, range, y);
}
#endif
