// Products of many tokens in fp32, for processors with AVX2, which have no arithmetic for bf16.
//
// Of 16 outputs, the weights of some inputs are written out in fp32. They stay in the first cache while all tokens meet
// them, six at a time, with their sums in registers (Goto and van de Geijn, Anatomy of high-performance matrix
// multiplication, 2008). Whatever form weights have, only how they are written out differs.
#include "avx2_lowbit.h"

#if defined(TARDIS_AVX2)

namespace tardis {
namespace {

constexpr int kOutputs = 16, kTileTokens = 6;  // whose sums stay in registers
constexpr int64_t kDepth = 256;  // inputs at once, at most
using Weights = const float (*)[kOutputs];  // by inputs
using Panel = float[kDepth][kOutputs];

inline TARDIS_INLINE __m256 wide(const uint16_t* from, TardisType type) {
    const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if (type == TARDIS_FP16) return _mm256_cvtph_ps(some);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(some), 16));
}

// Of 8 codes in bytes.
inline TARDIS_INLINE __m256 wide(const uint8_t* codes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
}

// 8 vectors of 8 numbers: number i of vector j becomes number j of vector i.
inline TARDIS_INLINE void transpose(__m256 (&v)[8]) {
    __m256 t[8];
    each<4>([&](auto i) TARDIS_INLINE {
        t[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]), t[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    });
    each<2>([&](auto i) TARDIS_INLINE {
        each<2>([&](auto j) TARDIS_INLINE {
            v[4 * i + 2 * j] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + j + 2], 0x44);
            v[4 * i + 2 * j + 1] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + j + 2], 0xee);
        });
    });
    each<8>([&](auto i) TARDIS_INLINE { t[i] = v[i]; });
    each<4>([&](auto i) TARDIS_INLINE {
        v[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20), v[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    });
}

// 16 vectors of 16 bytes, as before.
inline TARDIS_INLINE void transpose(__m128i (&v)[16]) {
    each<4>([&](auto) TARDIS_INLINE {
        __m128i t[16];
        each<8>([&](auto i) TARDIS_INLINE {
            t[2 * i] = _mm_unpacklo_epi8(v[i], v[i + 8]), t[2 * i + 1] = _mm_unpackhi_epi8(v[i], v[i + 8]);
        });
        each<16>([&](auto i) TARDIS_INLINE { v[i] = t[i]; });
    });
}

// Adds the products of some inputs to the sums of T tokens, [T, stride], which begin at zero.
template <int T>
void tile(Weights weights, const float* x, int64_t depth, bool begin, float* out, int64_t stride) {
    __m256 sum[T][2];
    each<2 * T>([&](auto i) TARDIS_INLINE {
        sum[i / 2][i % 2] = begin ? _mm256_setzero_ps() : _mm256_loadu_ps(out + i / 2 * stride + 8 * (i % 2));
    });
    for (int64_t k = 0; k < depth; ++k) {
        const __m256 first = _mm256_load_ps(weights[k]), second = _mm256_load_ps(weights[k] + 8);
        each<T>([&](auto t) TARDIS_INLINE {
            const __m256 value = _mm256_broadcast_ss(x + t * kDepth + k);
            sum[t][0] = _mm256_fmadd_ps(first, value, sum[t][0]);
            sum[t][1] = _mm256_fmadd_ps(second, value, sum[t][1]);
        });
    }
    each<2 * T>([&](auto i) TARDIS_INLINE { _mm256_storeu_ps(out + i / 2 * stride + 8 * (i % 2), sum[i / 2][i % 2]); });
}

using Tile = decltype(&tile<1>);
constexpr Tile kTiles[] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

// `weights(output, begin, end)` are those of inputs begin..end-1 of 16 outputs, `depth` at most, which divides `begin`.
template <typename W>
void multiply(
    W&& weights, int64_t depth, Range outputs, int64_t inputs, const Tokens& x, bool bf16, float* out, int64_t stride
) {
    alignas(64) float values[kGemmTokens * kDepth];
    const int64_t groups = (x.count + kTileTokens - 1) / kTileTokens;
    for (int64_t begin = 0; begin < inputs; begin += depth) {
        const int64_t end = begin + depth < inputs ? begin + depth : inputs;
        for (int64_t t = 0; t < x.count; ++t) {
            const int64_t at = t * x.stride + begin;
            if (bf16) avx2::widen({x.bf16, TARDIS_BF16, 0}, at, end - begin, values + t * kDepth);
            else memcpy(values + t * kDepth, x.f32 + at, static_cast<size_t>(end - begin) * sizeof *values);
        }
        for (int64_t i = outputs.begin; i < outputs.end; i += kOutputs) {
            const Weights panel = weights(i, begin, end);
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t t = g * x.count / groups, last = (g + 1) * x.count / groups;
                float* to = out + t * stride + i - outputs.begin;
                kTiles[last - t](panel, values + t * kDepth, end - begin, begin == 0, to, stride);
            }
        }
    }
}

// Numbers of 16 bits, outputs by inputs.
class Rows16 {
public:
    explicit Rows16(const TardisMatrix& m) : m_(m), type_(static_cast<TardisType>(m.type)) {}

    Weights operator()(int64_t output, int64_t begin, int64_t end) {
        const int64_t whole = (end - begin) / 8 * 8;
        for (int64_t half = 0; half < kOutputs; half += 8) {
            const uint16_t* row[8];
            for (int64_t r = 0; r < 8; ++r) {
                const int64_t own = output + half + r < m_.rows ? output + half + r : m_.rows - 1;
                row[r] = static_cast<const uint16_t*>(m_.data) + own * m_.columns + begin;
            }
            for (int64_t k = 0; k < whole; k += 8) {
                __m256 v[8];
                each<8>([&](auto r) TARDIS_INLINE { v[r] = wide(row[r] + k, type_); });
                transpose(v);
                each<8>([&](auto r) TARDIS_INLINE { _mm256_store_ps(panel_[k + r] + half, v[r]); });
            }
            for (int64_t k = whole; k < end - begin; ++k)
                for (int64_t r = 0; r < 8; ++r) panel_[k][half + r] = number({row[r], m_.type, 0}, k);
        }
        return panel_;
    }

private:
    const TardisMatrix& m_;
    const TardisType type_;
    alignas(64) Panel panel_;
};

// The same, inputs by outputs.
class Columns16 {
public:
    explicit Columns16(const TardisMatrix& m) : m_(m), type_(static_cast<TardisType>(m.type)) {}

    Weights operator()(int64_t output, int64_t begin, int64_t end) {
        const auto* from = static_cast<const uint16_t*>(m_.data) + begin * m_.columns + output;
        const int64_t count = m_.columns - output < kOutputs ? m_.columns - output : kOutputs;
        for (int64_t k = 0; k < end - begin; ++k, from += m_.columns) {
            if (count < kOutputs) {
                avx2::widen({from, m_.type, 0}, 0, count, panel_[k]);
                continue;
            }
            each<2>([&](auto v) TARDIS_INLINE { _mm256_store_ps(panel_[k] + 8 * v, wide(from + 8 * v, type_)); });
        }
        return panel_;
    }

private:
    const TardisMatrix& m_;
    const TardisType type_;
    alignas(64) Panel panel_;
};

// The codes of a block of columns of one row, in planes, in the order of the columns.
template <int B>
inline TARDIS_INLINE void read_block(const TardisMatrix& m, int64_t row, int64_t column, uint8_t* to) {
    const int64_t left = m.columns - column, bytes = (left < kBlockColumns ? left + 7 : kBlockColumns) / 8;
    const int64_t plane = (m.columns + 7) / 8;
    const auto* from = static_cast<const uint8_t*>(m.data) + row * m.bits * plane + column / 8;
    Codes<B> codes[2];
    each<2>([&](auto half) TARDIS_INLINE {
        codes[half].load(from + 32 * half, plane, B - m.bits, bytes - 32 * half);
    });
    each<8>([&](auto k) TARDIS_INLINE {
        each<2>([&](auto half) TARDIS_INLINE {
            auto* at = reinterpret_cast<__m256i*>(to + k * bytes + 32 * half);
            if (32 * half < bytes) _mm256_storeu_si256(at, codes[half].template code<k>());
        });
    });
}

inline void read_block(const TardisMatrix& m, int64_t row, int64_t column, uint8_t* to) {
    if (m.bits == 1) return read_block<1>(m, row, column, to);
    if (m.bits == 2) return read_block<2>(m, row, column, to);
    if (m.bits <= 4) return read_block<4>(m, row, column, to);
    read_block<8>(m, row, column, to);
}

// So many codes of a block may be written behind its last ones.
constexpr int64_t kBehind = 32;

// Codes of panels; with `sum`, and others in planes that are added to them.
template <int B, bool sum>
class PanelCodes {
public:
    PanelCodes(const TardisMatrix& m, const TardisMatrix& added)
        : m_(m), added_(added), lines_((m.columns + kColumns - 1) / kColumns),
          groups_((m.columns + m.group_size - 1) / m.group_size) {}

    Weights operator()(int64_t output, int64_t begin, int64_t end) {
        const int64_t panel = output / kPanelRows, first = output % kPanelRows;
        const char* data = static_cast<const char*>(m_.data) + panel * lines_ * kLine + first * kLineBytes;
        if constexpr (sum) read_added(output, begin, end);
        for (int64_t column = begin; column < end;) {
            const int64_t group = column / m_.group_size, next = (group + 1) * m_.group_size;
            const int64_t stop = next < end ? next : end;
            const Scales scales(*this, m_.scale + (panel * groups_ + group) * kPanelRows + first, output, group);
            for (; column < stop; column += kColumns) write_line(data + column / kColumns * kLine, scales, column - begin);
        }
        return panel_;
    }

private:
    static constexpr int kColumns = 8 * kLineBytes / B;
    static constexpr int64_t kLine = kLineBytes * kPanelRows;

    // A number is a code times `own`, and another one times `other`, less `zero`.
    struct Scales {
        __m256 own[2], other[2], zero[2];

        TARDIS_INLINE Scales(const PanelCodes& all, const uint16_t* from, int64_t output, int64_t group) {
            const __m256 middle = _mm256_set1_ps(static_cast<float>(all.m_.twice_zero) / 2);
            each<2>([&](auto v) TARDIS_INLINE {
                own[v] = wide(from + 8 * v, TARDIS_FP16);
                zero[v] = _mm256_mul_ps(own[v], middle);
            });
            if constexpr (sum) {
                const __m256 half = _mm256_set1_ps(static_cast<float>(all.added_.twice_zero) / 2);
                uint16_t more[kOutputs];
                for (int64_t i = 0; i < kOutputs; ++i) more[i] = all.added_.scale[(output + i) * all.groups_ + group];
                each<2>([&](auto v) TARDIS_INLINE {
                    other[v] = wide(more + 8 * v, TARDIS_FP16);
                    zero[v] = _mm256_fmadd_ps(other[v], half, zero[v]);
                });
            }
        }
    };

    TARDIS_INLINE void write_line(const char* line, const Scales& scales, int64_t input) {
        each<2>([&](auto v) TARDIS_INLINE {
            const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + 32 * v));
            each<kColumns>([&](auto k) TARDIS_INLINE {
                const __m256i code = _mm256_srli_epi32(codes, k % 4 * 8 + k / 4 * B);
                const __m256i own = _mm256_and_si256(code, _mm256_set1_epi32((1 << B) - 1));
                __m256 value = _mm256_fmsub_ps(_mm256_cvtepi32_ps(own), scales.own[v], scales.zero[v]);
                if constexpr (sum) value = _mm256_fmadd_ps(wide(added_codes_[input + k] + 8 * v), scales.other[v], value);
                _mm256_store_ps(panel_[input + k] + 8 * v, value);
            });
        });
    }

    // Of 16 rows, what some columns have, column by column.
    TARDIS_INLINE void read_added(int64_t output, int64_t begin, int64_t end) {
        const int64_t block = begin / kBlockColumns * kBlockColumns;
        uint8_t in_order[kOutputs][kBlockColumns + kBehind];
        for (int64_t i = 0; i < kOutputs; ++i) read_block(added_, output + i, block, in_order[i]);
        for (int64_t column = begin; column < end; column += 16) {
            __m128i v[16];
            each<16>([&](auto i) TARDIS_INLINE {
                v[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in_order[i] + column - block));
            });
            transpose(v);
            each<16>([&](auto i) TARDIS_INLINE {
                _mm_store_si128(reinterpret_cast<__m128i*>(added_codes_[column - begin + i]), v[i]);
            });
        }
    }

    const TardisMatrix &m_, &added_;
    const int64_t lines_, groups_;
    alignas(64) Panel panel_;
    alignas(16) uint8_t added_codes_[sum ? kDepth : 1][kOutputs];
};

// Code rows, inputs by outputs: some columns, all of which are written out at once.
template <int B>
class CodeRows {
public:
    static constexpr int64_t kRows = 64;  // at once: the second cache keeps their panels

    CodeRows(const TardisMatrix& m, Range columns)
        : m_(m), columns_(columns), groups_((m.columns + m.group_size - 1) / m.group_size) {}

    Weights operator()(int64_t output, int64_t begin, int64_t end) {
        if (output == columns_.begin)
            for (int64_t row = begin; row < end; ++row) write(row, row - begin);
        return panels_[(output - columns_.begin) / kOutputs];
    }

private:
    static constexpr int64_t kHalf = 16 / B * 8;  // columns of half a line

    TARDIS_INLINE void write(int64_t row, int64_t number) {
        const uint8_t* data = static_cast<const uint8_t*>(m_.data) + row * m_.columns * B / 8;
        for (int64_t column = columns_.begin; column < columns_.end; column += kOutputs) {
            const float scale = from_fp16(m_.scale[row * groups_ + column / m_.group_size]);
            const int64_t half = column / kHalf, byte = column % kHalf / kOutputs;
            const auto* line = reinterpret_cast<const __m256i*>(data) + half / 2;
            const __m256i all = _mm256_loadu_si256(line), zero = _mm256_setzero_si256();
            const __m256i words = half % 2 ? _mm256_unpackhi_epi16(all, zero) : _mm256_unpacklo_epi16(all, zero);
            const __m256i own = _mm256_srl_epi32(words, _mm_cvtsi32_si128(static_cast<int>(8 * byte)));
            float* to = panels_[(column - columns_.begin) / kOutputs][number];
            each<2>([&](auto v) TARDIS_INLINE {
                const __m256 code = _mm256_cvtepi32_ps(code_of_words<B, v>(own));
                const __m256 middle = _mm256_set1_ps(static_cast<float>(m_.twice_zero * worth<B, v>) / 2);
                const __m256 unit = _mm256_set1_ps(scale / worth<B, v>);
                _mm256_store_ps(to + 8 * v, _mm256_mul_ps(_mm256_sub_ps(code, middle), unit));
            });
        }
    }

    const TardisMatrix& m_;
    const Range columns_;
    const int64_t groups_;
    alignas(64) float panels_[kDownColumns / kOutputs][kRows][kOutputs];
};

template <bool sum>
void multiply_panels(
    const TardisMatrix& m, const TardisMatrix& added, Range rows, const Tokens& x, float* out, int64_t stride
) {
    const auto run = [&](auto bits) {
        multiply(PanelCodes<bits, sum>(m, added), kDepth, rows, m.columns, x, true, out, stride);
    };
    if (m.bits == 1) return run(Constant<1>{});
    if (m.bits == 2) return run(Constant<2>{});
    if (m.bits == 4) return run(Constant<4>{});
    run(Constant<8>{});
}

}  // namespace

void gemm_avx2(const TardisMatrix& m, bool transposed, Range outputs, const Tokens& x, float* out, int64_t stride) {
    const bool bf16 = m.type == TARDIS_BF16;
    if (transposed) multiply(Columns16(m), kDepth, outputs, m.rows, x, bf16, out, stride);
    else multiply(Rows16(m), kDepth, outputs, m.columns, x, bf16, out, stride);
}

void sum_gemm_avx2(
    const TardisMatrix& m, const TardisMatrix& added, Range rows, const Tokens& x, float* out, int64_t stride
) {
    if (added.type == TARDIS_NONE) multiply_panels<false>(m, added, rows, x, out, stride);
    else multiply_panels<true>(m, added, rows, x, out, stride);
}

void down_gemm_avx2(const TardisMatrix& m, Range columns, const Tokens& x, float* out, int64_t stride) {
    const auto run = [&](auto bits) {
        using Own = CodeRows<bits>;
        multiply(Own(m, columns), Own::kRows, columns, m.rows, x, true, out, stride);
    };
    if (m.bits == 4) run(Constant<4>{});
    else run(Constant<8>{});
}

}  // namespace tardis
#endif
