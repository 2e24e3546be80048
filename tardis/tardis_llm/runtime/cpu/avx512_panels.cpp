// Dense matrices in panels, for processors with AVX-512.
//
// A panel has 32 outputs side by side in two registers, so that sums need no adding up across a register, every number
// of an input serves all of them, and a matrix is one stretch of memory from its first weight to its last. The products
// of a dozen tokens then hide behind reading it.
#include "avx512.h"

#if defined(TARDIS_AVX512)

namespace tardis {
namespace {

constexpr int64_t kDepth = 256;  // inputs whose weights stay in the first cache until all tokens have met them

// The weights of inputs that lie side by side.
template <typename K>
constexpr int64_t kStepBytes = 2 * K::kInputs * kPanelRows;

// Adds the products of some steps of inputs to the sums of T tokens, which begin at zero; asks for `lines` per step.
template <typename K, int T, int lines>
void tile(
    const char* w, const char* ahead, const typename K::Value* x, int64_t x_stride, int64_t steps, bool begin,
    float* out, int64_t stride
) {
    __m512 sum[T][kPanelVectors];
    const auto all = [&](const auto& body) TARDIS_INLINE {
        each<T>([&](auto t) TARDIS_INLINE { each<kPanelVectors>([&](auto v) TARDIS_INLINE { body(t, v); }); });
    };
    all([&](auto t, auto v) TARDIS_INLINE {
        sum[t][v] = begin ? _mm512_setzero_ps() : _mm512_loadu_ps(out + t * stride + 16 * v);
    });
    for (int64_t s = 0; s < steps; ++s) {
        each<lines>([&](auto l) TARDIS_INLINE { prefetch_far(ahead + 64 * (lines * s + l)); });
        typename K::Vector weights[kPanelVectors];
        each<kPanelVectors>([&](auto v) TARDIS_INLINE {
            weights[v] = K::load(w + kStepBytes<K> * s + kStepBytes<K> / kPanelVectors * v);
        });
        each<T>([&](auto t) TARDIS_INLINE {
            const auto inputs = K::broadcast(x + t * x_stride + K::kInputs * s);
            each<kPanelVectors>([&](auto v) TARDIS_INLINE {
                sum[t][v] = K::add_product(sum[t][v], weights[v], inputs);
            });
        });
    }
    all([&](auto t, auto v) TARDIS_INLINE { _mm512_storeu_ps(out + t * stride + 16 * v, sum[t][v]); });
}

// One panel. With more tokens than registers take, some inputs' weights after the other; the next of them are fetched
// evenly meanwhile.
template <typename K>
void multiply(const char* w, const Tokens& x, int64_t steps, float* out, int64_t stride) {
    constexpr int kLines = kStepBytes<K> / 64;
    const bool once = x.count <= kPanelTokens;
    const int64_t depth = once ? steps : kDepth / K::kInputs;
    for (int64_t s = 0; s < steps; s += depth) {
        const int64_t some = s + depth < steps ? depth : steps - s;
        const char* from = w + kStepBytes<K> * s;
        in_groups<kPanelTokens>(x.count, [&](auto count, int64_t first, int64_t group) TARDIS_INLINE {
            const auto* own = K::inputs(x) + first * x.stride + K::kInputs * s;
            float* to = out + first * stride;
            if (once) return tile<K, count, kLines>(from, from + kPanelAhead, own, x.stride, some, s == 0, to, stride);
            const char* ahead = from + kStepBytes<K> * depth + group * 64 * some;
            if (group < kLines) tile<K, count, 1>(from, ahead, own, x.stride, some, s == 0, to, stride);
            else tile<K, count, 0>(from, ahead, own, x.stride, some, s == 0, to, stride);
        });
    }
}

template <typename F>
inline void each_panel(const Range& rows, const F& body) {
    for (int64_t i = rows.begin; i < rows.end; i += kPanelRows) body(i / kPanelRows, i - rows.begin);
}

template <typename K>
void product(const TardisMatrix& m, Range rows, const Tokens& x, float* out, int64_t stride) {
    const int64_t steps = m.columns / K::kInputs;
    each_panel(rows, [&](int64_t panel, int64_t at) {
        multiply<K>(static_cast<const char*>(m.data) + panel * steps * kStepBytes<K>, x, steps, out + at, stride);
    });
}

}  // namespace

void TARDIS_AVX512_SET::panels_bf16(const TardisMatrix& m, Range rows, const Tokens& x, float* out, int64_t stride) {
    product<Bf16Panel>(m, rows, x, out, stride);
}

void TARDIS_AVX512_SET::panels_fp16(const TardisMatrix& m, Range rows, const Tokens& x, float* out, int64_t stride) {
    product<Fp16Panel>(m, rows, x, out, stride);
}

}  // namespace tardis
#endif
