// For processors with AVX2: the plain kernels, vectorised by the compiler, for dense matrices, and others by hand.
#include "activations.h"
#include "avx2.h"

#if defined(TARDIS_AVX2)

#include "generic.inc"

namespace tardis {
namespace {

// With more tokens than these it pays to write weights out in fp32: 12 to 64 are multiplied 1.5 to 3 times as fast.
constexpr int64_t kFewTokens = 4;

template <Dense Table::*dense>
void product_half(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    if (x.tokens <= kFewTokens || rows.index) return (kTable.*dense).product(m, rows, x, out);
    gemm_avx2(m, false, {rows.begin, rows.end}, {x.bf16, x.f32, x.tokens, x.stride}, out, kBlockRows);
}

Table table_of(Product planes, Product panels) {
    Table table = kTable;
    table.bf16.product = product_half<&Table::bf16>, table.fp16.product = product_half<&Table::fp16>;
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
