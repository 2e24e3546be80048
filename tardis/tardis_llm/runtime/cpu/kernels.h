// What the kernels of every instruction set get and give; `interface.cpp` and `ffn.cpp` call them through a `Table`.
//
// Files compiled for one instruction set include this and C headers only, and define everything `static`: an inline
// function of the standard library compiled there could be the one that the linker keeps for all.
#pragma once
#include "interface.h"

#include <string.h>

namespace tardis {

constexpr int64_t kBlockRows = 64;  // of a task
constexpr int64_t kPad = 64;  // rows of inputs and outputs are padded with zeros to a multiple of this, and one more

// Consecutive columns, kBlockColumns or fewer: `bytes` of every plane from `byte` on.
struct Block {
    int32_t byte, bytes, column, columns;
    int32_t piece, pieces, segment;
    int32_t whole;  // 64 bytes, of which every bit is a piece
    int32_t ends;  // if whole, a bit for every piece that is the last of its segment
};

// Columns of one group that lie in the same bit of the bytes of a block: those of `count` bytes from number `first` on.
struct Piece {
    int32_t bit, first, count, column, group;
    int32_t last;  // of its segment
};

// The pieces of one group in one block, consecutive.
struct Segment {
    int32_t piece, pieces, group;
};

// How groups of columns lie in the rows of a plane; the same for all matrices of as many columns and group size.
struct Layout {
    const Block* blocks;
    const Piece* pieces;
    const Segment* segments;
    int64_t block_count, piece_count, segment_count, row_bytes, groups;
};

// Inputs as integers, 64 per piece by the numbers of the bytes, zero outside of it. With two halves a value is
// 256 * first + second. `scale`, and `sum` of the values times the scale: [tokens, segments].
struct Quantised {
    const Layout* layout;
    const int8_t* values;  // [tokens, halves, stride]
    const float* scale;
    const float* sum;
    int64_t stride;
    int32_t halves;
};

struct Input {
    int64_t tokens, columns, stride;
    const float* f32;      // [tokens, stride], zero beyond `columns`
    const uint16_t* bf16;  // [tokens, stride]; null unless the inputs are bf16
    Quantised quantised;   // for low-bit matrices
};

// Token number t of an input as an input of one token.
inline Input of_token(const Input& x, int64_t t) {
    Input one = x;
    one.tokens = 1;
    one.f32 += t * x.stride;
    if (x.bf16) one.bf16 += t * x.stride;
    Quantised& q = one.quantised;
    if (!q.layout) return one;
    q.values += t * q.halves * q.stride;
    q.scale += t * q.layout->segment_count;
    q.sum += t * q.layout->segment_count;
    return one;
}

// Columns begin..end-1 of rows, or the blocks begin..end-1 of rows in planes, or outputs.
struct Range {
    int64_t begin, end;
};

// Rows begin..end-1 of a list of `total`: those numbered index[i], or i itself.
struct Rows {
    const int32_t* index;
    int64_t begin, end, total;
    int64_t at(int64_t i) const {
        const int64_t j = i < total ? i : total - 1;
        return index ? index[j] : j;
    }
};

// out[token * kBlockRows + i - begin] = row i . x, for at most kBlockRows rows.
using Product = void (*)(const TardisMatrix&, const Rows&, const Input&, float* out);

// Many tokens, [count, stride]: in bf16 for weights in bf16, else in fp32; the other is not read.
struct Tokens {
    const uint16_t* bf16;
    const float* f32;
    int64_t count, stride;
};

constexpr int64_t kGemmTokens = 256, kGemmOutputs = 256;  // of a call, at most

// out[token * stride + i - begin] = output i, of weights [outputs, inputs], or [inputs, outputs] if `transposed`. In
// bf16 an odd number of inputs wants a zero behind each token's.
using Gemm = void (*)(const TardisMatrix&, bool transposed, Range outputs, const Tokens&, float* out, int64_t stride);

// out[token * stride + i - begin] = output i, of weights in panels; `outputs` begin with a panel.
using PanelGemm = void (*)(const TardisMatrix&, Range outputs, const Tokens&, float* out, int64_t stride);

// The same for the sum of weights in panels and of others in planes, or none, both in few bits and in the same groups.
using SumGemm = void (*)(
    const TardisMatrix& panels, const TardisMatrix& planes, Range outputs, const Tokens&, float* out, int64_t stride
);

constexpr int64_t kDownColumns = kBlockColumns / 2;  // of a call, at most: half a block's, or those of half the last one

// out[token * stride + i - begin] = column i of the tokens, in bf16, times weights [inputs, columns] in planes, or in
// code rows if the table has these.
using DownGemm = void (*)(const TardisMatrix&, Range columns, const Tokens&, float* out, int64_t stride);

// Pairs of a row and a token.
struct Pairs {
    const int32_t *row, *token;
    int64_t count;
};

// out[i] = row row[i] . token token[i]. No pair's product depends on the others.
using PairProduct = void (*)(const TardisMatrix&, const Pairs&, const Input&, float* out);

constexpr int64_t kTermsTogether = 8;  // which may share their rounding, counted from the first on

// What is added to one token's outputs: sum over e of r[e] * row index[e].
struct Terms {
    const int32_t* index;
    const float* r;
    int64_t count;
};

// y[column] += terms, for the columns of a range; of code rows for all.
using Accumulate = void (*)(const TardisMatrix&, const Layout*, const Terms&, Range, float* y);

// out[0..count-1] = v[begin...] in fp32; zeros where there is no vector.
using Widen = void (*)(const TardisVector& v, int64_t begin, int64_t count, float* out);

// Numbers begin... of `to`, whose data are written, are values[i] + bias[i]; without a bias, values[i].
using Store = void (*)(const TardisVector& to, int64_t begin, int64_t count, const float* values, const float* bias);

// Bit i: z[i] is not within [low[i], high[i]], NaN included. At most 64.
using Outside = uint64_t (*)(const float* z, const float* low, const float* high, int64_t count);

// z = activation(z).
using Activate = void (*)(const TardisActivation& activation, float* z, int64_t count);

// The largest size of the numbers, infinite if one of them is or is NaN.
using Largest = float (*)(const float* x, int64_t count);

// The integers next to x * inverse: `first`, or 256 * first + second if `second` is given. Returns their sum, which
// fits 32 bits.
using Round = int64_t (*)(const float* x, int64_t count, float inverse, int8_t* first, int8_t* second);

// For the weights of rows begin..end-1; see `TardisRounding`.
using RoundColumns = void (*)(const TardisRounding&, int64_t begin, int64_t end);

inline bool in_panels(const TardisMatrix& m) {
    return m.type == TARDIS_BF16_PANELS || m.type == TARDIS_FP16_PANELS || m.type == TARDIS_LOW_BIT_PANELS;
}

inline bool is_low_bit(const TardisMatrix& m) {
    return m.type == TARDIS_LOW_BIT || m.type == TARDIS_LOW_BIT_PANELS || m.type == TARDIS_CODE_ROWS;
}

// For dense matrices of one type of numbers.
struct Dense {
    Product product;
    PairProduct pairs;
    Accumulate add;
    Gemm gemm;  // null where there is none, as the next one
    PanelGemm panels;
};

struct Table {
    Dense bf16, fp16, f32;
    Product low_bit, low_bit_panels;  // the second is null where there is none
    PanelGemm low_bit_gemm;  // of codes in panels, with tokens in bf16; null where there is none
    Accumulate add_low_bit, add_code_rows;
    Widen widen;
    Store store;
    Outside outside;
    Activate activate;
    Largest largest;
    Round round;
    RoundColumns round_columns;
    SumGemm sum_gemm = nullptr;  // null where there is none, as the next one
    DownGemm down_gemm = nullptr;
    int64_t panel_tokens = kGemmTokens;  // that a `PanelGemm` gets at once, at most
    bool code_rows = false;  // whether `add_code_rows` was seen to be faster than `add_low_bit`
};

const Table* portable_table();
const Table* avx2_table();        // null where not compiled in
const Table* avxvnni_table();     // null where not compiled in
const Table* avx512bw_table();    // null where not compiled in
const Table* avx512vnni_table();  // null where not compiled in
const Table* avx512_table();      // null where not compiled in
const Table* amx_table();         // null where not compiled in, or not allowed
const Table* neon_table();        // null where not compiled in
const Table* i8mm_table();        // null where not compiled in

static inline float from_bf16(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

// To the nearest, ties to even; NaN stays NaN. Without branches, so that loops of it are vectorised.
static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, nan = (bits >> 16) | 0x40u;
    const bool is_nan = static_cast<int32_t>(bits & 0x7fffffffu) > 0x7f800000;
    return static_cast<uint16_t>(is_nan ? nan : nearest);
}

#if defined(__aarch64__)
// Every such processor has instructions for both ways.
static inline float from_fp16(uint16_t value) {
    __fp16 half;
    memcpy(&half, &value, sizeof half);
    return half;
}

static inline uint16_t to_fp16(float value) {
    const __fp16 half = static_cast<__fp16>(value);
    uint16_t bits;
    memcpy(&bits, &half, sizeof bits);
    return bits;
}
#else
// Subnormal numbers are taken for a fraction behind 2^-14, which is then subtracted. Without branches, as `to_bf16`.
static inline float from_fp16(uint16_t value) {
    const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
    const uint32_t size = static_cast<uint32_t>(value & 0x7fffu) << 13, shifted = size + 0x38800000u;
    float result;
    memcpy(&result, &shifted, sizeof result);
    result -= 0x1p-14f;
    uint32_t bits;
    memcpy(&bits, &result, sizeof bits);
    const uint32_t other = size + (size >= 0x0f800000u ? 0x70000000u : 0x38000000u);  // infinite and NaN, or normal
    bits = sign | (size < 0x00800000u ? bits : other);
    memcpy(&result, &bits, sizeof result);
    return result;
}

// To the nearest, ties to even; infinite from 65520 on, and NaN stays NaN. Below 2^-14 the sum with a half ends where
// subnormal numbers do, and rounds as they do.
static inline uint16_t to_fp16(float value) {
    uint32_t bits, sum;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
    float small;
    memcpy(&small, &size, sizeof small);
    small += 0.5f;
    memcpy(&sum, &small, sizeof sum);
    const uint32_t subnormal = sum - 0x3f000000u, normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
    const uint32_t large = size > 0x7f800000u ? 0x7e00u : 0x7c00u, finite = size < 0x38800000u ? subnormal : normal;
    return static_cast<uint16_t>(sign | (size >= 0x477ff000u ? large : finite));
}
#endif

// Number i of a vector in fp32; zero where there is no vector.
static inline float number(const TardisVector& v, int64_t i) {
    switch (v.type) {
        case TARDIS_BF16: return from_bf16(static_cast<const uint16_t*>(v.data)[i]);
        case TARDIS_FP16: return from_fp16(static_cast<const uint16_t*>(v.data)[i]);
        case TARDIS_FP32: return static_cast<const float*>(v.data)[i];
        default: return 0;
    }
}

}  // namespace tardis
