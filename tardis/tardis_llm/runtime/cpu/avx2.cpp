// For processors with AVX2: the plain kernels, vectorised by the compiler, for dense matrices, and others by hand.
#include "activations.h"
#include "avx2.h"

#if defined(TARDIS_AVX2)

#include "generic.inc"

namespace tardis {
namespace {

Table table_of(Product planes, Product panels) {
    Table table = kTable;
    table.bf16.gemm = table.fp16.gemm = gemm_avx2;
    table.sum_gemm = sum_gemm_avx2, table.down_gemm = down_gemm_avx2;
    table.low_bit = planes, table.low_bit_panels = panels, table.add_low_bit = avx2::add_low_bit;
    table.add_code_rows = avx2::add_code_rows, table.code_rows = true;
    avx2::set_vectors(table);
    return table;
}

}  // namespace
}  // namespace tardis

// Tables are made when first asked for: this code must not run on other processors.
const tardis::Table* tardis::avx2_table() {
    static const Table table = table_of(avx2::planes, avx2::panels);
    return &table;
}

const tardis::Table* tardis::avxvnni_table() {
#if defined(TARDIS_HAS_AVXVNNI)
    static const Table table = table_of(avxvnni::planes, avxvnni::panels);
    return &table;
#else
    return nullptr;
#endif
}
#else
const tardis::Table* tardis::avx2_table() { return nullptr; }
const tardis::Table* tardis::avxvnni_table() { return nullptr; }
#endif
