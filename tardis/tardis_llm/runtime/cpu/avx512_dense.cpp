// Dense matrices that are read by rows, for processors with AVX-512.
//
// Decoding is bound by memory: every weight is read from it once, rows ahead are prefetched or several rows are read
// side by side, and where there are several tokens a weight in a register serves some of them.
#include "avx512.h"

#include <algorithm>

#if defined(TARDIS_AVX512)

namespace tardis {
namespace {

// How 64 bytes of a row meet 64 bytes or more of an input, for every type of numbers.
struct Bf16 {
    using Number = uint16_t;
    using Value = uint16_t;  // of inputs
    using Vector = __m512i;
    static constexpr int64_t kWidth = 32;
    static const Value* input(const Input& x) { return x.bf16; }
    static Vector load(const Number* p) { return _mm512_loadu_si512(p); }
    static Vector load(const Number* p, int64_t n) { return _mm512_maskz_loadu_epi16(first32(n), p); }
    static __m512 add_product(__m512 sum, Vector a, Vector b) { return add_pairs(sum, a, b); }
    static __m512 widen(const Number* p, __mmask16 k) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k, p)), 16));
    }

    // What rows are added to, a line of them at a time: numbers at even and at odd places, so that none needs widening.
    class Sums {
    public:
        explicit Sums(const float* y) {
            const __m512 first = _mm512_loadu_ps(y), second = _mm512_loadu_ps(y + 16);
            even_ = join(first, second, kEven), odd_ = join(first, second, kOdd);
        }
        void add(__m512 factor, __m512i line) {
            even_ = _mm512_fmadd_ps(factor, even_bf16(line), even_);
            odd_ = _mm512_fmadd_ps(factor, odd_bf16(line), odd_);
        }
        void store(float* y) const {
            _mm512_storeu_ps(y, join(even_, odd_, kFirst)), _mm512_storeu_ps(y + 16, join(even_, odd_, kSecond));
        }

    private:
        static __m512 join(__m512 a, __m512 b, const int32_t (&places)[16]) {
            return _mm512_permutex2var_ps(a, _mm512_load_si512(places), b);
        }

        alignas(64) static constexpr int32_t kEven[] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
        alignas(64) static constexpr int32_t kOdd[] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
        alignas(64) static constexpr int32_t kFirst[] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
        alignas(64) static constexpr int32_t kSecond[] = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

        __m512 even_, odd_;
    };
};

struct Fp16 {
    using Number = uint16_t;
    using Value = float;
    struct Vector {
        __m512 first, second;
    };
    static constexpr int64_t kWidth = 32;
    static const Value* input(const Input& x) { return x.f32; }
    static Vector load(const Number* p) { return {widen(p), widen(p + 16)}; }
    static Vector load(const Number* p, int64_t n) { return {widen(p, first16(n)), widen(p + 16, behind16(n))}; }
    static Vector load(const Value* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
    static Vector load(const Value* p, int64_t n) {
        return {_mm512_maskz_loadu_ps(first16(n), p), _mm512_maskz_loadu_ps(behind16(n), p + 16)};
    }
    static __m512 add_product(__m512 sum, const Vector& a, const Vector& b) {
        return _mm512_fmadd_ps(a.second, b.second, _mm512_fmadd_ps(a.first, b.first, sum));
    }
    static __m512 widen(const Number* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static __m512 widen(const Number* p, __mmask16 k) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(k, p)); }
    static __mmask16 behind16(int64_t n) { return first16(n > 16 ? n - 16 : 0); }

    // See those of `Bf16`.
    class Sums {
    public:
        explicit Sums(const float* y) : first_(_mm512_loadu_ps(y)), second_(_mm512_loadu_ps(y + 16)) {}
        void add(__m512 factor, const Vector& line) {
            first_ = _mm512_fmadd_ps(factor, line.first, first_);
            second_ = _mm512_fmadd_ps(factor, line.second, second_);
        }
        void store(float* y) const { _mm512_storeu_ps(y, first_), _mm512_storeu_ps(y + 16, second_); }

    private:
        __m512 first_, second_;
    };
};

struct F32 {
    using Number = float;
    using Value = float;
    using Vector = __m512;
    static constexpr int64_t kWidth = 16;
    static const Value* input(const Input& x) { return x.f32; }
    static Vector load(const Number* p) { return _mm512_loadu_ps(p); }
    static Vector load(const Number* p, int64_t n) { return _mm512_maskz_loadu_ps(first16(n), p); }
    static __m512 add_product(__m512 sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
    static __m512 widen(const Number* p, __mmask16 k) { return _mm512_maskz_loadu_ps(k, p); }

    // See those of `Bf16`.
    class Sums {
    public:
        explicit Sums(const float* y) : sum_(_mm512_loadu_ps(y)) {}
        void add(__m512 factor, __m512 line) { sum_ = _mm512_fmadd_ps(factor, line, sum_); }
        void store(float* y) const { _mm512_storeu_ps(y, sum_); }

    private:
        __m512 sum_;
    };
};

constexpr int kTileRows = 4, kTileTokens = 6;  // whose sums stay in registers

// Some rows times T tokens. `ahead`, as much memory as the rows have, is fetched meanwhile; null: nothing.
template <typename K, int T>
void tile(
    const typename K::Number* const (&w)[kTileRows], const typename K::Number* ahead, const typename K::Value* x,
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
template <typename K, Gemm gemm>
void product_half(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    if (x.tokens <= kTileTokens || rows.index) return product_dense<K>(m, rows, x, out);
    gemm(m, false, {rows.begin, rows.end}, {x.bf16, x.f32, x.tokens, x.stride}, out, kBlockRows);
}

// Rows from all over a matrix that are multiplied side by side: the processor fetches each ahead as it would a single
// one, once it has seen some lines of it, so that those of the next rows are asked for beforehand.
constexpr int kFirstLines = 4;

// N of them, with one token's inputs or with those of a token each.
template <typename K, int N, bool one_token>
void multiply_pairs(const TardisMatrix& m, const Pairs& pairs, const Input& x, float* out) {
    const auto last = [&](int64_t i) { return i < pairs.count ? i : pairs.count - 1; };
    const auto row = [&](int64_t i) {
        return static_cast<const typename K::Number*>(m.data) + pairs.row[last(i)] * m.columns;
    };
    for (int64_t i = 0; i < pairs.count; i += N) {
        const typename K::Number* w[N];
        const typename K::Value* in[N];
        __m512 sum[N] = {};
        for (int64_t r = 0; r < N; ++r) {
            w[r] = row(i + r), in[r] = K::input(x) + pairs.token[last(i + r)] * x.stride;
            const auto* next = row(i + N + r);
            each<kFirstLines>([&](auto l) TARDIS_INLINE { prefetch(next + l * K::kWidth); });
        }
        const auto step = [&](int64_t k, const auto& load) TARDIS_INLINE {
            auto inputs = load(in[0] + k);
            each<N>([&](auto r) TARDIS_INLINE {
                if (!one_token && r > 0) inputs = load(in[r] + k);
                sum[r] = K::add_product(sum[r], load(w[r] + k), inputs);
            });
        };
        int64_t k = 0;
        for (; k + K::kWidth <= m.columns; k += K::kWidth)
            step(k, [](const auto* p) TARDIS_INLINE { return K::load(p); });
        if (k < m.columns) step(k, [&](const auto* p) TARDIS_INLINE { return K::load(p, m.columns - k); });
        each<N>([&](auto r) TARDIS_INLINE {
            if (i + r < pairs.count) out[i + r] = _mm512_reduce_add_ps(sum[r]);
        });
    }
}

// As many as there are registers for their addresses.
template <typename K>
void product_pairs(const TardisMatrix& m, const Pairs& pairs, const Input& x, float* out) {
    if (x.tokens == 1) multiply_pairs<K, 12, true>(m, pairs, x, out);
    else multiply_pairs<K, 6, false>(m, pairs, x, out);
}

constexpr int kRowsTogether = 12;  // which are added side by side
constexpr int64_t kLinesAhead = 16;  // of a row, from the one that is added to the one that is fetched

// y += factor[0] w[0] + factor[1] w[1] + ... for n numbers of some rows: sums are loaded and stored once for all rows.
// Towards the end of the rows, lines of the next ones are fetched.
template <typename K>
void add_rows(
    float* y, const typename K::Number* const (&w)[kRowsTogether],
    const typename K::Number* const (&next)[kRowsTogether],
    const __m512 (&factor)[kRowsTogether], int64_t n
) {
    constexpr int N = kRowsTogether;
    const int64_t whole = n / K::kWidth * K::kWidth, last = std::max<int64_t>(whole - kLinesAhead * K::kWidth, 0);
    const auto lines = [&](int64_t begin, int64_t end, const auto& rows, int64_t ahead) TARDIS_INLINE {
        for (int64_t k = begin; k < end; k += K::kWidth) {
            each<N>([&](auto e) TARDIS_INLINE { prefetch(rows[e] + ahead + k); });
            typename K::Sums sums(y + k);
            each<N>([&](auto e) TARDIS_INLINE { sums.add(factor[e], K::load(w[e] + k)); });
            sums.store(y + k);
        }
    };
    lines(0, last, w, kLinesAhead * K::kWidth);
    lines(last, whole, next, -last);
    for (int64_t k = whole; k < n; k += 16) {
        const __mmask16 some = first16(n - k);
        __m512 sum = _mm512_maskz_loadu_ps(some, y + k);
        each<N>([&](auto e) TARDIS_INLINE { sum = _mm512_fmadd_ps(factor[e], K::widen(w[e] + k, some), sum); });
        _mm512_mask_storeu_ps(y + k, some, sum);
    }
}

template <typename K>
void add_dense(const TardisMatrix& m, const Layout*, const Terms& terms, Range range, float* y) {
    const auto row = [&](int64_t e) {
        const int64_t i = terms.index[e < terms.count ? e : terms.count - 1];
        return static_cast<const typename K::Number*>(m.data) + i * m.columns + range.begin;
    };
    for (int64_t first = 0; first < terms.count; first += kRowsTogether) {
        const typename K::Number *w[kRowsTogether], *next[kRowsTogether];
        __m512 factor[kRowsTogether];
        for (int64_t e = 0; e < kRowsTogether; ++e) {
            w[e] = row(first + e), next[e] = row(first + kRowsTogether + e);
            factor[e] = _mm512_set1_ps(first + e < terms.count ? terms.r[first + e] : 0.0f);
        }
        add_rows<K>(y + range.begin, w, next, factor, range.end - range.begin);
    }
}

template <typename K, Gemm gemm, PanelGemm panels>
constexpr Dense kHalf = {product_half<K, gemm>, product_pairs<K>, add_dense<K>, gemm, panels};

}  // namespace

namespace TARDIS_AVX512_SET {

const Dense kBf16 = kHalf<Bf16, gemm_bf16, panels_bf16>;
const Dense kFp16 = kHalf<Fp16, gemm_fp16, panels_fp16>;
const Dense kF32 = {product_dense<F32>, product_pairs<F32>, add_dense<F32>, nullptr, nullptr};

}  // namespace TARDIS_AVX512_SET
}  // namespace tardis
#endif
