// Low-bit matrices in panels, for ARM processors with the dot product.
//
// One token meets codes as they come from memory. For several, the codes of a group are written out as bytes, which
// stay in the first cache while the tokens meet them, some at a time, with their sums in registers.
#include "neon.h"

#if defined(TARDIS_NEON)

namespace tardis {
namespace {

constexpr int kRegisters = kPanelRows / 4;  // of 4 outputs each
constexpr int64_t kLine = kLineBytes * kPanelRows;
constexpr int64_t kAhead = 4096;  // bytes from what is multiplied to what is asked for
constexpr int kValues = 16;  // that a register holds: those of four steps of four inputs
constexpr int kTile = 4;  // registers of outputs, and rows of values, whose sums stay in registers

// Four steps of codes of four outputs, as they meet values, and the sums of N rows of values with them.
#if defined(__ARM_FEATURE_MATMUL_INT8)
// Two outputs and two rows of values at once.
inline TARDIS_INLINE void arrange(Bytes (&codes)[4]) {
    const auto words = [&](int s) TARDIS_INLINE { return vreinterpretq_u32_u8(codes[s]); };
    const Bytes first[] = {
        vreinterpretq_u8_u32(vzip1q_u32(words(0), words(1))), vreinterpretq_u8_u32(vzip2q_u32(words(0), words(1))),
    };
    const Bytes second[] = {
        vreinterpretq_u8_u32(vzip1q_u32(words(2), words(3))), vreinterpretq_u8_u32(vzip2q_u32(words(2), words(3))),
    };
    each<2>([&](auto i) TARDIS_INLINE { codes[i] = first[i], codes[2 + i] = second[i]; });
}

template <int N>
struct Values {
    static constexpr int kPairs = (N + 1) / 2;
    int8x16_t half[kPairs][2];  // of two rows, the first 8 and the others

    TARDIS_INLINE Values(const int8_t* x, int64_t stride) {
        each<kPairs>([&](auto p) TARDIS_INLINE {
            const int64x2_t one = row(x + 2 * p * stride), other = 2 * p + 1 < N ? row(x + (2 * p + 1) * stride) : one;
            half[p][0] = vreinterpretq_s8_s64(vzip1q_s64(one, other));
            half[p][1] = vreinterpretq_s8_s64(vzip2q_s64(one, other));
        });
    }

private:
    TARDIS_INLINE static int64x2_t row(const int8_t* x) { return vreinterpretq_s64_s8(vld1q_s8(x)); }
};

template <int N>
struct Sums {
    Integers square[Values<N>::kPairs][2] = {};

    TARDIS_INLINE void add(const uint8_t* codes, const Values<N>& values) {
        each<4>([&](auto i) TARDIS_INLINE {
            const Bytes code = vld1q_u8(codes + 16 * i);
            each<Values<N>::kPairs>([&](auto p) TARDIS_INLINE {
                square[p][i % 2] = vusmmlaq_s32(square[p][i % 2], code, values.half[p][i / 2]);
            });
        });
    }
    template <int n>
    TARDIS_INLINE Integers row() const {
        const Integers(&two)[2] = square[n / 2];
        const int64x2_t first = vreinterpretq_s64_s32(n % 2 ? vuzp2q_s32(two[0], two[1]) : vuzp1q_s32(two[0], two[1]));
        return vreinterpretq_s32_s64(first);
    }
};
#else
inline TARDIS_INLINE void arrange(Bytes (&)[4]) {}

template <int N>
struct Values {
    int8x16_t row[N];

    TARDIS_INLINE Values(const int8_t* x, int64_t stride) {
        each<N>([&](auto n) TARDIS_INLINE { row[n] = vld1q_s8(x + n * stride); });
    }
};

template <int N>
struct Sums {
    Integers sum[N] = {};

    TARDIS_INLINE void add(const uint8_t* codes, const Values<N>& values) {
        each<4>([&](auto s) TARDIS_INLINE {
            const Bytes code = vld1q_u8(codes + 16 * s);
            each<N>([&](auto n) TARDIS_INLINE { sum[n] = add_dots<s>(sum[n], code, values.row[n]); });
        });
    }
    template <int n>
    TARDIS_INLINE Integers row() const {
        return sum[n];
    }
};
#endif

// out += the products of a group, in whole numbers, times what they stand for.
struct Scale {
    Floats unit, middle;

    Scale(const Quantised& q, int64_t at, float half)
        : unit(constant(q.scale[at])), middle(constant(half * q.sum[at])) {}

    TARDIS_INLINE void add(Floats dot, const uint16_t* scale, float* out) const {
        const Floats own = of_fp16(vld1_u16(scale));
        store(out, plus_product(load(out), plus_product(middle, dot, unit), own));
    }
};

// Of both halves of values, or of one.
template <int H>
inline TARDIS_INLINE Floats joined(Integers first, Integers second) {
    if constexpr (H == 1) return floats(first);
    return plus_product(floats(second), floats(first), constant(256));
}

// Codes of B bits.
template <int B, int H>
class Panel {
public:
    // Panels that one token meets by turns: memory gives two streams sooner than one.
    static constexpr int64_t kTurns = 2;

    Panel(const TardisMatrix& m, const Input& x)
        : q_(x.quantised), layout_(*q_.layout), groups_((m.columns + m.group_size - 1) / m.group_size),
          lines_((m.columns + kInputs - 1) / kInputs), half_(kLess - static_cast<float>(m.twice_zero) / 2) {}

    // `count` panels from one on, 2 at most.
    void multiply(const TardisMatrix& m, int64_t panel, int64_t count, int64_t tokens, float* out) const {
        Group group;
        for (int64_t t = 0; t < tokens; ++t) memset(out + t * kBlockRows, 0, count * kPanelRows * sizeof *out);
        for (int64_t g = 0, line = 0; g < layout_.segment_count; ++g) {
            const Segment& segment = layout_.segments[g];
            const int64_t left = lines_ - line, own = segment.pieces * 64 / kInputs, n = own < left ? own : left;
            const int8_t* x = q_.values + line * kInputs;
            for (int64_t p = 0; p < count; ++p) {
                const auto* from = static_cast<const uint8_t*>(m.data) + ((panel + p) * lines_ + line) * kLine;
                const uint16_t* scale = m.scale + ((panel + p) * groups_ + segment.group) * kPanelRows;
                float* to = out + p * kPanelRows;
                // behind the end of these panels are those of the next ones
                const int64_t ahead = kAhead + (line + kAhead / kLine < lines_ ? 0 : (count - 1) * lines_ * kLine);
                if (tokens == 1) {
                    one(from, ahead, n, x, g, scale, to);
                    continue;
                }
                write_out(from, ahead, n, group);
                for (int v = 0; v < kRegisters; v += kTile) meet_all(group, v, x, g, tokens, scale + 4 * v, to + 4 * v);
            }
            line += n;
        }
    }

private:
    static constexpr float kLess = kSignedCodes && B == 8 ? 128 : 0;  // as codes are multiplied, than they are
    static constexpr int kSteps = 8 / B, kInputs = 4 * kSteps;  // of a line
    static constexpr int kLines = kInputs < kValues ? kValues / kInputs : 1;  // that meet registers of values at once
    static constexpr int kUnits = kLines * kInputs / kValues;  // of those registers
    static constexpr int64_t kMaxUnits = kBlockColumns / kValues;

    // A group's codes as bytes, in units of four steps.
    struct Group {
        alignas(16) uint8_t codes[kMaxUnits][kRegisters][64];
        int64_t units;
    };

    TARDIS_INLINE static Bytes load_codes(const uint8_t* p) {
        const Bytes codes = vld1q_u8(p);
        return kLess > 0 ? veorq_u8(codes, vdupq_n_u8(128)) : codes;
    }

    // body(line, which of kLines it is), and what lies ahead is fetched.
    template <typename F>
    TARDIS_INLINE static void each_line(const uint8_t* w, int64_t ahead, int64_t lines, const F& body) {
        each<kLines>([&](auto i) TARDIS_INLINE {
            if (i >= lines) return;
            each<kLine / 64>([&](auto l) TARDIS_INLINE { prefetch_far(w + i * kLine + ahead + 64 * l); });
            body(w + i * kLine, i);
        });
    }

    // Segments of values are padded to 64 with zeros.
    void one(
        const uint8_t* w, int64_t ahead, int64_t lines, const int8_t* x, int64_t g, const uint16_t* scale, float* out
    ) const {
        Integers sum[H][kRegisters] = {};
        for (int64_t first = 0; first < lines; first += kLines) {
            int8x16_t values[H][kUnits];
            each<H * kUnits>([&](auto i) TARDIS_INLINE {
                constexpr int h = i / kUnits, u = i % kUnits;
                values[h][u] = vld1q_s8(x + h * q_.stride + first * kInputs + kValues * u);
            });
            each_line(w + first * kLine, ahead, lines - first, [&](const uint8_t* line, auto i) TARDIS_INLINE {
                each<kRegisters>([&](auto v) TARDIS_INLINE {
                    const Bytes codes = load_codes(line + 16 * v);
                    each<kSteps>([&](auto s) TARDIS_INLINE {
                        constexpr int step = i * kSteps + s;
                        const Bytes code = code_at<B, s * B>(codes);
                        each<H>([&](auto h) TARDIS_INLINE {
                            sum[h][v] = add_dots<step % 4>(sum[h][v], code, values[h][step / 4]);
                        });
                    });
                });
            });
        }
        const Scale factor(q_, g, half_);
        each<kRegisters>([&](auto v) TARDIS_INLINE {
            factor.add(joined<H>(sum[0][v], sum[H - 1][v]), scale + 4 * v, out + 4 * v);
        });
    }

    // The codes of some lines; those of a unit that has fewer are zero.
    static void write_out(const uint8_t* w, int64_t ahead, int64_t lines, Group& group) {
        group.units = (lines + kLines - 1) / kLines * kUnits;
        for (int64_t first = 0, unit = 0; first < lines; first += kLines, unit += kUnits) {
            each<kRegisters>([&](auto v) TARDIS_INLINE {
                Bytes steps[kUnits][4] = {};
                const uint8_t* from = w + first * kLine;
                each<kLines>([&](auto i) TARDIS_INLINE {
                    if (first + i >= lines) return;
                    if constexpr (v % 4 == 0) prefetch_far(from + i * kLine + ahead + 16 * v);
                    const Bytes line = load_codes(from + i * kLine + 16 * v);
                    each<kSteps>([&](auto s) TARDIS_INLINE {
                        constexpr int step = i * kSteps + s;
                        steps[step / 4][step % 4] = code_at<B, s * B>(line);
                    });
                });
                each<kUnits>([&](auto u) TARDIS_INLINE {
                    arrange(steps[u]);
                    each<4>([&](auto s) TARDIS_INLINE { vst1q_u8(group.codes[unit + u][v] + 16 * s, steps[u][s]); });
                });
            });
        }
    }

    // 16 outputs, from register v of each unit on, and all tokens.
    void meet_all(
        const Group& group, int v, const int8_t* x, int64_t g, int64_t tokens, const uint16_t* scale, float* out
    ) const {
        constexpr int T = kTile / H;
        int64_t t = 0;
        for (; t + T <= tokens; t += T) tile<T>(group, v, x, g, t, scale, out + t * kBlockRows);
        for (; t < tokens; ++t) tile<1>(group, v, x, g, t, scale, out + t * kBlockRows);
    }

    // With T tokens from one on.
    template <int T>
    void tile(
        const Group& group, int v, const int8_t* x, int64_t g, int64_t token, const uint16_t* scale, float* out
    ) const {
        Sums<T * H> sums[kTile];
        x += token * H * q_.stride;
        for (int64_t unit = 0; unit < group.units; ++unit) {
            const Values<T * H> values(x + kValues * unit, q_.stride);
            each<kTile>([&](auto i) TARDIS_INLINE { sums[i].add(group.codes[unit][v + i], values); });
        }
        each<T>([&](auto t) TARDIS_INLINE {
            const Scale factor(q_, (token + t) * layout_.segment_count + g, half_);
            each<kTile>([&](auto i) TARDIS_INLINE {
                constexpr int first = t * H, last = first + H - 1;
                const Floats dot = joined<H>(sums[i].template row<first>(), sums[i].template row<last>());
                factor.add(dot, scale + 4 * i, out + t * kBlockRows + 4 * i);
            });
        });
    }

    const Quantised& q_;
    const Layout& layout_;
    const int64_t groups_, lines_;
    const float half_;
};

}  // namespace
}  // namespace tardis

#include "lowbit_panels.inc"

void tardis::TARDIS_NEON_SET::panels(const TardisMatrix& m, const Rows& rows, const Input& x, float* out) {
    multiply_panels(m, rows, x, out);
}
#endif
