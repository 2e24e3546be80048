// What the kernels for ARM processors with the dot product share: registers of 16 bytes.
//
// Products with matrices in few bits are compiled with the matrix product of 8-bit numbers (I8MM) and without; see
// CMakeLists.txt. What is defined for other files is in a namespace named after what it needs.
#pragma once
#include "kernels.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#define TARDIS_NEON
#include <arm_neon.h>

#include "registers.h"

#if defined(__ARM_FEATURE_MATMUL_INT8)
#define TARDIS_NEON_SET i8mm
#else
#define TARDIS_NEON_SET neon
#endif

namespace tardis {
namespace {

using Bytes = uint8x16_t;
using Floats = float32x4_t;
using Integers = int32x4_t;

inline TARDIS_INLINE Floats constant(float value) { return vdupq_n_f32(value); }
inline TARDIS_INLINE Floats plus_product(Floats sum, Floats a, Floats b) { return vfmaq_f32(sum, a, b); }
inline TARDIS_INLINE Floats minus_product(Floats sum, Floats a, Floats b) { return vfmsq_f32(sum, a, b); }
inline TARDIS_INLINE Floats size_of(Floats x) { return vabsq_f32(x); }
inline TARDIS_INLINE Floats maximum(Floats a, Floats b) { return vmaxq_f32(a, b); }  // NaN where either is
inline TARDIS_INLINE uint32x4_t above(Floats a, Floats b) { return vcgtq_f32(a, b); }
inline TARDIS_INLINE float sum_of(Floats v) { return vaddvq_f32(v); }

inline TARDIS_INLINE Integers plus(Integers a, Integers b) { return vaddq_s32(a, b); }
inline TARDIS_INLINE Integers minus(Integers a, Integers b) { return vsubq_s32(a, b); }
inline TARDIS_INLINE Integers nearest(Floats x) { return vcvtnq_s32_f32(x); }
inline TARDIS_INLINE Floats floats(Integers x) { return vcvtq_f32_s32(x); }
// Of every lane, with its sign.
inline TARDIS_INLINE Integers lowest_byte(Integers x) { return vshrq_n_s32(vshlq_n_s32(x, 24), 24); }
inline TARDIS_INLINE Integers shifted_by_8(Integers x) { return vshrq_n_s32(x, 8); }

inline TARDIS_INLINE Floats load(const float* p) { return vld1q_f32(p); }
inline TARDIS_INLINE void store(float* p, Floats x) { vst1q_f32(p, x); }
inline TARDIS_INLINE Floats of_bf16(uint16x4_t half) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(half), 16));
}
inline TARDIS_INLINE Floats of_fp16(uint16x4_t half) { return vcvt_f32_f16(vreinterpret_f16_u16(half)); }

// The first `count` of a register, 4 at most, and zeros.
inline TARDIS_INLINE Floats load_first(const float* p, int64_t count) {
    if (count == 4) return load(p);
    alignas(16) float all[4] = {};
    memcpy(all, p, static_cast<size_t>(count) * sizeof *p);
    return load(all);
}
inline TARDIS_INLINE uint16x4_t load_first(const uint16_t* p, int64_t count) {
    if (count == 4) return vld1_u16(p);
    alignas(8) uint16_t all[4] = {};
    memcpy(all, p, static_cast<size_t>(count) * sizeof *p);
    return vld1_u16(all);
}

// Codes meet values with a sign. The instruction of I8MM takes them as they are, the other one wants both with a sign.
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool kSignedCodes = false;
#else
constexpr bool kSignedCodes = true;
#endif

// The codes of B bits from a bit of every byte on.
template <int B, int bit>
inline TARDIS_INLINE Bytes code_at(Bytes line) {
    if constexpr (B == 8) return line;
    else if constexpr (bit == 0) return vandq_u8(line, vdupq_n_u8((1 << B) - 1));
    else if constexpr (bit + B == 8) return vshrq_n_u8(line, bit);
    else return vandq_u8(vshrq_n_u8(line, bit), vdupq_n_u8((1 << B) - 1));
}

// Sums of 32 bits, and the products of codes with values, four by four.
inline TARDIS_INLINE Integers add_dots(Integers sum, Bytes codes, int8x16_t values) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return vusdotq_s32(sum, codes, values);
#else
    return vdotq_s32(sum, vreinterpretq_s8_u8(codes), values);
#endif
}

// The same with four of the values, for every lane.
template <int lane>
inline TARDIS_INLINE Integers add_dots(Integers sum, Bytes codes, int8x16_t values) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return vusdotq_laneq_s32(sum, codes, values, lane);
#else
    return vdotq_laneq_s32(sum, vreinterpretq_s8_u8(codes), values, lane);
#endif
}

}  // namespace

// Of `neon_lowbit.cpp` and `neon_lowbit_panels.cpp`: products with matrices in few bits, in planes and in panels; of
// `neon_add.cpp`: sums of their rows.
namespace neon {
void planes(const TardisMatrix& m, const Rows& rows, const Input& x, float* out);
void panels(const TardisMatrix& m, const Rows& rows, const Input& x, float* out);
void add_low_bit(const TardisMatrix& m, const Layout* layout, const Terms& terms, Range range, float* y);
}  // namespace neon

namespace i8mm {
void planes(const TardisMatrix& m, const Rows& rows, const Input& x, float* out);
void panels(const TardisMatrix& m, const Rows& rows, const Input& x, float* out);
}  // namespace i8mm

// Of `neon_dense.cpp` and `neon_vectors.cpp`.
namespace neon {
extern const Dense kBf16, kFp16, kF32;
void set_vectors(Table& table);
}  // namespace neon

}  // namespace tardis
#endif
