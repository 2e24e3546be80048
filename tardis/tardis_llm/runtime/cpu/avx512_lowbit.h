// The codes of matrices in few bits, out of planes, and their products with integers, for processors with AVX-512.
#pragma once
#include "avx512.h"

#if defined(TARDIS_AVX512)

namespace tardis {
namespace {

constexpr int64_t kMaxSegments = 256;  // of a row; those of more are for the plain kernels

inline TARDIS_INLINE __m512i bytes_of(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }

// mask ? a : b, bit by bit.
inline TARDIS_INLINE __m512i select(int mask, __m512i a, __m512i b) {
    return _mm512_ternarylogic_epi64(bytes_of(mask), a, b, 0xca);
}

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
            if (b >= B / 2 - 1 || b >= missing) prefetch_far(p + (b - missing) * plane + 63);
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

    // Leaves out so many bits, a multiple of B.
    template <int bits>
    TARDIS_INLINE void skip() {
        each<B>([&](auto s) TARDIS_INLINE { line[s] = _mm512_srli_epi16(line[s], bits); });
    }

    // to: 64 codes for each bit.
    TARDIS_INLINE void store(uint8_t (*to)[64]) const {
        each<8>([&](auto k) TARDIS_INLINE { _mm512_store_si512(to[k], code<k>()); });
    }
};

// Whether `add_dot` takes codes of 8 bits as quickly as smaller ones.
#if defined(__AVX512VNNI__)
constexpr bool kQuickBytes = true;
#else
constexpr bool kQuickBytes = false;
#endif

// In every lane of 32 bits, sum and the products of four codes of B bits with four values.
template <int B>
inline TARDIS_INLINE __m512i add_dot(__m512i sum, __m512i code, __m512i values) {
#if defined(__AVX512VNNI__) && defined(__GNUC__) && !defined(__clang__)
    // by hand because GCC copies every sum to another register and back around the intrinsic
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(code), "v"(values));
    return sum;
#elif defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(sum, code, values);
#else
    if constexpr (B < 8) {  // two products fit 16 bits
        const __m512i two = _mm512_maddubs_epi16(code, values);
        return _mm512_add_epi32(sum, _mm512_madd_epi16(two, _mm512_set1_epi16(1)));
    }
    const __m512i even = _mm512_and_si512(code, _mm512_set1_epi16(0xff)), odd = _mm512_srli_epi16(code, 8);
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(even, _mm512_srai_epi16(_mm512_slli_epi16(values, 8), 8)));
    return _mm512_add_epi32(sum, _mm512_madd_epi16(odd, _mm512_srai_epi16(values, 8)));
#endif
}

// Of a row, the first line; of its scales, which usually fit one line and may lie in two, the first and the last.
inline TARDIS_INLINE void prefetch_ends(const uint8_t* row, const uint16_t* scale, int64_t groups) {
    prefetch_far(row), prefetch_far(scale), prefetch_far(scale + groups - 1);
}

}  // namespace
}  // namespace tardis
#endif
