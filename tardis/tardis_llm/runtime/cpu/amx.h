// Products of tiles of bf16 numbers, for processors with AMX.
//
// Weights have the order of panels, in which tiles want their second operand: 16 rows of a tile are 32 inputs, two of
// which lie side by side for each of 16 outputs.
#pragma once
#include "avx512_lowbit.h"

#if defined(TARDIS_AVX512) && defined(__AMX_BF16__) && defined(__linux__)
#define TARDIS_AMX_TILES

namespace tardis {

// Of `amx_down.cpp`; see `DownGemm`.
void down_gemm_amx(const TardisMatrix& m, Range columns, const Tokens& x, float* out, int64_t stride);

namespace {

constexpr int64_t kTile = 16;  // rows of a tile, each of 64 bytes
constexpr int64_t kStep = 2 * kTile;  // inputs that a tile has
constexpr int64_t kInputsAtOnce = 2048, kTokensAtOnce = 256;  // whose numbers stay in the second cache
constexpr int64_t kFew = 16;  // tokens, below which reading the weights takes the time

// Numbers 0, 16, 1, 17, ... of 32.
inline TARDIS_INLINE __m512i side_by_side(__m512i numbers) {
    const __m512i order = _mm512_set_epi32(
        0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008, 0x170007, 0x160006,
        0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000
    );
    return _mm512_mask_permutexvar_epi16(numbers, ~0u, order, numbers);
}

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row
    uint8_t rows[16] = {};
};

// Of two blocks of tokens, the second of which may be empty: sums 0 to 3, inputs 4 and 5, weights 6 and 7.
inline void configure(int64_t first, int64_t second) {
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
inline void add_part_to_all(const Part& part, int64_t tokens, bool begin, float* out, int64_t stride) {
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

}  // namespace
}  // namespace tardis
#endif
