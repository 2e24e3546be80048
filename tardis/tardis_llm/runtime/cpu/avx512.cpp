// The kernels for processors with AVX-512 F, BW, DQ, VL, VNNI and BF16, and GFNI.
//
// Decoding is bound by memory: every weight is read once, rows ahead are prefetched, and where there are several tokens
// a weight in a register serves up to four of them.
#include "kernels.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__GFNI__) && defined(__AVX512BW__)
#include <immintrin.h>

namespace tardis {
namespace {

#define TARDIS_INLINE __attribute__((always_inline))

// GCC drops calls of a function that only prefetches, unless they are inlined from the start.
inline TARDIS_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

__mmask16 first16(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }
__mmask64 first64(int64_t n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }
__mmask32 first32(int64_t n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }

// Loops over registers, which only stay in registers if their numbers are constants for the compiler from the start.
template <int N>
struct Constant {
    constexpr operator int() const { return N; }
};

// body(0), ..., body(N - 1).
template <int N, int k = 0, typename F>
inline TARDIS_INLINE void each(const F& body) {
    if constexpr (k < N) {
        body(Constant<k>{});
        each<N, k + 1>(body);
    }
}

// ---- dense rows ----------------------------------------------------------------------------------------------------

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

// One row and one token, in four sums that do not wait for each other. `ahead` is a row to come.
template <typename K>
float dot(const typename K::Number* w, const typename K::Number* ahead, const typename K::Number* x, int64_t n) {
    constexpr int64_t step = K::kWidth;
    __m512 sum[4] = {};
    int64_t k = 0;
    for (; k + 4 * step <= n; k += 4 * step) {
        for (int j = 0; j < 4; ++j) {
            prefetch(ahead + k + j * step);
            sum[j] = K::add_product(sum[j], K::load(w + k + j * step), K::load(x + k + j * step));
        }
    }
    for (; k < n; k += step) {
        prefetch(ahead + k);
        sum[0] = K::add_product(sum[0], K::load(w + k, n - k), K::load(x + k));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

constexpr int64_t kStripe = 16;  // rows that are multiplied by some tokens a chunk of columns after the other
constexpr int64_t kChunk = 2048;  // bytes of a row: with as much of eight tokens' inputs they fit the first cache
constexpr int64_t kBlocksAhead = 2;  // from a block that is multiplied to one that is prefetched

// Rows begin..end-1, at most kStripe, and T tokens from number `token`, R rows at a time.
template <typename K, int R, int T>
class Stripe {
public:
    Stripe(const TardisMatrix& m, const Rows& rows, int64_t begin, int64_t end, const Input& x, int64_t token)
        : m_(m), rows_(rows), begin_(begin), blocks_((end - begin + R - 1) / R),
          in_(K::input(x) + token * x.stride), stride_(x.stride), prefetching_(token == 0) {
        for (int64_t k = 0; k < m.columns; k += kColumns)
            for (int64_t b = 0; b < blocks_; ++b) add(b, k, k + kColumns < m.columns ? k + kColumns : m.columns);
    }

    float result(int64_t i, int64_t t) const { return _mm512_reduce_add_ps(sum_[i - begin_][t]); }

private:
    using Number = typename K::Number;
    static constexpr int64_t kColumns = kChunk / static_cast<int64_t>(sizeof(Number));

    const Number* row(int64_t i) const { return static_cast<const Number*>(m_.data) + rows_.at(i) * m_.columns; }

    // The products of block b in the columns k..end-1.
    void add(int64_t b, int64_t k, int64_t end) {
        const Number *w[R], *ahead[R];
        int64_t next = b + kBlocksAhead, shift = 0;
        if (next >= blocks_ && k + kColumns < m_.columns) next -= blocks_, shift = kColumns;
        else if (next >= blocks_) shift = -k;  // a stripe to come, from its first column
        for (int r = 0; r < R; ++r) w[r] = row(begin_ + b * R + r), ahead[r] = row(begin_ + next * R + r) + shift;
        __m512 sum[R][T];
        __m512(*sums)[T] = sum_ + b * R;
        each<R>([&](auto r) TARDIS_INLINE { each<T>([&](auto t) TARDIS_INLINE { sum[r][t] = sums[r][t]; }); });
        const auto step = [&](const auto& load) TARDIS_INLINE {
            typename K::Vector weights[R];
            each<R>([&](auto r) TARDIS_INLINE { weights[r] = load(w[r] + k); });
            each<T>([&](auto t) TARDIS_INLINE {
                const auto v = K::load(in_ + t * stride_ + k);
                each<R>([&](auto r) TARDIS_INLINE { sum[r][t] = K::add_product(sum[r][t], weights[r], v); });
            });
        };
        for (; k + K::kWidth <= end; k += K::kWidth) {
            if (prefetching_) each<R>([&](auto r) TARDIS_INLINE { prefetch(ahead[r] + k); });
            step([](const Number* p) TARDIS_INLINE { return K::load(p); });
        }
        if (k < end) step([&](const Number* p) TARDIS_INLINE { return K::load(p, end - k); });
        each<R>([&](auto r) TARDIS_INLINE { each<T>([&](auto t) TARDIS_INLINE { sums[r][t] = sum[r][t]; }); });
    }

    const TardisMatrix& m_;
    const Rows& rows_;
    const int64_t begin_, blocks_;
    const Number* const in_;
    const int64_t stride_;
    const bool prefetching_;
    __m512 sum_[kStripe][T] = {};
};

template <typename K, int R, int T>
void stripe(
    const TardisMatrix& m, const Rows& rows, int64_t begin, int64_t end, const Input& x, int64_t token, float* out
) {
    const Stripe<K, R, T> all(m, rows, begin, end, x, token);
    for (int64_t t = 0; t < T; ++t)
        for (int64_t i = begin; i < end; ++i) out[(token + t) * kBlockRows + i - rows.begin] = all.result(i, t);
}

template <typename K>
void product_dense(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    if (x.tokens == 1) {
        const auto* w = static_cast<const typename K::Number*>(m.data);
        for (int64_t i = rows.begin; i < rows.end; ++i)
            *out++ = dot<K>(w + rows.at(i) * m.columns, w + rows.at(i + 1) * m.columns, K::input(x), m.columns);
        return;
    }
    for (int64_t begin = rows.begin; begin < rows.end; begin += kStripe) {
        const int64_t end = begin + kStripe < rows.end ? begin + kStripe : rows.end;
        int64_t t = 0;
        for (; t + 8 <= x.tokens; t += 8) stripe<K, 2, 8>(m, rows, begin, end, x, t, out);
        for (; t + 4 <= x.tokens; t += 4) stripe<K, 4, 4>(m, rows, begin, end, x, t, out);
        for (; t + 2 <= x.tokens; t += 2) stripe<K, 4, 2>(m, rows, begin, end, x, t, out);
        for (; t < x.tokens; ++t) stripe<K, 4, 1>(m, rows, begin, end, x, t, out);
    }
}

// y += r[0] w[0] + ... + r[3] w[3] for n numbers.
template <typename K>
void add_four(
    float* y, const typename K::Number* const* w, const typename K::Number* const* ahead, const float* r, int64_t n
) {
    __m512 factor[4];
    for (int e = 0; e < 4; ++e) factor[e] = _mm512_set1_ps(r[e]);
    int64_t k = 0;
    for (; k + K::kWidth <= n; k += K::kWidth) {
        for (int e = 0; e < 4; ++e) prefetch(ahead[e] + k);
        for (int64_t j = k; j < k + K::kWidth; j += 16) {
            __m512 sum = _mm512_loadu_ps(y + j);
            for (int e = 0; e < 4; ++e) sum = _mm512_fmadd_ps(factor[e], K::widen(w[e] + j), sum);
            _mm512_storeu_ps(y + j, sum);
        }
    }
    for (; k < n; k += 16) {
        const __mmask16 some = first16(n - k);
        __m512 sum = _mm512_maskz_loadu_ps(some, y + k);
        for (int e = 0; e < 4; ++e) sum = _mm512_fmadd_ps(factor[e], K::widen(w[e] + k, some), sum);
        _mm512_mask_storeu_ps(y + k, some, sum);
    }
}

template <typename K>
void add_dense(const TardisMatrix& m, const Layout*, const Terms& terms, Range range, float* y) {
    using Number = typename K::Number;
    const auto row = [&](int64_t e) {
        const int64_t i = terms.index[e < terms.count ? e : terms.count - 1];
        return static_cast<const Number*>(m.data) + i * m.columns + range.begin;
    };
    for (int64_t e = 0; e < terms.count; e += 4) {
        const Number* const w[4] = {row(e), row(e + 1), row(e + 2), row(e + 3)};
        const Number* const ahead[4] = {row(e + 4), row(e + 5), row(e + 6), row(e + 7)};
        float r[4];
        for (int64_t j = 0; j < 4; ++j) r[j] = e + j < terms.count ? terms.r[e + j] : 0.0f;
        add_four<K>(y + range.begin, w, ahead, r, range.end - range.begin);
    }
}

// ---- low-bit rows --------------------------------------------------------------------------------------------------

__m512i bytes_of(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }

// mask ? a : b, bit by bit.
__m512i select(int mask, __m512i a, __m512i b) { return _mm512_ternarylogic_epi64(bytes_of(mask), a, b, 0xca); }

// The matrix that takes bits shift..shift + count - 1 of a byte: bit i of a product is the parity of the byte's bits
// that are in byte 7 - i of the matrix.
constexpr int64_t taking(int shift, int count) {
    uint64_t matrix = 0;
    for (int i = 0; i < count; ++i) matrix |= 1ull << (8 * (7 - i) + shift + i);
    return static_cast<int64_t>(matrix);
}

// Shift and mask of bytes in one.
template <int shift, int count>
inline TARDIS_INLINE __m512i bits_of_bytes(__m512i bytes) {
    return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(taking(shift, count)), 0);
}

// 64 bytes, or the first of them. A masked load of all of them would wait for memory several times as long.
inline TARDIS_INLINE __m512i load_bytes(const uint8_t* p, __mmask64 bytes) {
    return bytes == ~0ull ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(bytes, p);
}

// The codes of a block of a row, in B bits each, 1, 2, 4 or 8: register s has those of the bits k with k % B == s, from
// the lowest on.
template <int B>
struct Codes {
    __m512i line[B];

    // p: the bytes of the block in the first plane. Of planes, which come highest first, the first `missing` are zero.
    TARDIS_INLINE void load(const uint8_t* p, int64_t plane, int missing, __mmask64 bytes) {
        each<B>([&](auto b) TARDIS_INLINE {
            line[b] = b < missing ? _mm512_setzero_si512() : load_bytes(p + (b - missing) * plane, bytes);
        });
        join();
    }

    TARDIS_INLINE static void prefetch_planes(const uint8_t* p, int64_t plane, int missing) {
        each<B>([&](auto b) TARDIS_INLINE {
            if (b >= missing) prefetch(p + (b - missing) * plane);
        });
    }

    // Pairs of planes become pairs of registers of two-bit codes, and pairs of these of four-bit codes, and so on.
    TARDIS_INLINE void join() {
        if constexpr (B >= 2) each<B / 2>([&](auto b) TARDIS_INLINE { pair<1, 0xaa>(line[2 * b], line[2 * b + 1]); });
        if constexpr (B >= 4)
            each<B / 4>([&](auto b) TARDIS_INLINE {
                each<2>([&](auto s) TARDIS_INLINE { pair<2, 0xcc>(line[4 * b + s], line[4 * b + 2 + s]); });
            });
        if constexpr (B == 8) each<4>([&](auto s) TARDIS_INLINE { pair<4, 0xf0>(line[s], line[4 + s]); });
    }

    // Joins high and low halves of codes, `shift` bits each: the even places of both to `high`, the odd ones to `low`.
    template <int shift, int mask>
    TARDIS_INLINE static void pair(__m512i& high, __m512i& low) {
        const __m512i even = select(mask, _mm512_slli_epi16(high, shift), low);
        low = select(mask, high, _mm512_srli_epi16(low, shift));
        high = even;
    }

    template <int k>
    TARDIS_INLINE __m512i code() const {
        constexpr int shift = k / B * B;
        if constexpr (B == 8) return line[k];
        if constexpr (shift == 0) return _mm512_and_si512(line[k % B], bytes_of((1 << B) - 1));
        return bits_of_bytes<shift, B>(line[k % B]);
    }

    // to: 64 codes for each bit.
    TARDIS_INLINE void store(uint8_t (*to)[64]) const {
        each<8>([&](auto k) TARDIS_INLINE { _mm512_store_si512(to[k], code<k>()); });
    }
};

// In every lane of 32 bits, sum and the products of four codes with four values. As an instruction by hand because GCC
// copies every sum to another register and back around the intrinsic.
inline TARDIS_INLINE __m512i add_products(__m512i sum, __m512i code, __m512i values) {
#if defined(__GNUC__) && !defined(__clang__)
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(code), "vm"(values));
    return sum;
#else
    return _mm512_dpbusd_epi32(sum, code, values);
#endif
}

constexpr int64_t kBytesAhead = 16384;  // of rows from a tile that is multiplied to one that is prefetched
constexpr int64_t kMaxSegments = 256;  // of a row, in these kernels

// Some rows and T tokens from number `token`, a block of columns after the other: of inputs, weights and sums together
// as much is in use at a time as the first cache holds.
template <int B, int H, int T>
class Tile {
public:
    static constexpr int64_t kRows = B > 4 ? 4 : 8;

    Tile(const TardisMatrix& m, const Rows& rows, int64_t first, const Input& x, int64_t token)
        : q_(x.quantised), layout_(*q_.layout), missing_(B - m.bits), token_(token),
          factors_((layout_.segment_count + 15) / 16 * 16) {
        const int64_t row_bytes = m.bits * layout_.row_bytes;
        const int64_t tiles_ahead = 1 + kBytesAhead / (kRows * row_bytes);
        for (int64_t r = 0; r < kRows; ++r) {
            const int64_t row = rows.at(first + r), ahead = rows.at(first + r + tiles_ahead * kRows);
            w_[r] = static_cast<const uint8_t*>(m.data) + row * row_bytes;
            ahead_[r] = static_cast<const uint8_t*>(m.data) + ahead * row_bytes;
            if (token == 0) prefetch(m.scale + ahead * layout_.groups);
            scale_[r] = m.scale + row * layout_.groups;
        }
        const __m512 middle = _mm512_set1_ps(static_cast<float>((1 << m.bits) - 1) / -2);
        for (int64_t g = 0; g < layout_.segment_count; g += 16) begin(g, middle);
        for (int64_t b = 0; b < layout_.block_count; ++b) {
            const Block& block = layout_.blocks[b];
            for (int64_t r = 0; r < kRows; r += R) add(block, r);
        }
    }

    float result(int64_t r, int64_t t) const { return _mm512_reduce_add_ps(total_[r][t]); }

private:
    static constexpr int R = B > 4 || T * H > 4 ? 2 : 4;  // rows at once: their sums are in registers
    using Sums = __m512i[R][T][H];

    // For 16 segments from number g on: the rows' scales times the tokens', and what codes' middles take from products.
    void begin(int64_t g, __m512 middle) {
        const int64_t count = layout_.segment_count, stride = factors_;
        const __mmask16 some = first16(count - g);
        __m512 sums[T], units[T];
        each<T>([&](auto t) TARDIS_INLINE {
            const int64_t at = (token_ + t) * count + g;
            sums[t] = _mm512_mul_ps(middle, _mm512_maskz_loadu_ps(some, q_.sum + at));
            units[t] = _mm512_maskz_loadu_ps(some, q_.scale + at);
        });
        for (int64_t r = 0; r < kRows; ++r) {
            const __m512 own = scales(scale_[r], g, some);
            each<T>([&](auto t) TARDIS_INLINE {
                const __m512 before = g ? total_[r][t] : _mm512_setzero_ps();
                total_[r][t] = _mm512_fmadd_ps(own, sums[t], before);
                _mm512_storeu_ps(factor_ + (r * T + t) * stride + g, _mm512_mul_ps(own, units[t]));
            });
        }
    }

    // Of the segments from number g on, in fp32.
    __m512 scales(const uint16_t* scale, int64_t g, __mmask16 some) const {
        const int64_t count = layout_.segment_count;
        if (count == layout_.groups) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, scale + g));
        if (layout_.groups == 1) return _mm512_set1_ps(_cvtsh_ss(scale[0]));
        alignas(32) uint16_t own[16] = {};
        for (int j = 0; j < 16 && g + j < count; ++j) own[j] = scale[layout_.segments[g + j].group];
        return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(own)));
    }

    // The products of a block of rows first..first + R - 1.
    void add(const Block& block, int64_t first) {
        const uint8_t *const *w = w_ + first, *const *ahead = ahead_ + first;
        const int64_t row_bytes = layout_.row_bytes, stride = q_.stride, factors = factors_;
        const int8_t* values = q_.values + token_ * H * stride + 64 * block.piece;
        const float* factor = factor_ + first * T * factors + block.segment;
        const int missing = missing_;
        const __mmask64 bytes = first64(block.bytes);
        Codes<B> codes[R];
        each<R>([&](auto r) TARDIS_INLINE {
            codes[r].load(w[r] + block.byte, row_bytes, missing, bytes);
            if (token_ > 0) return;
            Codes<B>::prefetch_planes(ahead[r] + block.byte, row_bytes, missing);
        });
        Sums sum;
        clear(sum);
        const auto end_segment = [&]() TARDIS_INLINE {
            add_segment(factor++, factors, sum, total_ + first);
            clear(sum);
        };
        if (block.whole) {
            const int ends = block.ends;
            each<8>([&](auto k) TARDIS_INLINE {
                add_piece<k>(values + 64 * k, stride, codes, sum);
                if (ends & (1 << k)) end_segment();
            });
            return;
        }
        const Piece *piece = layout_.pieces + block.piece, *end = piece + block.pieces;
        each<8>([&](auto k) TARDIS_INLINE {
            for (; piece != end && piece->bit == k; ++piece, values += 64) {
                add_piece<k>(values, stride, codes, sum);
                if (piece->last) end_segment();
            }
        });
    }

    template <int k>
    TARDIS_INLINE static void add_piece(const int8_t* values, int64_t stride, const Codes<B> (&codes)[R], Sums& sum) {
        __m512i own[R];
        each<R>([&](auto r) TARDIS_INLINE { own[r] = codes[r].template code<k>(); });
        each<T>([&](auto t) TARDIS_INLINE {
            each<H>([&](auto h) TARDIS_INLINE {
                const __m512i v = _mm512_loadu_si512(values + (t * H + h) * stride);
                each<R>([&](auto r) TARDIS_INLINE { sum[r][t][h] = add_products(sum[r][t][h], own[r], v); });
            });
        });
    }

    TARDIS_INLINE static void clear(Sums& sum) {
        each<R>([&](auto r) TARDIS_INLINE {
            each<T>([&](auto t) TARDIS_INLINE {
                each<H>([&](auto h) TARDIS_INLINE { sum[r][t][h] = _mm512_setzero_si512(); });
            });
        });
    }

    TARDIS_INLINE static void add_segment(const float* factor, int64_t factors, const Sums& sum, __m512 (*total)[T]) {
        each<R>([&](auto r) TARDIS_INLINE {
            each<T>([&](auto t) TARDIS_INLINE {
                __m512i dot = sum[r][t][0];
                if constexpr (H == 2) dot = _mm512_add_epi32(_mm512_slli_epi32(dot, 8), sum[r][t][1]);
                const __m512 both = _mm512_set1_ps(factor[(r * T + t) * factors]);
                total[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), both, total[r][t]);
            });
        });
    }

    const Quantised q_;
    const Layout layout_;
    const int missing_;  // planes, of the B that codes here have
    const int64_t token_, factors_;
    const uint8_t *w_[kRows], *ahead_[kRows];
    const uint16_t* scale_[kRows];
    __m512 total_[kRows][T];
    alignas(64) float factor_[kRows * T * kMaxSegments];
};

template <int B, int H, int T>
void sweep(const TardisMatrix& m, const Rows& rows, const Input& x, int64_t token, float* out) {
    using Rectangle = Tile<B, H, T>;
    for (int64_t i = rows.begin; i < rows.end; i += Rectangle::kRows) {
        const Rectangle tile(m, rows, i, x, token);
        const int64_t count = rows.end - i < Rectangle::kRows ? rows.end - i : Rectangle::kRows;
        for (int64_t t = 0; t < T; ++t)
            for (int64_t r = 0; r < count; ++r) out[(token + t) * kBlockRows + i - rows.begin + r] = tile.result(r, t);
    }
}

template <int B, int H>
void product_bits(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    int64_t t = 0;
    if constexpr (H == 1)
        for (; t + 8 <= x.tokens; t += 8) sweep<B, H, 8>(m, rows, x, t, out);
    for (; t + 4 <= x.tokens; t += 4) sweep<B, H, 4>(m, rows, x, t, out);
    for (; t + 2 <= x.tokens; t += 2) sweep<B, H, 2>(m, rows, x, t, out);
    for (; t < x.tokens; ++t) sweep<B, H, 1>(m, rows, x, t, out);
}

// Their entries are for 0 to 8 bits: codes of 3 bits are taken as of 4, and those of 5 to 7 as of 8.
const Product kEightBitInputs[] = {
    nullptr,           product_bits<1, 1>, product_bits<2, 1>, product_bits<4, 1>, product_bits<4, 1>,
    product_bits<8, 1>, product_bits<8, 1>, product_bits<8, 1>, product_bits<8, 1>,
};
const Product kSixteenBitInputs[] = {
    nullptr,           product_bits<1, 2>, product_bits<2, 2>, product_bits<4, 2>, product_bits<4, 2>,
    product_bits<8, 2>, product_bits<8, 2>, product_bits<8, 2>, product_bits<8, 2>,
};

// Rows of very many groups are for the plain kernels.
void product_low_bit(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    if (x.quantised.layout->segment_count > kMaxSegments) return portable_table()->low_bit(m, rows, x, out);
    const Product* products = x.quantised.halves == 1 ? kEightBitInputs : kSixteenBitInputs;
    products[m.bits](m, rows, x, out);
}

// 16 codes as weights over their scale. Up to four bits they are looked up in a table of them.
template <int B>
__m512 levels(__m512i codes, __m512 table) {
    if constexpr (B <= 4) return _mm512_permutexvar_ps(codes, table);
    return _mm512_sub_ps(_mm512_cvtepi32_ps(codes), table);
}

template <int B>
__m512 level_table(int bits) {
    const float middle = static_cast<float>((1 << bits) - 1) / 2;
    alignas(64) float values[16];
    for (int j = 0; j < 16; ++j) values[j] = B <= 4 ? static_cast<float>(j) - middle : middle;
    return _mm512_load_ps(values);
}

// Some rows that are added together, so that the sums are loaded and stored once for all of them.
constexpr int kTogether = 4;
using Factors = float[kTogether][kMaxSegments];  // of each row, by group
using Stored = uint8_t[kTogether][8][64];

// y[0..15] += the rows' factors times the weights of 16 codes each; `some` of the 16.
template <int B, typename Mask>
inline TARDIS_INLINE void add_sixteen(float* y, const uint8_t* codes, const __m512* factor, __m512 table, Mask some) {
    __m512 sum = some.load(y);
    each<kTogether>([&](auto e) TARDIS_INLINE {
        const __m512i wide = _mm512_cvtepu8_epi32(some.load(codes + e * sizeof(Stored) / kTogether));
        sum = _mm512_fmadd_ps(factor[e], levels<B>(wide, table), sum);
    });
    some.store(y, sum);
}

// All of 16 numbers or bytes, or the first of them.
struct Sixteen {
    static __m512 load(const float* p) { return _mm512_loadu_ps(p); }
    static __m128i load(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
    static void store(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
};
struct First {
    __mmask16 some;
    __m512 load(const float* p) const { return _mm512_maskz_loadu_ps(some, p); }
    __m128i load(const uint8_t* p) const { return _mm_maskz_loadu_epi8(some, p); }
    void store(float* p, __m512 v) const { _mm512_mask_storeu_ps(p, some, v); }
};

// The same for the codes of a piece.
template <int B>
inline void add_piece(float* y, const Piece& piece, const Stored& stored, const Factors& factors, __m512 table) {
    __m512 factor[kTogether];
    for (int e = 0; e < kTogether; ++e) factor[e] = _mm512_set1_ps(factors[e][piece.group]);
    const uint8_t* codes = stored[0][piece.bit] + piece.first;
    float* to = y + piece.column;
    int64_t j = 0;
    for (; j + 16 <= piece.count; j += 16) add_sixteen<B>(to + j, codes + j, factor, table, Sixteen{});
    if (j < piece.count) add_sixteen<B>(to + j, codes + j, factor, table, First{first16(piece.count - j)});
}

template <int B>
void add_bits(const TardisMatrix& m, const Layout* layout, const Terms& terms, Range range, float* y) {
    const int64_t plane = layout->row_bytes, groups = layout->groups;
    const __m512 table = level_table<B>(m.bits);
    const auto row = [&](int64_t e) -> int64_t { return terms.index[e < terms.count ? e : terms.count - 1]; };
    const auto codes_of = [&](int64_t i) { return static_cast<const uint8_t*>(m.data) + i * m.bits * plane; };
    alignas(64) Factors factors;
    alignas(64) Stored stored;
    for (int64_t first = 0; first < terms.count; first += kTogether) {
        const uint8_t *w[kTogether], *ahead[kTogether];
        for (int e = 0; e < kTogether; ++e) {
            const int64_t i = row(first + e), next = row(first + kTogether + e);
            w[e] = codes_of(i), ahead[e] = codes_of(next);
            prefetch(m.scale + next * groups);
            const __m512 r = _mm512_set1_ps(first + e < terms.count ? terms.r[first + e] : 0.0f);
            for (int64_t g = 0; g < groups; g += 16) {
                const __m256i scale = _mm256_maskz_loadu_epi16(first16(groups - g), m.scale + i * groups + g);
                _mm512_storeu_ps(factors[e] + g, _mm512_mul_ps(r, _mm512_cvtph_ps(scale)));
            }
        }
        for (int64_t b = range.begin; b < range.end; ++b) {
            const Block& block = layout->blocks[b];
            each<kTogether>([&](auto e) TARDIS_INLINE {
                Codes<B>::prefetch_planes(ahead[e] + block.byte, plane, B - m.bits);
                Codes<B> codes;
                codes.load(w[e] + block.byte, plane, B - m.bits, first64(block.bytes));
                codes.store(stored[e]);
            });
            const Piece* pieces = layout->pieces + block.piece;
            for (int32_t p = 0; p < block.pieces; ++p) add_piece<B>(y, pieces[p], stored, factors, table);
        }
    }
}

const Accumulate kAddBits[] = {
    nullptr, add_bits<1>, add_bits<2>, add_bits<4>, add_bits<4>, add_bits<8>, add_bits<8>, add_bits<8>, add_bits<8>,
};

void add_low_bit(const TardisMatrix& m, const Layout* layout, const Terms& terms, Range range, float* y) {
    if (layout->groups > kMaxSegments) return portable_table()->add_low_bit(m, layout, terms, range, y);
    kAddBits[m.bits](m, layout, terms, range, y);
}

void widen(const TardisVector& v, int64_t begin, int64_t count, float* out) {
    if (v.type != TARDIS_FP16) return portable_table()->widen(v, begin, count, out);
    const auto* from = static_cast<const uint16_t*>(v.data) + begin;
    for (int64_t j = 0; j < count; j += 16) {
        const __mmask16 some = first16(count - j);
        _mm512_mask_storeu_ps(out + j, some, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, from + j)));
    }
}

uint64_t outside(const float* z, const float* low, const float* high, int64_t count) {
    uint64_t found = 0;
    for (int64_t j = 0; j < count; j += 16) {
        const __mmask16 some = first16(count - j);
        const __m512 at = _mm512_maskz_loadu_ps(some, z + j);
        const __mmask16 below = _mm512_mask_cmp_ps_mask(some, at, _mm512_maskz_loadu_ps(some, low + j), _CMP_NGE_UQ);
        const __mmask16 above = _mm512_mask_cmp_ps_mask(some, at, _mm512_maskz_loadu_ps(some, high + j), _CMP_NLE_UQ);
        found |= static_cast<uint64_t>(below | above) << j;
    }
    return found;
}

const Table kTable = {
    product_dense<Bf16>, product_dense<F32>, product_low_bit, add_dense<Bf16>,
    add_dense<F32>,      add_low_bit,        widen,           outside,
};

}  // namespace
}  // namespace tardis

const tardis::Table* tardis::avx512_table() { return &kTable; }
#else
const tardis::Table* tardis::avx512_table() { return nullptr; }
#endif
