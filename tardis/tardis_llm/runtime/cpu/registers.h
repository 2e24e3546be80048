// What files for instruction sets share: loops over registers, and fetching from memory.
#pragma once

namespace tardis {
namespace {

#define TARDIS_INLINE __attribute__((always_inline))

// GCC drops calls of a function that only prefetches, unless they are inlined from the start.
inline TARDIS_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
// Into the second cache only, which can wait for more lines at once than the first.
inline TARDIS_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

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
