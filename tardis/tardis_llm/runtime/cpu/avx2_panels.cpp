// Low-bit matrices in panels, for processors with AVX2.
//
// One token meets codes as they come from memory. For several, the codes of a group are written out as bytes, which
// stay in the first cache while the tokens meet them, some at a time, with their sums in registers.
#include "avx2.h"

#if defined(TARDIS_AVX2)

namespace tardis {
namespace {

constexpr int kRegisters = kPanelRows / 8;  // of 8 outputs each
constexpr int64_t kLine = kLineBytes * kPanelRows;
constexpr int64_t kAhead = 4096;  // bytes from what is multiplied to what is asked for
constexpr int64_t kMaxSteps = kBlockColumns / 4;  // of four inputs, in a segment

// Codes of B bits as they are multiplied: in parts of so few bits that two products fit 16 bits. So many are added up
// there that sums of the largest still fit.
template <int B>
struct Codes {
    static constexpr int kBits = B == 8 ? 4 : B, kParts = 8 / (B == 8 ? 4 : 8);
    static constexpr int kSteps = 8 / B;  // of four inputs, in a line
    static constexpr int64_t kTogether = 32767 / (2 * 128 * ((1 << kBits) - 1));

    static TARDIS_INLINE __m256i mask() { return _mm256_set1_epi8((1 << kBits) - 1); }
};

// Four values, for every output.
inline TARDIS_INLINE __m256i broadcast(const int8_t* x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm256_set1_epi32(four);
}

inline TARDIS_INLINE __m256i load(const char* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }

// Sums of 16 bits two by two, times what they are worth.
inline TARDIS_INLINE __m256i in_pairs(__m256i sum, int worth) {
    return _mm256_madd_epi16(sum, _mm256_set1_epi16(static_cast<int16_t>(worth)));
}

// out += the products of a group, in whole numbers, times what they stand for.
struct Scale {
    __m256 unit, middle;

    Scale(const Quantised& q, int64_t at, float half)
        : unit(_mm256_set1_ps(q.scale[at])), middle(_mm256_set1_ps(half * q.sum[at])) {}

    TARDIS_INLINE void add(__m256 dot, const uint16_t* scale, float* out) const {
        const __m256 own = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale)));
        _mm256_storeu_ps(out, _mm256_fmadd_ps(_mm256_fmadd_ps(dot, unit, middle), own, _mm256_loadu_ps(out)));
    }
};

// Of both halves of values, or of one.
inline TARDIS_INLINE __m256 joined(const __m256i (&sum)[1][kRegisters], int v) { return _mm256_cvtepi32_ps(sum[0][v]); }
inline TARDIS_INLINE __m256 joined(const __m256i (&sum)[2][kRegisters], int v) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[0][v]), _mm256_set1_ps(256), _mm256_cvtepi32_ps(sum[1][v]));
}

template <int B, int H>
class Panel {
public:
    Panel(const TardisMatrix& m, const Input& x)
        : q_(x.quantised), layout_(*q_.layout), groups_((m.columns + m.group_size - 1) / m.group_size),
          lines_((m.columns + kInputs - 1) / kInputs), half_(static_cast<float>(m.twice_zero) / -2) {}

    // `count` panels from one on, 2 at most, which one token meets by turns: memory gives two streams sooner than one.
    void multiply(const TardisMatrix& m, int64_t panel, int64_t count, int64_t tokens, float* out) const {
        for (int64_t t = 0; t < tokens; ++t) memset(out + t * kBlockRows, 0, count * kPanelRows * sizeof *out);
        for (int64_t g = 0, line = 0; g < layout_.segment_count; ++g) {
            const Segment& segment = layout_.segments[g];
            const int64_t left = lines_ - line, whole = segment.pieces * 64 / kInputs, n = whole < left ? whole : left;
            for (int64_t p = 0; p < count; ++p) {
                const char* from = static_cast<const char*>(m.data) + ((panel + p) * lines_ + line) * kLine;
                const uint16_t* scale = m.scale + ((panel + p) * groups_ + segment.group) * kPanelRows;
                // behind the end of these panels are those of the next ones
                const int64_t ahead = kAhead + (line + kAhead / kLine < lines_ ? 0 : (count - 1) * lines_ * kLine);
                if (tokens == 1) one(from, ahead, n, line * kInputs, g, scale, out + p * kPanelRows);
                else several(from, ahead, n, line * kInputs, g, tokens, scale, out + p * kPanelRows);
            }
            line += n;
        }
    }

private:
    using C = Codes<B>;
    static constexpr int64_t kInputs = 4 * C::kSteps;  // of a line
    static constexpr int kTile = 6;  // tokens

    void one(const char* w, int64_t ahead, int64_t lines, int64_t column, int64_t g, const uint16_t* scale, float* out) const {
        constexpr int64_t kLines = C::kTogether / C::kSteps;
        __m256i sum[H][kRegisters] = {};
        for (int64_t first = 0; first < lines; first += kLines) {
            const int64_t end = first + kLines < lines ? first + kLines : lines;
            __m256i part[C::kParts][H][kRegisters] = {};
            for (int64_t line = first; line < end; ++line)
                add_line(w + line * kLine, ahead, q_.values + column + line * kInputs, part);
            each<C::kParts * H * kRegisters>([&](auto i) TARDIS_INLINE {
                constexpr int p = i / (H * kRegisters), h = i / kRegisters % H, v = i % kRegisters;
                sum[h][v] = _mm256_add_epi32(sum[h][v], in_pairs(part[p][h][v], p ? 16 : 1));
            });
        }
        const Scale factor(q_, g, half_);
        each<kRegisters>([&](auto v) TARDIS_INLINE { factor.add(joined(sum, v), scale + 8 * v, out + 8 * v); });
    }

    TARDIS_INLINE void add_line(
        const char* w, int64_t ahead, const int8_t* x, __m256i (&part)[C::kParts][H][kRegisters]
    ) const {
        __m256i line[kRegisters];
        each<kRegisters>([&](auto v) TARDIS_INLINE { line[v] = load(w + 32 * v); });
        each<kLine / 64>([&](auto i) TARDIS_INLINE { prefetch_far(w + ahead + 64 * i); });
        each<C::kSteps * C::kParts>([&](auto q) TARDIS_INLINE {
            constexpr int step = q / C::kParts, p = q % C::kParts;
            __m256i values[H];
            each<H>([&](auto h) TARDIS_INLINE { values[h] = broadcast(x + h * q_.stride + 4 * step); });
            each<kRegisters>([&](auto v) TARDIS_INLINE {
                const __m256i code = code_of<q>(line[v]);
                each<H>([&](auto h) TARDIS_INLINE {
                    part[p][h][v] = add_products(part[p][h][v], code, values[h]);
                });
            });
        });
    }

    // The codes, or parts of them, from bit q * kBits of every byte on.
    template <int q>
    static TARDIS_INLINE __m256i code_of(__m256i line) {
        return _mm256_and_si256(q ? _mm256_srli_epi16(line, q * C::kBits) : line, C::mask());
    }

    void several(
        const char* w, int64_t ahead, int64_t lines, int64_t column, int64_t g, int64_t tokens, const uint16_t* scale,
        float* out
    ) const {
        const int64_t steps = lines * C::kSteps;
        alignas(32) char codes[C::kParts][kMaxSteps * kLine];  // [steps, kPanelRows, 4]
        for (int64_t line = 0; line < lines; ++line) {
            const char* from = w + line * kLine;
            each<kLine / 64>([&](auto i) TARDIS_INLINE { prefetch_far(from + ahead + 64 * i); });
            each<kRegisters>([&](auto v) TARDIS_INLINE {
                const __m256i own = load(from + 32 * v);
                each<C::kSteps * C::kParts>([&](auto q) TARDIS_INLINE {
                    char* to = codes[q % C::kParts] + (line * C::kSteps + q / C::kParts) * kLine + 32 * v;
                    _mm256_store_si256(reinterpret_cast<__m256i*>(to), code_of<q>(own));
                });
            });
        }
        for (int64_t v = 0; v < kRegisters; v += 2) {
            const auto run = [&](auto count, int64_t t) TARDIS_INLINE {
                tile<count>(codes[0] + 32 * v, steps, column, g, t, scale + 8 * v, out + t * kBlockRows + 8 * v);
            };
            int64_t t = 0;
            for (; t + kTile <= tokens; t += kTile) run(Constant<kTile>{}, t);
            for (; t + 2 <= tokens; t += 2) run(Constant<2>{}, t);
            if (t < tokens) run(Constant<1>{}, t);
        }
    }

    // T tokens from one on, and 16 outputs.
    template <int T>
    void tile(
        const char* codes, int64_t steps, int64_t column, int64_t g, int64_t token, const uint16_t* scale, float* out
    ) const {
        __m256 dot[T][2] = {};
        for (int h = 0; h < H; ++h) {
            const int8_t* x = q_.values + (token * H + h) * q_.stride + column;
            __m256i sum[T][2] = {};
            for (int p = 0; p < C::kParts; ++p) {
                const char* own = codes + p * kMaxSteps * kLine;
                for (int64_t first = 0; first < steps; first += C::kTogether) {
                    const int64_t end = first + C::kTogether < steps ? first + C::kTogether : steps;
                    __m256i part[T][2] = {};
                    for (int64_t s = first; s < end; ++s) {
                        const __m256i low = load(own + s * kLine), high = load(own + s * kLine + 32);
                        each<T>([&](auto t) TARDIS_INLINE {
                            const __m256i values = broadcast(x + t * H * q_.stride + 4 * s);
                            part[t][0] = add_products(part[t][0], low, values);
                            part[t][1] = add_products(part[t][1], high, values);
                        });
                    }
                    each<2 * T>([&](auto i) TARDIS_INLINE {
                        sum[i / 2][i % 2] = _mm256_add_epi32(sum[i / 2][i % 2], in_pairs(part[i / 2][i % 2], p ? 16 : 1));
                    });
                }
            }
            const __m256 worth = _mm256_set1_ps(h + 1 < H ? 256.0f : 1.0f);
            each<2 * T>([&](auto i) TARDIS_INLINE {
                dot[i / 2][i % 2] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[i / 2][i % 2]), worth, dot[i / 2][i % 2]);
            });
        }
        each<T>([&](auto t) TARDIS_INLINE {
            const Scale factor(q_, (token + t) * layout_.segment_count + g, half_);
            each<2>([&](auto v) TARDIS_INLINE { factor.add(dot[t][v], scale + 8 * v, out + t * kBlockRows + 8 * v); });
        });
    }

    const Quantised& q_;
    const Layout& layout_;
    const int64_t groups_, lines_;
    const float half_;
};

template <int B, int H>
void multiply_panels(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    const Panel<B, H> product(m, x);
    const int64_t last = (rows.end + kPanelRows - 1) / kPanelRows;
    for (int64_t panel = rows.begin / kPanelRows, first = panel; panel < last; panel += 2) {
        const int64_t count = panel + 1 < last ? 2 : 1;
        product.multiply(m, panel, count, x.tokens, out + (panel - first) * kPanelRows);
    }
}

template <int H>
void multiply_panels(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    if (m.bits == 1) return multiply_panels<1, H>(m, rows, x, out);
    if (m.bits == 2) return multiply_panels<2, H>(m, rows, x, out);
    if (m.bits == 4) return multiply_panels<4, H>(m, rows, x, out);
    multiply_panels<8, H>(m, rows, x, out);
}

}  // namespace

void low_bit_panels_avx2(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    if (x.quantised.halves == 2) return multiply_panels<2>(m, rows, x, out);
    multiply_panels<1>(m, rows, x, out);
}

}  // namespace tardis
#endif
