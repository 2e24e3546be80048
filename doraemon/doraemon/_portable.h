/* What compilers other than GCC and Clang say differently, or not at all. */
#ifndef DORAEMON_PORTABLE_H
#define DORAEMON_PORTABLE_H

#include <stdint.h>

#if defined(__GNUC__) || defined(__clang__)
#define INLINE static inline __attribute__((always_inline))
#define PREFETCH(address) __builtin_prefetch(address)
#define COUNT_BITS(bits) __builtin_popcountll(bits)
#define LOAD(address) __atomic_load_n(address, __ATOMIC_RELAXED)
#define STORE(address, value) __atomic_store_n(address, value, __ATOMIC_RELAXED)
#define TRY_LOCK(address) (!__atomic_exchange_n(address, 1, __ATOMIC_ACQUIRE))
#define UNLOCK(address) __atomic_store_n(address, 0, __ATOMIC_RELEASE)
#else
#define INLINE static inline
#define PREFETCH(address) ((void)0)
#define COUNT_BITS(bits) count_bits(bits)
#define LOAD(address) (*(volatile uint64_t *)(address))
#define STORE(address, value) (*(volatile uint64_t *)(address) = (value))
#ifdef _MSC_VER
#include <intrin.h>
#define TRY_LOCK(address) (!_InterlockedExchange64((volatile __int64 *)(address), 1))
#define UNLOCK(address) ((void)_InterlockedExchange64((volatile __int64 *)(address), 0))
#else
#define TRY_LOCK(address) ((void)(address), 0) /* never, as nothing is known that would be safe */
#define UNLOCK(address) ((void)(address))
#endif
#endif

/* How many bits of a number are 1. */
static inline int count_bits(uint64_t bits)
{
    int count = 0;
    for (; bits; bits &= bits - 1)
        count++;
    return count;
}

/* Loops over many keys are compiled for processors with AVX2 as well, where the C library can choose at run time. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define WIDE __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define WIDE
#endif

#endif
