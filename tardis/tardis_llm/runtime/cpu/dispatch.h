// The kernels of the instruction set in use.
#pragma once
#include "kernels.h"

namespace tardis {

const Table& kernels();

// For a dense matrix, in panels or not.
inline const Dense& dense_of(const TardisMatrix& m) {
    const Table& table = kernels();
    switch (m.type) {
        case TARDIS_BF16: case TARDIS_BF16_PANELS: return table.bf16;
        case TARDIS_FP16: case TARDIS_FP16_PANELS: return table.fp16;
        default: return table.f32;
    }
}

inline Product product_of(const TardisMatrix& m) {
    switch (m.type) {
        case TARDIS_LOW_BIT: return kernels().low_bit;
        case TARDIS_LOW_BIT_PANELS: return kernels().low_bit_panels;
        case TARDIS_BF16_PANELS: case TARDIS_FP16_PANELS:
            return [](const TardisMatrix& panels, const Rows& rows, const Input& x, float* out) {
                const Tokens tokens = {x.bf16, x.f32, x.tokens, x.stride};
                dense_of(panels).panels(panels, {rows.begin, rows.end}, tokens, out, kBlockRows);
            };
        default: return dense_of(m).product;
    }
}

inline Accumulate accumulate_of(const TardisMatrix& m) {
    switch (m.type) {
        case TARDIS_LOW_BIT: return kernels().add_low_bit;
        case TARDIS_CODE_ROWS: return kernels().add_code_rows;
        default: return dense_of(m).add;
    }
}

}  // namespace tardis
