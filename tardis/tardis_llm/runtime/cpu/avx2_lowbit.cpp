// Products with matrices in few bits, for processors with AVX2.
#include "avx2_lowbit.h"

#if defined(TARDIS_AVX2)

namespace tardis {
namespace {

inline TARDIS_INLINE Bytes values_at(const int8_t* x) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
}

// sum and the products of 64 codes with their values.
template <int B>
inline TARDIS_INLINE Integers add_dot(Integers sum, const Bytes (&code)[2], const int8_t* x) {
    if constexpr (kDots) return add_dots(add_dots(sum, code[0], values_at(x)), code[1], values_at(x + 32));
    each<kParts<B>>([&](auto p) TARDIS_INLINE {
        const Bytes two = _mm256_maddubs_epi16(part_of<B, p>(code[0]), values_at(x));
        const Bytes four = add_products(two, part_of<B, p>(code[1]), values_at(x + 32));
        sum = plus(sum, _mm256_madd_epi16(four, _mm256_set1_epi16(p ? 16 : 1)));
    });
    return sum;
}

}  // namespace
}  // namespace tardis

#include "lowbit_planes.inc"

void tardis::TARDIS_AVX2_SET::planes(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    product_low_bit(m, rows, x, out);
}
#endif
