// What the kernels for processors with AVX-512 share.
//
// Those of dense matrices are compiled with BF16 and without, and those of matrices in few bits with VNNI and without;
// see CMakeLists.txt. What they define for other files is in a namespace named after what it needs.
#pragma once
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define TARDIS_AVX512
#include "x86.h"

#if defined(__AVX512BF16__)
#define TARDIS_AVX512_SET avx512
#elif defined(__AVX512VNNI__)
#define TARDIS_AVX512_SET avx512vnni
#else
#define TARDIS_AVX512_SET avx512bw
#endif

namespace tardis {

// For matrices in few bits.
struct LowBit {
    Product planes, panels;
    Accumulate add;
};

namespace avx512bw {
extern const Dense kBf16, kFp16, kF32;
extern const LowBit kLowBit;
}  // namespace avx512bw

namespace avx512vnni {
extern const LowBit kLowBit;
}  // namespace avx512vnni

namespace avx512 {
extern const Dense kBf16, kFp16, kF32;
}  // namespace avx512

namespace TARDIS_AVX512_SET {

// Of `avx512_lowbit.cpp`, `avx512_lowbit_panels.cpp` and `avx512_lowbit_add.cpp`.
void product_low_bit(const TardisMatrix& m, const Rows& rows, const Input& x, float* out);
void low_bit_panels(const TardisMatrix& m, const Rows& rows, const Input& x, float* out);
void add_low_bit(const TardisMatrix& m, const Layout* layout, const Terms& terms, Range range, float* y);

// Of `avx512_gemm.cpp` and `avx512_panels.cpp`.
void gemm_bf16(const TardisMatrix& m, bool transposed, Range outputs, const Tokens& x, float* out, int64_t stride);
void gemm_fp16(const TardisMatrix& m, bool transposed, Range outputs, const Tokens& x, float* out, int64_t stride);
void panels_bf16(const TardisMatrix& m, Range rows, const Tokens& x, float* out, int64_t stride);
void panels_fp16(const TardisMatrix& m, Range rows, const Tokens& x, float* out, int64_t stride);

}  // namespace TARDIS_AVX512_SET

// Of `avx512_vectors.cpp`; see `Widen` and what follows it.
void widen_avx512(const TardisVector& v, int64_t begin, int64_t count, float* out);
void store_avx512(const TardisVector& to, int64_t begin, int64_t count, const float* values, const float* bias);
uint64_t outside_avx512(const float* z, const float* low, const float* high, int64_t count);
void activate_avx512(const TardisActivation& activation, float* z, int64_t count);
float largest_avx512(const float* x, int64_t count);
int64_t round_avx512(const float* x, int64_t count, float inverse, int8_t* first, int8_t* second);

namespace {

inline __mmask16 first16(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }
inline __mmask64 first64(int64_t n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }
inline __mmask32 first32(int64_t n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }

// The numbers at even places of 32 in bf16, and those at odd ones.
inline TARDIS_INLINE __m512 even_bf16(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline TARDIS_INLINE __m512 odd_bf16(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000))));
}

// In every lane of 32 bits, sum and the products of two numbers in bf16 with two others.
inline TARDIS_INLINE __m512 add_pairs(__m512 sum, __m512i a, __m512i b) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    return _mm512_fmadd_ps(odd_bf16(a), odd_bf16(b), _mm512_fmadd_ps(even_bf16(a), even_bf16(b), sum));
#endif
}

// How panels of 16-bit numbers are multiplied: `kInputs` of them, which lie side by side, in 16 outputs at once.
struct Bf16Panel {
    static constexpr int kInputs = kBf16Together;
    using Value = uint16_t;  // of inputs
    using Vector = __m512i;
    static const Value* inputs(const Tokens& x) { return x.bf16; }
    static TARDIS_INLINE Vector load(const void* weights) { return _mm512_load_si512(weights); }
    static TARDIS_INLINE Vector broadcast(const Value* x) {
        int32_t pair;
        memcpy(&pair, x, sizeof pair);
        return _mm512_set1_epi32(pair);
    }
    static TARDIS_INLINE __m512 add_product(__m512 sum, Vector weights, Vector x) { return add_pairs(sum, weights, x); }
};

struct Fp16Panel {
    static constexpr int kInputs = kFp16Together;
    using Value = float;
    using Vector = __m512;
    static const Value* inputs(const Tokens& x) { return x.f32; }
    static TARDIS_INLINE Vector load(const void* weights) {
        return _mm512_cvtph_ps(_mm256_load_si256(static_cast<const __m256i*>(weights)));
    }
    static TARDIS_INLINE Vector broadcast(const Value* x) { return _mm512_set1_ps(*x); }
    static TARDIS_INLINE __m512 add_product(__m512 sum, Vector weights, Vector x) {
        return _mm512_fmadd_ps(weights, x, sum);
    }
};

// Shift and mask of bytes.
template <int shift, int count>
inline TARDIS_INLINE __m512i bits_of_bytes(__m512i bytes) {
    return _mm512_and_si512(_mm512_srli_epi16(bytes, shift), _mm512_set1_epi8((1 << count) - 1));
}

// body(T, first token, number of the group), with the number of tokens a constant, for tokens in groups of some at most
// that are as equal as can be.
template <int T, typename F>
inline TARDIS_INLINE void with_constant(int64_t count, const F& body) {
    if constexpr (T > 1) {
        if (count < T) return with_constant<T - 1>(count, body);
    }
    body(Constant<T>{});
}

template <int most, typename F>
inline TARDIS_INLINE void in_groups(int64_t tokens, const F& body) {
    const int64_t groups = (tokens + most - 1) / most;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * tokens / groups, count = (g + 1) * tokens / groups - first;
        with_constant<most>(count, [&](auto n) TARDIS_INLINE { body(n, first, g); });
    }
}

// Of panels.
constexpr int kPanelVectors = kPanelRows / 16;
constexpr int kPanelTokens = 12;  // or halves of them, whose sums with a panel's outputs stay in registers
constexpr int64_t kPanelAhead = 2048;  // bytes from what is multiplied to what is asked for

}  // namespace
}  // namespace tardis
#endif
