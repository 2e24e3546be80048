// Dense products of many tokens, for processors with AVX-512.
//
// The weights of some inputs are copied into panels, which have 64 outputs side by side, in bf16 two inputs of each, as
// the processor multiplies pairs, and in fp16 one. A panel meets all tokens, a few at a time: it stays in the first
// cache and their sums in registers (Goto and van de Geijn, Anatomy of high-performance matrix multiplication, 2008).
// Meanwhile the weights of the next inputs come from memory.
#include "avx512.h"

#if defined(TARDIS_AVX512)

namespace tardis {
namespace {

constexpr int kVectors = 4, kTileTokens = 6;  // whose sums stay in registers
constexpr int64_t kPanel = 16 * kVectors;  // outputs
constexpr int64_t kDepth = 256;  // inputs whose weights are packed at a time
constexpr int64_t kWidth = 32;  // numbers of a register
constexpr int64_t kLine = 64;

using Panel = uint16_t[kDepth / 2][2 * kPanel];

// Pieces of memory that are fetched in as many steps of something else.
class Upcoming {
public:
    Upcoming(const void* begin, int64_t pieces, int64_t bytes, int64_t stride, int64_t steps)
        : at_(static_cast<const char*>(begin)), left_(pieces * bytes / kLine), bytes_(bytes), stride_(stride) {
        while (pace_ < 8 && pace_ * steps < left_) pace_ *= 2;
    }

    // Lines in each of the next steps: 0, 1, 2, 4 or 8.
    int64_t lines(int64_t steps) {
        const int64_t now = left_ > 0 ? pace_ : 0;
        left_ -= now * steps;
        return now;
    }

    template <int lines>
    TARDIS_INLINE void step() {
        each<lines>([&](auto i) TARDIS_INLINE { _mm_prefetch(at_ + done_ + i * kLine, _MM_HINT_T1); });
        done_ += lines * kLine;
        if (done_ >= bytes_) done_ = 0, at_ += stride_;
    }

private:
    const char* at_;
    int64_t left_, pace_ = 1, done_ = 0;
    int64_t bytes_, stride_;
};

// 16 vectors of 16 pairs: pair i of vector j becomes pair j of vector i.
TARDIS_INLINE inline void transpose(__m512i (&v)[16]) {
    __m512i t[16];
    each<8>([&](auto i) TARDIS_INLINE {
        t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    });
    each<4>([&](auto i) TARDIS_INLINE {
        each<2>([&](auto j) TARDIS_INLINE {
            v[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + j + 2]);
            v[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + j + 2]);
        });
    });
    each<4>([&](auto i) TARDIS_INLINE {
        each<2>([&](auto j) TARDIS_INLINE {
            t[8 * j + i] = _mm512_shuffle_i32x4(v[8 * j + i], v[8 * j + 4 + i], 0x88);
            t[8 * j + 4 + i] = _mm512_shuffle_i32x4(v[8 * j + i], v[8 * j + 4 + i], 0xdd);
        });
    });
    each<8>([&](auto i) TARDIS_INLINE {
        v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    });
}

// 32 numbers, or the first of them. A masked load of all of them would wait for memory several times as long.
TARDIS_INLINE inline __m512i load(const uint16_t* p, int64_t count) {
    if (count >= kWidth) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi16(count > 0 ? first32(count) : 0, p);
}

// How pairs of inputs lie in a panel: [outputs, 2] in bf16, [2, outputs] in fp16.
struct Bf16 : Bf16Panel {
    // The pairs of 16 outputs, from number i on.
    static TARDIS_INLINE void put_pairs(uint16_t* to, int64_t i, __m512i pairs) {
        _mm512_store_si512(to + 2 * i, pairs);
    }

    // Two inputs of 32 outputs.
    static TARDIS_INLINE void put(uint16_t* to, int64_t i, __m512i first, __m512i second) {
        const __m512i low = _mm512_load_si512(kPairs[0]), high = _mm512_load_si512(kPairs[1]);
        _mm512_store_si512(to + 2 * i, _mm512_permutex2var_epi16(first, low, second));
        _mm512_store_si512(to + 2 * i + kWidth, _mm512_permutex2var_epi16(first, high, second));
    }

    alignas(64) static constexpr uint16_t kPairs[2][32] = {
        {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
         24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63},
    };
};

// See `Bf16`.
struct Fp16 : Fp16Panel {
    static TARDIS_INLINE void put_pairs(uint16_t* to, int64_t i, __m512i pairs) {
        const __m512i apart = _mm512_permutexvar_epi16(_mm512_load_si512(kApart), pairs);
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + i), _mm512_castsi512_si256(apart));
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + kPanel + i), _mm512_extracti64x4_epi64(apart, 1));
    }

    static TARDIS_INLINE void put(uint16_t* to, int64_t i, __m512i first, __m512i second) {
        _mm512_store_si512(to + i, first), _mm512_store_si512(to + kPanel + i, second);
    }

    alignas(64) static constexpr uint16_t kApart[32] = {
        0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
        1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
    };
};

// A block of the weights: some outputs by some inputs.
template <typename K>
struct Weights {
    const TardisMatrix& m;
    const bool transposed;
    const Range outputs, inputs;

    int64_t width() const { return outputs.end - outputs.begin; }
    int64_t depth() const { return inputs.end - inputs.begin; }
    const uint16_t* row(int64_t i) const { return static_cast<const uint16_t*>(m.data) + i * m.columns; }

    void pack(Panel* panels) const {
        if (transposed) return pack_columns(panels);
        for (int64_t i = 0; i < width(); i += 16) pack_rows(panels[i / kPanel], i);
    }

    // Outputs i..i + 15, which are rows.
    TARDIS_INLINE void pack_rows(Panel& panel, int64_t i) const {
        const uint16_t* from = row(outputs.begin + i) + inputs.begin;
        for (int64_t k = 0; k < depth(); k += kWidth, from += kWidth) {
            __m512i v[16];
            if (i + 16 <= width() && k + kWidth <= depth()) load_rows(from, m.columns, v);
            else each<16>([&](auto r) TARDIS_INLINE {
                v[r] = load(from + r * m.columns, i + r < width() ? depth() - k : 0);
            });
            transpose(v);
            each<16>([&](auto r) TARDIS_INLINE { K::put_pairs(panel[k / 2 + r], i % kPanel, v[r]); });
        }
    }

    // With few addresses, all in registers: one kept in memory would be read after stores to panels, and wait for those
    // that look alike in their last 12 bits.
    TARDIS_INLINE static void load_rows(const uint16_t* from, int64_t stride, __m512i (&v)[16]) {
        each<4>([&](auto j) TARDIS_INLINE {
            v[4 * j] = _mm512_loadu_si512(from);
            v[4 * j + 1] = _mm512_loadu_si512(from + stride);
            v[4 * j + 2] = _mm512_loadu_si512(from + 2 * stride);
            v[4 * j + 3] = _mm512_loadu_si512(from + 3 * stride);
            from += 4 * stride;
        });
    }

    // Inputs are rows: two of them become pairs.
    void pack_columns(Panel* panels) const {
        for (int64_t k = 0; k < depth(); k += 2) {
            const uint16_t* one = row(inputs.begin + k) + outputs.begin;
            const uint16_t* other = k + 1 < depth() ? one + m.columns : nullptr;
            for (int64_t i = 0; i < width(); i += kPanel) {
                uint16_t* to = panels[i / kPanel][k / 2];
                const int64_t left = width() - i;
                if (other && left >= kPanel) join(one + i, other + i, kPanel, kPanel, to);
                else join(one + i, other ? other + i : one, left, other ? left : 0, to);
            }
        }
    }

    // Numbers of two rows, the first `left` and `right` of 64, by turns.
    TARDIS_INLINE static void join(const uint16_t* a, const uint16_t* b, int64_t left, int64_t right, uint16_t* to) {
        each<kPanel / kWidth>([&](auto j) TARDIS_INLINE {
            const int64_t k = kWidth * j;
            K::put(to, k, load(a + k, left - k), load(b + k, right - k));
        });
    }

    // Of all its weights.
    Upcoming fetch(int64_t steps) const {
        const int64_t stride = 2 * m.columns;
        if (transposed) return {row(inputs.begin) + outputs.begin, depth(), 2 * width(), stride, steps};
        return {row(outputs.begin) + inputs.begin, width(), 2 * depth(), stride, steps};
    }
};

// Adds the products of some steps of inputs to the sums of T tokens and a panel's outputs, which begin at zero.
template <typename K, int T, int lines>
void tile(
    const Panel& panel, const typename K::Value* x, int64_t x_stride, int64_t steps, bool begin, float* out,
    int64_t stride, Upcoming& next
) {
    __m512 sum[T][kVectors];
    const auto all = [&](const auto& body) TARDIS_INLINE {
        each<T * kVectors>([&](auto i) TARDIS_INLINE { body(Constant<i / kVectors>{}, Constant<i % kVectors>{}); });
    };
    all([&](auto t, auto v) TARDIS_INLINE {
        sum[t][v] = begin ? _mm512_setzero_ps() : _mm512_loadu_ps(out + t * stride + 16 * v);
    });
    Upcoming fetch = next;  // its numbers stay in registers
    const uint16_t* w = panel[0];
    for (int64_t s = 0; s < steps; ++s, w += K::kInputs * kPanel) {
        if constexpr (lines > 0) fetch.template step<lines>();
        typename K::Vector weights[kVectors], inputs[T];
        each<kVectors>([&](auto v) TARDIS_INLINE { weights[v] = K::load(w + 16 * K::kInputs * v); });
        each<T>([&](auto t) TARDIS_INLINE { inputs[t] = K::broadcast(x + t * x_stride + K::kInputs * s); });
        all([&](auto t, auto v) TARDIS_INLINE { sum[t][v] = K::add_product(sum[t][v], weights[v], inputs[t]); });
    }
    next = fetch;
    all([&](auto t, auto v) TARDIS_INLINE { _mm512_storeu_ps(out + t * stride + 16 * v, sum[t][v]); });
}

template <typename K>
using Tile = decltype(&tile<K, 1, 0>);
template <typename K, int lines>
constexpr Tile<K> kTiles[] = {
    nullptr,           tile<K, 1, lines>, tile<K, 2, lines>, tile<K, 3, lines>,
    tile<K, 4, lines>, tile<K, 5, lines>, tile<K, 6, lines>,
};

template <typename K>
Tile<K> tile_of(int64_t tokens, int64_t lines) {
    switch (lines) {
        case 0: return kTiles<K, 0>[tokens];
        case 1: return kTiles<K, 1>[tokens];
        case 2: return kTiles<K, 2>[tokens];
        case 4: return kTiles<K, 4>[tokens];
        default: return kTiles<K, 8>[tokens];
    }
}

template <typename K>
void multiply(const TardisMatrix& m, bool transposed, Range outputs, const Tokens& x, float* out, int64_t stride) {
    alignas(4096) Panel panels[kGemmOutputs / kPanel];
    const int64_t all = transposed ? m.rows : m.columns, groups = (x.count + kTileTokens - 1) / kTileTokens;
    const auto from = [](int64_t begin, int64_t size, int64_t limit) -> Range {
        return {begin < limit ? begin : limit, begin + size < limit ? begin + size : limit};
    };
    const int64_t made = transposed ? m.columns : m.rows;
    const Range behind = from(outputs.end, outputs.end - outputs.begin, made);
    for (int64_t k = 0; k < all; k += kDepth) {
        const bool last = k + kDepth >= all;
        const Weights<K> now = {m, transposed, outputs, from(k, kDepth, all)};
        const Weights<K> then = {m, transposed, last ? behind : outputs, from(last ? 0 : k + kDepth, kDepth, all)};
        now.pack(panels);
        const int64_t steps = (now.depth() + K::kInputs - 1) / K::kInputs, width = now.width();
        Upcoming next = then.fetch(groups * steps * ((width + kPanel - 1) / kPanel));
        for (int64_t i = 0; i < width; i += kPanel) {
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t t = g * x.count / groups, end = (g + 1) * x.count / groups;
                const Tile<K> run = tile_of<K>(end - t, next.lines(steps));
                const auto* own = K::inputs(x) + t * x.stride + k;
                run(panels[i / kPanel], own, x.stride, steps, k == 0, out + t * stride + i, stride, next);
            }
        }
    }
}

}  // namespace

void TARDIS_AVX512_SET::gemm_bf16(
    const TardisMatrix& m, bool transposed, Range outputs, const Tokens& x, float* out, int64_t stride
) {
    multiply<Bf16>(m, transposed, outputs, x, out, stride);
}

void TARDIS_AVX512_SET::gemm_fp16(
    const TardisMatrix& m, bool transposed, Range outputs, const Tokens& x, float* out, int64_t stride
) {
    multiply<Fp16>(m, transposed, outputs, x, out, stride);
}

}  // namespace tardis
#endif
