// Low-bit matrices in planes, for processors with AVX2: products with integers, and sums of rows times residuals.
// Compilers do not find any of this by themselves, and plain loops take ten times as long.
#include "avx2.h"

#include <math.h>

#if defined(TARDIS_AVX2)

namespace tardis {
namespace {

// mask ? a : b, bit by bit.
inline __m256i select(int mask, __m256i a, __m256i b) {
    const __m256i bits = _mm256_set1_epi8(static_cast<char>(mask));
    return _mm256_or_si256(_mm256_and_si256(bits, a), _mm256_andnot_si256(bits, b));
}

// Joins high and low halves of codes, `shift` bits each: the even places of both to `high`, the odd ones to `low`.
template <int shift>
inline void join(__m256i& high, __m256i& low, int mask) {
    const __m256i even = select(mask, _mm256_slli_epi16(high, shift), low);
    low = select(mask, high, _mm256_srli_epi16(low, shift));
    high = even;
}

// 32 bytes, or the first of them and zeros.
inline __m256i load_bytes(const uint8_t* p, int32_t bytes) {
    if (bytes >= 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    alignas(32) uint8_t some[32] = {};
    if (bytes > 0) memcpy(some, p, bytes);
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(some));
}

// Of codes of up to B bits, 1, 2, 4 or 8: pairs of planes become pairs of registers of two-bit codes, and so on, until
// register s has the codes of the bits k with k % B == s.
template <int B>
void unpack_bits(const uint8_t* p, int64_t plane, int32_t bits, int32_t bytes, uint8_t (*codes)[64]) {
    const int32_t missing = B - bits;  // of the highest planes
    for (int32_t at = 0; at < 64; at += 32) {
        __m256i line[B];
        for (int b = 0; b < B; ++b)
            line[b] = b < missing ? _mm256_setzero_si256() : load_bytes(p + (b - missing) * plane + at, bytes - at);
        if constexpr (B >= 2)
            for (int b = 0; b < B; b += 2) join<1>(line[b], line[b + 1], 0xaa);
        if constexpr (B >= 4)
            for (int b = 0; b < B; b += 4)
                for (int s = 0; s < 2; ++s) join<2>(line[b + s], line[b + 2 + s], 0xcc);
        if constexpr (B == 8)
            for (int s = 0; s < 4; ++s) join<4>(line[s], line[4 + s], 0xf0);
        const __m256i one = _mm256_set1_epi8(static_cast<char>((1 << B) - 1));
        for (int k = 0; k < 8; ++k) {
            const __m256i code = _mm256_and_si256(_mm256_srli_epi16(line[k % B], k / B * B), one);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes[k] + at), code);
        }
    }
}

// The codes of a block, 64 for each bit of its bytes. p: at its bytes in the first plane of the row.
void unpack(const TardisMatrix& m, const Layout& layout, const Block& block, const uint8_t* p, uint8_t (*codes)[64]) {
    if (m.bits == 1) return unpack_bits<1>(p, layout.row_bytes, m.bits, block.bytes, codes);
    if (m.bits == 2) return unpack_bits<2>(p, layout.row_bytes, m.bits, block.bytes, codes);
    if (m.bits <= 4) return unpack_bits<4>(p, layout.row_bytes, m.bits, block.bytes, codes);
    unpack_bits<8>(p, layout.row_bytes, m.bits, block.bytes, codes);
}

inline __m256i bytes_at(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline float sum_of(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline void prefetch_row(const uint8_t* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(row + i), _MM_HINT_T1);
}

// sum + the products of 64 codes with their values. Two products fit 16 bits where codes have 7 bits; the halves of
// those of 8 are taken one after the other.
template <bool halves>
inline __m256i add_codes(__m256i sum, const uint8_t* codes, const int8_t* x) {
    const __m256i low = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16);
    for (int j = 0; j < 64; j += 32) {
        const __m256i code = bytes_at(codes + j), values = bytes_at(x + j);
        const __m256i lower = halves ? _mm256_and_si256(code, low) : code;
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(lower, values), one));
        if (!halves) continue;
        const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(code, 4), low);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(upper, values), sixteen));
    }
    return sum;
}

template <bool halves>
void multiply_row(const TardisMatrix& m, int64_t row, const Input& x, float* out) {
    const Quantised& q = x.quantised;
    const Layout& layout = *q.layout;
    const float middle = static_cast<float>(m.twice_zero) / 2;
    const uint8_t* w = static_cast<const uint8_t*>(m.data) + row * m.bits * layout.row_bytes;
    __m256 total[kMaxTokens];
    __m256i dot[kMaxTokens][2];
    for (int64_t t = 0; t < x.tokens; ++t) {
        out[t * kBlockRows] = 0, total[t] = _mm256_setzero_ps();
        dot[t][0] = dot[t][1] = _mm256_setzero_si256();
    }
    int64_t g = 0;
    for (int64_t b = 0; b < layout.block_count; ++b) {
        const Block& block = layout.blocks[b];
        alignas(32) uint8_t codes[8][64];
        unpack(m, layout, block, w + block.byte, codes);
        for (int32_t p = block.piece; p < block.piece + block.pieces; ++p) {
            const Piece& piece = layout.pieces[p];
            for (int64_t t = 0; t < x.tokens; ++t)
                for (int32_t h = 0; h < q.halves; ++h) {
                    const int8_t* values = q.values + (t * q.halves + h) * q.stride + 64 * p;
                    dot[t][h] = add_codes<halves>(dot[t][h], codes[piece.bit], values);
                }
            if (!piece.last) continue;
            const float scale = from_fp16(m.scale[row * layout.groups + piece.group]);
            for (int64_t t = 0; t < x.tokens; ++t) {
                const int64_t at = t * layout.segment_count + g;
                __m256 value = _mm256_cvtepi32_ps(dot[t][0]);
                if (q.halves == 2) value = _mm256_fmadd_ps(value, _mm256_set1_ps(256), _mm256_cvtepi32_ps(dot[t][1]));
                total[t] = _mm256_fmadd_ps(value, _mm256_set1_ps(scale * q.scale[at]), total[t]);
                out[t * kBlockRows] -= middle * q.sum[at] * scale;
                dot[t][0] = dot[t][1] = _mm256_setzero_si256();
            }
            ++g;
        }
    }
    for (int64_t t = 0; t < x.tokens; ++t) out[t * kBlockRows] += sum_of(total[t]);
}

constexpr int64_t kRowsAhead = 16;

// ---- sums of rows --------------------------------------------------------------------------------------------------

constexpr int kAdded = 4;  // rows that are added together; what they get together has one scale

// What codes of a group are multiplied with, residuals times scales, as integers of 16 bits: those of two rows side by
// side. What is not finite makes the unit NaN.
struct Factors {
    float exact[kAdded], unit;
    __m256i pair[kAdded / 2], start;  // the second for the codes' middles

    Factors(const TardisMatrix& m, const int64_t (&row)[kAdded], const float (&r)[kAdded], int64_t groups, int64_t g) {
        float largest = 0, nan = 0;
        for (int e = 0; e < kAdded; ++e) {
            exact[e] = r[e] * from_fp16(m.scale[row[e] * groups + g]);
            largest = fabsf(exact[e]) > largest ? fabsf(exact[e]) : largest, nan += 0 * exact[e];
        }
        const float inverse = largest > 1e-30f && nan == 0 ? 32639 / largest : 0;
        int32_t value[kAdded], sum = 0;
        for (int e = 0; e < kAdded; ++e) sum += value[e] = inverse > 0 ? static_cast<int32_t>(lrintf(exact[e] * inverse)) : 0;
        unit = largest / 32639 + nan, start = _mm256_set1_epi32(-m.twice_zero * sum >> 1);
        for (int e = 0; e < kAdded; e += 2) pair[e / 2] = _mm256_set1_epi32((value[e] & 0xffff) | value[e + 1] << 16);
    }
};

// y[0..7] += the factors times the codes of 8 columns, which lie in the lower or upper halves of `two`.
inline void add_eight(const __m128i (&two)[kAdded / 2], const Factors& factors, float* y) {
    __m256i sum = factors.start;
    for (int p = 0; p < kAdded / 2; ++p)
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_cvtepu8_epi16(two[p]), factors.pair[p]));
    const __m256 unit = _mm256_set1_ps(factors.unit);
    _mm256_storeu_ps(y, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), unit, _mm256_loadu_ps(y)));
}

using Unpacked = uint8_t[kAdded][8][64];

void add_piece(const Piece& piece, const Unpacked& codes, const Factors& factors, float middle, float* y) {
    const int end = piece.first + piece.count;
    int j = piece.first;
    for (; j + 16 <= end; j += 16, y += 16) {
        __m128i row[kAdded], low[kAdded / 2], high[kAdded / 2];
        for (int e = 0; e < kAdded; ++e)
            row[e] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes[e][piece.bit] + j));
        for (int p = 0; p < kAdded / 2; ++p) {
            low[p] = _mm_unpacklo_epi8(row[2 * p], row[2 * p + 1]);
            high[p] = _mm_unpackhi_epi8(row[2 * p], row[2 * p + 1]);
        }
        add_eight(low, factors, y), add_eight(high, factors, y + 8);
    }
    for (; j < end; ++j, ++y)
        for (int e = 0; e < kAdded; ++e)
            *y += factors.exact[e] * (static_cast<float>(codes[e][piece.bit][j]) - middle);
}

}  // namespace

void product_low_bit_avx2(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    const int64_t row_bytes = m.bits * x.quantised.layout->row_bytes;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
        prefetch_row(static_cast<const uint8_t*>(m.data) + rows.at(i + kRowsAhead) * row_bytes, row_bytes);
        if (m.bits == 8) multiply_row<true>(m, rows.at(i), x, out++);
        else multiply_row<false>(m, rows.at(i), x, out++);
    }
}

void add_low_bit_avx2(const TardisMatrix& m, const Layout* layout, const Terms& terms, Range range, float* y) {
    const int64_t row_bytes = m.bits * layout->row_bytes;
    const auto* data = static_cast<const uint8_t*>(m.data);
    const auto index = [&](int64_t i) -> int64_t { return terms.index[i < terms.count ? i : terms.count - 1]; };
    for (int64_t first = 0; first < terms.count; first += kAdded) {
        int64_t row[kAdded];
        float r[kAdded];
        for (int e = 0; e < kAdded; ++e) {
            row[e] = index(first + e), r[e] = first + e < terms.count ? terms.r[first + e] : 0;
            prefetch_row(data + index(first + kRowsAhead + e) * row_bytes, row_bytes);
        }
        for (int64_t b = range.begin; b < range.end; ++b) {
            const Block& block = layout->blocks[b];
            alignas(32) Unpacked codes;
            for (int e = 0; e < kAdded; ++e) unpack(m, *layout, block, data + row[e] * row_bytes + block.byte, codes[e]);
            for (int32_t p = block.piece; p < block.piece + block.pieces;) {
                const int32_t group = layout->pieces[p].group;
                const Factors factors(m, row, r, layout->groups, group);
                for (; p < block.piece + block.pieces && layout->pieces[p].group == group; ++p)
                    add_piece(layout->pieces[p], codes, factors, static_cast<float>(m.twice_zero) / 2,
                              y + layout->pieces[p].column);
            }
        }
    }
}

}  // namespace tardis
#endif
