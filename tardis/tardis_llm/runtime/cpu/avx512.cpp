// The kernels for processors with AVX-512 F, BW, DQ, VL, VNNI and BF16, and GFNI.
//
// Decoding is bound by memory: every weight is read from it once, rows ahead are prefetched or several rows are read side
// by side, and where there are several tokens a weight in a register serves some of them.
#include "avx512.h"

#if defined(TARDIS_AVX512)

namespace tardis {
namespace {

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
    const auto last = [&](int64_t i) { return i < pairs.count ? i : pairs.count - 1; };
    const auto row = [&](int64_t i) {
        return static_cast<const typename K::Number*>(m.data) + pairs.row[last(i)] * m.columns;
    };
    for (int64_t i = 0; i < pairs.count; i += kPairsAtOnce) {
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
            if (i + r < pairs.count) out[i + r] = _mm512_reduce_add_ps(sum[r]);
        });
    }
}

// Rows that are added together, so that sums are loaded and stored once for all of them.
constexpr int kRowsAtOnce = 8;

template <typename K>
using RowsAtOnce = const typename K::Number* [kRowsAtOnce];

// y += factor[0] w[0] + factor[1] w[1] + ... for n numbers.
template <typename K>
void add_rows(
    float* y, const RowsAtOnce<K>& w, const RowsAtOnce<K>& ahead, const __m512* factor, int64_t n
) {
    int64_t k = 0;
    for (; k + K::kWidth <= n; k += K::kWidth) {
        each<kRowsAtOnce>([&](auto e) TARDIS_INLINE { prefetch(ahead[e] + k); });
        for (int64_t j = k; j < k + K::kWidth; j += 16) {
            __m512 sum = _mm512_loadu_ps(y + j);
            each<kRowsAtOnce>([&](auto e) TARDIS_INLINE { sum = _mm512_fmadd_ps(factor[e], K::widen(w[e] + j), sum); });
            _mm512_storeu_ps(y + j, sum);
        }
    }
    for (; k < n; k += 16) {
        const __mmask16 some = first16(n - k);
        __m512 sum = _mm512_maskz_loadu_ps(some, y + k);
        each<kRowsAtOnce>([&](auto e) TARDIS_INLINE { sum = _mm512_fmadd_ps(factor[e], K::widen(w[e] + k, some), sum); });
        _mm512_mask_storeu_ps(y + k, some, sum);
    }
}

template <typename K>
void add_dense(const TardisMatrix& m, const Layout*, const Terms& terms, Range range, float* y) {
    const auto row = [&](int64_t e) {
        const int64_t i = terms.index[e < terms.count ? e : terms.count - 1];
        return static_cast<const typename K::Number*>(m.data) + i * m.columns + range.begin;
    };
    for (int64_t first = 0; first < terms.count; first += kRowsAtOnce) {
        RowsAtOnce<K> w, ahead;
        __m512 factor[kRowsAtOnce];
        for (int64_t e = 0; e < kRowsAtOnce; ++e) {
            w[e] = row(first + e), ahead[e] = row(first + kRowsAtOnce + e);
            factor[e] = _mm512_set1_ps(first + e < terms.count ? terms.r[first + e] : 0.0f);
        }
        add_rows<K>(y + range.begin, w, ahead, factor, range.end - range.begin);
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

    // p: the bytes of the block in the first plane. Of planes, which come highest first, the first `missing` are zero,
    // which are B / 2 - 1 at most.
    TARDIS_INLINE void load(const uint8_t* p, int64_t plane, int missing, __mmask64 bytes) {
        each<B>([&](auto b) TARDIS_INLINE {
            const bool zero = b < B / 2 - 1 && b < missing;
            line[b] = zero ? _mm512_setzero_si512() : load_bytes(p + (b - missing) * plane, bytes);
        });
        join();
    }

    TARDIS_INLINE static void prefetch_planes(const uint8_t* p, int64_t plane, int missing) {
        each<B>([&](auto b) TARDIS_INLINE {
            if (b >= B / 2 - 1 || b >= missing) prefetch(p + (b - missing) * plane);
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

    // The same for bit k of those left, below 2 * B, but where they lie: the upper half of them 1 << B times as large.
    // It leaves the ports free that products need.
    template <int k>
    TARDIS_INLINE __m512i code_in_place() const {
        return _mm512_and_si512(line[k % B], bytes_of(((1 << B) - 1) << k / B * B));
    }

    // Leaves out 2 * B bits, for B up to 4.
    TARDIS_INLINE void skip() {
        each<B>([&](auto s) TARDIS_INLINE { line[s] = _mm512_srli_epi16(line[s], 2 * B); });
    }

    // to: 64 codes for each bit.
    TARDIS_INLINE void store(uint8_t (*to)[64]) const {
        each<8>([&](auto k) TARDIS_INLINE { _mm512_store_si512(to[k], code<k>()); });
    }
};

// In every lane of 32 bits, sum and the products of four codes with four values. As an instruction by hand because GCC
// copies every sum to another register and back around the intrinsic.
inline TARDIS_INLINE __m512i add_dot(__m512i sum, __m512i code, __m512i values) {
#if defined(__GNUC__) && !defined(__clang__)
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(code), "vm"(values));
    return sum;
#else
    return _mm512_dpbusd_epi32(sum, code, values);
#endif
}

constexpr int64_t kBytesAhead = 16384;  // of rows from a tile that is multiplied to one that is prefetched
constexpr int64_t kMaxSegments = 256;  // of a row, in these kernels

// The ends of a block's segments where groups have 256 columns, as they have unless told otherwise.
constexpr int kUsualEnds = 0x88;

// Some rows and T tokens of H halves, a block of columns after the other: weights and inputs come from memory and the
// first cache, sums and totals stay in registers. E: the ends of segments in all whole blocks, or 0.
template <int B, int H, int T, int E>
class Tile {
public:
    static constexpr int R = T * H == 1 ? 4 : 8 / (T * H);

    Tile(const Quantised& quantised, int64_t first_token)
        : q_(quantised), layout_(*quantised.layout), token_(first_token),
          factors_((layout_.segment_count + 15) / 16 * 16) {}

    // Rows from number `first` on, as far as they go.
    void multiply(const TardisMatrix& m, const Rows& rows, int64_t first, float* out) {
        const int64_t row_bytes = m.bits * layout_.row_bytes, tiles_ahead = 1 + kBytesAhead / (R * row_bytes);
        const auto* data = static_cast<const uint8_t*>(m.data);
        const uint8_t *w[R], *ahead[R];
        const uint16_t* scale[R];
        each<R>([&](auto r) TARDIS_INLINE {
            const int64_t row = rows.at(first + r), next = rows.at(first + r + tiles_ahead * R);
            w[r] = data + row * row_bytes, ahead[r] = data + next * row_bytes;
            scale[r] = m.scale + row * layout_.groups;
            if (token_ == 0) prefetch(m.scale + next * layout_.groups);
        });
        Totals total = {};
        const __m512 middle = _mm512_set1_ps(static_cast<float>((1 << m.bits) - 1) / -2);
        for (int64_t g = 0; g < layout_.segment_count; g += 16) begin(g, scale, middle, total);
        for (int64_t b = 0; b < layout_.block_count; ++b) {
            const Block& block = layout_.blocks[b];
            const __mmask64 bytes = block.whole ? ~0ull : first64(block.bytes);
            Codes<B> codes[R];
            each<R>([&](auto r) TARDIS_INLINE {
                codes[r].load(w[r] + block.byte, layout_.row_bytes, B - m.bits, bytes);
                if (token_ > 0) return;
                Codes<B>::prefetch_planes(ahead[r] + block.byte, layout_.row_bytes, B - m.bits);
            });
            if (block.whole) add_whole(block, codes, total);
            else add_pieces(block, codes, total);
        }
        each<R>([&](auto r) TARDIS_INLINE {
            if (first + r >= rows.end) return;
            each<T>([&](auto t) TARDIS_INLINE { out[t * kBlockRows + r] = _mm512_reduce_add_ps(total[r][t]); });
        });
    }

private:
    static constexpr int P = T * H == 1 && B < 8 ? 2 : 1;  // places in bytes of which codes are taken
    using Totals = __m512[R][T];
    using Sums = __m512i[R][T][H][P];

    // For 16 segments from number g on: the rows' scales times the tokens', and what codes' middles take from products.
    TARDIS_INLINE void begin(int64_t g, const uint16_t* const (&scale)[R], __m512 middle, Totals& total) {
        const int64_t count = layout_.segment_count;
        const __mmask16 some = first16(count - g);
        __m512 sums[T], units[T];
        each<T>([&](auto t) TARDIS_INLINE {
            const int64_t at = (token_ + t) * count + g;
            sums[t] = _mm512_mul_ps(middle, _mm512_maskz_loadu_ps(some, q_.sum + at));
            units[t] = _mm512_maskz_loadu_ps(some, q_.scale + at);
        });
        each<R>([&](auto r) TARDIS_INLINE {
            const __m512 own = scales(scale[r], g, some);
            each<T>([&](auto t) TARDIS_INLINE {
                total[r][t] = _mm512_fmadd_ps(own, sums[t], total[r][t]);
                _mm512_store_ps(factor_ + (r * T + t) * factors_ + g, _mm512_mul_ps(own, units[t]));
            });
        });
    }

    // Of the segments from number g on, in fp32.
    TARDIS_INLINE __m512 scales(const uint16_t* scale, int64_t g, __mmask16 some) const {
        const int64_t count = layout_.segment_count;
        if (count == layout_.groups) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, scale + g));
        if (layout_.groups == 1) return _mm512_set1_ps(_cvtsh_ss(scale[0]));
        alignas(32) uint16_t own[16] = {};
        for (int j = 0; j < 16 && g + j < count; ++j) own[j] = scale[layout_.segments[g + j].group];
        return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(own)));
    }

    TARDIS_INLINE const int8_t* values(const Block& block) const {
        return q_.values + token_ * H * q_.stride + 64 * block.piece;
    }

    TARDIS_INLINE void add_whole(const Block& block, Codes<B> (&codes)[R], Totals& total) const {
        const int8_t* v = values(block);
        const float* f = factor_ + block.segment;
        const int ends = E ? E : block.ends;
        Sums sum = {};
        each<8>([&](auto k) TARDIS_INLINE {
            constexpr int next = P == 2 ? k % (2 * B) : k;
            if constexpr (k > 0 && next == 0) each<R>([&](auto r) TARDIS_INLINE { codes[r].skip(); });
            add_products<(P == 2 && next >= B)>(v + 64 * k, sum, [&](auto r) TARDIS_INLINE {
                if constexpr (P == 2) return codes[r].template code_in_place<next>();
                else return codes[r].template code<k>();
            });
            if (ends & (1 << k)) end_segment(f++, sum, total);
        });
    }

    TARDIS_INLINE void add_pieces(const Block& block, const Codes<B> (&codes)[R], Totals& total) const {
        const int8_t* v = values(block);
        const float* f = factor_ + block.segment;
        const Piece *piece = layout_.pieces + block.piece, *end = piece + block.pieces;
        Sums sum = {};
        each<8>([&](auto k) TARDIS_INLINE {
            for (; piece != end && piece->bit == k; ++piece, v += 64) {
                add_products<0>(v, sum, [&](auto r) TARDIS_INLINE { return codes[r].template code<k>(); });
                if (piece->last) end_segment(f++, sum, total);
            }
        });
    }

    template <int place, typename Code>
    TARDIS_INLINE void add_products(const int8_t* v, Sums& sum, const Code& code) const {
        __m512i own[R];
        each<R>([&](auto r) TARDIS_INLINE { own[r] = code(r); });
        each<T>([&](auto t) TARDIS_INLINE {
            each<H>([&](auto h) TARDIS_INLINE {
                const __m512i x = _mm512_load_si512(v + (t * H + h) * q_.stride);
                each<R>([&](auto r) TARDIS_INLINE { sum[r][t][h][place] = add_dot(sum[r][t][h][place], own[r], x); });
            });
        });
    }

    TARDIS_INLINE void end_segment(const float* f, Sums& sum, Totals& total) const {
        each<R>([&](auto r) TARDIS_INLINE {
            each<T>([&](auto t) TARDIS_INLINE {
                __m512i dot = joined(sum[r][t][0]);
                if constexpr (H == 2) dot = _mm512_add_epi32(_mm512_slli_epi32(dot, 8), joined(sum[r][t][1]));
                const __m512 both = _mm512_set1_ps(f[(r * T + t) * factors_]);
                total[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), both, total[r][t]);
                each<H>([&](auto h) TARDIS_INLINE {
                    each<P>([&](auto p) TARDIS_INLINE { sum[r][t][h][p] = _mm512_setzero_si512(); });
                });
            });
        });
    }

    // Of all places.
    TARDIS_INLINE static __m512i joined(const __m512i (&sum)[P]) {
        if constexpr (P == 1) return sum[0];
        else return _mm512_add_epi32(sum[0], _mm512_srai_epi32(sum[1], B));
    }

    const Quantised& q_;
    const Layout& layout_;
    const int64_t token_, factors_;  // how far the factors of a row and token are from the next
    alignas(64) float factor_[R * T * kMaxSegments];
};

template <int B, int H, int T, int E>
void sweep(const TardisMatrix& m, const Rows& rows, const Input& x, int64_t token, float* out) {
    Tile<B, H, T, E> tile(x.quantised, token);
    for (int64_t i = rows.begin; i < rows.end; i += tile.R)
        tile.multiply(m, rows, i, out + token * kBlockRows + i - rows.begin);
}

template <int B, int H, int E>
void product_bits(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    int64_t t = 0;
    for (; t + 4 <= x.tokens; t += 4) sweep<B, H, 4, E>(m, rows, x, t, out);
    for (; t + 2 <= x.tokens; t += 2) sweep<B, H, 2, E>(m, rows, x, t, out);
    for (; t < x.tokens; ++t) sweep<B, H, 1, E>(m, rows, x, t, out);
}

// Codes of 3 bits are taken as of 4, and those of 5 to 7 as of 8.
template <int H, int E>
void product_of_bits(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    if (m.bits == 1) return product_bits<1, H, E>(m, rows, x, out);
    if (m.bits == 2) return product_bits<2, H, E>(m, rows, x, out);
    if (m.bits <= 4) return product_bits<4, H, E>(m, rows, x, out);
    return product_bits<8, H, E>(m, rows, x, out);
}

// Rows of very many groups are for the plain kernels.
void product_low_bit(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    if (x.quantised.layout->segment_count > kMaxSegments) return portable_table()->low_bit(m, rows, x, out);
    if (x.quantised.halves == 2) return product_of_bits<2, 0>(m, rows, x, out);
    if (m.group_size == 256) return product_of_bits<1, kUsualEnds>(m, rows, x, out);
    product_of_bits<1, 0>(m, rows, x, out);
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
    product_bf16,    product_dense<F32>, product_low_bit, product_pairs<Bf16>, product_pairs<F32>, gemm_avx512,
    add_dense<Bf16>, add_dense<F32>,     add_low_bit,     widen,               outside,
};

}  // namespace
}  // namespace tardis

const tardis::Table* tardis::avx512_table() { return &kTable; }
#else
const tardis::Table* tardis::avx512_table() { return nullptr; }
#endif
