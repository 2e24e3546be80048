// The plain C interface of the CPU kernels: raw pointers in, numbers out, no torch. `tardis_description` says what is
// in it, and Python refuses a library whose description differs from what it states itself: see description.cpp.
//
// A matrix is [rows, columns], row-major. In few bits it is planes [rows, bits, ceil(columns / 8)], of which the first
// holds the highest bits, and `scale` [rows, ceil(columns / group_size)] fp16; a weight is
// (code - twice_zero / 2) * scale. Columns come in blocks of 512, the last one shorter: bit k (1 << k) of byte j of a
// block of n columns is that of column k * ceil(n / 8) + j. Functions that compute return a `TardisStatus`.
//
// In panels it is for products only, which then read one stretch of memory: 32 rows after the other, the last ones
// filled up, and in them, from the first columns to the last, bf16 numbers [columns / 2, 32, 2]; or fp16 numbers
// [columns, 32]; or codes in 1, 2, 4 or 8 bits, 32 bits per row and 32 / bits columns, of which byte j has columns
// j, 4 + j, ... from the lowest bits on, and scales [groups, 32].
//
// As code rows it is for sums of rows only, which then read one stretch for each: codes of 4 or 8 bits side by side, and
// scales as in planes. Words of 16 bits come in lines of 16, and have n = 16 / bits codes, from the lowest bits on: code
// k of word 8 i + 4 h + j of a line is that of column 8 (n h + k) + 4 i + j of its 16 n columns. Rows have whole
// lines, and groups 64 columns or a multiple of them.
#pragma once
#include <cstdint>

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

namespace tardis {

// Sizes that Python states as well.
constexpr int64_t kMaxTokens = 64;  // of a batch
constexpr int64_t kMaxBits = 8;  // of a code
constexpr int64_t kBlockColumns = 512;  // of planes
constexpr int64_t kPanelRows = 32;
constexpr int64_t kBf16Together = 2, kFp16Together = 1;  // columns of a row that lie side by side in a panel
constexpr int64_t kHeadRows = 32;  // of a head whose greatest logit is looked at first
constexpr int64_t kLineBytes = 4;  // of a row's codes that lie side by side in a panel
constexpr int64_t kRoundedColumns = 128;  // at most, in one call

}  // namespace tardis

extern "C" {

enum TardisType : int32_t {
    TARDIS_NONE,
    TARDIS_BF16,
    TARDIS_FP16,
    TARDIS_FP32,
    TARDIS_LOW_BIT,
    TARDIS_BF16_PANELS,
    TARDIS_FP16_PANELS,
    TARDIS_LOW_BIT_PANELS,
    TARDIS_CODE_ROWS,
};
enum TardisStatus : int32_t { TARDIS_OK, TARDIS_NO_MEMORY, TARDIS_BAD_ARGUMENT };
enum TardisIsa : int32_t {
    TARDIS_PORTABLE,
    TARDIS_AVX2,        // and FMA and F16C
    TARDIS_AVXVNNI,     // and AVX-VNNI
    TARDIS_AVX512BW,    // AVX-512 F, BW, DQ and VL
    TARDIS_AVX512VNNI,  // and VNNI
    TARDIS_AVX512,      // and BF16
    TARDIS_AMX,
    TARDIS_NEON,        // of ARM, with the dot product of 8-bit numbers
    TARDIS_I8MM,        // and their matrix product
};
enum TardisActivationKind : int32_t {
    TARDIS_GELU,
    TARDIS_GELU_TANH,
    TARDIS_QUICK_GELU,
    TARDIS_SILU,
    TARDIS_RELU,
    TARDIS_RELU2,
    TARDIS_XIELU,
};

struct TardisMatrix {
    const void* data;       // bf16, fp16 or fp32 numbers, or planes, or panels; null where there is no matrix
    const uint16_t* scale;  // low-bit only
    int64_t rows, columns, group_size;
    int32_t type, bits;
    int32_t twice_zero;  // low-bit only, twice the code of 0: 2^bits - 1, between two codes, or 2^bits
    int32_t unused;
};

struct TardisVector {
    const void* data;
    int32_t type;  // TARDIS_NONE: no vector
    int32_t unused;
};

// Inputs [tokens, d] and outputs [tokens, rows], contiguous, in `type` (bf16, fp16 or fp32); at most kMaxTokens tokens.
struct TardisBatch {
    const void* x;
    void* y;
    int64_t tokens;
    int32_t type;
    int32_t activation_bits;  // 8 or 16: of x where it meets a low-bit matrix, but for a folded FFN, which has its own
    int32_t threads;
    int32_t unused;
};

struct TardisActivation {
    int32_t kind;  // a `TardisActivationKind`
    float alpha_p, alpha_n, beta, eps;  // of xIELU
};

// Of h neurons that are predicted, and others that are kept, which are always computed, with k up-projections each.
// Where a neuron has two, the rows of all gates come first, then all others. If none is predicted, `predictor` is none,
// and what they would be tested with is not read; if none is kept, `kept_up` and `kept_down` are none.
struct TardisFFN {
    TardisMatrix fold, predictor;  // [d, d] or none, [k h, d]; of any type, low-bit
    TardisMatrix up;               // [k h, d]: W1, or what the predictor leaves of it (low-bit), or none
    TardisMatrix down;             // [h, d]: W2 transposed, which may be code rows
    TardisMatrix kept_up, kept_down;  // [k kept, d], [d, kept]; of any type
    TardisVector bias, b1, low, high, slope, offset;  // b1 and slope [k h]
    TardisVector kept_bias;           // [k kept]
    TardisActivation activation;
    int32_t k;                     // 1, or 2: the activation of the first times the second
    int32_t activation_bits;       // 8 or 16: of x where it meets a low-bit matrix; those of the batch where that is of
                                   // kept neurons, and 8 where it is a predictor that only selects
};

// The linear layer that gives logits. What the predictor leaves of its weight is multiplied for the greatest of each
// token alone: for those that are no less than the `top`-th of the greatest of kHeadRows consecutive ones.
struct TardisHead {
    TardisMatrix predictor, remainder;  // [vocabulary, d], low-bit; the second not in panels
    TardisVector bias;
    int64_t top;  // 1 or more
};

// Columns of weights [rows, columns] that are rounded one after the other, while those behind make up for each: with
// target j at the nearest level, change j = level j - base j, and target k -= factor[j, k] change j for k > j. All are
// fp32, and but for the factor [columns, rows].
struct TardisRounding {
    float* target;        // afterwards the levels
    const float* base;    // null: each target as it is when its turn comes
    const float* scale;   // of each weight, not 0
    const float* factor;  // [columns, columns]
    float* change;        // what is left in it
    int64_t rows, columns;
    float top, zero;      // the greatest code, and that of 0
};

// A row of numbers for each token, in the type of the batch; the next row begins `stride` numbers behind.
struct TardisRows {
    void* data;
    int64_t stride;
};

// Operations of a decoding step, each of which reads rows x, and some also others, and writes rows y, which may be x.
// What `of` points to is beside the kind. Results are rounded where the layers of transformers round theirs.
enum TardisOperationKind : int32_t {
    TARDIS_NORM,      // TardisNorm: y is x normalised
    TARDIS_PRODUCTS,  // `count` TardisProduct: products of x, which is contiguous
    TARDIS_TURN,      // TardisTurn: y is x with the rotary embedding of the position (arXiv 2104.09864)
    TARDIS_ATTEND,    // TardisAttention: x are queries, y what the heads give
    TARDIS_ADD,       // nothing: y = x + other
    TARDIS_GATE,      // TardisActivation: y = activation(x), times other if there is one
    TARDIS_FOLDED,    // TardisFFN: y is its output; both are contiguous
    TARDIS_HEAD,      // TardisHead: y are its logits; both are contiguous
};

struct TardisNorm {
    TardisVector factor, bias;  // [width / vectors], each or none
    float eps;
    int32_t centred;            // of mean zero, as layer norms have it
    int32_t rounded_first;      // before they meet the factor
    int32_t vectors;            // of a row, each normalised by itself
};

// y = x weight^T + bias, contiguous.
struct TardisProduct {
    TardisMatrix weight;
    TardisVector bias;
    void* y;
};

// The first `turned` numbers of each of the heads in a row turn by the angles of the position.
struct TardisTurn {
    TardisVector cosine, sine;  // [positions, turned]
    int64_t heads, size, turned;
};

// Queries meet the keys kept of all positions up to this one, `heads / groups` of them the same. Key and value of this
// position are kept first.
struct TardisAttention {
    TardisRows key, value;      // [groups * size] for each token
    void *keys, *values;        // [tokens, groups, capacity, size], in the type of the batch
    int64_t capacity, heads, groups, size;
    int64_t window;             // how many positions are seen, this one included; 0: all
    float scale;
    int32_t unused;
};

struct TardisOperation {
    int32_t kind, count;
    const void* of;
    TardisRows x, other, y;
    int64_t width;  // numbers in a row of x
};

// Lines `name=value`: see description.cpp. The one function that Python calls before it knows the library's version.
const char* tardis_description();
int32_t tardis_supports(int32_t isa);  // by processor and build
int32_t tardis_use(int32_t isa);  // TARDIS_BAD_ARGUMENT where the processor lacks it
int32_t tardis_isa();
// `GOMP_parallel`, whose threads run everything from now on; null, as at first: the calling thread alone.
void tardis_use_openmp(void* parallel);

// y = x W^T + bias.
int32_t tardis_linear(const TardisMatrix* weight, const TardisVector* bias, const TardisBatch* batch);
// y = x W^T + bias by the predictor, and by both matrices where it is among the greatest.
int32_t tardis_head(const TardisHead* head, const TardisBatch* batch);
// y = x W^T + bias for any number of tokens, all in bf16 or all in fp16; y = x W + bias if `transposed`. In bf16 the
// number of inputs is even. TARDIS_BAD_ARGUMENT unless `tardis_has_gemm`. With codes in panels, in bf16, where
// `tardis_has_low_bit_gemm`.
int32_t tardis_gemm(
    const TardisMatrix* weight, int32_t transposed, const TardisVector* bias, const TardisBatch* batch
);
int32_t tardis_has_gemm();  // whether the instruction set in use has it
int32_t tardis_has_low_bit_gemm();
// Whether the instruction set in use multiplies a matrix once it is in panels. Only its type and sizes are read.
int32_t tardis_can_be_in_panels(const TardisMatrix* matrix);
// Whether the instruction set in use adds rows of a matrix faster once it is code rows; of it, as before.
int32_t tardis_can_be_code_rows(const TardisMatrix* matrix);
// y [tokens, h] uint8: 1 for the neurons whose prediction, or residual at it if k is 2, is not within [low, high], NaN
// included.
int32_t tardis_fixed(const TardisFFN* ffn, const TardisBatch* batch);
// y = x fold^T + bias + sum over fixed neurons of residual * W2 column + sum over kept ones of value * W2 column; the
// first two where they are given.
int32_t tardis_folded_ffn(const TardisFFN* ffn, const TardisBatch* batch);
// y: what the FFN gives with the predictor and `up` added up for W1, `down` for W2 and the bias b2: every neuron is
// computed, and no fold. Any number of tokens in bf16; TARDIS_BAD_ARGUMENT unless `tardis_has_exact_ffn`.
int32_t tardis_exact_ffn(const TardisFFN* ffn, const TardisVector* b2, const TardisBatch* batch);
int32_t tardis_has_exact_ffn(const TardisFFN* ffn);
// One token more for each sequence of a batch, all at the same position: the operations one after the other. Of the
// batch all is read but x and y.
int32_t tardis_step(const TardisOperation* operations, int64_t count, const TardisBatch* batch, int64_t position);
// See TardisRounding.
int32_t tardis_round_columns(const TardisRounding* rounding, int32_t threads);
// Sum of the 64-bit words at `data`, read by `threads`: what the memory's read bandwidth is measured with.
uint64_t tardis_read(const uint64_t* data, int64_t words, int32_t threads);
}

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
