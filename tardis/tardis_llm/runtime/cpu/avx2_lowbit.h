// The codes of matrices in few bits, out of planes, for processors with AVX2.
#pragma once
#include "avx2.h"

#if defined(TARDIS_AVX2)

namespace tardis {
namespace {

using Bytes = __m256i;

inline TARDIS_INLINE Bytes bytes_of(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }

// 32 bytes, or the first of them and zeros.
inline TARDIS_INLINE Bytes load_bytes(const uint8_t* p, int64_t bytes) {
    if (bytes >= 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if (bytes <= 0) return _mm256_setzero_si256();
    if (bytes % 4 == 0) return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), first8(bytes / 4));
    alignas(32) uint8_t some[32] = {};
    memcpy(some, p, static_cast<size_t>(bytes));
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(some));
}

// Joins high and low halves of codes, `shift` bits each: the even places of both to `high`, the odd ones to `low`.
template <int shift>
inline TARDIS_INLINE void join(Bytes& high, Bytes& low) {
    constexpr int mask = shift == 1 ? 0xaa : shift == 2 ? 0xcc : 0xf0;
    const Bytes up = _mm256_slli_epi16(high, shift);
    const Bytes other = _mm256_and_si256(_mm256_xor_si256(up, low), bytes_of(mask));
    const Bytes even = _mm256_xor_si256(low, other);
    low = _mm256_xor_si256(high, _mm256_srli_epi16(other, shift));
    high = even;
}

// The codes of B bits from a bit of every byte on.
template <int B, int bit>
inline TARDIS_INLINE Bytes code_at(Bytes line) {
    if constexpr (B == 8) return line;
    return _mm256_and_si256(bit ? _mm256_srli_epi16(line, bit) : line, bytes_of((1 << B) - 1));
}

constexpr bool kSignedCodes = false;  // that are multiplied

// Halves of codes of 8 bits are multiplied one after the other: two products with smaller ones fit 16 bits.
template <int B>
constexpr int kParts = B == 8 ? 2 : 1;

template <int B, int part>
inline TARDIS_INLINE Bytes part_of(Bytes code) {
    if constexpr (B < 8) return code;
    return _mm256_and_si256(part ? _mm256_srli_epi16(code, 4) : code, bytes_of(15));
}

// Number k of the codes of B bits in each word of 16 bits, times what `worth<B, k>` says.
template <int B, int k>
inline TARDIS_INLINE __m256i code_of_words(__m256i words) {
    constexpr int at = k * B % 8;
    const __m256i byte = k * B < 8 ? words : _mm256_srli_epi16(words, 8);
    return B == 8 && k ? byte : _mm256_and_si256(byte, _mm256_set1_epi16(((1 << B) - 1) << at));
}

template <int B, int k>
constexpr int worth = 1 << k * B % 8;

// So many scales from one on, in fp32; of 8 those beyond are zero.
inline TARDIS_INLINE Floats scales_at(const uint16_t* scale, int64_t count) {
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

#include "lowbit_codes.h"
#endif
