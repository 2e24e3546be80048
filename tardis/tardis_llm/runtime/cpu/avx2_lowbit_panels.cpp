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

// Codes of B bits as they are multiplied: in parts of so few bits that two products fit 16 bits, where sums have no
// more. So many are added up there that sums of the largest still fit.
template <int B>
struct Codes {
    static constexpr int kBits = B == 8 && !kDots ? 4 : B, kParts = B / kBits;
    static constexpr int kSteps = 8 / B;  // of four inputs, in a line
    static constexpr int64_t kTogether = kDots ? kMaxSteps : 32767 / (2 * 128 * ((1 << kBits) - 1));

    static TARDIS_INLINE __m256i mask() { return _mm256_set1_epi8((1 << kBits) - 1); }
};

// Four values, for every output.
inline TARDIS_INLINE __m256i broadcast(const void* values) {
    int32_t four;
    memcpy(&four, values, sizeof four);
    return _mm256_set1_epi32(four);
}

inline TARDIS_INLINE __m256i load(const char* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }

// In a register: GCC would load it again for each use.
inline TARDIS_INLINE __m256i kept(__m256i value) {
#if defined(__GNUC__)
    asm("" : "+x"(value));
#endif
    return value;
}

// What sums of `add_dots` are in 32 bits, times what they are worth.
inline TARDIS_INLINE __m256i whole(__m256i sum, int worth) {
    if constexpr (kDots) return sum;
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
    // Panels that one token meets by turns: memory gives two streams sooner than one, but where codes are so few bits
    // that multiplying takes as long as reading.
    static constexpr int64_t kTurns = B < 4 && !kDots ? 1 : 2;

    Panel(const TardisMatrix& m, const Input& x)
        : q_(x.quantised), layout_(*q_.layout), groups_((m.columns + m.group_size - 1) / m.group_size),
          lines_((m.columns + kInputs - 1) / kInputs), half_(static_cast<float>(m.twice_zero) / -2) {}

    // `count` panels from one on, 2 at most.
    void multiply(const TardisMatrix& m, int64_t panel, int64_t count, int64_t tokens, float* out) const {
        Group group;
        for (int64_t t = 0; t < tokens; ++t) memset(out + t * kBlockRows, 0, count * kPanelRows * sizeof *out);
        for (int64_t g = 0, line = 0; g < layout_.segment_count; ++g) {
            const Segment& segment = layout_.segments[g];
            const int64_t left = lines_ - line, own = segment.pieces * 64 / kInputs, n = own < left ? own : left;
            group.steps = n * C::kSteps * kWide;
            if (tokens > 1) set_values(line * kInputs, tokens, group);
            for (int64_t p = 0; p < count; ++p) {
                const char* from = static_cast<const char*>(m.data) + ((panel + p) * lines_ + line) * kLine;
                const uint16_t* scale = m.scale + ((panel + p) * groups_ + segment.group) * kPanelRows;
                float* to = out + p * kPanelRows;
                // behind the end of these panels are those of the next ones
                const int64_t ahead = kAhead + (line + kAhead / kLine < lines_ ? 0 : (count - 1) * lines_ * kLine);
                if (tokens == 1) {
                    one(from, ahead, n, q_.values + line * kInputs, g, scale, to);
                    continue;
                }
                set_codes(from, ahead, n, group);
                for (int64_t i = 0; i < kPanelRows; i += 16) add_all(group, 4 * i, g, tokens, scale + i, to + i);
            }
            line += n;
        }
    }

private:
    using C = Codes<B>;
    static constexpr int64_t kInputs = 4 * C::kSteps;  // of a line
    // Tokens whose sums with 16 outputs stay in registers, beside codes, values and products.
    static constexpr int kTile = kDots ? 6 : 4;

    void one(
        const char* w, int64_t ahead, int64_t lines, const int8_t* x, int64_t g, const uint16_t* scale, float* out
    ) const {
        constexpr int64_t kLines = C::kTogether / C::kSteps;
        __m256i sum[H][kRegisters] = {};
        for (int64_t first = 0; first < lines; first += kLines) {
            const int64_t end = first + kLines < lines ? first + kLines : lines;
            __m256i part[C::kParts][H][kRegisters] = {};
            for (int64_t line = first; line < end; ++line)
                add_line(w + line * kLine, ahead, x + line * kInputs, part);
            each<C::kParts * H * kRegisters>([&](auto i) TARDIS_INLINE {
                constexpr int p = i / (H * kRegisters), h = i / kRegisters % H, v = i % kRegisters;
                sum[h][v] = _mm256_add_epi32(sum[h][v], whole(part[p][h][v], p ? 16 : 1));
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
                    part[p][h][v] = add_dots(part[p][h][v], code, values[h]);
                });
            });
        });
    }

    // The codes, or parts of them, from bit q * kBits of every byte on.
    template <int q>
    static TARDIS_INLINE __m256i code_of(__m256i line) {
        return _mm256_and_si256(q ? _mm256_srli_epi16(line, q * C::kBits) : line, C::mask());
    }

    // The numbers that `tile` multiplies: bytes, or with two halves numbers of 16 bits.
    static constexpr int64_t kWide = H;
    // Of what lies side by side for each output, as many as sums of 32 bits take of the largest, or those of 16.
    static constexpr int64_t kSums = H == 2 ? (int64_t{1} << 31) / (int64_t{2} * 127 * 257 << B) : C::kTogether;

    // A group's codes [steps, kPanelRows, 4 bytes], in parts of so few bits as are multiplied, and the values of all
    // tokens.
    struct Group {
        static constexpr int kParts = H == 2 ? 1 : C::kParts;
        alignas(32) char codes[kParts][kMaxSteps * kWide * kLine];
        alignas(32) int16_t wide[H == 2 ? kMaxTokens * 4 * kMaxSteps : 1];
        const char* values;
        int64_t steps, stride;  // from a token's values to the next one's, in bytes
    };

    // The values of a group's inputs from a column on.
    TARDIS_INLINE void set_values(int64_t column, int64_t tokens, Group& group) const {
        const int8_t* x = q_.values + column;
        group.values = reinterpret_cast<const char*>(x), group.stride = q_.stride;
        if constexpr (H == 1) return;
        group.values = reinterpret_cast<const char*>(group.wide), group.stride = 4 * group.steps;
        for (int64_t t = 0; t < tokens; ++t, x += 2 * q_.stride)
            for (int64_t j = 0; j < 2 * group.steps; j += 16) put_wide(x + j, group.wide + t * 2 * group.steps + j);
    }

    // 16 values of two halves as numbers of 16 bits: of four the first and the third, then the others, as `put` has
    // their codes.
    TARDIS_INLINE void put_wide(const int8_t* x, int16_t* to) const {
        const auto half = [&](const int8_t* from) TARDIS_INLINE {
            return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        };
        const __m256i whole = _mm256_add_epi16(_mm256_slli_epi16(half(x), 8), half(x + q_.stride));
        const __m256i low = _mm256_shufflelo_epi16(whole, 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_shufflehi_epi16(low, 0xd8));
    }

    // The codes of some lines, while what lies ahead is fetched.
    TARDIS_INLINE void set_codes(const char* w, int64_t ahead, int64_t lines, Group& group) const {
        for (int64_t line = 0; line < lines; ++line, w += kLine) {
            each<kLine / 64>([&](auto i) TARDIS_INLINE { prefetch_far(w + ahead + 64 * i); });
            each<kRegisters>([&](auto v) TARDIS_INLINE { put(load(w + 32 * v), line, 32 * v, group); });
        }
    }

    TARDIS_INLINE static void put(__m256i line, int64_t number, int64_t at, Group& group) {
        const auto store = [&](int part, int64_t step, __m256i codes) TARDIS_INLINE {
            _mm256_store_si256(reinterpret_cast<__m256i*>(group.codes[part] + step * kLine + at), codes);
        };
        if constexpr (H == 1) {
            each<C::kSteps * C::kParts>([&](auto q) TARDIS_INLINE {
                store(q % C::kParts, number * C::kSteps + q / C::kParts, code_of<q>(line));
            });
            return;
        }
        each<C::kSteps>([&](auto q) TARDIS_INLINE {
            __m256i codes = line;
            if constexpr (B < 8) codes = code_of<q>(line);
            const int64_t step = 2 * (number * C::kSteps + q);
            store(0, step, _mm256_and_si256(codes, _mm256_set1_epi16(0xff)));
            store(0, step + 1, _mm256_srli_epi16(codes, 8));
        });
    }

    // 16 outputs from a byte of each step on.
    void add_all(const Group& group, int64_t at, int64_t g, int64_t tokens, const uint16_t* scale, float* out) const {
        int64_t t = 0;
        for (; t + kTile <= tokens; t += kTile) tile<kTile>(group, at, g, t, scale, out + t * kBlockRows);
        for (; t + 2 <= tokens; t += 2) tile<2>(group, at, g, t, scale, out + t * kBlockRows);
        if (t < tokens) tile<1>(group, at, g, t, scale, out + t * kBlockRows);
    }

    // For T tokens from one on.
    template <int T>
    void tile(const Group& group, int64_t at, int64_t g, int64_t token, const uint16_t* scale, float* out) const {
        const char* x = group.values + token * group.stride;
        __m256 dot[T][2] = {};
        for (int p = 0; p < Group::kParts; ++p) {
            for (int64_t first = 0; first < group.steps; first += kSums) {
                const int64_t end = first + kSums < group.steps ? first + kSums : group.steps;
                __m256i sum[T][2] = {};
                for (int64_t s = first; s < end; ++s) {
                    const char* codes = group.codes[p] + s * kLine + at;
                    const __m256i low = kept(load(codes)), high = kept(load(codes + 32));
                    each<T>([&](auto t) TARDIS_INLINE {
                        const __m256i values = broadcast(x + t * group.stride + 4 * s);
                        sum[t][0] = add(sum[t][0], low, values), sum[t][1] = add(sum[t][1], high, values);
                    });
                }
                each<2 * T>([&](auto i) TARDIS_INLINE {
                    __m256i all = sum[i / 2][i % 2];
                    if constexpr (H == 1) all = whole(all, p ? 16 : 1);
                    dot[i / 2][i % 2] = _mm256_add_ps(dot[i / 2][i % 2], _mm256_cvtepi32_ps(all));
                });
            }
        }
        each<T>([&](auto t) TARDIS_INLINE {
            const Scale factor(q_, (token + t) * layout_.segment_count + g, half_);
            each<2>([&](auto v) TARDIS_INLINE { factor.add(dot[t][v], scale + 8 * v, out + t * kBlockRows + 8 * v); });
        });
    }

    static TARDIS_INLINE __m256i add(__m256i sum, __m256i codes, __m256i values) {
        if constexpr (H == 2) return add_wide_products(sum, codes, values);
        else return add_dots(sum, codes, values);
    }

    const Quantised& q_;
    const Layout& layout_;
    const int64_t groups_, lines_;
    const float half_;
};

}  // namespace
}  // namespace tardis

#include "lowbit_panels.inc"

void tardis::TARDIS_AVX2_SET::panels(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    multiply_panels(m, rows, x, out);
}
#endif
