// For processors with AVX2: the plain kernels, vectorised by the compiler, for dense matrices, and others by hand.
#include "activations.h"
#include "avx2.h"

#if defined(TARDIS_AVX2)

#include "generic.inc"

namespace tardis {
namespace {

const Table kVectors = [] {
    Table table = kTable;
    table.low_bit = product_low_bit_avx2, table.low_bit_panels = low_bit_panels_avx2;
    table.add_low_bit = add_low_bit_avx2;
    table.widen = widen_avx2, table.store = store_avx2, table.outside = outside_avx2;
    table.activate = activate_avx2, table.largest = largest_avx2, table.round = round_avx2;
    return table;
}();

}  // namespace
}  // namespace tardis

const tardis::Table* tardis::avx2_table() { return &tardis::kVectors; }
#else
const tardis::Table* tardis::avx2_table() { return nullptr; }
#endif
