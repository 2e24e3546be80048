// Products with matrices in few bits, for ARM processors with the dot product.
#include "neon_lowbit.h"

#if defined(TARDIS_NEON)

namespace tardis {
namespace {

// sum and the products of 64 codes with their values.
template <int B>
inline TARDIS_INLINE Integers add_dot(Integers sum, const Bytes (&code)[4], const int8_t* x) {
    each<4>([&](auto r) TARDIS_INLINE { sum = add_dots(sum, code[r], vld1q_s8(x + 16 * r)); });
    return sum;
}

}  // namespace
}  // namespace tardis

#include "lowbit_planes.inc"

void tardis::TARDIS_NEON_SET::planes(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    product_low_bit(m, rows, x, out);
}
#endif
