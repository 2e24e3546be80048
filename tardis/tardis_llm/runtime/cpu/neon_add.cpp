// Sums of rows in few bits, for ARM processors with the dot product: four rows' factors meet their codes at once.
#include "neon_lowbit.h"

#if defined(TARDIS_NEON)

namespace tardis {
namespace {

constexpr int kTuple = 4;
using Tuple = uint32_t;

inline TARDIS_INLINE Floats where(uint32x4_t mask, Floats x) {
    return vreinterpretq_f32_u32(vandq_u32(mask, vreinterpretq_u32_f32(x)));
}
inline TARDIS_INLINE void store(int32_t* p, Integers x) { vst1q_s32(p, x); }
inline TARDIS_INLINE void store(uint8_t* p, Bytes x) { vst1q_u8(p, x); }
inline TARDIS_INLINE Integers every(int64_t value) { return vdupq_n_s32(static_cast<int32_t>(value)); }
inline TARDIS_INLINE Integers order() {
    static constexpr int32_t kLanes[4] = {0, 1, 2, 3};
    return vld1q_s32(kLanes);
}
inline TARDIS_INLINE Integers more(Integers a, Integers b) { return vreinterpretq_s32_u32(vcgtq_s32(a, b)); }
inline TARDIS_INLINE Integers both(Integers a, Integers b) { return vandq_s32(a, b); }

// x factor / 2
inline TARDIS_INLINE Integers half_product(Integers x, int32_t factor) {
    return vshrq_n_s32(vmulq_n_s32(x, factor), 1);
}

// Of 4 groups, the lowest bytes of four numbers each side by side.
inline TARDIS_INLINE void put(uint32_t* to, const Integers (&four)[4]) {
    uint32x4_t all = vreinterpretq_u32_s32(four[0]);
    all = vsliq_n_u32(all, vreinterpretq_u32_s32(four[1]), 8);
    all = vsliq_n_u32(all, vreinterpretq_u32_s32(four[2]), 16);
    vst1q_u32(to, vsliq_n_u32(all, vreinterpretq_u32_s32(four[3]), 24));
}

// The codes of four rows for 16 columns, column by column.
struct Columns {
    Bytes four[4];

    TARDIS_INLINE Columns(const Stored& stored, int first_row, int bit, int64_t first) {
        Bytes row[4];
        each<4>([&](auto e) TARDIS_INLINE { row[e] = vld1q_u8(stored[first_row + e][bit] + first); });
        const uint16x8_t upper[] = {pairs(vzip1q_u8(row[0], row[1])), pairs(vzip2q_u8(row[0], row[1]))};
        const uint16x8_t lower[] = {pairs(vzip1q_u8(row[2], row[3])), pairs(vzip2q_u8(row[2], row[3]))};
        each<2>([&](auto i) TARDIS_INLINE {
            four[2 * i] = vreinterpretq_u8_u16(vzip1q_u16(upper[i], lower[i]));
            four[2 * i + 1] = vreinterpretq_u8_u16(vzip2q_u16(upper[i], lower[i]));
        });
    }

private:
    TARDIS_INLINE static uint16x8_t pairs(Bytes x) { return vreinterpretq_u16_u8(x); }
};

// Adds what the rows give for 16 columns.
template <int B, typename F>
inline TARDIS_INLINE void add_rows(
    const Stored& stored, int bit, int64_t first, const F& factors, int64_t group, Integers (&sum)[4]
) {
    Integers high[4] = {};
    each<kTermsTogether / kTuple>([&](auto p) TARDIS_INLINE {
        const Columns codes(stored, kTuple * p, bit, first);
        const int8x16_t highs = vreinterpretq_s8_u32(vdupq_n_u32(factors.high[p][group]));
        const int8x16_t lows = vreinterpretq_s8_u32(vdupq_n_u32(factors.low[p][group]));
        each<4>([&](auto v) TARDIS_INLINE {
            high[v] = add_dots(high[v], codes.four[v], highs);
            sum[v] = add_dots(sum[v], codes.four[v], lows);
        });
    });
    each<4>([&](auto v) TARDIS_INLINE { sum[v] = plus(sum[v], vshlq_n_s32(high[v], 8)); });
}

}  // namespace
}  // namespace tardis

#include "lowbit_add.inc"

void tardis::neon::add_low_bit(
    const TardisMatrix& m, const Layout* layout, const Terms& terms, Range range, float* y
) {
    add_rows_of_bits(m, layout, terms, range, y);
}
#endif
