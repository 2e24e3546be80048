// What files for the instruction sets of x86 share: loops over registers, and fetching from memory.
#pragma once
#include <immintrin.h>

namespace tardis {
namespace {

#define TARDIS_INLINE __attribute__((always_inline))

// GCC drops calls of a function that only prefetches, unless they are inlined from the start.
inline TARDIS_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// Into the second cache only, which can wait for more lines at once than the first.
inline TARDIS_INLINE void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// Loops over registers, which only stay in registers if their numbers are constants for the compiler from the start.
template <int N>
struct Constant {
    constexpr operator int() const { return N; }
};

template <int... k>
struct Each {
    template <typename F>
    TARDIS_INLINE void operator()(const F& body) const {
        (body(Constant<k>{}), ...);
    }
};

// 0, ..., N - 1.
template <int N, int... k>
struct Numbers : Numbers<N - 1, N - 1, k...> {};
template <int... k>
struct Numbers<0, k...> {
    static constexpr Each<k...> each{};
};

// each<N>(body): body(0), ..., body(N - 1). In one function: compilers go over a body again for each that it gets into.
template <int N>
constexpr auto each = Numbers<N>::each;

}  // namespace
}  // namespace tardis
