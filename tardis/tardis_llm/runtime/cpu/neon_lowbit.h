// The codes of matrices in few bits, out of planes, for ARM processors with the dot product.
#pragma once
#include "neon.h"

#if defined(TARDIS_NEON)

namespace tardis {
namespace {

// 16 bytes, or the first of them and zeros.
inline TARDIS_INLINE Bytes load_bytes(const uint8_t* p, int64_t bytes) {
    if (bytes >= 16) return vld1q_u8(p);
    if (bytes == 8) return vcombine_u8(vld1_u8(p), vdup_n_u8(0));
    alignas(16) uint8_t some[16] = {};
    if (bytes > 0) memcpy(some, p, static_cast<size_t>(bytes));
    return vld1q_u8(some);
}

// Joins high and low halves of codes, `shift` bits each: the even places of both to `high`, the odd ones to `low`.
template <int shift>
inline TARDIS_INLINE void join(Bytes& high, Bytes& low) {
    Bytes even;
    if constexpr (shift == 4) {
        even = vsliq_n_u8(low, high, 4);
        low = vsriq_n_u8(high, low, 4);
    } else {
        const Bytes odd = vdupq_n_u8(shift == 1 ? 0xaa : 0xcc);
        even = vbslq_u8(odd, vshlq_n_u8(high, shift), low);
        low = vbslq_u8(odd, high, vshrq_n_u8(low, shift));
    }
    high = even;
}

// So many scales from one on, in fp32; of 4 those beyond are zero.
inline TARDIS_INLINE Floats scales_at(const uint16_t* scale, int64_t count) {
    return of_fp16(load_first(scale, count));
}

}  // namespace
}  // namespace tardis

#include "lowbit_codes.h"
#endif
