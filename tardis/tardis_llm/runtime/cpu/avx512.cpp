// The kernels for processors with AVX-512 F, BW, DQ, VL, VNNI and BF16, and GFNI.
//
// Decoding is bound by memory: every weight is read from it once, rows ahead are prefetched or several rows are read side
// by side, and where there are several tokens a weight in a register serves some of them.
#include "avx512.h"

#if defined(TARDIS_AVX512)

namespace tardis {
namespace {

// How 64 bytes of a row meet 64 bytes or more of an input, for both types of numbers.
struct Bf16 {
    using Number = uint16_t;
    using Vector = __m512i;
    static constexpr int64_t kWidth = 32;
    static const Number* input(const Input& x) { return x.bf16; }
    static Vector load(const Number* p) { return _mm512_loadu_si512(p); }
    static Vector load(const Number* p, int64_t n) { return _mm512_maskz_loadu_epi16(first32(n), p); }
    static __m512 add_product(__m512 sum, Vector a, Vector b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
    static __m512 widen(const Number* p) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static __m512 widen(const Number* p, __mmask16 k) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k, p)), 16));
    }
};

struct F32 {
    using Number = float;
    using Vector = __m512;
    static constexpr int64_t kWidth = 16;
    static const Number* input(const Input& x) { return x.f32; }
    static Vector load(const Number* p) { return _mm512_loadu_ps(p); }
    static Vector load(const Number* p, int64_t n) { return _mm512_maskz_loadu_ps(first16(n), p); }
    static __m512 add_product(__m512 sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
    static __m512 widen(const Number* p) { return _mm512_loadu_ps(p); }
    static __m512 widen(const Number* p, __mmask16 k) { return _mm512_maskz_loadu_ps(k, p); }
};

constexpr int kTileRows = 4, kTileTokens = 6;  // whose sums stay in registers

// Some rows times T tokens. `ahead`, as much memory as the rows have, is fetched meanwhile; null: nothing.
template <typename K, int T>
void tile(
    const typename K::Number* const (&w)[kTileRows], const typename K::Number* ahead, const typename K::Number* x,
    int64_t stride, int64_t columns, float (*out)[kTileRows]
) {
    __m512 sum[kTileRows][T] = {};
    const auto step = [&](int64_t k, const auto& load) TARDIS_INLINE {
        typename K::Vector weights[kTileRows];
        each<kTileRows>([&](auto r) TARDIS_INLINE { weights[r] = load(w[r] + k); });
        each<T>([&](auto t) TARDIS_INLINE {
            const auto v = K::load(x + t * stride + k);
            each<kTileRows>([&](auto r) TARDIS_INLINE { sum[r][t] = K::add_product(sum[r][t], weights[r], v); });
        });
    };
    int64_t k = 0;
    for (; k + K::kWidth <= columns; k += K::kWidth) {
        if (ahead) each<kTileRows>([&](auto r) TARDIS_INLINE { prefetch(ahead + kTileRows * k + r * K::kWidth); });
        step(k, [](const auto* p) TARDIS_INLINE { return K::load(p); });
    }
    if (k < columns) step(k, [&](const auto* p) TARDIS_INLINE { return K::load(p, columns - k); });
    each<T>([&](auto t) TARDIS_INLINE {
        each<kTileRows>([&](auto r) TARDIS_INLINE { out[t][r] = _mm512_reduce_add_ps(sum[r][t]); });
    });
}

template <typename K>
constexpr decltype(&tile<K, 1>) kTiles[] = {
    nullptr, tile<K, 1>, tile<K, 2>, tile<K, 3>, tile<K, 4>, tile<K, 5>, tile<K, 6>,
};

constexpr int64_t kTilesAhead = 2;  // from rows that are multiplied to those that are prefetched

template <typename K>
void product_dense(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    const auto* data = static_cast<const typename K::Number*>(m.data);
    for (int64_t i = rows.begin; i < rows.end; i += kTileRows) {
        const typename K::Number* w[kTileRows];
        for (int r = 0; r < kTileRows; ++r) w[r] = data + rows.at(i + r) * m.columns;
        const bool more = i + (kTilesAhead + 1) * kTileRows <= rows.total;
        const auto* ahead = more ? data + rows.at(i + kTilesAhead * kTileRows) * m.columns : nullptr;
        for (int64_t t = 0, end; t < x.tokens; t = end, ahead = nullptr) {
            end = t + kTileTokens < x.tokens ? t + kTileTokens : x.tokens;
            float some[kTileTokens][kTileRows];
            kTiles<K>[end - t](w, ahead, K::input(x) + t * x.stride, x.stride, m.columns, some);
            for (int64_t j = t; j < end; ++j)
                for (int r = 0; r < kTileRows && i + r < rows.end; ++r)
                    out[j * kBlockRows + i + r - rows.begin] = some[j - t][r];
        }
    }
}

// With more tokens than a tile has it pays to pack weights.
void product_bf16(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    if (x.tokens <= kTileTokens || rows.index) return product_dense<Bf16>(m, rows, x, out);
    gemm_avx512(m, false, {rows.begin, rows.end}, {x.bf16, x.tokens, x.stride}, out, kBlockRows);
}

// Rows from all over a matrix that are multiplied side by side: the processor fetches each ahead as it would a single
// one, once it has seen some lines of it, so that those of the next rows are asked for beforehand.
constexpr int kPairsAtOnce = 6, kFirstLines = 4;

template <typename K>
void product_pairs(const TardisMatrix& m, const Pairs& pairs, const Input& x, float* out) {
    const auto last = [&](int64_t i) { return i < pairs.total ? i : pairs.total - 1; };
    const auto row = [&](int64_t i) {
        return static_cast<const typename K::Number*>(m.data) + pairs.row[last(i)] * m.columns;
    };
    for (int64_t i = pairs.begin; i < pairs.end; i += kPairsAtOnce) {
        const typename K::Number *w[kPairsAtOnce], *in[kPairsAtOnce];
        __m512 sum[kPairsAtOnce] = {};
        each<kPairsAtOnce>([&](auto r) TARDIS_INLINE {
            w[r] = row(i + r), in[r] = K::input(x) + pairs.token[last(i + r)] * x.stride;
            const auto* next = row(i + kPairsAtOnce + r);
            each<kFirstLines>([&](auto l) TARDIS_INLINE { prefetch(next + l * K::kWidth); });
        });
        int64_t k = 0;
        for (; k + K::kWidth <= m.columns; k += K::kWidth)
            each<kPairsAtOnce>([&](auto r) TARDIS_INLINE {
                sum[r] = K::add_product(sum[r], K::load(w[r] + k), K::load(in[r] + k));
            });
        if (k < m.columns)
            each<kPairsAtOnce>([&](auto r) TARDIS_INLINE {
                sum[r] = K::add_product(sum[r], K::load(w[r] + k, m.columns - k), K::load(in[r] + k));
            });
        each<kPairsAtOnce>([&](auto r) TARDIS_INLINE {
            if (i + r < pairs.end) out[i + r - pairs.begin] = _mm512_reduce_add_ps(sum[r]);
        });
    }
}

// y += factor[0] w[0] + factor[1] w[1] + ... for n numbers of N rows: sums are loaded and stored once for all of them.
template <typename K, int N>
void add_rows(
    float* y, const typename K::Number* const (&w)[N], const typename K::Number* const (&ahead)[N],
    const __m512 (&factor)[N], int64_t n
) {
    int64_t k = 0;
    for (; k + K::kWidth <= n; k += K::kWidth) {
        each<N>([&](auto e) TARDIS_INLINE { prefetch(ahead[e] + k); });
        for (int64_t j = k; j < k + K::kWidth; j += 16) {
            __m512 sum = _mm512_loadu_ps(y + j);
            each<N>([&](auto e) TARDIS_INLINE { sum = _mm512_fmadd_ps(factor[e], K::widen(w[e] + j), sum); });
            _mm512_storeu_ps(y + j, sum);
        }
    }
    for (; k < n; k += 16) {
        const __mmask16 some = first16(n - k);
        __m512 sum = _mm512_maskz_loadu_ps(some, y + k);
        each<N>([&](auto e) TARDIS_INLINE { sum = _mm512_fmadd_ps(factor[e], K::widen(w[e] + k, some), sum); });
        _mm512_mask_storeu_ps(y + k, some, sum);
    }
}

template <typename K, int N>
void add_together(const TardisMatrix& m, const Terms& terms, Range range, float* y) {
    const auto row = [&](int64_t e) {
        const int64_t i = terms.index[e < terms.count ? e : terms.count - 1];
        return static_cast<const typename K::Number*>(m.data) + i * m.columns + range.begin;
    };
    for (int64_t first = 0; first < terms.count; first += N) {
        const typename K::Number *w[N], *ahead[N];
        __m512 factor[N];
        for (int64_t e = 0; e < N; ++e) {
            w[e] = row(first + e), ahead[e] = row(first + N + e);
            factor[e] = _mm512_set1_ps(first + e < terms.count ? terms.r[first + e] : 0.0f);
        }
        add_rows<K, N>(y + range.begin, w, ahead, factor, range.end - range.begin);
    }
}

constexpr int64_t kPage = 4096;  // bytes, between which lines of memory get the same few places in the first cache

// Many rows that begin with a page would drive each other out of that cache.
template <typename K>
void add_dense(const TardisMatrix& m, const Layout*, const Terms& terms, Range range, float* y) {
    const bool pages = m.columns * sizeof(typename K::Number) % kPage == 0;
    if (pages) add_together<K, kTermsTogether / 2>(m, terms, range, y);
    else add_together<K, kTermsTogether>(m, terms, range, y);
}

const Table kTable = {
    product_bf16,   product_dense<F32>, product_low_bit_avx512, product_pairs<Bf16>, product_pairs<F32>,
    gemm_avx512,    panels_avx512,      low_bit_panels_avx512,  add_dense<Bf16>,     add_dense<F32>,
    add_low_bit_avx512, widen_avx512,   outside_avx512,         activate_avx512,     largest_avx512,
    round_avx512,
};

}  // namespace
}  // namespace tardis

const tardis::Table* tardis::avx512_table() { return &kTable; }
#else
const tardis::Table* tardis::avx512_table() { return nullptr; }
#endif
