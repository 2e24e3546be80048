// The kernels of the instruction set in use.
#pragma once
#include "kernels.h"

namespace tardis {

const Table& kernels();

inline Product product_of(const TardisMatrix& m) {
    const Table& table = kernels();
    switch (m.type) {
        case TARDIS_BF16: return table.bf16;
        case TARDIS_FP32: return table.f32;
        case TARDIS_PANELS:
            return [](const TardisMatrix& panels, const Rows& rows, const Input& x, float* out) {
                kernels().panels(panels, {rows.begin, rows.end}, {x.bf16, x.tokens, x.stride}, out, kBlockRows);
            };
        case TARDIS_LOW_BIT_PANELS: return table.low_bit_panels;
        default: return table.low_bit;
    }
}

// Of a dense matrix.
inline PairProduct pair_product_of(const TardisMatrix& m) {
    return m.type == TARDIS_BF16 ? kernels().pairs_bf16 : kernels().pairs_f32;
}

inline Accumulate accumulate_of(const TardisMatrix& m) {
    const Table& table = kernels();
    return m.type == TARDIS_BF16 ? table.add_bf16 : m.type == TARDIS_FP32 ? table.add_f32 : table.add_low_bit;
}

}  // namespace tardis
