// What the kernels of every instruction set get and give; `interface.cpp` and `ffn.cpp` call them through a `Table`.
//
// Files compiled for one instruction set include this and C headers only, and define everything `static`: an inline
// function of the standard library compiled there could be the one that the linker keeps for all.
#pragma once
#include "interface.h"

#include <string.h>

namespace tardis {

constexpr int64_t kMaxTokens = 64;
constexpr int64_t kPad = 64;  // rows of inputs and outputs are padded with zeros to a multiple of this, and one more
constexpr int64_t kSegmentChunks = 32;  // sums of 8-bit codes x 16-bit activations over so many fit in int32

// 64 columns or fewer, all of one group: they begin `shift` bits into the 8 bytes at `byte` of a row of a plane. These
// lie within the row, so at its end they overlap those of the chunk before; only a row of less than 8 bytes has fewer.
struct Chunk {
    int32_t byte, shift, first, count, group;
};

// Consecutive chunks of one group.
struct Segment {
    int32_t chunk, chunks, group;
};

// How groups of columns lie in the rows of a plane; the same for all matrices of as many columns and group size.
struct Layout {
    const Chunk* chunks;
    const Segment* segments;
    int64_t chunk_count, segment_count, row_bytes, groups;
};

// Inputs as integers, permuted as bits lie in bytes: 64 per chunk, zero outside of its columns. With two halves a value
// is 256 * first + second. `scale` and `sum` (of the values): [tokens, segments].
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
    const uint16_t* bf16;  // the same; null unless the inputs are bf16
    Quantised quantised;   // for low-bit matrices
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

// out[(i - begin) * tokens + token] = row i . x.
using Product = void (*)(const TardisMatrix&, const Rows&, const Input&, float* out);

// What is added to the outputs: sum over e of r[e * tokens + token] * row index[e].
struct Terms {
    const int32_t* index;
    const float* r;
    int64_t count, tokens;
};

// Columns begin..end-1 of dense rows, or the chunks begin..end-1 of low-bit ones.
struct Range {
    int64_t begin, end;
};

// y[token * stride + column] += terms, for the columns of a range.
using Accumulate = void (*)(const TardisMatrix&, const Layout*, const Terms&, Range, float* y, int64_t stride);

struct Table {
    Product bf16, f32, low_bit;
    Accumulate add_bf16, add_f32, add_low_bit;
};

const Table* portable_table();
const Table* avx2_table();    // null where not compiled in
const Table* avx512_table();  // null where not compiled in

static inline float from_bf16(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

// To the nearest, ties to even; NaN stays NaN.
static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The exponent is moved by a multiplication, which is exact, subnormal numbers included.
static inline float from_fp16(uint16_t value) {
    const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
    uint32_t bits = static_cast<uint32_t>(value & 0x7fffu) << 13;
    float result;
    if ((value & 0x7c00u) == 0x7c00u) {
        bits |= 0x7f800000u;
    } else {
        memcpy(&result, &bits, sizeof result);
        result *= 0x1p112f;
        memcpy(&bits, &result, sizeof bits);
    }
    bits |= sign;
    memcpy(&result, &bits, sizeof result);
    return result;
}

// The `bytes` (1 to 8) at p as the low bytes of a word.
static inline uint64_t load_bytes(const uint8_t* p, int64_t bytes) {
    uint64_t word = 0;
    memcpy(&word, p, static_cast<size_t>(bytes));
    return word;
}

}  // namespace tardis
