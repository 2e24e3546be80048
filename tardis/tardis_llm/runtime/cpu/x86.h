// What files for the instruction sets of x86 share.
#pragma once
#include <immintrin.h>

#include "kernels.h"
#include "registers.h"

// Of `avx2_add.cpp`: every such processor has AVX2.
namespace tardis::avx2 {
void add_code_rows(const TardisMatrix& m, const Layout* layout, const Terms& terms, Range range, float* y);
}
