/* Groups: queries that go through the model together, so that many wait for memory at once and no branch depends on one. */
#ifndef DORAEMON_GROUPS_H
#define DORAEMON_GROUPS_H

#include <stdint.h>

#include "_search.h"

enum { SHORT = 16 }; /* keys of a window, above which it is halved by itself */

/* The number of `n` sorted codes below each of up to GROUP queries, in step: comparisons do not wait for each other. */
static inline void group_below(const uint64_t *codes, int64_t n, const uint64_t *q, int64_t m, int64_t *out)
{
    const uint64_t *at[GROUP];
    for (int64_t i = 0; i < m; i++)
        at[i] = codes;
    for (; n > 1; n -= n >> 1) {
        int64_t half = n >> 1;
        for (int64_t i = 0; i < m; i++)
            at[i] += half & -(int64_t)(at[i][half - 1] < q[i]);
    }
    for (int64_t i = 0; i < m; i++)
        out[i] = (at[i] - codes) + (n == 1 && *at[i] < q[i]);
}

/* The rank of `q`, which was searched for in the window [low, low + size] and found to be `at` there. */
static inline int64_t checked(const Search *s, const Bucket *bucket, int64_t low, int64_t size, int64_t at, uint64_t q)
{
    int64_t start = bucket->start, end = bucket[1].start;
    if (at == low && low > start && s->keys[low - 1] >= q)
        return gallop(s->keys, start, end, low - 1, q);
    if (at == low + size && at < end && s->keys[at] < q)
        return gallop(s->keys, start, end, at, q);
    return at;
}

/* Up to GROUP queries on their way through the model. */
typedef struct {
    uint64_t q[GROUP];
    const Bucket *bucket[GROUP];
    const Leaf *leaf[GROUP];
    double fraction[GROUP];
    int64_t low[GROUP], high[GROUP], m;
    Told told[GROUP]; /* where leaves tell */
} Group;

/* The three stages of a group. Each asks memory for what the next one reads, and other groups' stages go in between. */
static inline void find_leaves(const Search *s, Group *g)
{
    group_below(s->bounds + 1, s->n_buckets - 1, g->q, g->m, g->low);
    for (int64_t i = 0; i < g->m; i++) {
        g->bucket[i] = s->buckets + g->low[i];
        g->leaf[i] = leaf_of(s, g->bucket[i], g->q[i], g->fraction + i);
        PREFETCH(g->leaf[i]);
    }
}

static inline void find_windows(const Search *s, Group *g)
{
    for (int64_t i = 0; i < g->m; i++) {
        int64_t start = g->bucket[i]->start, depth = g->bucket[i][1].start - start;
        double centre = (double)g->leaf[i]->base + (double)g->leaf[i]->slope * g->fraction[i];
        double radius = (double)g->leaf[i]->radius;
        g->low[i] = start + clamp(centre - radius, depth);
        g->high[i] = start + clamp(centre + radius + 1.0, depth);
        PREFETCH(s->keys + g->low[i]);
        PREFETCH(s->keys + ((g->low[i] + g->high[i]) >> 1));
        PREFETCH(s->keys + g->high[i]);
    }
    for (int64_t i = 0; leaves_tell(s) && i < g->m; i++)
        g->told[i] = told_by_leaf(g->leaf[i], g->fraction[i]);
    for (int d = leaves_tell(s) ? DELTAS : 0; d < DELTAS; d++)
        for (int64_t i = 0; s->deltas[d].n && i < g->m; i++)
            PREFETCH(s->deltas[d].summaries + window_of(s->deltas + d, g->low[i]));
}

/* Halve the long windows, all of them in step, until none is longer than SHORT; the length of the longest then. */
static inline int64_t halve_long(const uint64_t *keys, Group *g)
{
    int64_t wide[GROUP], left[GROUP], n_left = 0, longest = 1;
    for (int64_t i = 0; i < g->m; i++) {
        wide[i] = g->high[i] - g->low[i];
        left[n_left] = i;
        n_left += wide[i] > SHORT;
    }
    while (n_left > 0) {
        int64_t still = 0;
        for (int64_t j = 0; j < n_left; j++) {
            int64_t i = left[j], half = wide[i] >> 1;
            g->low[i] += half & -(int64_t)(keys[g->low[i] + half - 1] < g->q[i]);
            wide[i] -= half;
            PREFETCH(keys + g->low[i] + (wide[i] >> 1) - 1);
            left[still] = i;
            still += wide[i] > SHORT;
        }
        n_left = still;
    }
    for (int64_t i = 0; i < g->m; i++)
        longest = wide[i] > longest ? wide[i] : longest;
    return longest;
}

/* Windows are made equally long, so that no branch depends on a query. */
static inline void search_windows(const Search *s, Group *g, int64_t *out)
{
    const uint64_t *keys = s->keys, *q = g->q;
    int64_t *low = g->low, size = halve_long(keys, g);
    size = size < s->n ? size : s->n;
    for (int64_t i = 0; i < g->m; i++)
        out[i] = low[i] = low[i] < s->n - size ? low[i] : s->n - size;
    for (int64_t n = size; n > 1; n -= n >> 1) {
        int64_t half = n >> 1;
        for (int64_t i = 0; i < g->m; i++)
            out[i] += half & -(int64_t)(keys[out[i] + half - 1] < q[i]);
    }
    for (int64_t i = 0; i < g->m; i++) {
        out[i] += keys[out[i]] < q[i];
        out[i] = checked(s, g->bucket[i], low[i], size, out[i], q[i]);
    }
}

/* Ranks without a model, for arrays too small or too young to have one. */
WIDE static void ranks_many(const uint64_t *codes, int64_t n, const uint64_t *queries, int64_t m, int right,
                            int64_t *out)
{
    uint64_t q[GROUP];
    for (int64_t first = 0; first < m; first += GROUP) {
        int64_t size = m - first < GROUP ? m - first : GROUP;
        for (int64_t i = 0; i < size; i++)
            q[i] = queries[first + i] + (uint64_t)right;
        group_below(codes, n, q, size, out + first);
        for (int64_t i = 0; right && i < size; i++)
            out[first + i] = q[i] == 0 ? n : out[first + i];
    }
}

#endif
