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
    if (bytes <= 0) return _mm256_setzero_si256();
    if (bytes % 4 == 0) return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), first8(bytes / 4));
    alignas(32) uint8_t some[32] = {};
    memcpy(some, p, static_cast<size_t>(bytes));
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
    uint64_t first = 0, last = 0;  // four each
    if (count >= 4) {
        memcpy(&first, scale, sizeof first), memcpy(&last, scale + count - 4, sizeof last);
        last = count > 4 ? last >> 16 * (8 - count) : 0;
    }
    for (int64_t j = 0; count < 4 && j < count; ++j) first |= static_cast<uint64_t>(scale[j]) << 16 * j;
    return _mm256_cvtph_ps(_mm_set_epi64x(static_cast<int64_t>(last), static_cast<int64_t>(first)));
}

}  // namespace
}  // namespace tardis
#endif
