// The kernels for processors with AVX-512.
#include "avx512.h"

#if defined(TARDIS_AVX512)

namespace tardis {
namespace {

Table table_of(const Dense& bf16, const Dense& fp16, const Dense& f32, const LowBit& low_bit) {
    return {
        bf16, fp16, f32, low_bit.planes, low_bit.panels, nullptr, low_bit.add, avx2::add_code_rows,
        widen_avx512, store_avx512, outside_avx512, activate_avx512, largest_avx512, round_avx512,
        avx2::round_columns,
    };
}

}  // namespace
}  // namespace tardis

// Tables are made when first asked for: this code must not run on other processors.
const tardis::Table* tardis::avx512bw_table() {
    static const Table table = [] {
        Table made = table_of(avx512bw::kBf16, avx512bw::kFp16, avx512bw::kF32, avx512bw::kLowBit);
        made.code_rows = true;
        return made;
    }();
    return &table;
}

const tardis::Table* tardis::avx512vnni_table() {
    static const Table table = table_of(avx512bw::kBf16, avx512bw::kFp16, avx512bw::kF32, avx512vnni::kLowBit);
    return &table;
}

const tardis::Table* tardis::avx512_table() {
    static const Table table = table_of(avx512::kBf16, avx512::kFp16, avx512::kF32, avx512vnni::kLowBit);
    return &table;
}
#else
const tardis::Table* tardis::avx512bw_table() { return nullptr; }
const tardis::Table* tardis::avx512vnni_table() { return nullptr; }
const tardis::Table* tardis::avx512_table() { return nullptr; }
#endif
