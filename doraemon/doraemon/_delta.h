/* Deltas: sorted changes of a run, and how they are found once a code's rank in the run is known.
 *
 * A window of ranks tells which entries there may be, and a summary of each window what most queries need to know of it.
 */
#ifndef DORAEMON_DELTA_H
#define DORAEMON_DELTA_H

#include <stdint.h>
#include <string.h>

#include "_arrays.h"
#include "_portable.h"

enum { FEW = 4 }; /* entries that are compared at once */
enum { CELLS = 32, CELL_BITS = 5, TWIN_BITS = 6, NO_TWIN = 63, UNKNOWN = INT32_MIN };
enum { GROUP = 64 }; /* queries that are searched for together */

/* A change of a delta. */
typedef struct {
    uint64_t code;
    int64_t found; /* by how much the entries before this one shift ranks, twice, and 1 more if the code is in the index */
} Entry;

/* What most queries need to know of a window of a delta: which of its CELLS parts have entries, the shift of those before
 * the window, and which cell has two entries, if one has. UNKNOWN stands where that is not all: where more have two, one
 * has more, or an entry shifts by another number than 1. */
typedef struct {
    uint32_t marks;
    int32_t shift; /* << TWIN_BITS | the cell of two */
} Summary;

/* The changes of a delta. The rank of a code in the run tells between which of them its own is: `windows[b]` of them
 * have ranks below b << bits, and the last window takes all that are left. */
typedef struct {
    const Entry *entries; /* n, and FEW that are above every code and have the shift of all */
    const int64_t *left;  /* where each code is, or would be, in the run */
    const uint32_t *windows;
    const Summary *summaries; /* one for each window */
    int64_t n, last_window;
    int bits;
} Delta;

INLINE int64_t window_of(const Delta *delta, int64_t rank)
{
    int64_t window = rank >> delta->bits;
    return window < delta->last_window ? window : delta->last_window;
}

/* Which cell of a window of 1 << bits ranks one is in that lies so far after its first; CELLS after the last. */
INLINE int64_t cell_of(int64_t after, int bits)
{
    int64_t cell = after >> (bits > CELL_BITS ? bits - CELL_BITS : 0);
    return cell < CELLS ? cell : CELLS;
}

/* What a delta's summary tells of the changes below a code whose rank in the run is known. */
typedef struct {
    int64_t shift; /* where it is `known`: entries of cells before the code's are below the code */
    int known, marked; /* only where the code's cell is marked there may be an entry of it */
} Told;

INLINE Told told_by(const Delta *delta, int64_t rank)
{
    int64_t window = window_of(delta, rank), cell = cell_of(rank - (window << delta->bits), delta->bits);
    Summary summary = delta->summaries[window];
    uint64_t marks = summary.marks;
    int marked = (int)(marks >> cell & 1);
    int64_t before = COUNT_BITS(marks & ((UINT64_C(1) << cell) - 1)) + (cell > (summary.shift & NO_TWIN));
    return (Told){(summary.shift >> TWIN_BITS) + before, !marked & (summary.shift != UNKNOWN), marked};
}

/* The number of `n` entries whose codes are below `q`, without branches on their values. */
static inline int64_t entries_below(const Entry *entries, int64_t n, uint64_t q)
{
    const Entry *at = entries;
    while (n > 1) {
        int64_t half = n >> 1;
        at += half & -(int64_t)(at[half - 1].code < q);
        n -= half;
    }
    return (at - entries) + (n == 1 && at->code < q);
}

/* The number of a delta's codes below `q`, whose rank in the run is known. */
static inline int64_t entry_of(const Delta *delta, uint64_t q, int64_t rank)
{
    const uint32_t *window = delta->windows + window_of(delta, rank);
    return window[0] + entries_below(delta->entries + window[0], (int64_t)window[1] - window[0], q);
}

/* By how much the first `entry` entries of a delta shift ranks, and all of them. */
static inline int64_t shift_at(const Delta *delta, int64_t entry) { return delta->entries[entry].found >> 1; }
static inline int64_t whole_shift(const Delta *delta) { return shift_at(delta, delta->n); }

/* By how much a delta shifts the rank of `q`, whose rank in the run is known. */
static inline int64_t shift_of(const Delta *delta, uint64_t q, int64_t rank)
{
    Told told = told_by(delta, rank);
    return told.known ? told.shift : shift_at(delta, entry_of(delta, q, rank));
}

/* The number of a delta's entry for a code whose rank in the run is known, if it has one; else that of another, or n. */
static inline int64_t entry_for(const Delta *delta, uint64_t code, int64_t rank)
{
    return told_by(delta, rank).marked ? entry_of(delta, code, rank) : delta->n;
}

static inline int has_entry(const Delta *delta, int64_t entry, uint64_t code)
{
    return entry < delta->n && delta->entries[entry].code == code;
}

/* By how much an entry changes the number of keys of its code. */
static inline int64_t net_of(const Delta *delta, int64_t entry)
{
    return shift_at(delta, entry + 1) - shift_at(delta, entry);
}

/* How many of a delta's codes are below each of m queries, whose ranks in the run are known: memory is asked for all of
 * them before one is searched. Most windows have few entries, which are compared without a branch on their codes; those
 * after the window are not below the query, and after the last one are as many that are below nothing. */
INLINE void find_entries(const Delta *delta, const uint64_t *q, const int64_t *rank, int64_t m, int64_t *entry)
{
    int64_t wide[GROUP];
    for (int64_t i = 0; i < m; i++) {
        const uint32_t *window = delta->windows + window_of(delta, rank[i]);
        entry[i] = window[0];
        wide[i] = (int64_t)window[1] - window[0];
        PREFETCH(delta->entries + window[0]);
        PREFETCH(delta->entries + window[0] + FEW - 1);
    }
    for (int64_t i = 0; i < m; i++) {
        const Entry *at = delta->entries + entry[i];
        if (wide[i] <= FEW)
            for (int j = 0; j < FEW; j++)
                entry[i] += at[j].code < q[i];
        else
            entry[i] += entries_below(at, wide[i], q[i]);
    }
}

/* ------------------------------------------------------------------ making them */

/* How many of a delta's codes are below each of m queries, whose ranks in the run are known. */
static void windowed_below(const uint64_t *codes, const Delta *delta, const uint64_t *q, const int64_t *rank, int64_t m,
                           int64_t *out)
{
    for (int64_t first = 0; first < m; first += GROUP) {
        int64_t end = m - first < GROUP ? m : first + GROUP;
        for (int64_t i = first; i < end; i++)
            PREFETCH(delta->windows + window_of(delta, rank[i]));
        for (int64_t i = first; i < end; i++)
            PREFETCH(codes + delta->windows[window_of(delta, rank[i])]);
        for (int64_t i = first; i < end; i++) {
            const uint32_t *window = delta->windows + window_of(delta, rank[i]);
            out[i] = window[0] + below(codes + window[0], (int64_t)window[1] - window[0], q[i]);
        }
    }
}

static void pack_entries(const uint64_t *codes, const int64_t *net, const int64_t *present, int64_t n, Entry *out)
{
    int64_t shift = 0;
    for (int64_t i = 0; i < n; i++) {
        out[i] = (Entry){codes[i], 2 * shift + (present[i] + net[i] > 0)};
        shift += net[i];
    }
    for (int64_t i = n; i < n + FEW; i++)
        out[i] = (Entry){UINT64_MAX, 2 * shift};
}

/* windows[b]: how many of the ranks, which ascend, are below b << bits; the last window ends after all of them. First each
 * entry is noted where it lies, which takes no branch that is hard to foresee, then counts are carried on. */
static void fill_windows(Delta delta, uint32_t *windows)
{
    int64_t count = delta.last_window + 1;
    memset(windows, 0, ((size_t)count + 1) * sizeof *windows);
    for (int64_t i = 0; i < delta.n; i++)
        windows[window_of(&delta, delta.left[i]) + 1] = (uint32_t)i + 1;
    for (int64_t b = 0; b < count; b++)
        windows[b + 1] = windows[b + 1] > windows[b] ? windows[b + 1] : windows[b];
}

static void sum_up_windows(const int64_t *net, Delta delta, Summary *summaries)
{
    int64_t count = delta.last_window + 1;
    for (int64_t b = 0; b < count; b++)
        summaries[b] = (Summary){0, NO_TWIN};
    for (int64_t i = 0; i < delta.n; i++) {
        int64_t b = window_of(&delta, delta.left[i]), cell = cell_of(delta.left[i] - (b << delta.bits), delta.bits);
        uint32_t mark = UINT32_C(1) << (cell < CELLS ? cell : CELLS - 1);
        if (summaries[b].marks & mark)
            summaries[b].shift = summaries[b].shift == NO_TWIN ? (int32_t)cell : UNKNOWN;
        if (net[i] != 1)
            summaries[b].shift = UNKNOWN;
        summaries[b].marks |= mark;
    }
    for (int64_t b = 0; b < count; b++) {
        int64_t shift = shift_at(&delta, delta.windows[b]);
        int known = summaries[b].shift != UNKNOWN && shift > UNKNOWN >> TWIN_BITS && shift <= INT32_MAX >> TWIN_BITS;
        summaries[b].shift = known ? (int32_t)(shift * (1 << TWIN_BITS)) + summaries[b].shift : UNKNOWN;
    }
}

#endif
