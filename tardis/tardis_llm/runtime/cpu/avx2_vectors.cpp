// What is done number by number, for processors with AVX2; as `avx512_vectors.cpp`.
#include "activations.h"
#include "avx2.h"

#if defined(TARDIS_AVX2)

namespace tardis {
namespace {

// body(j, how many of 8 numbers from j on), for all of `count`.
template <typename F>
inline TARDIS_INLINE void each8(int64_t count, const F& body) {
    int64_t j = 0;
    for (; j + 8 <= count; j += 8) body(j, Constant<8>{});
    if (j < count) body(j, count - j);
}

// 8 numbers, or the first of them and zeros.
inline TARDIS_INLINE __m256 load_some(const float* p, int64_t some) {
    return some == 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, first8(some));
}

inline TARDIS_INLINE void store_some(float* p, int64_t some, __m256 value) {
    if (some == 8) _mm256_storeu_ps(p, value);
    else _mm256_maskstore_ps(p, first8(some), value);
}

// 16-bit numbers.
inline TARDIS_INLINE __m128i load_halves(const uint16_t* p, int64_t some) {
    if (some == 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    alignas(16) uint16_t all[8] = {};
    memcpy(all, p, static_cast<size_t>(some) * sizeof *p);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(all));
}

// The first bytes of a register.
inline TARDIS_INLINE void store_bytes(void* p, int64_t bytes, __m128i value) {
    if (bytes == 16) return _mm_storeu_si128(static_cast<__m128i*>(p), value);
    if (bytes == 8) return _mm_storel_epi64(static_cast<__m128i*>(p), value);
    alignas(16) char all[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(all), value);
    memcpy(p, all, static_cast<size_t>(bytes));
}

inline TARDIS_INLINE __m256 constant(float value) { return _mm256_set1_ps(value); }
inline TARDIS_INLINE __m256 size_of(__m256 x) { return _mm256_andnot_ps(constant(-0.0f), x); }

// x 2^power, in two steps: the power may be beyond those of numbers.
inline TARDIS_INLINE __m256 scaled(__m256 x, __m256 power) {
    const __m256i whole = _mm256_cvtps_epi32(power), half = _mm256_srai_epi32(whole, 1);
    const auto exponent = [](__m256i n) TARDIS_INLINE {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
    };
    return _mm256_mul_ps(_mm256_mul_ps(x, exponent(half)), exponent(_mm256_sub_epi32(whole, half)));
}

// exp(x) = 2^power * (1 + slope * rest).
struct Exponential {
    __m256 power, rest, slope;
};

// NaN stays NaN: where an operand is, minimum and maximum are the second one.
inline TARDIS_INLINE Exponential parts_of_exponential(__m256 x) {
    constexpr float kTaylor[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1};
    x = _mm256_min_ps(constant(89), _mm256_max_ps(constant(-104), x));  // beyond, it is infinite or 0
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, constant(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 rest = _mm256_fnmadd_ps(n, constant(0.693359375f), x);  // ln 2 in two parts, the first exact
    rest = _mm256_fnmadd_ps(n, constant(-2.12194440e-4f), rest);
    __m256 sum = _mm256_setzero_ps();
    for (float coefficient : kTaylor) sum = _mm256_fmadd_ps(sum, rest, constant(coefficient));
    return {n, rest, sum};
}

inline TARDIS_INLINE __m256 exponential(__m256 x) {
    const Exponential of = parts_of_exponential(x);
    return scaled(_mm256_fmadd_ps(of.slope, of.rest, constant(1)), of.power);
}

// exp(x) - 1, as exact for small numbers as for large ones.
inline TARDIS_INLINE __m256 exponential_minus_one(__m256 x) {
    const Exponential of = parts_of_exponential(x);
    const __m256 whole = _mm256_sub_ps(scaled(constant(1), of.power), constant(1));
    return _mm256_add_ps(scaled(_mm256_mul_ps(of.slope, of.rest), of.power), whole);
}

// z / (1 + exp(-u))
inline TARDIS_INLINE __m256 gated(__m256 z, __m256 u) {
    return _mm256_div_ps(z, _mm256_add_ps(constant(1), exponential(_mm256_xor_ps(u, constant(-0.0f)))));
}

// z Phi(z), by formula 7.1.26 of Abramowitz and Stegun for erfc, whose error is 1.5e-7 at most.
inline TARDIS_INLINE __m256 gelu(__m256 z) {
    constexpr float kTerms[] = {1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f, 0};
    const __m256 a = _mm256_mul_ps(size_of(z), constant(0.70710678f));
    const __m256 t = _mm256_div_ps(constant(1), _mm256_fmadd_ps(a, constant(0.3275911f), constant(1)));
    __m256 sum = _mm256_setzero_ps();
    for (float term : kTerms) sum = _mm256_fmadd_ps(sum, t, constant(term));
    const __m256 erfc = _mm256_mul_ps(sum, exponential(_mm256_fnmadd_ps(a, a, _mm256_setzero_ps())));
    const __m256 positive = _mm256_cmp_ps(z, _mm256_setzero_ps(), _CMP_GT_OQ);
    const __m256 twice = _mm256_blendv_ps(erfc, _mm256_sub_ps(constant(2), erfc), positive);
    return _mm256_mul_ps(_mm256_mul_ps(z, constant(0.5f)), twice);
}

inline TARDIS_INLINE __m256 gelu_tanh(__m256 z) {
    const __m256 cube = _mm256_mul_ps(_mm256_mul_ps(z, z), z);
    return gated(z, _mm256_mul_ps(_mm256_fmadd_ps(constant(0.044715f), cube, z), constant(2 * 0.79788456f)));
}

inline TARDIS_INLINE __m256 relu(__m256 z) {
    return _mm256_andnot_ps(_mm256_cmp_ps(z, _mm256_setzero_ps(), _CMP_LT_OQ), z);
}

inline TARDIS_INLINE __m256 xielu(const TardisActivation& of, __m256 z) {
    const __m256 straight = _mm256_mul_ps(constant(of.beta), z);
    const __m256 below = _mm256_sub_ps(exponential_minus_one(_mm256_min_ps(constant(of.eps), z)), z);
    const __m256 negative = _mm256_fmadd_ps(constant(of.alpha_n), below, straight);
    const __m256 positive = _mm256_fmadd_ps(_mm256_mul_ps(z, constant(of.alpha_p)), z, straight);
    return _mm256_blendv_ps(negative, positive, _mm256_cmp_ps(z, _mm256_setzero_ps(), _CMP_GT_OQ));
}

// As `to_bf16`, in the lower halves of 8 lanes.
inline TARDIS_INLINE __m256i nearest_bf16(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), nan, is_nan);
}

// The lower halves of 8 lanes, and of those the lowest bytes.
inline TARDIS_INLINE __m128i halves(__m256i lanes) {
    return _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
}
inline TARDIS_INLINE __m128i lowest_bytes(__m256i lanes) {
    const __m128i both = halves(_mm256_and_si256(lanes, _mm256_set1_epi32(0xff)));
    return _mm_packus_epi16(both, both);
}

template <typename F>
inline TARDIS_INLINE void apply(float* z, int64_t count, const F& body) {
    each8(count, [&](int64_t j, auto some) TARDIS_INLINE { store_some(z + j, some, body(load_some(z + j, some))); });
}

inline TARDIS_INLINE float largest_of(__m256 v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

inline TARDIS_INLINE int32_t sum_of(__m256i v) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

}  // namespace

void activate_avx2(const TardisActivation& activation, float* z, int64_t count) {
    switch (activation.kind) {
        case TARDIS_GELU: return apply(z, count, [](__m256 at) TARDIS_INLINE { return gelu(at); });
        case TARDIS_GELU_TANH: return apply(z, count, [](__m256 at) TARDIS_INLINE { return gelu_tanh(at); });
        case TARDIS_QUICK_GELU:
            return apply(z, count, [](__m256 at) TARDIS_INLINE {
                return gated(at, _mm256_mul_ps(at, constant(1.702f)));
            });
        case TARDIS_SILU: return apply(z, count, [](__m256 at) TARDIS_INLINE { return gated(at, at); });
        case TARDIS_RELU2:
            return apply(z, count, [](__m256 at) TARDIS_INLINE { return _mm256_mul_ps(relu(at), relu(at)); });
        case TARDIS_XIELU: return apply(z, count, [&](__m256 at) TARDIS_INLINE { return xielu(activation, at); });
        default: return apply(z, count, [](__m256 at) TARDIS_INLINE { return relu(at); });
    }
}

void widen_avx2(const TardisVector& v, int64_t begin, int64_t count, float* out) {
    if (v.type == TARDIS_NONE) return static_cast<void>(memset(out, 0, count * sizeof *out));
    if (v.type == TARDIS_FP32)
        return static_cast<void>(memcpy(out, static_cast<const float*>(v.data) + begin, count * sizeof *out));
    const auto* from = static_cast<const uint16_t*>(v.data) + begin;
    each8(count, [&](int64_t j, auto some) TARDIS_INLINE {
        const __m128i half = load_halves(from + j, some);
        const __m256 bf16 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
        store_some(out + j, some, v.type == TARDIS_BF16 ? bf16 : _mm256_cvtph_ps(half));
    });
}

void store_avx2(const TardisVector& to, int64_t begin, int64_t count, const float* values, const float* bias) {
    auto* y = static_cast<char*>(const_cast<void*>(to.data)) + begin * (to.type == TARDIS_FP32 ? 4 : 2);
    each8(count, [&](int64_t j, auto some) TARDIS_INLINE {
        __m256 value = load_some(values + j, some);
        if (bias) value = _mm256_add_ps(value, load_some(bias + j, some));
        if (to.type == TARDIS_FP32) return store_some(reinterpret_cast<float*>(y) + j, some, value);
        const __m128i half = to.type == TARDIS_BF16 ? halves(nearest_bf16(value)) : _mm256_cvtps_ph(value, 0);
        store_bytes(y + 2 * j, 2 * some, half);
    });
}

uint64_t outside_avx2(const float* z, const float* low, const float* high, int64_t count) {
    uint64_t found = 0;
    each8(count, [&](int64_t j, auto some) TARDIS_INLINE {
        const __m256 at = load_some(z + j, some);
        const __m256 below = _mm256_cmp_ps(at, load_some(low + j, some), _CMP_NGE_UQ);
        const __m256 above = _mm256_cmp_ps(at, load_some(high + j, some), _CMP_NLE_UQ);
        const auto bits = static_cast<uint64_t>(_mm256_movemask_ps(_mm256_or_ps(below, above)));
        found |= (bits & ((1ull << some) - 1)) << j;
    });
    return found;
}

float largest_avx2(const float* x, int64_t count) {
    __m256 most = _mm256_setzero_ps(), beyond = most;
    each8(count, [&](int64_t j, auto some) TARDIS_INLINE {
        const __m256 size = size_of(load_some(x + j, some));
        beyond = _mm256_or_ps(beyond, _mm256_cmp_ps(size, constant(__FLT_MAX__), _CMP_NLE_UQ));
        most = _mm256_max_ps(most, size);
    });
    return _mm256_movemask_ps(beyond) ? __builtin_inff() : largest_of(most);
}

int64_t round_avx2(const float* x, int64_t count, float inverse, int8_t* first, int8_t* second) {
    __m256i sum = _mm256_setzero_si256();
    each8(count, [&](int64_t j, auto some) TARDIS_INLINE {
        const __m256i value = _mm256_cvtps_epi32(_mm256_mul_ps(load_some(x + j, some), constant(inverse)));
        sum = _mm256_add_epi32(sum, value);
        if (!second) return store_bytes(first + j, some, lowest_bytes(value));
        const __m256i low = _mm256_srai_epi32(_mm256_slli_epi32(value, 24), 24);
        store_bytes(first + j, some, lowest_bytes(_mm256_srai_epi32(_mm256_sub_epi32(value, low), 8)));
        store_bytes(second + j, some, lowest_bytes(low));
    });
    return sum_of(sum);
}

}  // namespace tardis
#endif
