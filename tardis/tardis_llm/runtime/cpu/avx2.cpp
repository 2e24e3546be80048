// The plain kernels, vectorised by the compiler for AVX2, FMA and F16C.
#include "activations.h"
#include "kernels.h"

#ifdef __AVX2__
#include <immintrin.h>

#include "generic.inc"

const tardis::Table* tardis::avx2_table() { return &kTable; }
#else
const tardis::Table* tardis::avx2_table() { return nullptr; }
#endif
