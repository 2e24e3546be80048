// The codes of matrices in few bits, out of planes, for processors with AVX2; as `avx512_lowbit.h`.
#pragma once
#include "avx2.h"

#if defined(TARDIS_AVX2)

namespace tardis {
namespace {

inline TARDIS_INLINE __m256i bytes_of(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }

// 32 bytes, or the first of them and zeros.
inline TARDIS_INLINE __m256i load_bytes(const uint8_t* p, int64_t bytes) {
    if (bytes >= 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    alignas(32) uint8_t some[32] = {};
    if (bytes > 0) memcpy(some, p, static_cast<size_t>(bytes));
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(some));
}

// Codes out of 32 bytes of every plane of a block of a row, in B bits each, 1, 2, 4 or 8: register s has those of the
// bits k with k % B == s, from the lowest on.
template <int B>
struct Codes {
    __m256i line[B];

    // p: at the first plane. Of planes, which come highest first, the first `missing` are zero, B / 2 - 1 at most.
    TARDIS_INLINE void load(const uint8_t* p, int64_t plane, int64_t missing, int64_t bytes) {
        each<B>([&](auto b) TARDIS_INLINE {
            const bool zero = b < B / 2 - 1 && b < missing;
            line[b] = zero ? _mm256_setzero_si256() : load_bytes(p + (b - missing) * plane, bytes);
        });
        if constexpr (B >= 2) each<B / 2>([&](auto b) TARDIS_INLINE { pair<1, 0xaa>(line[2 * b], line[2 * b + 1]); });
        if constexpr (B >= 4)
            each<B / 4>([&](auto b) TARDIS_INLINE {
                each<2>([&](auto s) TARDIS_INLINE { pair<2, 0xcc>(line[4 * b + s], line[4 * b + 2 + s]); });
            });
        if constexpr (B == 8) each<4>([&](auto s) TARDIS_INLINE { pair<4, 0xf0>(line[s], line[4 + s]); });
    }

    // Rows do not begin with a line of the cache: of a block's bytes in each plane, fetches the line in which they end,
    // which leaves the row's first to `prefetch_ends`.
    TARDIS_INLINE static void prefetch_planes(const uint8_t* p, int64_t plane, int64_t missing) {
        each<B>([&](auto b) TARDIS_INLINE {
            if (b >= B / 2 - 1 || b >= missing) prefetch_far(p + (b - missing) * plane + 63);
        });
    }

    template <int k>
    TARDIS_INLINE __m256i code() const {
        constexpr int shift = k / B * B;
        if constexpr (B == 8) return line[k];
        return _mm256_and_si256(shift ? _mm256_srli_epi16(line[k % B], shift) : line[k % B], bytes_of((1 << B) - 1));
    }

private:
    // Joins high and low halves of codes, `shift` bits each: the even places of both to `high`, the odd ones to `low`.
    template <int shift, int mask>
    TARDIS_INLINE static void pair(__m256i& high, __m256i& low) {
        const __m256i up = _mm256_slli_epi16(high, shift);
        const __m256i other = _mm256_and_si256(_mm256_xor_si256(up, low), bytes_of(mask));
        const __m256i even = _mm256_xor_si256(low, other);
        low = _mm256_xor_si256(high, _mm256_srli_epi16(other, shift));
        high = even;
    }
};

// Halves of codes of 8 bits are multiplied one after the other: two products with smaller ones fit 16 bits.
template <int B>
constexpr int kParts = B == 8 ? 2 : 1;

template <int B, int part>
inline TARDIS_INLINE __m256i part_of(__m256i code) {
    if constexpr (B < 8) return code;
    return _mm256_and_si256(part ? _mm256_srli_epi16(code, 4) : code, bytes_of(15));
}

// Of a row, the first line; of its scales, which usually fit one line and may lie in two, the first and the last.
inline TARDIS_INLINE void prefetch_ends(const uint8_t* row, const uint16_t* scale, int64_t groups) {
    prefetch_far(row), prefetch_far(scale), prefetch_far(scale + groups - 1);
}

// So many scales from one on, in fp32; of 8 those beyond are zero.
inline TARDIS_INLINE __m256 scales_at(const uint16_t* scale, int64_t count) {
    if (count >= 8) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale)));
    alignas(16) uint16_t some[8] = {};
    memcpy(some, scale, static_cast<size_t>(count) * sizeof *scale);
    return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(some)));
}

}  // namespace
}  // namespace tardis
#endif
