// What is done number by number, for processors with AVX2.
#include "avx2.h"

#if defined(TARDIS_AVX2)

namespace tardis {
namespace {

using Halves = __m128i;
constexpr int kWidth = 8;

inline TARDIS_INLINE Floats load_some(const float* p, int64_t some) {
    return some == kWidth ? load(p) : load_first(p, some);
}

inline TARDIS_INLINE void store_some(float* p, int64_t some, Floats value) {
    if (some == kWidth) store(p, value);
    else _mm256_maskstore_ps(p, first8(some), value);
}

inline TARDIS_INLINE Halves load_some(const uint16_t* p, int64_t some) {
    if (some == kWidth) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    alignas(16) uint16_t all[kWidth] = {};
    memcpy(all, p, static_cast<size_t>(some) * sizeof *p);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(all));
}

// The first bytes of a register.
inline TARDIS_INLINE void store_first(void* p, int64_t bytes, __m128i value) {
    if (bytes == 16) return _mm_storeu_si128(static_cast<__m128i*>(p), value);
    if (bytes == 8) return _mm_storel_epi64(static_cast<__m128i*>(p), value);
    alignas(16) char all[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(all), value);
    memcpy(p, all, static_cast<size_t>(bytes));
}

inline TARDIS_INLINE void store_some(uint16_t* p, int64_t some, Halves value) { store_first(p, 2 * some, value); }

// The lower halves of 8 lanes.
inline TARDIS_INLINE Halves halves(Integers lanes) {
    return _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
}

// The lowest bytes of lanes.
inline TARDIS_INLINE void store_bytes(int8_t* p, int64_t some, Integers lanes) {
    const Halves both = halves(_mm256_and_si256(lanes, _mm256_set1_epi32(0xff)));
    store_first(p, some, _mm_packus_epi16(both, both));
}

inline TARDIS_INLINE Floats minimum(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline TARDIS_INLINE Floats rounded(Floats x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline TARDIS_INLINE Integers halved(Integers x) { return _mm256_srai_epi32(x, 1); }
inline TARDIS_INLINE Floats power_of_two(Integers n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

inline TARDIS_INLINE Floats where(Floats mask, Floats a, Floats b) { return _mm256_blendv_ps(b, a, mask); }
inline TARDIS_INLINE Floats unless(Floats mask, Floats x) { return _mm256_andnot_ps(mask, x); }
inline TARDIS_INLINE uint64_t beyond(Floats x, Floats low, Floats high) {
    const Floats below = _mm256_cmp_ps(x, low, _CMP_NGE_UQ), above = _mm256_cmp_ps(x, high, _CMP_NLE_UQ);
    return static_cast<uint64_t>(_mm256_movemask_ps(_mm256_or_ps(below, above)));
}

inline TARDIS_INLINE Floats of_bf16(Halves half) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline TARDIS_INLINE Floats of_fp16(Halves half) { return _mm256_cvtph_ps(half); }
inline TARDIS_INLINE Halves fp16_of(Floats value) { return _mm256_cvtps_ph(value, 0); }

// As `to_bf16`.
inline TARDIS_INLINE Halves bf16_of(Floats value) {
    const __m256i bits = _mm256_castps_si256(value), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return halves(_mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), nan, is_nan));
}

inline TARDIS_INLINE float largest_of(Floats v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

inline TARDIS_INLINE int32_t sum_of(Integers v) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

}  // namespace
}  // namespace tardis

#include "vectors.inc"

void tardis::avx2::widen(const TardisVector& v, int64_t begin, int64_t count, float* out) {
    ::tardis::widen(v, begin, count, out);
}

void tardis::avx2::round_columns(const TardisRounding& r, int64_t begin, int64_t end) {
    ::tardis::round_columns(r, begin, end);
}

void tardis::avx2::set_vectors(Table& table) { ::tardis::set_vectors(table); }
#endif
