// Loops over registers, for files that are compiled for one instruction set.
#pragma once

#define TARDIS_INLINE __attribute__((always_inline))

namespace tardis {
namespace {

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
