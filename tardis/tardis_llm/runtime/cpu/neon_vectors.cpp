// What is done number by number, for ARM processors with the dot product.
#include "neon.h"

#if defined(TARDIS_NEON)

namespace tardis {
namespace {

using Halves = uint16x4_t;
constexpr int kWidth = 4;

inline TARDIS_INLINE Floats load_some(const float* p, int64_t some) { return load_first(p, some); }
inline TARDIS_INLINE Halves load_some(const uint16_t* p, int64_t some) { return load_first(p, some); }

inline TARDIS_INLINE void store_some(float* p, int64_t some, Floats value) {
    if (some == kWidth) return store(p, value);
    alignas(16) float all[kWidth];
    store(all, value);
    memcpy(p, all, static_cast<size_t>(some) * sizeof *p);
}

inline TARDIS_INLINE void store_some(uint16_t* p, int64_t some, Halves value) {
    if (some == kWidth) return vst1_u16(p, value);
    alignas(8) uint16_t all[kWidth];
    vst1_u16(all, value);
    memcpy(p, all, static_cast<size_t>(some) * sizeof *p);
}

// The lowest bytes of lanes.
inline TARDIS_INLINE void store_bytes(int8_t* p, int64_t some, Integers lanes) {
    const int16x4_t half = vmovn_s32(lanes);
    alignas(8) int8_t all[8];
    vst1_s8(all, vmovn_s16(vcombine_s16(half, half)));
    memcpy(p, all, static_cast<size_t>(some));
}

inline TARDIS_INLINE Floats minimum(Floats a, Floats b) { return vminq_f32(a, b); }
inline TARDIS_INLINE Floats rounded(Floats x) { return vrndnq_f32(x); }
inline TARDIS_INLINE Integers halved(Integers x) { return vshrq_n_s32(x, 1); }
inline TARDIS_INLINE Floats power_of_two(Integers n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}

inline TARDIS_INLINE Floats where(uint32x4_t mask, Floats a, Floats b) { return vbslq_f32(mask, a, b); }
inline TARDIS_INLINE Floats unless(uint32x4_t mask, Floats x) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x), mask));
}
inline TARDIS_INLINE uint64_t beyond(Floats x, Floats low, Floats high) {
    static constexpr uint32_t kBits[4] = {1, 2, 4, 8};
    const uint32x4_t within = vandq_u32(vcgeq_f32(x, low), vcleq_f32(x, high));
    return vaddvq_u32(vbicq_u32(vld1q_u32(kBits), within));
}

inline TARDIS_INLINE Halves fp16_of(Floats value) { return vreinterpret_u16_f16(vcvt_f16_f32(value)); }

// As `to_bf16`.
inline TARDIS_INLINE Halves bf16_of(Floats value) {
    const uint32x4_t bits = vreinterpretq_u32_f32(value), high = vshrq_n_u32(bits, 16);
    const uint32x4_t odd = vandq_u32(high, vdupq_n_u32(1));
    const uint32x4_t sum = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t nan = vorrq_u32(high, vdupq_n_u32(0x40));
    return vmovn_u32(vbslq_u32(vceqq_f32(value, value), vshrq_n_u32(sum, 16), nan));
}

inline TARDIS_INLINE float largest_of(Floats v) { return vmaxvq_f32(v); }
inline TARDIS_INLINE int32_t sum_of(Integers v) { return vaddvq_s32(v); }

}  // namespace
}  // namespace tardis

#include "vectors.inc"

void tardis::neon::set_vectors(Table& table) { ::tardis::set_vectors(table); }
#endif
