// Low-bit matrices in panels, for processors with AVX2.
#include "avx2.h"

#if defined(TARDIS_AVX2)

namespace tardis {
namespace {

constexpr int kRegisters = kPanelRows / 8;  // of 8 outputs each
constexpr int64_t kLine = kLineBytes * kPanelRows;
constexpr int64_t kAhead = 2048;  // bytes from what is multiplied to what is asked for

// The products of lines of codes with one token's values, added to the sums of all outputs of a panel. Byte j of an
// output has, in a line, the codes of inputs 4 * q + j from bit q * B on.
//
// Two products fit 16 bits where codes have 4 bits at most; those of 8 are taken in halves. So many lines are added
// up in 16 bits that sums of the largest still fit.
template <int B>
struct Lines {
    static constexpr int kCodes = B == 8 ? 4 : B;  // bits of what is multiplied
    static constexpr int kParts = B == 8 ? 2 : 1;  // of a code
    static constexpr int64_t kInputs = 8 * kLineBytes / B;
    static constexpr int64_t kTogether = 32767 / (2 * 128 * ((1 << kCodes) - 1) * (B == 8 ? 1 : 8 / B));

    static void add(const char* w, const int8_t* x, int64_t lines, __m256i (&sum)[kRegisters]) {
        for (int64_t first = 0; first < lines; first += kTogether) {
            const int64_t end = first + kTogether < lines ? first + kTogether : lines;
            __m256i part[kParts][kRegisters] = {};
            for (int64_t line = first; line < end; ++line) add_line(w + line * kLine, x + line * kInputs, part);
            for (int v = 0; v < kRegisters; ++v)
                for (int p = 0; p < kParts; ++p) {
                    const __m256i worth = _mm256_set1_epi16(p ? 16 : 1);
                    sum[v] = _mm256_add_epi32(sum[v], _mm256_madd_epi16(part[p][v], worth));
                }
        }
    }

private:
    static inline void add_line(const char* w, const int8_t* x, __m256i (&part)[kParts][kRegisters]) {
        const __m256i mask = _mm256_set1_epi8((1 << kCodes) - 1);
        __m256i line[kRegisters];
        for (int v = 0; v < kRegisters; ++v) line[v] = _mm256_load_si256(reinterpret_cast<const __m256i*>(w + 32 * v));
        for (int q = 0; q < 8 / kCodes; ++q) {
            int32_t four;
            memcpy(&four, x + 4 * (q / kParts), sizeof four);
            const __m256i values = _mm256_set1_epi32(four);
            for (int v = 0; v < kRegisters; ++v) {
                const __m256i code = _mm256_and_si256(_mm256_srli_epi16(line[v], q * kCodes), mask);
                __m256i& to = part[q % kParts][v];
                to = _mm256_add_epi16(to, _mm256_maddubs_epi16(code, values));
            }
        }
    }
};

// One panel. The lines of a group stay in the first cache until all tokens have met them.
template <int B>
void multiply_panel(const TardisMatrix& m, int64_t panel, const Input& x, float* out) {
    using Codes = Lines<B>;
    const Quantised& q = x.quantised;
    const Layout& layout = *q.layout;
    const int64_t groups = (m.columns + m.group_size - 1) / m.group_size;
    const int64_t lines = (m.columns + Codes::kInputs - 1) / Codes::kInputs;
    const char* w = static_cast<const char*>(m.data) + panel * lines * kLine;
    const uint16_t* scale = m.scale + panel * groups * kPanelRows;
    const float middle = static_cast<float>(m.twice_zero) / -2;
    for (int64_t t = 0; t < x.tokens; ++t) memset(out + t * kBlockRows, 0, kPanelRows * sizeof *out);
    for (int64_t g = 0, line = 0; g < layout.segment_count; ++g) {
        const Segment& segment = layout.segments[g];
        const int64_t left = lines - line, whole = segment.pieces * 64 / Codes::kInputs, n = whole < left ? whole : left;
        const char* from = w + line * kLine;
        for (int64_t i = 0; i < n * kLine; i += 64) _mm_prefetch(from + kAhead + i, _MM_HINT_T1);
        for (int64_t t = 0; t < x.tokens; ++t) {
            __m256 dot[kRegisters] = {};
            for (int32_t half = 0; half < q.halves; ++half) {
                const int8_t* values = q.values + (t * q.halves + half) * q.stride + line * Codes::kInputs;
                __m256i sum[kRegisters] = {};
                Codes::add(from, values, n, sum);
                const __m256 worth = _mm256_set1_ps(half + 1 < q.halves ? 256.0f : 1.0f);
                for (int v = 0; v < kRegisters; ++v) dot[v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[v]), worth, dot[v]);
            }
            const int64_t at = t * layout.segment_count + g;
            const __m256 unit = _mm256_set1_ps(q.scale[at]), start = _mm256_set1_ps(middle * q.sum[at]);
            for (int v = 0; v < kRegisters; ++v) {
                const uint16_t* own = scale + segment.group * kPanelRows + 8 * v;
                const __m256 factor = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(own)));
                float* to = out + t * kBlockRows + 8 * v;
                const __m256 product = _mm256_fmadd_ps(dot[v], unit, start);
                _mm256_storeu_ps(to, _mm256_fmadd_ps(product, factor, _mm256_loadu_ps(to)));
            }
        }
        line += n;
    }
}

template <int B>
void multiply_panels(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    for (int64_t i = rows.begin; i < rows.end; i += kPanelRows)
        multiply_panel<B>(m, i / kPanelRows, x, out + i - rows.begin);
}

}  // namespace

void low_bit_panels_avx2(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    if (m.bits == 1) return multiply_panels<1>(m, rows, x, out);
    if (m.bits == 2) return multiply_panels<2>(m, rows, x, out);
    if (m.bits == 4) return multiply_panels<4>(m, rows, x, out);
    multiply_panels<8>(m, rows, x, out);
}

}  // namespace tardis
#endif
