// Products with matrices in few bits, for processors with AVX2: codes meet inputs that are integers as they are.
#include "avx2_lowbit.h"

#if defined(TARDIS_AVX2)

namespace tardis {
namespace {

constexpr int64_t kBytesAhead = 16384;  // from a row that is multiplied to one that is prefetched
constexpr int64_t kMaxSegments = 256;  // of a row; those of more are for the plain kernels

inline float sum_of(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline TARDIS_INLINE __m256i values_at(const int8_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }

// sum and the products of 64 codes with their values.
template <int B>
inline TARDIS_INLINE __m256i add_dot(__m256i sum, const __m256i (&code)[2], const int8_t* x) {
    if constexpr (kDots) return add_dots(add_dots(sum, code[0], values_at(x)), code[1], values_at(x + 32));
    each<kParts<B>>([&](auto p) TARDIS_INLINE {
        const __m256i two = _mm256_maddubs_epi16(part_of<B, p>(code[0]), values_at(x));
        const __m256i four = add_products(two, part_of<B, p>(code[1]), values_at(x + 32));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(four, _mm256_set1_epi16(p ? 16 : 1)));
    });
    return sum;
}

// A row and T tokens of H halves, a block of columns after the other: sums and totals stay in registers.
template <int B, int H, int T>
class Row {
public:
    Row(const TardisMatrix& m, const Quantised& q, int64_t first_token)
        : m_(m), layout_(*q.layout), values_(q.values + first_token * H * q.stride), stride_(q.stride),
          unit_(q.scale + first_token * layout_.segment_count), sum_(q.sum + first_token * layout_.segment_count) {}

    // A row, while row number `next` is fetched.
    void multiply(int64_t row, int64_t next, float* out) {
        const int64_t row_bytes = m_.bits * layout_.row_bytes;
        const auto* data = static_cast<const uint8_t*>(m_.data);
        const uint8_t *w = data + row * row_bytes, *ahead = data + next * row_bytes;
        prefetch_ends(ahead, m_.scale + next * layout_.groups, layout_.groups);
        __m256 total[T];
        begin(m_.scale + row * layout_.groups, total);
        for (int64_t b = 0; b < layout_.block_count; ++b) {
            const Block& block = layout_.blocks[b];
            Codes<B> codes[2];
            Codes<B>::prefetch_planes(ahead + block.byte, layout_.row_bytes, B - m_.bits);
            each<2>([&](auto half) TARDIS_INLINE {
                const int64_t bytes = block.bytes - 32 * half;
                codes[half].load(w + block.byte + 32 * half, layout_.row_bytes, B - m_.bits, bytes);
            });
            if (block.whole) add_whole(block, codes, total);
            else add_pieces(block, codes, total);
        }
        each<T>([&](auto t) TARDIS_INLINE { out[t * kBlockRows] = sum_of(total[t]); });
    }

private:
    using Sums = __m256i[T * H];

    // The row's scales times the tokens', and in the totals what codes' middles take from the products.
    TARDIS_INLINE void begin(const uint16_t* scale, __m256 (&total)[T]) {
        const int64_t count = layout_.segment_count;
        const __m256 middle = _mm256_set1_ps(static_cast<float>(m_.twice_zero) / -2);
        alignas(32) uint16_t own[8];
        each<T>([&](auto t) TARDIS_INLINE { total[t] = _mm256_setzero_ps(); });
        for (int64_t g = 0; g < count; g += 8) {
            const int64_t some = count - g < 8 ? count - g : 8;
            for (int64_t j = 0; count != layout_.groups && j < some; ++j) own[j] = scale[layout_.segments[g + j].group];
            const __m256 scales = scales_at(count == layout_.groups ? scale + g : own, some);
            const __m256i lanes = first8(some);
            each<T>([&](auto t) TARDIS_INLINE {
                const __m256 units = _mm256_maskload_ps(unit_ + t * count + g, lanes);
                const __m256 sums = _mm256_maskload_ps(sum_ + t * count + g, lanes);
                _mm256_store_ps(factor_[t] + g, _mm256_mul_ps(scales, units));
                total[t] = _mm256_fmadd_ps(_mm256_mul_ps(middle, scales), sums, total[t]);
            });
        }
    }

    TARDIS_INLINE void add_whole(const Block& block, const Codes<B> (&codes)[2], __m256 (&total)[T]) const {
        const int8_t* v = values_ + 64 * block.piece;
        int64_t g = block.segment;
        Sums sum = {};
        each<8>([&](auto k) TARDIS_INLINE {
            add_products<k>(codes, v + 64 * k, sum);
            if (block.ends & (1 << k)) end_segment(g++, sum, total);
        });
    }

    TARDIS_INLINE void add_pieces(const Block& block, const Codes<B> (&codes)[2], __m256 (&total)[T]) const {
        const int8_t* v = values_ + 64 * block.piece;
        const Piece *piece = layout_.pieces + block.piece, *end = piece + block.pieces;
        int64_t g = block.segment;
        Sums sum = {};
        each<8>([&](auto k) TARDIS_INLINE {
            for (; piece != end && piece->bit == k; ++piece, v += 64) {
                add_products<k>(codes, v, sum);
                if (piece->last) end_segment(g++, sum, total);
            }
        });
    }

    template <int k>
    TARDIS_INLINE void add_products(const Codes<B> (&codes)[2], const int8_t* v, Sums& sum) const {
        const __m256i code[2] = {codes[0].template code<k>(), codes[1].template code<k>()};
        each<T * H>([&](auto n) TARDIS_INLINE { sum[n] = add_dot<B>(sum[n], code, v + n * stride_); });
    }

    TARDIS_INLINE void end_segment(int64_t g, Sums& sum, __m256 (&total)[T]) const {
        each<T>([&](auto t) TARDIS_INLINE {
            __m256 dot = _mm256_cvtepi32_ps(sum[t * H]);
            if constexpr (H == 2)
                dot = _mm256_fmadd_ps(dot, _mm256_set1_ps(256), _mm256_cvtepi32_ps(sum[2 * t + 1]));
            total[t] = _mm256_fmadd_ps(dot, _mm256_set1_ps(factor_[t][g]), total[t]);
        });
        each<T * H>([&](auto n) TARDIS_INLINE { sum[n] = _mm256_setzero_si256(); });
    }

    const TardisMatrix& m_;
    const Layout& layout_;
    const int8_t* const values_;
    const int64_t stride_;
    const float *const unit_, *const sum_;
    alignas(32) float factor_[T][kMaxSegments];
};

template <int B, int H, int T>
void sweep(const TardisMatrix& m, const Rows& rows, const Input& x, int64_t token, float* out) {
    Row<B, H, T> product(m, x.quantised, token);
    const int64_t row_bytes = m.bits * x.quantised.layout->row_bytes, ahead = 1 + kBytesAhead / row_bytes;
    for (int64_t i = rows.begin; i < rows.end; ++i)
        product.multiply(rows.at(i), rows.at(i + ahead), out + token * kBlockRows + i - rows.begin);
}

template <int B, int H>
void product_bits(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    int64_t t = 0;
    for (; t + 2 <= x.tokens; t += 2) sweep<B, H, 2>(m, rows, x, t, out);
    if (t < x.tokens) sweep<B, H, 1>(m, rows, x, t, out);
}

// Codes of 3 bits are taken as of 4, and those of 5 to 7 as of 8.
template <int H>
void product_of_bits(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    if (m.bits == 1) return product_bits<1, H>(m, rows, x, out);
    if (m.bits == 2) return product_bits<2, H>(m, rows, x, out);
    if (m.bits <= 4) return product_bits<4, H>(m, rows, x, out);
    product_bits<8, H>(m, rows, x, out);
}

}  // namespace

void TARDIS_AVX2_SET::planes(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    if (x.quantised.layout->segment_count > kMaxSegments) return portable_table()->low_bit(m, rows, x, out);
    if (x.quantised.halves == 2) return product_of_bits<2>(m, rows, x, out);
    product_of_bits<1>(m, rows, x, out);
}

}  // namespace tardis
#endif
