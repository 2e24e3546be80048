/* The search: what it reads, and one query on its way.
 *
 * Why no answer depends on the model: the root search places a query q between two bucket boundaries by comparing
 * keys, so that start <= rank(q) <= end holds whatever the leaves say. The leaf's window inside it is only a guess,
 * and where the search ends on the window's edge, the key beyond the edge is compared too.
 */
#ifndef DORAEMON_SEARCH_H
#define DORAEMON_SEARCH_H

#include <stdint.h>

#include "_arrays.h"
#include "_delta.h"
#include "_hot.h"
#include "_portable.h"

enum { DELTAS = 2, PLACE_SHIFT = 8 }; /* of the deltas the older, larger one comes first */
enum { LEAF_CELLS = 64, UNTOLD = -1 };

typedef struct {
    uint64_t low;   /* the bucket's first code */
    double scale;   /* leaves per unit of code */
    int64_t start;  /* position of its first key in the run */
    uint64_t place; /* its first leaf << PLACE_SHIFT | log2 of the number of its leaves */
} Bucket;

typedef struct {
    float base, slope; /* position after `start` = base + slope * (fraction of the leaf's width) */
    float radius;      /* the true position is that far away at most, for keys in the run */
} Leaf;

/* A leaf, and what most queries in it need to know of both deltas: which of its LEAF_CELLS parts of equal width have entries,
 * the shift of those before the leaf, and which part has two entries, if one has. UNTOLD stands where that is not all: see
 * Summary. A code's leaf and part grow with the code, so that entries of parts before a query's are below it. */
typedef struct {
    Leaf leaf;
    int32_t shift;
    uint64_t marks;
    int32_t twin, noted; /* what is noted is for those who make it */
} ChangedLeaf;

typedef struct {
    const uint64_t *keys, *bounds; /* codes: of the run, of each bucket's first key */
    const Bucket *buckets;
    const char *leaves;
    int64_t leaf_size; /* that of a ChangedLeaf where leaves tell of the deltas */
    Delta deltas[DELTAS];
    Hot hot;
    Learner learner; /* without lines where there is no table */
    uint64_t *samples, *taken; /* one code in `sampling` of those asked for, in a ring, and how many so far */
    int64_t n, n_buckets;
    uint64_t sampling, ring, random; /* `ring` is the number of samples that there is room for, less 1 */
} Search;

/* Where a code lies: whether anywhere, whether in the run (0) or in which delta (from 1 on), and its position there. */
typedef struct {
    int present, layer;
    int64_t position;
} Place;

/* How many keys the run and its deltas have. */
static inline int64_t length_of(const Search *s)
{
    return s->n + whole_shift(s->deltas) + whole_shift(s->deltas + 1);
}

static inline int64_t first_row(const Bucket *bucket) { return (int64_t)(bucket->place >> PLACE_SHIFT); }

static inline int64_t leaves_in(const Bucket *bucket)
{
    return (int64_t)1 << (bucket->place & ((1 << PLACE_SHIFT) - 1));
}

/* The leaf that serves `q` in the bucket, and where in the leaf it falls. */
static inline const Leaf *leaf_of(const Search *s, const Bucket *bucket, uint64_t q, double *fraction)
{
    double leaves = (double)leaves_in(bucket);
    double t = (double)(q > bucket->low ? q - bucket->low : 0) * bucket->scale;
    t = t < leaves ? t : leaves;
    int64_t leaf = t < leaves ? (int64_t)t : (int64_t)leaves - 1;
    *fraction = t - (double)leaf;
    return (const Leaf *)(s->leaves + (first_row(bucket) + leaf) * s->leaf_size);
}

static inline int leaves_tell(const Search *s) { return s->leaf_size == sizeof(ChangedLeaf); }

INLINE int64_t leaf_cell(double fraction)
{
    int64_t cell = (int64_t)(fraction * LEAF_CELLS);
    return cell < LEAF_CELLS ? cell : LEAF_CELLS - 1;
}

INLINE Told told_by_leaf(const Leaf *leaf, double fraction)
{
    const ChangedLeaf *changed = (const ChangedLeaf *)leaf;
    int64_t cell = leaf_cell(fraction);
    int marked = (int)(changed->marks >> cell & 1);
    int64_t before = COUNT_BITS(changed->marks & ((UINT64_C(1) << cell) - 1)) + (cell > changed->twin);
    return (Told){changed->shift + before, !marked & (changed->twin != UNTOLD), marked};
}

static inline int64_t clamp(double position, int64_t depth)
{
    return position > 0.0 ? (position < (double)depth ? (int64_t)position : depth) : 0;
}

static inline uint64_t next_random(uint64_t random)
{
    return random * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
}

/* A number below `sampling`, each as likely. */
static inline int64_t draw(const Search *s, uint64_t random)
{
    return (int64_t)((random >> 32) * s->sampling >> 32);
}

/* One code in `sampling` is kept, also over short batches. Threads that write to the same places lose samples, but these
 * are only samples; `taken` is read and written once, as it is in one cache at a time. */
static inline void sample_codes(const Search *s, const uint64_t *codes, int64_t m, uint64_t *random)
{
    uint64_t taken = LOAD(s->taken), at = taken;
    for (int64_t first = 0; first < m; first += (int64_t)s->sampling) {
        *random = next_random(*random);
        int64_t sampled = first + draw(s, *random);
        if (sampled < m)
            STORE(s->samples + (at++ & s->ring), codes[sampled]);
    }
    if (at != taken)
        STORE(s->taken, at);
}

static inline void sample_code(Search *s, uint64_t code)
{
    uint64_t random = LOAD(&s->random);
    sample_codes(s, &code, 1, &random);
    STORE(&s->random, random);
}

/* One query, answered with the fewest comparisons: exponential search from the predicted position. What will be read of
 * the deltas, and perhaps of values of `size` bytes `beside` the keys, is asked of memory as soon as that is known. */
static int64_t run_rank_beside(const Search *s, uint64_t q, const char *beside, int64_t size)
{
    double fraction;
    if (s->n == 0)
        return 0;
    const Bucket *bucket = s->buckets + below(s->bounds + 1, s->n_buckets - 1, q);
    const Leaf *leaf = leaf_of(s, bucket, q, &fraction);
    int64_t start = bucket->start, end = bucket[1].start;
    int64_t from = start + clamp((double)leaf->base + (double)leaf->slope * fraction + 0.5, end - start);
    if (beside != NULL)
        PREFETCH(beside + from * size);
    for (int d = 0; d < DELTAS; d++)
        if (s->deltas[d].n)
            PREFETCH(s->deltas[d].summaries + window_of(s->deltas + d, from));
    return gallop(s->keys, start, end, from, q);
}

static int64_t run_rank(const Search *s, uint64_t q) { return run_rank_beside(s, q, NULL, 0); }

static inline int is_in_run(const Search *s, uint64_t q, int64_t rank) { return rank < s->n && s->keys[rank] == q; }

/* How many keys of the run equal `q`, whose rank is known. */
static inline int64_t copies_in_run(const Search *s, uint64_t q, int64_t rank)
{
    if (!is_in_run(s, q, rank))
        return 0;
    if (rank + 1 == s->n || s->keys[rank + 1] != q)
        return 1;
    return q == UINT64_MAX ? s->n - rank : gallop(s->keys, rank, s->n, rank + 1, q + 1) - rank;
}

/* The place of code `q` whose rank in the run is known, and by how many codes of each delta it is preceded. */
static inline Place place_of(const Search *s, uint64_t q, int64_t rank, int in_run, int64_t older, int64_t newer)
{
    if (has_entry(s->deltas + 1, newer, q))
        return (Place){s->deltas[1].entries[newer].found & 1, 2, newer};
    if (has_entry(s->deltas, older, q))
        return (Place){s->deltas[0].entries[older].found & 1, 1, older};
    return (Place){in_run, 0, rank};
}

/* Leaves that tell of the deltas. Each first notes how many entries of each there are up to its last one, then gets the
 * shift of those before its first. */
static void tell_leaves(const Search *plain, ChangedLeaf *out)
{
    Search s = *plain;
    int64_t seen[DELTAS] = {0};
    double fraction;
    s.leaves = (const char *)out;
    s.leaf_size = sizeof *out;
    for (int64_t b = 0; b < s.n_buckets; b++)
        for (int64_t i = 0, row = first_row(s.buckets + b); i < leaves_in(s.buckets + b); i++)
            out[row + i] = (ChangedLeaf){.leaf = ((const Leaf *)plain->leaves)[row + i], .twin = LEAF_CELLS};
    for (int d = 0; d < DELTAS; d++)
        for (int64_t i = 0, b = 0; i < s.deltas[d].n; i++) {
            uint64_t code = s.deltas[d].entries[i].code;
            while (b + 1 < s.n_buckets && s.bounds[b + 1] < code)
                b++;
            ChangedLeaf *leaf = (ChangedLeaf *)leaf_of(&s, s.buckets + b, code, &fraction);
            int32_t cell = (int32_t)leaf_cell(fraction);
            if (leaf->marks >> cell & 1)
                leaf->twin = leaf->twin == LEAF_CELLS ? cell : UNTOLD;
            if (net_of(s.deltas + d, i) != 1)
                leaf->twin = UNTOLD;
            leaf->marks |= UINT64_C(1) << cell;
            *(d == 0 ? &leaf->shift : &leaf->noted) = (int32_t)(i + 1);
        }
    for (int64_t b = 0; b < s.n_buckets; b++)
        for (int64_t i = 0, row = first_row(s.buckets + b); i < leaves_in(s.buckets + b); i++) {
            ChangedLeaf *leaf = out + row + i;
            int64_t shift = shift_at(s.deltas, seen[0]) + shift_at(s.deltas + 1, seen[1]);
            seen[0] = leaf->shift > 0 ? leaf->shift : seen[0];
            seen[1] = leaf->noted > 0 ? leaf->noted : seen[1];
            leaf->shift = (int32_t)shift;
            leaf->twin = leaf->shift == shift ? leaf->twin : UNTOLD;
        }
}

#endif
