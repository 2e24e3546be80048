// Matrices in few bits in panels, for processors with AVX-512; see `avx512_panels.cpp`.
#include "avx512_lowbit.h"

#if defined(TARDIS_AVX512)

namespace tardis {
namespace {

// A register has, of 16 outputs, the codes of 32 / B inputs: those of inputs 4 * q + j in byte j of each 32 bits, from
// bit q * B on.
template <int B, int H>
class LowBit {
public:
    static constexpr int kMost = kPanelTokens / H;

    LowBit(const TardisMatrix& m, const Input& x)
        : q_(x.quantised), layout_(*q_.layout), groups_((m.columns + m.group_size - 1) / m.group_size),
          lines_((m.columns + kColumns - 1) / kColumns), half_(static_cast<float>(m.twice_zero) / -2) {}

    // `count` panels from one on, 2 at most.
    void multiply(const TardisMatrix& m, int64_t panel, int64_t count, int64_t tokens, float* out) const {
        const auto* data = static_cast<const char*>(m.data) + panel * lines_ * kLine;
        const uint16_t* scale = m.scale + panel * groups_ * kPanelRows;
        if (count == 2 && tokens == 1) return some<1, 2>(data, scale, 0, out);
        for (int64_t p = 0; p < count; ++p) {
            in_groups<kMost>(tokens, [&](auto together, int64_t first, int64_t) TARDIS_INLINE {
                float* to = out + first * kBlockRows + p * kPanelRows;
                some<together, 1>(data + p * lines_ * kLine, scale + p * groups_ * kPanelRows, first, to);
            });
        }
    }

private:
    static constexpr int kColumns = 8 * kLineBytes / B;
    static constexpr int64_t kLine = 64 * kPanelVectors;
    static constexpr int64_t kAhead = B == 8 ? 3072 : 4096;  // bytes from what is multiplied to what is asked for
    template <int T, int P>
    static constexpr bool kInPairs = T * H == 1 && B < 8 && !kQuickBytes;
    // Of a token: a product waits for the one before it in the same sum.
    template <int T, int P>
    static constexpr int kSums = T * P * H <= 2 && B < 8 && !kInPairs<T, P> ? 2 : 1;
    template <int T, int P>
    using Sums = __m512i[T * H][P * kPanelVectors][kSums<T, P>];

    // P panels side by side: memory gives two streams sooner than one, and a number of an input serves both.
    template <int T, int P>
    void some(const char* w, const uint16_t* scale, int64_t token, float* out) const {
        alignas(64) float total[T][P * kPanelRows] = {};
        const int8_t* values = q_.values + token * H * q_.stride;
        const float *unit = q_.scale + token * layout_.segment_count, *sum = q_.sum + token * layout_.segment_count;
        for (int64_t g = 0, line = 0; g < layout_.segment_count; ++g) {
            const Segment& segment = layout_.segments[g];
            const int64_t left = lines_ - line, whole = segment.pieces * 64 / kColumns, n = whole < left ? whole : left;
            Sums<T, P> dot = {};
            for (int64_t end = line + n; line < end; ++line, values += kColumns) {
                // behind the end of these panels are those of the next ones
                const bool inside = line + kAhead / kLine < lines_;
                const int64_t ahead = kAhead + (inside ? 0 : (P - 1) * lines_ * kLine);
                add_line<T, P>(w + line * kLine, ahead, values, dot);
            }
            each<P * kPanelVectors>([&](auto v) TARDIS_INLINE {
                constexpr int panel = v / kPanelVectors, part = v % kPanelVectors;
                const uint16_t* from = scale + (panel * groups_ + segment.group) * kPanelRows + 16 * part;
                const __m512 own = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
                each<T>([&](auto t) TARDIS_INLINE {
                    const int64_t at = t * layout_.segment_count + g;
                    const __m512 middle = _mm512_set1_ps(half_ * sum[at]), step = _mm512_set1_ps(unit[at]);
                    const __m512 product = _mm512_fmadd_ps(_mm512_cvtepi32_ps(joined<t, T, P>(dot, v)), step, middle);
                    float* to = total[t] + 16 * v;
                    _mm512_store_ps(to, _mm512_fmadd_ps(product, own, _mm512_load_ps(to)));
                });
            });
        }
        each<T>([&](auto t) TARDIS_INLINE { memcpy(out + t * kBlockRows, total[t], sizeof total[t]); });
    }

    template <int T, int P>
    TARDIS_INLINE void add_line(const char* w, int64_t ahead, const int8_t* values, Sums<T, P>& dot) const {
        __m512i line[P * kPanelVectors];
        each<P * kPanelVectors>([&](auto v) TARDIS_INLINE {
            const char* from = w + v / kPanelVectors * lines_ * kLine + 64 * (v % kPanelVectors);
            prefetch_far(from + ahead);
            line[v] = _mm512_load_si512(from);
        });
        if constexpr (kInPairs<T, P>) add_pairs<P>(line, values, dot);
        else add_codes<T, P>(line, values, dot);
    }

    template <int T, int P>
    TARDIS_INLINE void add_codes(const __m512i (&line)[P * kPanelVectors], const int8_t* values, Sums<T, P>& dot) const {
        each<8 / B>([&](auto q) TARDIS_INLINE {
            __m512i code[P * kPanelVectors];
            each<P * kPanelVectors>([&](auto v) TARDIS_INLINE { code[v] = code_of<q>(line[v]); });
            __m512i x;
            each<T * H * P * kPanelVectors>([&](auto i) TARDIS_INLINE {
                constexpr int n = i / (P * kPanelVectors), v = i % (P * kPanelVectors);
                if constexpr (v == 0) x = four_values(values + n * q_.stride + 4 * q);
                __m512i& sum = dot[n][v][q % kSums<T, P>];
                sum = add_dot<B>(sum, code[v], x);
            });
        });
    }

    // Without VNNI: the products of a line, two at a time, add up in 16 bits, which they fit: of 1, 2 and 4 bits there
    // are 8, 4 and 2 times two, of 127 * (2^B - 1) each at most.
    template <int P>
    TARDIS_INLINE void add_pairs(const __m512i (&line)[P * kPanelVectors], const int8_t* values, Sums<1, P>& dot) const {
        __m512i pairs[P * kPanelVectors];
        each<8 / B>([&](auto q) TARDIS_INLINE {
            const __m512i x = four_values(values + 4 * q);
            each<P * kPanelVectors>([&](auto v) TARDIS_INLINE {
                const __m512i two = _mm512_maddubs_epi16(code_of<q>(line[v]), x);
                if constexpr (q == 0) pairs[v] = two;
                else pairs[v] = _mm512_add_epi16(pairs[v], two);
            });
        });
        each<P * kPanelVectors>([&](auto v) TARDIS_INLINE {
            const __m512i four = _mm512_madd_epi16(pairs[v], _mm512_set1_epi16(1));
            dot[0][v][0] = _mm512_add_epi32(dot[0][v][0], four);
        });
    }

    template <int q>
    TARDIS_INLINE static __m512i code_of(__m512i line) {
        if constexpr (B == 8) return line;
        else if constexpr (q == 0) return _mm512_and_si512(line, _mm512_set1_epi8((1 << B) - 1));
        else return bits_of_bytes<q * B, B>(line);
    }

    TARDIS_INLINE static __m512i four_values(const int8_t* values) {
        int32_t four;
        memcpy(&four, values, sizeof four);
        return _mm512_set1_epi32(four);
    }

    template <int t, int T, int P>
    TARDIS_INLINE static __m512i joined(const Sums<T, P>& dot, int v) {
        if constexpr (H == 1) return total(dot[t][v]);
        else return _mm512_add_epi32(_mm512_slli_epi32(total(dot[2 * t][v]), 8), total(dot[2 * t + 1][v]));
    }

    template <int N>
    TARDIS_INLINE static __m512i total(const __m512i (&sum)[N]) {
        if constexpr (N == 1) return sum[0];
        else return _mm512_add_epi32(sum[0], sum[1]);
    }

    const Quantised& q_;
    const Layout& layout_;
    const int64_t groups_, lines_;
    const float half_;
};

template <int B, int H>
void low_bit(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    const LowBit<B, H> product(m, x);
    const int64_t last = (rows.end + kPanelRows - 1) / kPanelRows;
    for (int64_t panel = rows.begin / kPanelRows, first = panel; panel < last; panel += 2) {
        const int64_t count = panel + 1 < last ? 2 : 1;
        product.multiply(m, panel, count, x.tokens, out + (panel - first) * kPanelRows);
    }
}

template <int H>
void low_bit(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    if (m.bits == 1) return low_bit<1, H>(m, rows, x, out);
    if (m.bits == 2) return low_bit<2, H>(m, rows, x, out);
    if (m.bits == 4) return low_bit<4, H>(m, rows, x, out);
    low_bit<8, H>(m, rows, x, out);
}

}  // namespace

void TARDIS_AVX512_SET::low_bit_panels(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    if (x.quantised.halves == 2) return low_bit<2>(m, rows, x, out);
    low_bit<1>(m, rows, x, out);
}

}  // namespace tardis
#endif
