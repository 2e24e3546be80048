/* Sorted codes in arrays: searching, splicing and sorting them. */
#ifndef DORAEMON_ARRAYS_H
#define DORAEMON_ARRAYS_H

#include <stdint.h>
#include <string.h>

#include "_portable.h"

enum { CHUNK = 128 }; /* bytes that are copied at once */

/* The number of `n` sorted codes below `q`, without branches on their values. */
static inline int64_t below(const uint64_t *codes, int64_t n, uint64_t q)
{
    const uint64_t *at = codes;
    while (n > 1) {
        int64_t half = n >> 1;
        at += half & -(int64_t)(at[half - 1] < q);
        n -= half;
    }
    return (at - codes) + (n == 1 && *at < q);
}

/* Exponential search from `from` for the first position in [start, end] whose key is not below `q`. */
static int64_t gallop(const uint64_t *keys, int64_t start, int64_t end, int64_t from, uint64_t q)
{
    int64_t step = 1, low, high;
    if (from < end && keys[from] < q) {
        low = from + 1;
        while (low + step - 1 < end && keys[low + step - 1] < q) {
            low += step;
            step <<= 1;
        }
        high = low + step - 1 < end ? low + step - 1 : end;
    } else {
        high = from;
        while (high - step >= start && keys[high - step] >= q) {
            high -= step;
            step <<= 1;
        }
        low = high - step >= start ? high - step + 1 : start;
    }
    return low + below(keys + low, high - low, q);
}

/* ------------------------------------------------------------------ splice */

/* memcpy of a gap between two items is often short and never as long as the one before, and a loop that ends where it
 * ends is mispredicted. Whole chunks are copied instead, if there is room after them for what is not meant. */
static inline void copy_gap(char *to, const char *from, size_t bytes, size_t room)
{
    if (bytes > 4 * CHUNK || bytes + CHUNK > room) {
        memcpy(to, from, bytes);
        return;
    }
    size_t copied = 0;
    do {
        memcpy(to + copied, from + copied, CHUNK);
        copied += CHUNK;
    } while (copied < bytes);
}

static inline void copy_item(char *to, const char *from, size_t size)
{
    if (size == 8)
        memcpy(to, from, 8);
    else
        memcpy(to, from, size);
}

/* `old` with the m items of `more`, the j-th of them at[j] in `out`; 0 if these places are not ascending in it. */
WIDE static int splice_items(const char *old, int64_t n, const int64_t *at, const char *more, int64_t m, size_t size,
                        char *out)
{
    int64_t taken = 0, filled = 0;
    for (int64_t j = 0; j < m; j++) {
        int64_t gap = at[j] - filled;
        if (gap < 0 || gap > n - taken)
            return 0;
        copy_gap(out + (size_t)filled * size, old + (size_t)taken * size, (size_t)gap * size, (size_t)(n - taken) * size);
        taken += gap;
        copy_item(out + (size_t)at[j] * size, more + (size_t)j * size, size);
        filled = at[j] + 1;
    }
    memcpy(out + (size_t)filled * size, old + (size_t)taken * size, (size_t)(n - taken) * size);
    return 1;
}

/* ------------------------------------------------------------------ sort */

enum { DIGITS = 8, DIGIT_BITS = 8, DIGIT_VALUES = 1 << DIGIT_BITS };

static inline int digit_of(uint64_t code, int digit) { return (int)(code >> (digit * DIGIT_BITS) & (DIGIT_VALUES - 1)); }

/* Sort n codes by one digit after the other, the lowest first, to and fro between two arrays. A digit that all codes share
 * is left out. Where they are in the end. */
static uint64_t *sort_codes(uint64_t *codes, uint64_t *spare, int64_t n)
{
    int64_t counts[DIGITS][DIGIT_VALUES] = {{0}};
    for (int64_t i = 0; i < n; i++)
        for (int digit = 0; digit < DIGITS; digit++)
            counts[digit][digit_of(codes[i], digit)]++;
    for (int digit = 0; n > 0 && digit < DIGITS; digit++) {
        int64_t *place = counts[digit], before = 0;
        if (place[digit_of(codes[0], digit)] == n)
            continue;
        for (int value = 0; value < DIGIT_VALUES; value++) {
            int64_t many = place[value];
            place[value] = before;
            before += many;
        }
        for (int64_t i = 0; i < n; i++)
            spare[place[digit_of(codes[i], digit)]++] = codes[i];
        uint64_t *sorted = spare;
        spare = codes;
        codes = sorted;
    }
    return codes;
}

#endif
