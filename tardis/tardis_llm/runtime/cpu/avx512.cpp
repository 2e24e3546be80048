// The kernels for processors with AVX-512 F, BW, DQ, VL, VBMI, VNNI and BF16.
//
// Decoding is bound by memory: every weight is read once, rows ahead are prefetched, and where there are several tokens
// a weight in a register serves up to four of them.
#include "kernels.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BW__)
#include <immintrin.h>

namespace tardis {
namespace {

void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

__mmask16 first16(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }
__mmask32 first32(int64_t n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }

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

// Four rows and T tokens from number `token`.
template <typename K, int T>
void block(const TardisMatrix& m, const Rows& rows, int64_t i, const Input& x, int64_t token, float* out) {
    using Number = typename K::Number;
    const int64_t n = m.columns;
    const Number *w[4], *ahead[4];
    for (int r = 0; r < 4; ++r) {
        w[r] = static_cast<const Number*>(m.data) + rows.at(i + r) * n;
        ahead[r] = static_cast<const Number*>(m.data) + rows.at(i + r + 4) * n;
    }
    const Number* in = K::input(x) + token * x.stride;
    __m512 sum[4][T] = {};
    for (int64_t k = 0; k < n; k += K::kWidth) {
        typename K::Vector v[T];
        for (int t = 0; t < T; ++t) v[t] = K::load(in + t * x.stride + k);
        for (int r = 0; r < 4; ++r) {
            if (token == 0) prefetch(ahead[r] + k);
            const auto weights = k + K::kWidth <= n ? K::load(w[r] + k) : K::load(w[r] + k, n - k);
            for (int t = 0; t < T; ++t) sum[r][t] = K::add_product(sum[r][t], weights, v[t]);
        }
    }
    for (int r = 0; r < 4 && i + r < rows.end; ++r)
        for (int t = 0; t < T; ++t) out[(i + r - rows.begin) * x.tokens + token + t] = _mm512_reduce_add_ps(sum[r][t]);
}

template <typename K>
void product_dense(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    if (x.tokens == 1) {
        const auto* w = static_cast<const typename K::Number*>(m.data);
        for (int64_t i = rows.begin; i < rows.end; ++i)
            *out++ = dot<K>(w + rows.at(i) * m.columns, w + rows.at(i + 1) * m.columns, K::input(x), m.columns);
        return;
    }
    for (int64_t i = rows.begin; i < rows.end; i += 4) {
        int64_t t = 0;
        for (; t + 4 <= x.tokens; t += 4) block<K, 4>(m, rows, i, x, t, out);
        for (; t + 2 <= x.tokens; t += 2) block<K, 2>(m, rows, i, x, t, out);
        for (; t < x.tokens; ++t) block<K, 1>(m, rows, i, x, t, out);
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
void add_dense(const TardisMatrix& m, const Layout*, const Terms& terms, Range range, float* y, int64_t stride) {
    using Number = typename K::Number;
    const auto row = [&](int64_t e) {
        const int64_t i = terms.index[e < terms.count ? e : terms.count - 1];
        return static_cast<const Number*>(m.data) + i * m.columns + range.begin;
    };
    for (int64_t e = 0; e < terms.count; e += 4) {
        const Number* const w[4] = {row(e), row(e + 1), row(e + 2), row(e + 3)};
        const Number* const ahead[4] = {row(e + 4), row(e + 5), row(e + 6), row(e + 7)};
        for (int64_t t = 0; t < terms.tokens; ++t) {
            float r[4];
            bool any = false;
            for (int64_t j = 0; j < 4; ++j) {
                r[j] = e + j < terms.count ? terms.r[(e + j) * terms.tokens + t] : 0.0f;
                any |= r[j] != 0;
            }
            if (any) add_four<K>(y + t * stride + range.begin, w, ahead, r, range.end - range.begin);
        }
    }
}

// ---- low-bit rows --------------------------------------------------------------------------------------------------

// For bytes 0..63: where in a word of 64 bits the byte begins whose bit `position` is the bit of that number.
__m512i shifts(int position) {
    const __m512i number = _mm512_set_epi8(
        63, 62, 61, 60, 59, 58, 57, 56, 55, 54, 53, 52, 51, 50, 49, 48, 47, 46, 45, 44, 43, 42, 41, 40, 39, 38, 37, 36,
        35, 34, 33, 32, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7,
        6, 5, 4, 3, 2, 1, 0
    );
    return _mm512_sub_epi8(number, _mm512_set1_epi8(static_cast<char>(position)));
}

// 64 codes in the order in which bits lie in bytes, from the 8 bytes at p of each plane.
template <int B>
__m512i codes(const uint8_t* p, int64_t plane) {
    __m512i code = _mm512_setzero_si512();
    for (int b = 0; b < B; ++b) {
        const int position = B - 1 - b;
        int64_t word;
        memcpy(&word, p + b * plane, sizeof word);
        const __m512i bits = _mm512_multishift_epi64_epi8(shifts(position), _mm512_set1_epi64(word));
        const __m512i own = _mm512_set1_epi8(static_cast<char>(1 << position));
        code = b == 0 ? bits : _mm512_ternarylogic_epi64(own, bits, code, 0xca);  // own ? bits : code
    }
    return B == 8 ? code : _mm512_and_si512(code, _mm512_set1_epi8(static_cast<char>((1 << B) - 1)));
}

// In every lane of 32 bits, sum += the products of four codes with four values. As an instruction by hand because GCC
// copies every sum to another register and back around the intrinsic.
inline void add_products(__m512i& sum, __m512i code, __m512i values) {
#if defined(__GNUC__) && !defined(__clang__)
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(code), "v"(values));
#else
    sum = _mm512_dpbusd_epi32(sum, code, values);
#endif
}

// out[0..15]: scales of a row, [groups] fp16, times those of an input, [segments], for the segments from number g.
inline void factors(const Layout& layout, const uint16_t* weights, const float* input, int64_t g, float* out) {
    const __mmask16 some = first16(layout.segment_count - g);
    uint16_t own[16] = {};
    if (layout.segment_count != layout.groups)
        for (int j = 0; j < 16 && g + j < layout.segment_count; ++j) own[j] = weights[layout.segments[g + j].group];
    else
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(own), _mm256_maskz_loadu_epi16(some, weights + g));
    const __m512 wide = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(own)));
    _mm512_store_ps(out, _mm512_mul_ps(wide, _mm512_maskz_loadu_ps(some, input + g)));
}

// R rows and T tokens from number `token`, with H halves of the inputs' values.
template <int B, int H, int R, int T>
void block_low_bit(const TardisMatrix& m, const Rows& rows, int64_t i, const Input& x, int64_t token, float* out) {
    const Quantised& q = x.quantised;
    const Layout layout = *q.layout;
    const int64_t plane = m.rows * layout.row_bytes, stride = q.stride;
    const __m512 middle = _mm512_set1_ps(static_cast<float>((1 << B) - 1) / 2);
    const uint8_t *w[R], *ahead[R];
    const uint16_t* scale[R];
    for (int r = 0; r < R; ++r) {
        w[r] = static_cast<const uint8_t*>(m.data) + rows.at(i + r) * layout.row_bytes;
        ahead[r] = static_cast<const uint8_t*>(m.data) + rows.at(i + r + 2 * R) * layout.row_bytes;
        scale[r] = m.scale + rows.at(i + r) * layout.groups;
    }
    __m512 total[R][T] = {};
    alignas(64) float factor[R][T][16];  // of weights and inputs together, for 16 segments
    for (int64_t g = 0; g < layout.segment_count; ++g) {
        const Segment s = layout.segments[g];
        if (g % 16 == 0)
            for (int r = 0; r < R; ++r)
                for (int t = 0; t < T; ++t)
                    factors(layout, scale[r], q.scale + (token + t) * layout.segment_count, g, factor[r][t]);
        __m512i sum[R][T][H] = {};
        for (int64_t c = s.chunk; c < s.chunk + s.chunks; ++c) {
            const int64_t byte = layout.chunks[c].byte;
            const int8_t* values = q.values + token * H * stride + 64 * c;
            // a little at a time, each row's lines in turn: many at once would hold up the loads
            for (int b = 0; b < B && token == 0; ++b) prefetch(ahead[c % R] + b * plane + byte);
            __m512i v[T][H];
            for (int t = 0; t < T; ++t)
                for (int h = 0; h < H; ++h) v[t][h] = _mm512_loadu_si512(values + (t * H + h) * stride);
            for (int r = 0; r < R; ++r) {
                const __m512i code = codes<B>(w[r] + byte, plane);
                for (int t = 0; t < T; ++t)
                    for (int h = 0; h < H; ++h) add_products(sum[r][t][h], code, v[t][h]);
            }
        }
        for (int t = 0; t < T; ++t) {
            const int64_t at = (token + t) * layout.segment_count + g;
            const __m512 all = _mm512_zextps128_ps512(_mm_load_ss(q.sum + at));  // in one lane, for all of them
            for (int r = 0; r < R; ++r) {
                __m512i dot = sum[r][t][0];
                if (H == 2) dot = _mm512_add_epi32(_mm512_slli_epi32(dot, 8), sum[r][t][H - 1]);
                const __m512 level = _mm512_fnmadd_ps(middle, all, _mm512_cvtepi32_ps(dot));
                total[r][t] = _mm512_fmadd_ps(level, _mm512_set1_ps(factor[r][t][g % 16]), total[r][t]);
            }
        }
    }
    for (int r = 0; r < R && i + r < rows.end; ++r)
        for (int t = 0; t < T; ++t) out[(i + r - rows.begin) * x.tokens + token + t] = _mm512_reduce_add_ps(total[r][t]);
}

template <int B, int H>
void product_bits(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    if (x.tokens == 1) {
        for (int64_t i = rows.begin; i < rows.end; i += 4) block_low_bit<B, H, 4, 1>(m, rows, i, x, 0, out);
        return;
    }
    for (int64_t i = rows.begin; i < rows.end; i += 2) {
        int64_t t = 0;
        for (; t + 4 <= x.tokens; t += 4) block_low_bit<B, H, 2, 4>(m, rows, i, x, t, out);
        for (; t + 2 <= x.tokens; t += 2) block_low_bit<B, H, 2, 2>(m, rows, i, x, t, out);
        for (; t < x.tokens; ++t) block_low_bit<B, H, 2, 1>(m, rows, i, x, t, out);
    }
}

// Their entries are for one bit, two bits, and so on.
const Product kEightBitInputs[] = {
    product_bits<1, 1>, product_bits<2, 1>, product_bits<3, 1>, product_bits<4, 1>,
    product_bits<5, 1>, product_bits<6, 1>, product_bits<7, 1>, product_bits<8, 1>,
};
const Product kSixteenBitInputs[] = {
    product_bits<1, 2>, product_bits<2, 2>, product_bits<3, 2>, product_bits<4, 2>,
    product_bits<5, 2>, product_bits<6, 2>, product_bits<7, 2>, product_bits<8, 2>,
};

// Rows of less than 8 bytes are for the plain kernels.
void product_low_bit(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    if (x.quantised.layout->row_bytes < 8) return portable_table()->low_bit(m, rows, x, out);
    const Product* products = x.quantised.halves == 1 ? kEightBitInputs : kSixteenBitInputs;
    products[m.bits - 1](m, rows, x, out);
}

// Puts the bits of each byte, which lie highest first, in the order of the columns.
__m512i in_column_order(__m512i code) {
    const __m512i reversed = _mm512_set_epi64(
        0x08090a0b0c0d0e0f, 0x0001020304050607, 0x08090a0b0c0d0e0f, 0x0001020304050607,
        0x08090a0b0c0d0e0f, 0x0001020304050607, 0x08090a0b0c0d0e0f, 0x0001020304050607
    );
    return _mm512_shuffle_epi8(code, reversed);
}

// y[0..63] += factor * (code - middle), in the lanes of a mask. Whole chunks are stored as such, which is faster.
void add_chunk(float* y, const __m512i* code, __m512 factor, __m512 middle, __mmask64 lanes) {
    for (int j = 0; j < 4; ++j) {
        const __m512 level = _mm512_sub_ps(_mm512_cvtepi32_ps(code[j]), middle);
        if (lanes == ~0ull) {
            _mm512_storeu_ps(y + 16 * j, _mm512_fmadd_ps(factor, level, _mm512_loadu_ps(y + 16 * j)));
        } else {
            const __mmask16 k = static_cast<__mmask16>(lanes >> (16 * j));
            const __m512 before = _mm512_maskz_loadu_ps(k, y + 16 * j);
            _mm512_mask_storeu_ps(y + 16 * j, k, _mm512_fmadd_ps(factor, level, before));
        }
    }
}

template <int B>
void add_bits(
    const TardisMatrix& m, const Layout* layout, const Terms& terms, Range range, float* y, int64_t stride
) {
    const int64_t plane = m.rows * layout->row_bytes;
    const __m512 middle = _mm512_set1_ps(static_cast<float>((1 << B) - 1) / 2);
    const auto start = [&](int64_t e) {
        const int64_t row = terms.index[e < terms.count ? e : terms.count - 1];
        return static_cast<const uint8_t*>(m.data) + row * layout->row_bytes;
    };
    for (int64_t e = 0; e < terms.count; ++e) {
        const uint8_t *w = start(e), *ahead = start(e + 4);
        const uint16_t* scale = m.scale + static_cast<int64_t>(terms.index[e]) * layout->groups;
        for (int64_t c = range.begin; c < range.end; ++c) {
            const Chunk chunk = layout->chunks[c];
            if ((c & 7) == 0)
                for (int b = 0; b < B; ++b) prefetch(ahead + b * plane + chunk.byte);
            const __m512i all = in_column_order(codes<B>(w + chunk.byte, plane));
            const __m512i code[4] = {
                _mm512_cvtepu8_epi32(_mm512_castsi512_si128(all)),
                _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(all, 1)),
                _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(all, 2)),
                _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(all, 3)),
            };
            const __mmask64 lanes = (~0ull >> (64 - chunk.count)) << chunk.shift;
            const float unit = _cvtsh_ss(scale[chunk.group]);
            for (int64_t t = 0; t < terms.tokens; ++t) {
                const float r = terms.r[e * terms.tokens + t] * unit;
                if (r != 0) add_chunk(y + t * stride + 8 * chunk.byte, code, _mm512_set1_ps(r), middle, lanes);
            }
        }
    }
}

const Accumulate kAddBits[] = {
    add_bits<1>, add_bits<2>, add_bits<3>, add_bits<4>, add_bits<5>, add_bits<6>, add_bits<7>, add_bits<8>,
};

void add_low_bit(
    const TardisMatrix& m, const Layout* layout, const Terms& terms, Range range, float* y, int64_t stride
) {
    if (layout->row_bytes < 8) return portable_table()->add_low_bit(m, layout, terms, range, y, stride);
    kAddBits[m.bits - 1](m, layout, terms, range, y, stride);
}

const Table kTable = {
    product_dense<Bf16>, product_dense<F32>, product_low_bit, add_dense<Bf16>, add_dense<F32>, add_low_bit,
};

}  // namespace
}  // namespace tardis

const tardis::Table* tardis::avx512_table() { return &kTable; }
#else
const tardis::Table* tardis::avx512_table() { return nullptr; }
#endif
