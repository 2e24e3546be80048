// What the kernels for processors with AVX2, FMA and F16C share.
#pragma once
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define TARDIS_AVX2
#include <immintrin.h>

namespace tardis {

// Of `avx2_lowbit.cpp` and `avx2_panels.cpp`; see `Product` and `Accumulate`.
void product_low_bit_avx2(const TardisMatrix& m, const Rows& rows, const Input& x, float* out);
void add_low_bit_avx2(const TardisMatrix& m, const Layout* layout, const Terms& terms, Range range, float* y);
void low_bit_panels_avx2(const TardisMatrix& m, const Rows& rows, const Input& x, float* out);

}  // namespace tardis
#endif
