// For ARM processors with the dot product, which those of Armv8.2 may have and all later ones do.
#include "neon.h"

#if defined(TARDIS_NEON)

namespace tardis {
namespace {

Table table_of(Product planes, Product panels) {
    Table table = {};
    table.bf16 = neon::kBf16, table.fp16 = neon::kFp16, table.f32 = neon::kF32;
    table.low_bit = planes, table.low_bit_panels = panels, table.add_low_bit = neon::add_low_bit;
    table.add_code_rows = portable_table()->add_code_rows;
    neon::set_vectors(table);
    return table;
}

}  // namespace
}  // namespace tardis

// Tables are made when first asked for: this code must not run on other processors.
const tardis::Table* tardis::neon_table() {
    static const Table table = table_of(neon::planes, neon::panels);
    return &table;
}

const tardis::Table* tardis::i8mm_table() {
#if defined(TARDIS_HAS_I8MM)
    static const Table table = table_of(i8mm::planes, i8mm::panels);
    return &table;
#else
    return nullptr;
#endif
}
#else
const tardis::Table* tardis::neon_table() { return nullptr; }
const tardis::Table* tardis::i8mm_table() { return nullptr; }
#endif
