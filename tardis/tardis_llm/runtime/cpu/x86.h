// What files for the instruction sets of x86 share.
#pragma once
#include <immintrin.h>

#include "kernels.h"
#include "registers.h"

// Of `avx2_add.cpp` and `avx2_vectors.cpp`: every such processor has AVX2.
namespace tardis::avx2 {
void add_code_rows(const TardisMatrix& m, const Layout* layout, const Terms& terms, Range range, float* y);
void round_columns(const TardisRounding& r, int64_t begin, int64_t end);
}
