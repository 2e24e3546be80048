// Dense matrices, for ARM processors with the dot product. Numbers of 16 bits become fp32 once for some tokens.
#include "neon.h"

#if defined(TARDIS_NEON)

namespace tardis {
namespace {

// Eight numbers in fp32.
struct Eight {
    Floats half[2];
};

struct Bf16 {
    using Number = uint16_t;
    static Floats widen(uint16x4_t four) { return of_bf16(four); }
};

struct Fp16 {
    using Number = uint16_t;
    static Floats widen(uint16x4_t four) { return of_fp16(four); }
};

struct F32 {
    using Number = float;
};

inline TARDIS_INLINE Eight load_eight(const float* p) { return {{load(p), load(p + 4)}}; }

template <typename K>
inline TARDIS_INLINE Eight load_numbers(const typename K::Number* p) {
    if constexpr (sizeof *p == 4) return load_eight(p);
    else {
        const uint16x8_t all = vld1q_u16(p);
        return {{K::widen(vget_low_u16(all)), K::widen(vget_high_u16(all))}};
    }
}

// The first `count` of eight numbers, and zeros.
template <typename K>
inline TARDIS_INLINE Eight load_numbers(const typename K::Number* p, int64_t count) {
    alignas(16) typename K::Number all[8] = {};
    memcpy(all, p, static_cast<size_t>(count) * sizeof *p);
    return load_numbers<K>(all);
}

constexpr int kTileRows = 4, kTileTokens = 4;

// step(k, load) for eight columns each, the last ones filled up with zeros.
template <typename K, typename F>
inline TARDIS_INLINE void each_eight(int64_t columns, const F& step) {
    int64_t k = 0;
    for (; k + 8 <= columns; k += 8) step(k, [](const auto* p) TARDIS_INLINE { return load_numbers<K>(p); });
    if (k < columns) step(k, [&](const auto* p) TARDIS_INLINE { return load_numbers<K>(p, columns - k); });
}

// A row's product with a token takes the same sums wherever it is computed.
struct Sum {
    Floats half[2] = {};

    TARDIS_INLINE void add(const Eight& weights, const Eight& inputs) {
        each<2>([&](auto i) TARDIS_INLINE { half[i] = plus_product(half[i], weights.half[i], inputs.half[i]); });
    }
    TARDIS_INLINE float whole() const { return sum_of(vaddq_f32(half[0], half[1])); }
};

// R rows times T tokens, whose inputs are padded.
template <typename K, int R, int T>
inline TARDIS_INLINE void multiply(
    const typename K::Number* const* w, const float* x, int64_t stride, int64_t columns, float (*out)[kTileRows]
) {
    Sum sum[R][T];
    each_eight<K>(columns, [&](int64_t k, const auto& load) TARDIS_INLINE {
        Eight weights[R];
        each<R>([&](auto r) TARDIS_INLINE { weights[r] = load(w[r] + k); });
        each<T>([&](auto t) TARDIS_INLINE {
            const Eight inputs = load_eight(x + t * stride + k);
            each<R>([&](auto r) TARDIS_INLINE { sum[r][t].add(weights[r], inputs); });
        });
    });
    each<T>([&](auto t) TARDIS_INLINE { each<R>([&](auto r) TARDIS_INLINE { out[t][r] = sum[r][t].whole(); }); });
}

// kTileRows rows times T tokens, as many of the rows at once as there are registers for.
template <typename K, int T>
void tile(
    const typename K::Number* const* w, const float* x, int64_t stride, int64_t columns, float (*out)[kTileRows]
) {
    constexpr int R = T <= 2 ? kTileRows : kTileRows / 2;
    for (int r = 0; r < kTileRows; r += R) {
        float some[T][kTileRows];
        multiply<K, R, T>(w + r, x, stride, columns, some);
        each<T * R>([&](auto i) TARDIS_INLINE { out[i / R][r + i % R] = some[i / R][i % R]; });
    }
}

template <typename K>
constexpr decltype(&tile<K, 1>) kTiles[] = {nullptr, tile<K, 1>, tile<K, 2>, tile<K, 3>, tile<K, 4>};

template <typename K>
void product(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    const auto* data = static_cast<const typename K::Number*>(m.data);
    for (int64_t i = rows.begin; i < rows.end; i += kTileRows) {
        const typename K::Number* w[kTileRows];
        for (int r = 0; r < kTileRows; ++r) w[r] = data + rows.at(i + r) * m.columns;
        for (int64_t t = 0, end; t < x.tokens; t = end) {
            end = t + kTileTokens < x.tokens ? t + kTileTokens : x.tokens;
            float some[kTileTokens][kTileRows];
            kTiles<K>[end - t](w, x.f32 + t * x.stride, x.stride, m.columns, some);
            for (int64_t j = t; j < end; ++j)
                for (int r = 0; r < kTileRows && i + r < rows.end; ++r)
                    out[j * kBlockRows + i + r - rows.begin] = some[j - t][r];
        }
    }
}

constexpr int kPairsTogether = 4;

template <typename K>
void pairs(const TardisMatrix& m, const Pairs& all, const Input& x, float* out) {
    for (int64_t first = 0; first < all.count; first += kPairsTogether) {
        const typename K::Number* w[kPairsTogether];
        const float* in[kPairsTogether];
        for (int64_t r = 0; r < kPairsTogether; ++r) {
            const int64_t i = first + r < all.count ? first + r : all.count - 1;
            w[r] = static_cast<const typename K::Number*>(m.data) + all.row[i] * m.columns;
            in[r] = x.f32 + all.token[i] * x.stride;
        }
        Sum sum[kPairsTogether];
        each_eight<K>(m.columns, [&](int64_t k, const auto& load) TARDIS_INLINE {
            each<kPairsTogether>([&](auto r) TARDIS_INLINE { sum[r].add(load(w[r] + k), load_eight(in[r] + k)); });
        });
        for (int r = 0; r < kPairsTogether && first + r < all.count; ++r) out[first + r] = sum[r].whole();
    }
}

constexpr int kRowsTogether = 8;  // which are added side by side

// y += r[0] row index[0] + ...: sums are loaded and stored once for some rows.
template <typename K>
void add(const TardisMatrix& m, const Layout*, const Terms& terms, Range range, float* y) {
    for (int64_t first = 0; first < terms.count; first += kRowsTogether) {
        const typename K::Number* w[kRowsTogether];
        Floats factor[kRowsTogether];
        for (int64_t e = 0; e < kRowsTogether; ++e) {
            const int64_t at = first + e, row = terms.index[at < terms.count ? at : terms.count - 1];
            w[e] = static_cast<const typename K::Number*>(m.data) + row * m.columns;
            factor[e] = constant(at < terms.count ? terms.r[at] : 0.0f);
        }
        each_eight<K>(range.end - range.begin, [&](int64_t j, const auto& load) TARDIS_INLINE {
            const int64_t k = range.begin + j, left = range.end - k;
            Eight sums = load_eight(y + k);
            each<kRowsTogether>([&](auto e) TARDIS_INLINE {
                const Eight row = load(w[e] + k);
                each<2>([&](auto i) TARDIS_INLINE {
                    sums.half[i] = plus_product(sums.half[i], row.half[i], factor[e]);
                });
            });
            if (left < 8) return static_cast<void>(memcpy(y + k, sums.half, static_cast<size_t>(left) * sizeof *y));
            store(y + k, sums.half[0]), store(y + k + 4, sums.half[1]);
        });
    }
}

template <typename K>
constexpr Dense kDense = {product<K>, pairs<K>, add<K>, nullptr, nullptr};

}  // namespace

namespace neon {
const Dense kBf16 = kDense<Bf16>, kFp16 = kDense<Fp16>, kF32 = kDense<F32>;
}  // namespace neon

}  // namespace tardis
#endif
