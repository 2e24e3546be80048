// What the kernels for processors with AVX-512 share.
#pragma once
#include "kernels.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__GFNI__) && defined(__AVX512BW__)
#define TARDIS_AVX512
#include <immintrin.h>

namespace tardis {

// Of `avx512_lowbit.cpp`, `avx512_lowbit_add.cpp`, `avx512_gemm.cpp` and `avx512_panels.cpp`; see `Product`,
// `Accumulate`, `Gemm` and `PanelGemm`.
void product_low_bit_avx512(const TardisMatrix& m, const Rows& rows, const Input& x, float* out);
void add_low_bit_avx512(const TardisMatrix& m, const Layout* layout, const Terms& terms, Range range, float* y);
void gemm_bf16_avx512(
    const TardisMatrix& m, bool transposed, Range outputs, const Tokens& x, float* out, int64_t stride
);
void gemm_fp16_avx512(
    const TardisMatrix& m, bool transposed, Range outputs, const Tokens& x, float* out, int64_t stride
);
void panels_bf16_avx512(const TardisMatrix& m, Range rows, const Tokens& x, float* out, int64_t stride);
void panels_fp16_avx512(const TardisMatrix& m, Range rows, const Tokens& x, float* out, int64_t stride);
void low_bit_panels_avx512(const TardisMatrix& m, const Rows& rows, const Input& x, float* out);

// Of `avx512_vectors.cpp`; see `Widen` and what follows it.
void widen_avx512(const TardisVector& v, int64_t begin, int64_t count, float* out);
void store_avx512(const TardisVector& to, int64_t begin, int64_t count, const float* values, const float* bias);
uint64_t outside_avx512(const float* z, const float* low, const float* high, int64_t count);
void activate_avx512(const TardisActivation& activation, float* z, int64_t count);
float largest_avx512(const float* x, int64_t count);
int64_t round_avx512(const float* x, int64_t count, float inverse, int8_t* first, int8_t* second);

namespace {

#define TARDIS_INLINE __attribute__((always_inline))

// GCC drops calls of a function that only prefetches, unless they are inlined from the start.
inline TARDIS_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// Into the second cache only, which can wait for more lines at once than the first.
inline TARDIS_INLINE void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

inline __mmask16 first16(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }
inline __mmask64 first64(int64_t n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }
inline __mmask32 first32(int64_t n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }

// Loops over registers, which only stay in registers if their numbers are constants for the compiler from the start.
template <int N>
struct Constant {
    constexpr operator int() const { return N; }
};

// body(0), ..., body(N - 1).
template <int N, int k = 0, typename F>
inline TARDIS_INLINE void each(const F& body) {
    if constexpr (k < N) {
        body(Constant<k>{});
        each<N, k + 1>(body);
    }
}

// How panels of 16-bit numbers are multiplied: `kInputs` of them, which lie side by side, in 16 outputs at once.
struct Bf16Panel {
    static constexpr int kInputs = kBf16Together;
    using Value = uint16_t;  // of inputs
    using Vector = __m512bh;
    static const Value* inputs(const Tokens& x) { return x.bf16; }
    static TARDIS_INLINE Vector load(const void* weights) { return (__m512bh)_mm512_load_si512(weights); }
    static TARDIS_INLINE Vector broadcast(const Value* x) {
        int32_t pair;
        memcpy(&pair, x, sizeof pair);
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    static TARDIS_INLINE __m512 add_product(__m512 sum, Vector weights, Vector x) {
        return _mm512_dpbf16_ps(sum, weights, x);
    }
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

// The matrix that takes bits shift..shift + count - 1 of a byte: bit i of a product is the parity of the byte's bits
// that are in byte 7 - i of the matrix.
constexpr int64_t taking(int shift, int count) {
    uint64_t matrix = 0;
    for (int i = 0; i < count; ++i) matrix |= 1ull << (8 * (7 - i) + shift + i);
    return static_cast<int64_t>(matrix);
}

// Shift and mask of bytes in one.
template <int shift, int count>
inline TARDIS_INLINE __m512i bits_of_bytes(__m512i bytes) {
    return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(taking(shift, count)), 0);
}

// In every lane of 32 bits, sum and the products of four codes with four values. As an instruction by hand because GCC
// copies every sum to another register and back around the intrinsic.
inline TARDIS_INLINE __m512i add_dot(__m512i sum, __m512i code, __m512i values) {
#if defined(__GNUC__) && !defined(__clang__)
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(code), "v"(values));
    return sum;
#else
    return _mm512_dpbusd_epi32(sum, code, values);
#endif
}

}  // namespace
}  // namespace tardis
#endif
