// Products of many tokens in bf16 with matrices in panels, for processors with AMX: all else is as with AVX-512.
//
// A panel has the order in which tiles want their second operand: 16 rows of a tile are 32 inputs, two of which lie side
// by side for each of 16 outputs. Codes are written out as bf16 for some inputs at a time.
#include "avx512.h"

#if defined(TARDIS_AVX512) && defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

namespace tardis {
namespace {

constexpr int64_t kTile = 16;  // rows of a tile, each of 64 bytes
constexpr int64_t kStep = 2 * kTile;  // inputs that a tile has
constexpr int64_t kInputsAtOnce = 4096, kTokensAtOnce = 128;  // whose numbers stay in the second cache
constexpr int64_t kFew = 16;  // tokens, below which reading the weights takes the time

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row
    uint8_t rows[16] = {};
};

// Of two blocks of tokens, the second of which may be empty: sums 0 to 3, inputs 4 and 5, weights 6 and 7.
void configure(int64_t first, int64_t second) {
    TileConfig config;
    const auto set = [&](int tile, int64_t rows) {
        config.bytes[tile] = 64, config.rows[tile] = static_cast<uint8_t>(rows);
    };
    set(0, first), set(1, first), set(4, first), set(6, kTile), set(7, kTile);
    if (second) set(2, second), set(3, second), set(5, second);
    _tile_loadconfig(&config);
}

// Some inputs' weights of a panel, and the tokens' numbers for them.
struct Part {
    const char* weights;  // [inputs / 2, 32, 2]
    const uint16_t* x;
    int64_t x_stride, steps;
};

// Adds the products of a part to the sums of one or two blocks of tokens, [tokens, stride], which begin at zero.
template <bool both>
void add_part(const Part& part, bool begin, float* out, int64_t stride) {
    const int64_t bytes = stride * 4, x_bytes = part.x_stride * 2;
    float* second = out + kTile * stride;
    if (begin) {
        _tile_zero(0);
        _tile_zero(1);
    } else {
        _tile_loadd(0, out, bytes);
        _tile_loadd(1, out + kTile, bytes);
    }
    if constexpr (both) {
        if (begin) {
            _tile_zero(2);
            _tile_zero(3);
        } else {
            _tile_loadd(2, second, bytes);
            _tile_loadd(3, second + kTile, bytes);
        }
    }
    for (int64_t s = 0; s < part.steps; ++s) {
        const char* w = part.weights + s * kTile * 4 * kPanelRows;
        const uint16_t* x = part.x + s * kStep;
        _tile_loadd(4, x, x_bytes);
        _tile_loadd(6, w, 4 * kPanelRows);
        _tile_loadd(7, w + 64, 4 * kPanelRows);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (both) {
            _tile_loadd(5, x + kTile * part.x_stride, x_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, bytes);
    _tile_stored(1, out + kTile, bytes);
    if constexpr (both) {
        _tile_stored(2, second, bytes);
        _tile_stored(3, second + kTile, bytes);
    }
}

// For all tokens.
void add_part_to_all(const Part& part, int64_t tokens, bool begin, float* out, int64_t stride) {
    for (int64_t t = 0; t < tokens; t += 2 * kTile) {
        const int64_t left = tokens - t, first = left < kTile ? left : kTile;
        const int64_t second = left - first < kTile ? left - first : kTile;
        Part own = part;
        own.x += t * part.x_stride;
        if (t == 0 || second < kTile) configure(first, second);
        if (second) add_part<true>(own, begin, out + t * stride, stride);
        else add_part<false>(own, begin, out + t * stride, stride);
    }
}

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

// `weights(begin, end)` are those of some inputs of a panel, in bf16.
template <typename W>
void multiply(W&& weights, int64_t columns, const Tokens& x, float* out, int64_t stride) {
    const int64_t whole = columns / kStep * kStep;
    for (int64_t begin = 0; begin < whole; begin += kInputsAtOnce) {
        const int64_t end = begin + kInputsAtOnce < whole ? begin + kInputsAtOnce : whole;
        const Part part = {weights(begin, end), x.bf16 + begin, x.stride, (end - begin) / kStep};
        add_part_to_all(part, x.count, begin == 0, out, stride);
    }
    if (whole == columns) return;
    Rest rest(x, whole, columns - whole);
    memcpy(rest.weights, weights(whole, columns), static_cast<size_t>((columns - whole + 1) / 2 * 4 * kPanelRows));
    add_part_to_all({rest.weights, rest.x, kStep, 1}, x.count, whole == 0, out, stride);
}

void panels_bf16_amx(const TardisMatrix& m, Range rows, const Tokens& x, float* out, int64_t stride) {
    if (x.count < kFew) return panels_bf16_avx512(m, rows, x, out, stride);
    for (int64_t i = rows.begin; i < rows.end; i += kPanelRows) {
        const char* panel = static_cast<const char*>(m.data) + i * m.columns * 2;
        const auto weights = [&](int64_t begin, int64_t) { return panel + begin * 2 * kPanelRows; };
        multiply(weights, m.columns, x, out + i - rows.begin, stride);
    }
    _tile_release();
}

// Codes of a panel as bf16 numbers.
template <int B>
class WrittenOut {
public:
    WrittenOut(const TardisMatrix& m, int64_t panel)
        : group_size_(m.group_size), half_(static_cast<float>(m.twice_zero) / 2) {
        const int64_t lines = (m.columns + kColumns - 1) / kColumns;
        const int64_t groups = (m.columns + m.group_size - 1) / m.group_size;
        data_ = static_cast<const char*>(m.data) + panel * lines * kLine;
        scale_ = m.scale + panel * groups * kPanelRows;
    }

    // For inputs begin..end-1, of which the first is that of a line.
    const char* operator()(int64_t begin, int64_t end) {
        for (int64_t column = begin; column < end;) {
            const int64_t group = column / group_size_, next = (group + 1) * group_size_, stop = next < end ? next : end;
            __m512 scale[2], zero[2];
            each<2>([&](auto v) TARDIS_INLINE {
                const uint16_t* from = scale_ + group * kPanelRows + 16 * v;
                scale[v] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
                zero[v] = _mm512_mul_ps(scale[v], _mm512_set1_ps(half_));
            });
            for (; column < stop; column += kColumns)
                write_line(data_ + column / kColumns * kLine, scale, zero, wide_ + (column - begin) * 2 * kPanelRows);
        }
        return wide_;
    }

private:
    static constexpr int kColumns = 8 * kLineBytes / B;
    static constexpr int64_t kLine = kLineBytes * kPanelRows;

    TARDIS_INLINE static void write_line(const char* line, const __m512 (&scale)[2], const __m512 (&zero)[2], char* to) {
        each<2>([&](auto v) TARDIS_INLINE {
            const __m512i codes = _mm512_loadu_si512(line + 64 * v);
            each<8 / B>([&](auto q) TARDIS_INLINE {
                each<2>([&](auto pair) TARDIS_INLINE {
                    const auto number = [&](auto which) TARDIS_INLINE {
                        constexpr int shift = 8 * (2 * pair + which) + B * q;
                        const __m512i code = _mm512_srli_epi32(codes, shift), all = _mm512_set1_epi32((1 << B) - 1);
                        return _mm512_fmsub_ps(_mm512_cvtepi32_ps(_mm512_and_si512(code, all)), scale[v], zero[v]);
                    };
                    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(number(Constant<1>{}), number(Constant<0>{}));
                    _mm512_store_si512(to + (4 * q + 2 * pair) * 2 * kPanelRows + 64 * v, side_by_side(both));
                });
            });
        });
    }

    // Numbers 0, 16, 1, 17, ...
    TARDIS_INLINE static __m512i side_by_side(__m512i numbers) {
        const __m512i order = _mm512_set_epi32(
            0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008, 0x170007, 0x160006,
            0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000
        );
        return _mm512_mask_permutexvar_epi16(numbers, ~0u, order, numbers);
    }

    const int64_t group_size_;
    const float half_;
    const char* data_;
    const uint16_t* scale_;
    alignas(64) char wide_[kInputsAtOnce * 2 * kPanelRows];
};

template <int B>
void multiply_codes(const TardisMatrix& m, Range rows, const Tokens& x, float* out, int64_t stride) {
    for (int64_t i = rows.begin; i < rows.end; i += kPanelRows) {
        WrittenOut<B> weights(m, i / kPanelRows);
        multiply(weights, m.columns, x, out + i - rows.begin, stride);
    }
    _tile_release();
}

void low_bit_gemm_amx(const TardisMatrix& m, Range rows, const Tokens& x, float* out, int64_t stride) {
    if (m.bits == 1) return multiply_codes<1>(m, rows, x, out, stride);
    if (m.bits == 2) return multiply_codes<2>(m, rows, x, out, stride);
    if (m.bits == 4) return multiply_codes<4>(m, rows, x, out, stride);
    multiply_codes<8>(m, rows, x, out, stride);
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
