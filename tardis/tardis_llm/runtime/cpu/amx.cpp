// Products of many tokens in bf16 with matrices in panels, for processors with AMX: all else is as with AVX-512.
//
// Codes are written out as bf16 for some inputs at a time, which all panels of a task meet before the next ones.
#include "amx.h"

#if defined(TARDIS_AMX_TILES)
#include <sys/syscall.h>
#include <unistd.h>

namespace tardis {
namespace {

// What is behind the last whole step of inputs, filled up with zeros.
struct Rest {
    alignas(64) uint16_t x[kTokensAtOnce * kStep];
    alignas(64) char weights[kTile * 4 * kPanelRows];

    Rest(const Tokens& tokens, int64_t from, int64_t columns) {
        memset(x, 0, 2 * static_cast<size_t>(tokens.count * kStep));
        for (int64_t t = 0; t < tokens.count; ++t)
            memcpy(x + t * kStep, tokens.bf16 + t * tokens.stride + from, 2 * static_cast<size_t>(columns));
        memset(weights, 0, sizeof weights);
    }
};

// `weights(row, begin, end)` are those of some inputs of the panel that begins with a row, in bf16.
template <typename W>
void multiply(W&& weights, Range rows, int64_t columns, const Tokens& x, float* out, int64_t stride) {
    const int64_t whole = columns / kStep * kStep;
    for (int64_t begin = 0; begin < whole; begin += kInputsAtOnce) {
        const int64_t end = begin + kInputsAtOnce < whole ? begin + kInputsAtOnce : whole;
        for (int64_t i = rows.begin; i < rows.end; i += kPanelRows) {
            const Part part = {weights(i, begin, end), x.bf16 + begin, x.stride, (end - begin) / kStep};
            add_part_to_all(part, x.count, begin == 0, out + i - rows.begin, stride);
        }
    }
    if (whole == columns) return;
    Rest rest(x, whole, columns - whole);
    for (int64_t i = rows.begin; i < rows.end; i += kPanelRows) {
        memcpy(rest.weights, weights(i, whole, columns), static_cast<size_t>((columns - whole + 1) / 2 * 4 * kPanelRows));
        add_part_to_all({rest.weights, rest.x, kStep, 1}, x.count, whole == 0, out + i - rows.begin, stride);
    }
}

void panels_bf16_amx(const TardisMatrix& m, Range rows, const Tokens& x, float* out, int64_t stride) {
    if (x.count < kFew) return avx512::panels_bf16(m, rows, x, out, stride);
    const auto weights = [&](int64_t row, int64_t begin, int64_t) {
        return static_cast<const char*>(m.data) + (row * m.columns + begin * kPanelRows) * 2;
    };
    multiply(weights, rows, m.columns, x, out, stride);
    _tile_release();
}

// The codes of some columns of 32 rows of a matrix in planes, as a panel of codes in 8 bits has them.
class Transposed {
public:
    static constexpr int64_t kLine = 4 * kPanelRows;  // bytes of four columns

    explicit Transposed(const TardisMatrix& m) : m_(m), row_bytes_((m.columns + 7) / 8) {}

    // Of columns begin..end-1, of which the first is that of a block.
    const char* operator()(int64_t row, int64_t begin, int64_t end) {
        if (m_.bits == 1) return fill<1>(row, begin, end);
        if (m_.bits == 2) return fill<2>(row, begin, end);
        if (m_.bits <= 4) return fill<4>(row, begin, end);
        return fill<8>(row, begin, end);
    }

private:
    template <int B>
    const char* fill(int64_t row, int64_t begin, int64_t end) {
        for (int64_t column = begin; column < end; column += kBlockColumns) {
            for (int64_t half = 0; half < 2; ++half) {
                for (int64_t i = 0; i < kTile; ++i) read<B>(row + half * kTile + i, column, in_order_[i]);
                const int64_t columns = end - column < kBlockColumns ? end - column : kBlockColumns;
                for (int64_t some = 0; some < columns; some += 64)
                    transpose(some, codes_ + (column - begin + some) / 4 * kLine + 64 * half);
            }
        }
        return codes_;
    }

    // The codes of a block of a row, in the order of the columns.
    template <int B>
    TARDIS_INLINE void read(int64_t row, int64_t column, uint8_t* to) const {
        const int64_t left = m_.columns - column, bytes = (left < kBlockColumns ? left + 7 : kBlockColumns) / 8;
        const auto* first = static_cast<const uint8_t*>(m_.data) + row * m_.bits * row_bytes_ + column / 8;
        Codes<B> codes;
        codes.load(first, row_bytes_, B - m_.bits, first64(bytes));
        each<8>([&](auto k) TARDIS_INLINE { _mm512_storeu_si512(to + k * bytes, codes.template code<k>()); });
    }

    // 64 columns from number `some` on: what of four columns each of the rows has lies together.
    TARDIS_INLINE void transpose(int64_t some, char* to) const {
        __m512i row[16], pair[16];
        each<16>([&](auto i) TARDIS_INLINE { row[i] = _mm512_loadu_si512(in_order_[i] + some); });
        each<8>([&](auto i) TARDIS_INLINE {
            pair[2 * i] = _mm512_unpacklo_epi32(row[2 * i], row[2 * i + 1]);
            pair[2 * i + 1] = _mm512_unpackhi_epi32(row[2 * i], row[2 * i + 1]);
        });
        each<4>([&](auto i) TARDIS_INLINE {
            each<2>([&](auto j) TARDIS_INLINE {
                row[4 * i + 2 * j] = _mm512_unpacklo_epi64(pair[4 * i + j], pair[4 * i + 2 + j]);
                row[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(pair[4 * i + j], pair[4 * i + 2 + j]);
            });
        });
        each<4>([&](auto j) TARDIS_INLINE {
            const __m512i low = _mm512_shuffle_i32x4(row[j], row[4 + j], 0x88);
            const __m512i high = _mm512_shuffle_i32x4(row[j], row[4 + j], 0xdd);
            const __m512i more_low = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0x88);
            const __m512i more_high = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0xdd);
            const auto put = [&](int64_t lane, __m512i four) { _mm512_store_si512(to + (4 * lane + j) * kLine, four); };
            put(0, _mm512_shuffle_i32x4(low, more_low, 0x88)), put(2, _mm512_shuffle_i32x4(low, more_low, 0xdd));
            put(1, _mm512_shuffle_i32x4(high, more_high, 0x88)), put(3, _mm512_shuffle_i32x4(high, more_high, 0xdd));
        });
    }

    const TardisMatrix& m_;
    const int64_t row_bytes_;
    uint8_t in_order_[kTile][kBlockColumns + 64];
    alignas(64) char codes_[kInputsAtOnce / 4 * kLine];
};

// Codes of panels as bf16 numbers; with `more` beside them, codes of a matrix in planes that is added to it.
template <int B, bool sum>
class WrittenOut {
public:
    explicit WrittenOut(const TardisMatrix& m, Transposed* more = nullptr, const TardisMatrix* added = nullptr)
        : m_(m), lines_((m.columns + kColumns - 1) / kColumns), groups_((m.columns + m.group_size - 1) / m.group_size),
          more_(more), added_(added) {}

    // Of inputs begin..end-1, of which the first is that of a line, and with `more` that of a block.
    const char* operator()(int64_t row, int64_t begin, int64_t end) {
        const int64_t panel = row / kPanelRows;
        const char* data = static_cast<const char*>(m_.data) + panel * lines_ * kLine;
        const uint16_t* scales = m_.scale + panel * groups_ * kPanelRows;
        const char* more = sum ? (*more_)(row, begin, end) : nullptr;
        for (int64_t column = begin; column < end;) {
            const int64_t group = column / m_.group_size, next = (group + 1) * m_.group_size;
            const int64_t stop = next < end ? next : end;
            Scales scale;
            scale.set(m_, scales + group * kPanelRows);
            if constexpr (sum) scale.add(*added_, row, group, groups_);
            for (; column < stop; column += kColumns) {
                const char* also = sum ? more + (column - begin) / 4 * Transposed::kLine : nullptr;
                write_line(data + column / kColumns * kLine, also, scale, wide_ + (column - begin) * 2 * kPanelRows);
            }
        }
        return wide_;
    }

private:
    static constexpr int kColumns = 8 * kLineBytes / B;
    static constexpr int64_t kLine = kLineBytes * kPanelRows;

    // Of 32 outputs: a number is a code times `own`, and another one times `other`, less `zero`.
    struct Scales {
        __m512 own[2], other[2], zero[2];

        TARDIS_INLINE void set(const TardisMatrix& m, const uint16_t* from) {
            const __m512 half = _mm512_set1_ps(static_cast<float>(m.twice_zero) / 2);
            each<2>([&](auto v) TARDIS_INLINE {
                own[v] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 16 * v)));
                zero[v] = _mm512_mul_ps(own[v], half);
            });
        }

        TARDIS_INLINE void add(const TardisMatrix& m, int64_t row, int64_t group, int64_t groups) {
            const __m512 half = _mm512_set1_ps(static_cast<float>(m.twice_zero) / 2);
            alignas(64) uint16_t from[kPanelRows];
            for (int64_t i = 0; i < kPanelRows; ++i) from[i] = m.scale[(row + i) * groups + group];
            each<2>([&](auto v) TARDIS_INLINE {
                other[v] = _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(from + 16 * v)));
                zero[v] = _mm512_fmadd_ps(other[v], half, zero[v]);
            });
        }
    };

    TARDIS_INLINE static void write_line(const char* line, const char* more, const Scales& scale, char* to) {
        each<2>([&](auto v) TARDIS_INLINE {
            const __m512i codes = _mm512_loadu_si512(line + 64 * v);
            each<8 / B>([&](auto q) TARDIS_INLINE {
                __m512i others;
                if constexpr (sum) others = _mm512_load_si512(more + q * Transposed::kLine + 64 * v);
                each<2>([&](auto pair) TARDIS_INLINE {
                    const auto number = [&](auto which) TARDIS_INLINE {
                        constexpr int byte = 8 * (2 * pair + which);
                        const __m512 own = _mm512_fmsub_ps(bits<byte + B * q, B>(codes), scale.own[v], scale.zero[v]);
                        if constexpr (sum) return _mm512_fmadd_ps(bits<byte, 8>(others), scale.other[v], own);
                        else return own;
                    };
                    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(number(Constant<1>{}), number(Constant<0>{}));
                    _mm512_store_si512(to + (4 * q + 2 * pair) * 2 * kPanelRows + 64 * v, side_by_side(both));
                });
            });
        });
    }

    template <int shift, int count>
    TARDIS_INLINE static __m512 bits(__m512i codes) {
        const __m512i all = _mm512_set1_epi32((1 << count) - 1);
        return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(codes, shift), all));
    }

    const TardisMatrix& m_;
    const int64_t lines_, groups_;
    Transposed* const more_;
    const TardisMatrix* const added_;
    alignas(64) char wide_[kInputsAtOnce * 2 * kPanelRows];
};

template <int B>
void multiply_codes(const TardisMatrix& m, Range rows, const Tokens& x, float* out, int64_t stride) {
    multiply(WrittenOut<B, false>(m), rows, m.columns, x, out, stride);
    _tile_release();
}

void low_bit_gemm_amx(const TardisMatrix& m, Range rows, const Tokens& x, float* out, int64_t stride) {
    if (m.bits == 1) return multiply_codes<1>(m, rows, x, out, stride);
    if (m.bits == 2) return multiply_codes<2>(m, rows, x, out, stride);
    if (m.bits == 4) return multiply_codes<4>(m, rows, x, out, stride);
    multiply_codes<8>(m, rows, x, out, stride);
}

template <int B>
void multiply_sum(
    const TardisMatrix& m, const TardisMatrix& added, Range rows, const Tokens& x, float* out, int64_t stride
) {
    Transposed more(added);
    multiply(WrittenOut<B, true>(m, &more, &added), rows, m.columns, x, out, stride);
    _tile_release();
}

void sum_gemm_amx(
    const TardisMatrix& m, const TardisMatrix& added, Range rows, const Tokens& x, float* out, int64_t stride
) {
    if (added.type == TARDIS_NONE) return low_bit_gemm_amx(m, rows, x, out, stride);
    if (m.bits == 1) return multiply_sum<1>(m, added, rows, x, out, stride);
    if (m.bits == 2) return multiply_sum<2>(m, added, rows, x, out, stride);
    if (m.bits == 4) return multiply_sum<4>(m, added, rows, x, out, stride);
    multiply_sum<8>(m, added, rows, x, out, stride);
}

// The kernel lets a process use tiles once it has asked.
bool allowed() {
    constexpr long kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
}

Table make_table() {
    Table table = *avx512_table();
    table.bf16.panels = panels_bf16_amx;
    table.low_bit_gemm = low_bit_gemm_amx;
    table.sum_gemm = sum_gemm_amx;
    table.down_gemm = down_gemm_amx;
    table.panel_tokens = kTokensAtOnce;
    return table;
}

}  // namespace
}  // namespace tardis

const tardis::Table* tardis::amx_table() {
    static const bool usable = allowed();
    static const Table table = make_table();
    return usable ? &table : nullptr;
}
#else
const tardis::Table* tardis::amx_table() { return nullptr; }
#endif
