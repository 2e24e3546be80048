// What is done number by number, for processors with AVX-512.
#include "activations.h"
#include "avx512.h"

#if defined(TARDIS_AVX512)

namespace tardis {
namespace {

// body(j, mask of 16 numbers from j on), for all of `count`.
template <typename F>
inline TARDIS_INLINE void each16(int64_t count, const F& body) {
    for (int64_t j = 0; j < count; j += 16) body(j, first16(count - j));
}

// exp(x) = 2^power * (1 + slope * rest).
struct Exponential {
    __m512 power, rest, slope;
};

// NaN stays NaN: where an operand is, minimum and maximum are the second one.
inline TARDIS_INLINE Exponential parts_of_exponential(__m512 x) {
    constexpr float kTaylor[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1};
    x = _mm512_min_ps(_mm512_set1_ps(89), _mm512_max_ps(_mm512_set1_ps(-104), x));  // beyond, it is infinite or 0
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts, the first exact
    rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), rest);
    __m512 sum = _mm512_setzero_ps();
    for (float coefficient : kTaylor) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(coefficient));
    return {n, rest, sum};
}

inline TARDIS_INLINE __m512 exponential(__m512 x) {
    const Exponential of = parts_of_exponential(x);
    return _mm512_scalef_ps(_mm512_fmadd_ps(of.slope, of.rest, _mm512_set1_ps(1)), of.power);
}

// exp(x) - 1, as exact for small numbers as for large ones.
inline TARDIS_INLINE __m512 exponential_minus_one(__m512 x) {
    const Exponential of = parts_of_exponential(x);
    const __m512 one = _mm512_set1_ps(1), whole = _mm512_sub_ps(_mm512_scalef_ps(one, of.power), one);
    return _mm512_add_ps(_mm512_scalef_ps(_mm512_mul_ps(of.slope, of.rest), of.power), whole);
}

// z / (1 + exp(-u))
inline TARDIS_INLINE __m512 gated(__m512 z, __m512 u) {
    const __m512 one = _mm512_set1_ps(1);
    return _mm512_div_ps(z, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), u))));
}

// z Phi(z), by formula 7.1.26 of Abramowitz and Stegun for erfc, whose error is 1.5e-7 at most.
inline TARDIS_INLINE __m512 gelu(__m512 z) {
    constexpr float kTerms[] = {1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f, 0};
    const __m512 a = _mm512_mul_ps(_mm512_abs_ps(z), _mm512_set1_ps(0.70710678f)), one = _mm512_set1_ps(1);
    const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(a, _mm512_set1_ps(0.3275911f), one));
    __m512 sum = _mm512_setzero_ps();
    for (float term : kTerms) sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(term));
    const __m512 erfc = _mm512_mul_ps(sum, exponential(_mm512_fnmadd_ps(a, a, _mm512_setzero_ps())));
    const __m512 half = _mm512_mul_ps(z, _mm512_set1_ps(0.5f));
    const __mmask16 positive = _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_mul_ps(half, _mm512_mask_sub_ps(erfc, positive, _mm512_set1_ps(2), erfc));
}

inline TARDIS_INLINE __m512 gelu_tanh(__m512 z) {
    const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(z, z), z);
    const __m512 u = _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, z);
    return gated(z, _mm512_mul_ps(u, _mm512_set1_ps(2 * 0.79788456f)));
}

inline TARDIS_INLINE __m512 relu(__m512 z) {
    const __m512 zero = _mm512_setzero_ps();
    return _mm512_mask_mov_ps(z, _mm512_cmp_ps_mask(z, zero, _CMP_LT_OQ), zero);
}

inline TARDIS_INLINE __m512 xielu(const TardisActivation& of, __m512 z) {
    const __m512 straight = _mm512_mul_ps(_mm512_set1_ps(of.beta), z);
    const __m512 below = _mm512_sub_ps(exponential_minus_one(_mm512_min_ps(_mm512_set1_ps(of.eps), z)), z);
    const __m512 negative = _mm512_fmadd_ps(_mm512_set1_ps(of.alpha_n), below, straight);
    const __mmask16 positive = _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_mask_fmadd_ps(
        _mm512_mask_mul_ps(negative, positive, z, _mm512_set1_ps(of.alpha_p)), positive, z, straight
    );
}

// As `to_bf16`: the instruction for it takes subnormal numbers for zero.
inline TARDIS_INLINE __m256i nearest_bf16(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i nan = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), is_nan, nan));
}

template <typename F>
inline TARDIS_INLINE void apply(float* z, int64_t count, const F& body) {
    each16(count, [&](int64_t j, __mmask16 some) TARDIS_INLINE {
        _mm512_mask_storeu_ps(z + j, some, body(_mm512_maskz_loadu_ps(some, z + j)));
    });
}

}  // namespace

void activate_avx512(const TardisActivation& activation, float* z, int64_t count) {
    switch (activation.kind) {
        case TARDIS_GELU: return apply(z, count, [](__m512 at) TARDIS_INLINE { return gelu(at); });
        case TARDIS_GELU_TANH: return apply(z, count, [](__m512 at) TARDIS_INLINE { return gelu_tanh(at); });
        case TARDIS_QUICK_GELU:
            return apply(z, count, [](__m512 at) TARDIS_INLINE {
                return gated(at, _mm512_mul_ps(at, _mm512_set1_ps(1.702f)));
            });
        case TARDIS_SILU: return apply(z, count, [](__m512 at) TARDIS_INLINE { return gated(at, at); });
        case TARDIS_RELU2:
            return apply(z, count, [](__m512 at) TARDIS_INLINE { return _mm512_mul_ps(relu(at), relu(at)); });
        case TARDIS_XIELU: return apply(z, count, [&](__m512 at) TARDIS_INLINE { return xielu(activation, at); });
        default: return apply(z, count, [](__m512 at) TARDIS_INLINE { return relu(at); });
    }
}

void widen_avx512(const TardisVector& v, int64_t begin, int64_t count, float* out) {
    if (v.type == TARDIS_NONE) return static_cast<void>(memset(out, 0, count * sizeof *out));
    if (v.type == TARDIS_FP32)
        return static_cast<void>(memcpy(out, static_cast<const float*>(v.data) + begin, count * sizeof *out));
    const auto* from = static_cast<const uint16_t*>(v.data) + begin;
    each16(count, [&](int64_t j, __mmask16 some) TARDIS_INLINE {
        const __m256i half = _mm256_maskz_loadu_epi16(some, from + j);
        const __m512 bf16 = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        _mm512_mask_storeu_ps(out + j, some, v.type == TARDIS_BF16 ? bf16 : _mm512_cvtph_ps(half));
    });
}

void store_avx512(const TardisVector& to, int64_t begin, int64_t count, const float* values, const float* bias) {
    auto* y = static_cast<char*>(const_cast<void*>(to.data)) + begin * (to.type == TARDIS_FP32 ? 4 : 2);
    each16(count, [&](int64_t j, __mmask16 some) TARDIS_INLINE {
        __m512 value = _mm512_maskz_loadu_ps(some, values + j);
        if (bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(some, bias + j));
        if (to.type == TARDIS_FP32) return _mm512_mask_storeu_ps(y + 4 * j, some, value);
        const __m256i half = to.type == TARDIS_BF16 ? nearest_bf16(value) : _mm512_cvtps_ph(value, 0);
        _mm256_mask_storeu_epi16(y + 2 * j, some, half);
    });
}

uint64_t outside_avx512(const float* z, const float* low, const float* high, int64_t count) {
    uint64_t found = 0;
    each16(count, [&](int64_t j, __mmask16 some) TARDIS_INLINE {
        const __m512 at = _mm512_maskz_loadu_ps(some, z + j);
        const __mmask16 below = _mm512_mask_cmp_ps_mask(some, at, _mm512_maskz_loadu_ps(some, low + j), _CMP_NGE_UQ);
        const __mmask16 above = _mm512_mask_cmp_ps_mask(some, at, _mm512_maskz_loadu_ps(some, high + j), _CMP_NLE_UQ);
        found |= static_cast<uint64_t>(below | above) << j;
    });
    return found;
}

float largest_avx512(const float* x, int64_t count) {
    const __m512 limit = _mm512_set1_ps(__FLT_MAX__);
    __m512 most = _mm512_setzero_ps();
    __mmask16 beyond = 0;
    each16(count, [&](int64_t j, __mmask16 some) TARDIS_INLINE {
        const __m512 size = _mm512_abs_ps(_mm512_maskz_loadu_ps(some, x + j));
        beyond |= _mm512_cmp_ps_mask(size, limit, _CMP_NLE_UQ);
        most = _mm512_max_ps(most, size);
    });
    return beyond ? __builtin_inff() : _mm512_reduce_max_ps(most);
}

int64_t round_avx512(const float* x, int64_t count, float inverse, int8_t* first, int8_t* second) {
    const __m512 factor = _mm512_set1_ps(inverse);
    __m512i sum = _mm512_setzero_si512();
    each16(count, [&](int64_t j, __mmask16 some) TARDIS_INLINE {
        const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(some, x + j), factor));
        sum = _mm512_add_epi32(sum, value);
        const __m128i low = _mm512_cvtepi32_epi8(value);
        if (!second) return _mm_mask_storeu_epi8(first + j, some, low);
        const __m512i rest = _mm512_sub_epi32(value, _mm512_cvtepi8_epi32(low));
        _mm_mask_storeu_epi8(first + j, some, _mm512_cvtepi32_epi8(_mm512_srai_epi32(rest, 8)));
        _mm_mask_storeu_epi8(second + j, some, low);
    });
    return _mm512_reduce_add_epi32(sum);
}

}  // namespace tardis
#endif
