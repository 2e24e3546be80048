// What the kernels for processors with AVX2, FMA and F16C share.
//
// Products with matrices in few bits are compiled with AVX-VNNI and without; see CMakeLists.txt. What they define for
// other files is in a namespace named after what it needs.
#pragma once
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define TARDIS_AVX2
#include "x86.h"

#if defined(__AVXVNNI__)
#define TARDIS_AVX2_SET avxvnni
#else
#define TARDIS_AVX2_SET avx2
#endif

namespace tardis {
namespace {

// Whether products of four codes, of up to 8 bits, are added up at once, and in 32 bits.
#if defined(__AVXVNNI__)
constexpr bool kDots = true;
#else
constexpr bool kDots = false;
#endif

using Floats = __m256;
using Integers = __m256i;  // of 32 bits

inline TARDIS_INLINE Floats constant(float value) { return _mm256_set1_ps(value); }
inline TARDIS_INLINE Floats plus_product(Floats sum, Floats a, Floats b) { return _mm256_fmadd_ps(a, b, sum); }
inline TARDIS_INLINE Floats minus_product(Floats sum, Floats a, Floats b) { return _mm256_fnmadd_ps(a, b, sum); }
inline TARDIS_INLINE Floats size_of(Floats x) { return _mm256_andnot_ps(constant(-0.0f), x); }
inline TARDIS_INLINE Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline TARDIS_INLINE Floats above(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }  // a mask
inline TARDIS_INLINE float sum_of(Floats v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline TARDIS_INLINE Integers plus(Integers a, Integers b) { return _mm256_add_epi32(a, b); }
inline TARDIS_INLINE Integers minus(Integers a, Integers b) { return _mm256_sub_epi32(a, b); }
inline TARDIS_INLINE Integers nearest(Floats x) { return _mm256_cvtps_epi32(x); }
inline TARDIS_INLINE Floats floats(Integers x) { return _mm256_cvtepi32_ps(x); }
// Of every lane, with its sign.
inline TARDIS_INLINE Integers lowest_byte(Integers x) { return _mm256_srai_epi32(_mm256_slli_epi32(x, 24), 24); }
inline TARDIS_INLINE Integers shifted_by_8(Integers x) { return _mm256_srai_epi32(x, 8); }

// Of 8 lanes the first `count`, as masked loads want them. What is loaded behind smaller stores would wait for them.
inline TARDIS_INLINE __m256i first8(int64_t count) {
    alignas(32) static constexpr int32_t kLanes[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLanes + 8 - (count < 8 ? count : 8)));
}

inline TARDIS_INLINE Floats load_first(const float* p, int64_t count) { return _mm256_maskload_ps(p, first8(count)); }
inline TARDIS_INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline TARDIS_INLINE void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }

// Sums of 16 bits, and the products of codes with values, two by two.
inline TARDIS_INLINE __m256i add_products(__m256i sum, __m256i codes, __m256i values) {
#if defined(__GNUC__) && !defined(__clang__)
    // by hand because GCC computes all products first, for which there are not registers enough
    __m256i products;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(codes), "x"(values));
    return sum;
#else
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, values));
#endif
}

// The same, or with sums of 32 bits four by four, if `kDots`.
inline TARDIS_INLINE __m256i add_dots(__m256i sum, __m256i codes, __m256i values) {
#if defined(__AVXVNNI__) && defined(__GNUC__) && !defined(__clang__)
    // by hand because GCC copies every sum to another register and back around the intrinsic
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(values));
    return sum;
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, codes, values);
#else
    return add_products(sum, codes, values);
#endif
}

// The products of numbers of 16 bits two by two, in sums of 32.
inline TARDIS_INLINE __m256i add_wide_products(__m256i sum, __m256i codes, __m256i values) {
#if defined(__AVXVNNI__) && defined(__GNUC__) && !defined(__clang__)
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(values));
    return sum;
#elif defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(sum, codes, values);
#elif defined(__GNUC__) && !defined(__clang__)
    __m256i products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(codes), "x"(values));
    return sum;
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(codes, values));
#endif
}

}  // namespace

// Of `avx2_lowbit.cpp` and `avx2_lowbit_panels.cpp`: products with matrices in few bits, in planes and in panels.
namespace avx2 {
void planes(const TardisMatrix& m, const Rows& rows, const Input& x, float* out);
void panels(const TardisMatrix& m, const Rows& rows, const Input& x, float* out);
}  // namespace avx2

namespace avxvnni {
void planes(const TardisMatrix& m, const Rows& rows, const Input& x, float* out);
void panels(const TardisMatrix& m, const Rows& rows, const Input& x, float* out);
}  // namespace avxvnni

// Of `avx2_add.cpp` and `avx2_vectors.cpp`; for `widen` see `Widen`.
namespace avx2 {
void add_low_bit(const TardisMatrix& m, const Layout* layout, const Terms& terms, Range range, float* y);
void widen(const TardisVector& v, int64_t begin, int64_t count, float* out);
void set_vectors(Table& table);
}  // namespace avx2

// Of `avx2_gemm.cpp`; see `Gemm`, `SumGemm` and `DownGemm`.
void gemm_avx2(const TardisMatrix& m, bool transposed, Range outputs, const Tokens& x, float* out, int64_t stride);
void sum_gemm_avx2(
    const TardisMatrix& m, const TardisMatrix& added, Range rows, const Tokens& x, float* out, int64_t stride
);
void down_gemm_avx2(const TardisMatrix& m, Range columns, const Tokens& x, float* out, int64_t stride);

}  // namespace tardis
#endif
