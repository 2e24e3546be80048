/* The search and the fit in C.
 *
 * A View is what readers of one state of an index search in: the sorted codes of the immutable run, the model over
 * them, the sorted deltas of changes since, and the table of hot codes that is asked before the model. It borrows
 * NumPy's arrays through the buffer protocol and changes none but `samples`, the codes that were asked for lately.
 *
 * Why no answer depends on the model: the root search places a query q between two bucket boundaries by comparing
 * keys, so that start <= rank(q) <= end holds whatever the leaves say. The leaf's window inside it is only a guess,
 * and where the search ends on the window's edge, the key beyond the edge is compared too.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>

#include "_hot.h"
#include "_portable.h"
#include "_table.h"

enum { GROUP = 64, BLOCK = 32, CHUNK = 128, SHORT = 16, PLACE_SHIFT = 8 };
enum { DELTAS = 2, FEW = 4 };              /* the older, larger one first; entries that are compared at once */
enum { CELLS = 32, CELL_BITS = 5, TWIN_BITS = 6, NO_TWIN = 63, UNKNOWN = INT32_MIN };
enum { LEAF_CELLS = 64, UNTOLD = -1 };
enum { RUN_RANKS, RANKS, PLACES, COUNTS }; /* what a batch asks for */

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

/* ------------------------------------------------------------------ search */

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

/* Where the answers of a batch go: ranks, or places without or with their positions; or ranks in the run with the counts
 * of keys there. */
typedef struct {
    int64_t *ranks, *positions;
    uint8_t *present, *layers;
} Answers;

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

/* Queries whose answers need a delta's entries: of one group, or of several, until there are enough to ask memory for the
 * entries of all at once. `shift` is what was added to the rank of each. */
enum { ENOUGH = 32 };
typedef struct {
    uint64_t q[ENOUGH + GROUP];
    int64_t rank[ENOUGH + GROUP], at[ENOUGH + GROUP], shift[ENOUGH + GROUP], m;
} Few;

/* Give the waiting queries their ranks. */
INLINE void settle(const Delta *delta, Few *few, int right, int64_t *ranks)
{
    int64_t entry[ENOUGH + GROUP];
    for (int64_t first = 0; first < few->m; first += GROUP) {
        int64_t m = few->m - first < GROUP ? few->m - first : GROUP;
        find_entries(delta, few->q + first, few->rank + first, m, entry + first);
    }
    for (int64_t j = 0; j < few->m; j++)
        if (!right || few->q[j] != 0) /* else all was added */
            ranks[few->at[j]] += shift_at(delta, entry[j]) - few->shift[j];
    few->m = 0;
}

/* A query waits for its entry of a delta; so much was added to its rank instead. */
INLINE void wait_for(const Delta *delta, uint64_t q, int64_t rank, int64_t at, int64_t shift, Few *few)
{
    few->q[few->m] = q;
    few->rank[few->m] = rank;
    few->at[few->m] = at;
    few->shift[few->m++] = shift;
    PREFETCH(delta->windows + window_of(delta, rank));
}

/* Add a delta's shifts to the ranks of m queries, whose ranks in the run are known, but for those that have to wait. */
INLINE void add_shifts(const Delta *delta, const uint64_t *q, const int64_t *rank, const int64_t *at, int64_t m, Few *few,
                       int64_t *out)
{
    int64_t which[GROUP], unknown = 0;
    for (int64_t i = 0; i < m; i++) {
        Told told = told_by(delta, rank[i]);
        out[i] += told.shift;
        which[unknown] = i;
        unknown += !told.known;
    }
    for (int64_t j = 0; j < unknown; j++) {
        int64_t i = which[j];
        wait_for(delta, q[i], rank[i], at[i], told_by(delta, rank[i]).shift, few);
    }
}

/* The same of both deltas, where their leaves have `told` of them. */
INLINE void add_told(const Delta *deltas, const uint64_t *q, const int64_t *rank, const Told *told, const int64_t *at,
                     int64_t m, Few *few, int64_t *out)
{
    int64_t which[GROUP], unknown = 0;
    for (int64_t i = 0; i < m; i++) {
        out[i] += told[i].shift;
        which[unknown] = i;
        unknown += !told[i].known;
    }
    for (int64_t j = 0; j < unknown; j++) {
        int64_t i = which[j], shift = told[i].shift;
        for (int d = 0; d < DELTAS; d++)
            if (deltas[d].n) {
                wait_for(deltas + d, q[i], rank[i], at[i], shift, few + d);
                shift = 0;
            }
    }
}

/* Write the ranks of m queries, whose ranks in the run are known, to the places `at`; of those that wait later. */
INLINE void write_ranks(const Search *s, const uint64_t *q, const int64_t *rank, const Told *told, const int64_t *at,
                        int64_t m, int asked, int right, Few *few, int64_t *ranks)
{
    int64_t out[GROUP];
    memcpy(out, rank, (size_t)m * sizeof *out);
    if (asked == RANKS && told != NULL)
        add_told(s->deltas, q, rank, told, at, m, few, out);
    for (int d = 0; asked == RANKS && told == NULL && d < DELTAS; d++)
        if (s->deltas[d].n)
            add_shifts(s->deltas + d, q, rank, at, m, few + d, out);
    for (int64_t i = 0; right && i < m; i++)
        if (q[i] == 0) /* q + 1 wrapped around: everything is left of it */
            out[i] = asked == RANKS ? length_of(s) : s->n;
    for (int64_t i = 0; i < m; i++)
        ranks[at[i]] = out[i];
    for (int d = 0; d < DELTAS; d++)
        if (few[d].m >= ENOUGH)
            settle(s->deltas + d, few + d, right, ranks);
}

static inline void settle_all(const Search *s, Few *few, int right, int64_t *ranks)
{
    for (int d = 0; d < DELTAS; d++)
        settle(s->deltas + d, few + d, right, ranks);
}

/* The numbers of a delta's entries for m codes, as of `entry_for`; what their leaves have `told`, or NULL. */
INLINE void find_entries_for(const Delta *delta, const uint64_t *q, const int64_t *rank, const Told *told, int64_t m,
                             int64_t *entry)
{
    Few few;
    few.m = 0;
    for (int64_t i = 0; i < m; i++)
        entry[i] = delta->n;
    for (int64_t i = 0; delta->n && i < m; i++) {
        few.q[few.m] = q[i];
        few.rank[few.m] = rank[i];
        few.at[few.m] = i;
        few.m += told != NULL ? told[i].marked : told_by(delta, rank[i]).marked;
    }
    find_entries(delta, few.q, few.rank, few.m, few.shift);
    for (int64_t j = 0; j < few.m; j++)
        entry[few.at[j]] = few.shift[j];
}

/* Write what is asked of m queries, whose run ranks are known, to the places `at`. Whether the run has them is known too,
 * or looked up where `in_run` is NULL; and perhaps what their leaves have `told`, else NULL. */
INLINE void write_answers(const Search *s, const uint64_t *q, const int64_t *rank, const uint8_t *in_run,
                          const Told *told, const int64_t *at, int64_t m, int asked, int right, Few *few,
                          const Answers *out)
{
    int64_t entry[DELTAS][GROUP];
    if (asked == RUN_RANKS || asked == RANKS) {
        write_ranks(s, q, rank, told, at, m, asked, right, few, out->ranks);
        return;
    }
    if (asked == COUNTS) {
        for (int64_t i = 0; i < m; i++) {
            out->ranks[at[i]] = rank[i];
            out->positions[at[i]] = copies_in_run(s, q[i], rank[i]);
        }
        return;
    }
    for (int d = 0; d < DELTAS; d++)
        find_entries_for(s->deltas + d, q, rank, told, m, entry[d]);
    for (int64_t i = 0; i < m; i++) {
        int found = in_run != NULL ? in_run[i] : is_in_run(s, q[i], rank[i]);
        Place place = place_of(s, q[i], rank[i], found, entry[0][i], entry[1][i]);
        out->present[at[i]] = (uint8_t)place.present;
        if (out->positions != NULL) {
            out->layers[at[i]] = (uint8_t)place.layer;
            out->positions[at[i]] = place.position;
        }
    }
}

/* A batch that all goes through the model. */
WIDE static void search_model(Search *s, int asked, int right, const uint64_t *codes, int64_t m, const Answers *out)
{
    Group groups[2];
    Few few[DELTAS];
    int64_t at[GROUP], rank[GROUP] = {0}; /* of everything in an empty run */
    uint64_t random = LOAD(&s->random);
    few[0].m = few[1].m = 0;
    for (int64_t i = 0; i < GROUP; i++)
        at[i] = i;
    for (int64_t first = 0; first < m + GROUP; first += GROUP) {
        Group *next = groups + (first / GROUP & 1), *last = groups + !(first / GROUP & 1);
        next->m = m - first < GROUP ? m - first : GROUP;
        for (int64_t i = 0; i < next->m; i++)
            next->q[i] = codes[first + i] + (uint64_t)right; /* codes are whole: right of q is left of q + 1 */
        if (asked == RANKS || asked == PLACES) /* the others writers ask for */
            sample_codes(s, codes + first, next->m, &random);
        if (s->n && next->m > 0)
            find_leaves(s, next);
        if (first > 0) {
            if (s->n)
                search_windows(s, last, rank);
            const Told *told = leaves_tell(s) ? last->told : NULL;
            write_answers(s, last->q, rank, NULL, told, at, last->m, asked, right, few, out);
            for (int64_t i = 0; i < GROUP; i++)
                at[i] += GROUP;
        }
        if (s->n && next->m > 0)
            find_windows(s, next);
    }
    settle_all(s, few, right, out->ranks);
    STORE(&s->random, random);
}

/* Queries of a batch with their places in it: those that the hot table answered, or those that wait for the model. */
typedef struct {
    uint64_t q[GROUP + BLOCK];
    int64_t at[GROUP + BLOCK], rank[GROUP + BLOCK], m;
    uint8_t in_run[GROUP + BLOCK];
} Picked;

/* Ask the hot table for the next m codes. Both lists are written for every code, and only one of them grows. */
static inline void ask_hot(Hot hot, int right, const uint64_t *codes, int64_t first, int64_t m, Picked *hits,
                           Picked *misses)
{
    int64_t hit = 0, missed = misses->m;
    for (int64_t i = first; i < first + m; i++) {
        const Line *line = line_of(hot, codes[i]);
        int slot = slot_of(line, codes[i]), equal = line->code[slot] == codes[i];
        uint64_t found = line->found[slot];
        hits->q[hit] = misses->q[missed] = codes[i] + (uint64_t)right;
        hits->at[hit] = misses->at[missed] = i;
        hits->rank[hit] = rank_in(found) + (right ? copies_in(found) : 0);
        hits->in_run[hit] = copies_in(found) > 0;
        hit += equal;
        missed += !equal;
    }
    hits->m = hit;
    misses->m = missed;
}

/* The same where nothing but the rank in the run is asked for, which is written at once; misses write over it later. */
static inline void ask_hot_ranks(Hot hot, int right, const uint64_t *codes, int64_t first, int64_t m, int64_t *ranks,
                                 Picked *misses)
{
    int64_t missed = misses->m;
    for (int64_t i = first; i < first + m; i++) {
        const Line *line = line_of(hot, codes[i]);
        int slot = slot_of(line, codes[i]);
        uint64_t found = line->found[slot];
        ranks[i] = rank_in(found) + (right ? copies_in(found) : 0);
        misses->q[missed] = codes[i] + (uint64_t)right;
        misses->at[missed] = i;
        missed += line->code[slot] != codes[i];
    }
    misses->m = missed;
}

/* Codes that a table is to learn, and how many keys are below each or, `right`, not above it. */
typedef struct {
    uint64_t q[GROUP];
    int64_t rank[GROUP], m;
} Lesson;

/* The table learns the code of a query if the run has one key of it. */
static inline void learn_found(const Search *s, uint64_t q, int64_t rank, int right)
{
    const uint64_t *keys = s->keys;
    uint64_t code = q - (uint64_t)right;
    int64_t at = rank - right;
    if (0 <= at && at < s->learner.reach && keys[at] == code && (at == 0 || keys[at - 1] != code) &&
        (at + 1 == s->n || keys[at + 1] != code))
        learn_code(s->learner.lines, s->hot.n_lines, code, at);
}

static inline void learn(const Search *s, Lesson *lesson, int right)
{
    for (int64_t i = 0; i < lesson->m; i++)
        learn_found(s, lesson->q[i], lesson->rank[i], right);
    lesson->m = 0;
}

/* Note a group that was searched, and ask memory for what learning it will read: a key's neighbours may be in other lines
 * of the cache. */
static inline void prepare_lesson(const Search *s, const Group *g, const int64_t *rank, int right, Lesson *lesson)
{
    lesson->m = g->m;
    memcpy(lesson->q, g->q, (size_t)g->m * sizeof *g->q);
    memcpy(lesson->rank, rank, (size_t)g->m * sizeof *rank);
    for (int64_t i = 0; i < g->m; i++) {
        PREFETCH(s->learner.lines + line_number(g->q[i] - (uint64_t)right, s->hot.n_lines));
        PREFETCH(s->keys + rank[i] - (rank[i] > right ? right + 1 : 0));
        PREFETCH(s->keys + rank[i] + 1 - right);
    }
}

/* The first GROUP misses, or as many as there are, become a group. */
static inline void take_group(Picked *misses, Group *g, int64_t *at)
{
    g->m = misses->m < GROUP ? misses->m : GROUP;
    memcpy(g->q, misses->q, (size_t)g->m * sizeof *g->q);
    memcpy(at, misses->at, (size_t)g->m * sizeof *at);
    misses->m -= g->m;
    memmove(misses->q, misses->q + g->m, (size_t)misses->m * sizeof *g->q);
    memmove(misses->at, misses->at + g->m, (size_t)misses->m * sizeof *at);
}

/* A batch that asks the hot table first, that which learns if it can be had. Misses are gathered into groups for the
 * model, and while a group waits for memory the table is asked on. */
WIDE static void search_hot(Search *s, int asked, int right, const uint64_t *codes, int64_t m, const Answers *out)
{
    Group groups[2];
    Picked hits, misses;
    Lesson lesson;
    Few few[DELTAS];
    int64_t at[2][GROUP], rank[GROUP], done = 0, noted = 0;
    int learns = take_learner(s->learner);
    Hot hot = {learns ? s->learner.lines : s->hot.lines, s->hot.n_lines, 0};
    int turn = 0, only_ranks = asked == RUN_RANKS || (asked == RANKS && s->deltas[0].n + s->deltas[1].n == 0);
    uint64_t random = LOAD(&s->random);
    groups[1].m = misses.m = lesson.m = few[0].m = few[1].m = 0;
    do {
        Group *next = groups + turn, *last = groups + !turn;
        while (done < m && misses.m < GROUP) {
            int64_t size = m - done < BLOCK ? m - done : BLOCK, after = m - done - size;
            for (int64_t i = 0; i < (after < BLOCK ? after : BLOCK); i++)
                PREFETCH(line_of(hot, codes[done + size + i]));
            if (asked != RUN_RANKS)
                sample_codes(s, codes + done, size, &random);
            hits.m = 0;
            if (only_ranks)
                ask_hot_ranks(hot, right, codes, done, size, out->ranks, &misses);
            else
                ask_hot(hot, right, codes, done, size, &hits, &misses);
            if (hits.m)
                write_answers(s, hits.q, hits.rank, hits.in_run, NULL, hits.at, hits.m, asked, right, few, out);
            done += size;
        }
        take_group(&misses, next, at[turn]);
        if (next->m)
            find_leaves(s, next);
        if (last->m) {
            search_windows(s, last, rank);
            const Told *told = leaves_tell(s) ? last->told : NULL;
            write_answers(s, last->q, rank, NULL, told, at[!turn], last->m, asked, right, few, out);
            if (learns) {
                learn(s, &lesson, right);
                if (wants_lesson(s->learner, done - noted, last->m))
                    prepare_lesson(s, last, rank, right, &lesson);
                noted = done;
            }
        }
        if (next->m)
            find_windows(s, next);
        turn = !turn;
    } while (done < m || misses.m || groups[!turn].m);
    settle_all(s, few, right, out->ranks);
    if (learns) {
        learn(s, &lesson, right);
        wants_lesson(s->learner, m - noted, 0);
        leave_learner(s->learner);
    }
    STORE(&s->random, random);
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

/* Whether every key of the run lies within the error bound that its leaf states. */
static int within_error_bounds(const Search *s)
{
    for (int64_t b = 0; b < s->n_buckets; b++) {
        const Bucket *bucket = s->buckets + b;
        for (int64_t i = bucket->start; i < bucket[1].start; i++) {
            double fraction;
            if (i > bucket->start && s->keys[i] == s->keys[i - 1])
                continue;
            const Leaf *leaf = leaf_of(s, bucket, s->keys[i], &fraction);
            double predicted = (double)leaf->base + (double)leaf->slope * fraction;
            if (!(fabs(predicted - (double)(i - bucket->start)) <= (double)leaf->radius))
                return 0;
        }
    }
    return 1;
}

/* ------------------------------------------------------------------ fit */

/* The least-squares line through m points (f, r), moved so that it errs as much above as below. Sums are taken from the
 * first point on: keys of one leaf may differ in the last digits only. */
static inline Leaf fit_leaf(const double *f, const double *r, int64_t m, double steepest)
{
    double sf = 0, sr = 0, sff = 0, sfr = 0, least = INFINITY, most = -INFINITY;
    for (int64_t i = 1; i < m; i++) {
        double df = f[i] - f[0], dr = r[i] - r[0];
        sf += df;
        sr += dr;
        sff += df * df;
        sfr += df * dr;
    }
    double ff = sff - sf * sf / (double)m, fr = sfr - sf * sr / (double)m;
    double steep = ff > 0 ? fr / ff : 0.0;
    float slope = (float)(steep < steepest ? steep : steepest);
    for (int64_t i = 0; i < m; i++) {
        double rest = r[i] - (double)slope * f[i];
        least = rest < least ? rest : least;
        most = rest > most ? rest : most;
    }
    Leaf leaf = {(float)(0.5 * (least + most)), slope, (float)(0.5 * (most - least) + 1.0)};
    return leaf;
}

/* The 1 << bits leaves of the keys at [start, end], each over an equal width of codes. */
WIDE static void fit_bucket(const uint64_t *keys, int64_t n, int64_t start, int64_t end, double scale, int bits,
                            double steepest, Leaf *out, double *f, double *r)
{
    int64_t leaves = (int64_t)1 << bits, current = 0, m = 0;
    for (int64_t i = start; i <= end && i < n; i++) {
        if (i > start && keys[i] == keys[i - 1])
            continue; /* the rank of a key is that of its first copy */
        double t = (double)(keys[i] - keys[start]) * scale;
        int64_t leaf = t < (double)leaves ? (int64_t)t : leaves - 1;
        while (current < leaf) {
            Leaf empty = {(float)(i - start), 0.0f, 0.0f}; /* without keys: queries in it have this rank */
            out[current++] = m ? fit_leaf(f, r, m, steepest) : empty;
            m = 0;
        }
        f[m] = t - (double)leaf;
        r[m++] = (double)(i - start);
    }
    while (current < leaves) {
        Leaf empty = {(float)(end - start), 0.0f, 0.0f};
        out[current++] = m ? fit_leaf(f, r, m, steepest) : empty;
        m = 0;
    }
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

/* ------------------------------------------------------------------ deltas */

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

/* ------------------------------------------------------------------ Python */

enum { ENTRIES_OF, LEFT_OF, WINDOWS_OF, SUMMARIES_OF, DELTA_BUFFERS };
enum { KEYS, BOUNDS, BUCKETS, LEAVES, HOT, OLDER, NEWER = OLDER + DELTA_BUFFERS, SAMPLES = NEWER + DELTA_BUFFERS, TAKEN,
       LEARNED, LEARNER_NOTES, N_BUFFERS };

enum { TIERS, FINDERS, N_NAMES }; /* of attributes that C asks for, as str */

/* `kind` is the letter of the keys' dtype, `cut` maps keys that C does not read by itself, and `values` are those of
 * the run and of the deltas, None for a multiset. `lexicon` has the trees of keys that are texts, else it is None. */
typedef struct {
    PyObject_HEAD
    Search search;
    int kind, itemsize, n_held;
    PyObject *cut, *lexicon, *names[N_NAMES], *values[1 + DELTAS];
    Py_buffer held[N_BUFFERS], raw[1 + DELTAS]; /* the values' bytes, where they are plain ones of `value_size` bytes */
    Py_ssize_t value_size;
} View;

static void release_buffers(Py_buffer *held, int count)
{
    while (count > 0)
        PyBuffer_Release(held + --count);
}

/* Hold the buffers of some arrays, of which those from `written` on are written to; -1 and none held on error. */
static int get_buffers(PyObject *const *arrays, const Py_ssize_t *itemsizes, int count, int written, Py_buffer *held)
{
    for (int i = 0; i < count; i++) {
        if (PyObject_GetBuffer(arrays[i], held + i, i < written ? PyBUF_CONTIG_RO : PyBUF_CONTIG) < 0) {
            release_buffers(held, i);
            return -1;
        }
        if (held[i].len % itemsizes[i] != 0) {
            PyErr_Format(PyExc_ValueError, "%zd bytes do not hold items of %zd", held[i].len, itemsizes[i]);
            release_buffers(held, i + 1);
            return -1;
        }
    }
    return 0;
}

/* Let go of a call's buffers and return None, or raise a ValueError if there is a message. */
static PyObject *end_call(Py_buffer *held, int count, const char *error)
{
    release_buffers(held, count);
    if (error == NULL)
        Py_RETURN_NONE;
    PyErr_SetString(PyExc_ValueError, error);
    return NULL;
}

static const char NOT_AS_MANY[] = "there must be as many places for answers as queries";

#include "_texts.c"

static void view_dealloc(PyObject *self)
{
    View *view = (View *)self;
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_view = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release_buffers(view->held, view->n_held);
    release_buffers(view->raw, view->value_size > 0 ? 1 + DELTAS : 0);
    Py_XDECREF(view->cut);
    Py_XDECREF(view->lexicon);
    for (int i = 0; i < N_NAMES; i++)
        Py_XDECREF(view->names[i]);
    for (int i = 0; i <= DELTAS; i++)
        Py_XDECREF(view->values[i]);
    free_view(self);
    Py_DECREF((PyObject *)type);
}

/* A delta of its buffers; -1 if they do not fit together. */
static int read_delta(const Py_buffer *held, int bits, Delta *delta)
{
    int64_t n = held[ENTRIES_OF].len / (Py_ssize_t)sizeof(Entry) - FEW, windows = held[WINDOWS_OF].len / 4;
    const uint32_t *window = held[WINDOWS_OF].buf;
    if (n < 0 || n > UINT32_MAX || held[LEFT_OF].len / 8 != n || windows < 2 ||
        held[SUMMARIES_OF].len / (Py_ssize_t)sizeof(Summary) != windows - 1 || bits < 0 || bits > 62)
        return -1;
    *delta = (Delta){.entries = held[ENTRIES_OF].buf, .left = held[LEFT_OF].buf, .windows = window,
                     .summaries = held[SUMMARIES_OF].buf, .n = n, .last_window = windows - 2, .bits = bits};
    return window[0] == 0 && window[windows - 1] == n ? 0 : -1;
}

/* Hold the bytes of plain values; -1 and none held on error. */
static int hold_values(View *view, PyObject *const *raw, Py_ssize_t size)
{
    Py_ssize_t itemsizes[1 + DELTAS] = {size, size, size};
    if (get_buffers(raw, itemsizes, 1 + DELTAS, 1 + DELTAS, view->raw) < 0)
        return -1;
    int fit = view->raw[0].len == size * view->search.n;
    for (int d = 0; d < DELTAS; d++)
        fit = fit && view->raw[1 + d].len == size * view->search.deltas[d].n;
    if (fit) {
        view->value_size = size;
        return 0;
    }
    release_buffers(view->raw, 1 + DELTAS);
    PyErr_SetString(PyExc_ValueError, "the values of a view do not fit its keys");
    return -1;
}

static PyObject *view_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static const Py_ssize_t itemsizes[N_BUFFERS] = {
        8, 8, sizeof(Bucket), 4, sizeof(Line), sizeof(Entry), 8, 4, sizeof(Summary),
        sizeof(Entry), 8, 4, sizeof(Summary), 8, 8, sizeof(Line), 8};
    PyObject *arrays[N_BUFFERS], *cut, *lexicon, *values[1 + DELTAS], *raw[1 + DELTAS];
    Py_ssize_t count[N_BUFFERS], value_size, leaf_size, reach, lacks, least;
    int kind, itemsize, sampling, bits[DELTAS];
    (void)kwargs;
    if (!PyArg_ParseTuple(args, "CiOOiOOOOOOOOOOOOOOOOOnnnOOOiiOOOn", &kind, &itemsize, &cut, &lexicon, &sampling, arrays,
                          arrays + 1, arrays + 2, arrays + 3, arrays + 4, arrays + 5, arrays + 6, arrays + 7, arrays + 8,
                          arrays + 9, arrays + 10, arrays + 11, arrays + 12, arrays + 13, arrays + 14, arrays + 15,
                          arrays + 16, &reach, &lacks, &least, values, values + 1, values + 2, bits, bits + 1, raw, raw + 1, raw + 2,
                          &value_size))
        return NULL;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    View *view = (View *)allocate(type, 0);
    if (view == NULL || get_buffers(arrays, itemsizes, N_BUFFERS, SAMPLES, view->held) < 0)
        goto failed;
    view->n_held = N_BUFFERS;
    for (int i = 0; i < N_BUFFERS; i++)
        count[i] = view->held[i].len / itemsizes[i];
    leaf_size = view->held[LEAVES].itemsize == sizeof(ChangedLeaf) ? sizeof(ChangedLeaf) : sizeof(Leaf);
    view->search = (Search){
        .keys = view->held[KEYS].buf, .bounds = view->held[BOUNDS].buf, .buckets = view->held[BUCKETS].buf,
        .leaves = view->held[LEAVES].buf, .leaf_size = leaf_size,
        .samples = view->held[SAMPLES].buf, .taken = view->held[TAKEN].buf,
        .hot = {view->held[HOT].buf, (uint64_t)count[HOT], least},
        .learner = {count[LEARNED] ? view->held[LEARNED].buf : NULL, view->held[LEARNER_NOTES].buf, reach, lacks},
        .n = count[KEYS], .n_buckets = count[BOUNDS],
        .sampling = (uint64_t)sampling, .ring = (uint64_t)count[SAMPLES] - 1, .random = (uint64_t)(uintptr_t)view,
    };
    if (sampling < 1 || view->held[LEAVES].len % leaf_size != 0 || (leaves_tell(&view->search) && count[KEYS] == 0) ||
        (count[KEYS] > 0) != (count[BOUNDS] > 0) || (count[HOT] > 0 && count[KEYS] == 0) ||
        count[BUCKETS] != count[BOUNDS] + 1 || count[TAKEN] != 1 || count[SAMPLES] < 1 ||
        (count[SAMPLES] & (count[SAMPLES] - 1)) != 0 || count[HOT] > UINT32_MAX ||
        (count[LEARNED] > 0 && (count[LEARNED] != count[HOT] || count[LEARNER_NOTES] != NOTES)) ||
        reach > count[KEYS] || lacks < 0 || lacks > PARTS || least < 0 || least > PARTS ||
        read_delta(view->held + OLDER, bits[0], view->search.deltas) < 0 ||
        read_delta(view->held + NEWER, bits[1], view->search.deltas + 1) < 0) {
        PyErr_SetString(PyExc_ValueError, "the arrays of a view do not fit together");
        goto failed;
    }
    if (value_size > 0 && hold_values(view, raw, value_size) < 0)
        goto failed;
    view->kind = kind;
    view->itemsize = itemsize;
    view->cut = Py_NewRef(cut);
    view->lexicon = Py_NewRef(lexicon);
    view->names[TIERS] = PyUnicode_InternFromString("tiers");
    view->names[FINDERS] = PyUnicode_InternFromString("finders");
    if (view->names[TIERS] == NULL || view->names[FINDERS] == NULL)
        goto failed;
    for (int i = 0; i <= DELTAS; i++)
        view->values[i] = Py_NewRef(values[i]);
    return (PyObject *)view;
failed:
    Py_XDECREF((PyObject *)view);
    return NULL;
}

/* 1 and the code of a Python number that is in the key type's domain, 0 for what Python has to map. */
static int code_of_float(int itemsize, PyObject *key, uint64_t *code)
{
    double value = PyFloat_AsDouble(key) + 0.0; /* -0.0 equals 0.0 */
    float single = (float)value;
    uint64_t bits;
    uint32_t short_bits;
    if (isnan(value) || (itemsize == 4 && (double)single != value))
        return 0;
    memcpy(&bits, &value, sizeof bits);
    memcpy(&short_bits, &single, sizeof short_bits);
    if (itemsize == 8)
        *code = bits >> 63 ? ~bits : bits | UINT64_C(1) << 63;
    else
        *code = short_bits >> 31 ? (uint32_t)~short_bits : short_bits | UINT32_C(1) << 31;
    return 1;
}

static int code_of_int(int is_signed, int itemsize, PyObject *key, uint64_t *code)
{
    int overflow;
    long long value = PyLong_AsLongLongAndOverflow(key, &overflow);
    if (overflow > 0 && !is_signed && itemsize == 8) {
        *code = PyLong_AsUnsignedLongLong(key);
        if (!PyErr_Occurred())
            return 1;
        PyErr_Clear();
    }
    if (overflow)
        return 0;
    int64_t least = !is_signed ? 0 : itemsize == 8 ? INT64_MIN : INT32_MIN;
    int64_t largest = itemsize == 8 ? INT64_MAX : is_signed ? INT32_MAX : UINT32_MAX;
    *code = (uint64_t)value - (uint64_t)least;
    return least <= value && value <= largest;
}

static int code_of(const View *view, PyObject *key, uint64_t *code)
{
    if (view->kind == 'f')
        return PyFloat_Check(key) ? code_of_float(view->itemsize, key, code) : 0;
    if (view->kind != 'i' && view->kind != 'u')
        return 0;
    if (PyLong_Check(key))
        return code_of_int(view->kind == 'i', view->itemsize, key, code);
    if (!PyIndex_Check(key) || PySequence_Check(key)) /* an array may be masked: the slow path looks at it */
        return 0;
    PyObject *whole = PyNumber_Index(key); /* NumPy's integers */
    if (whole == NULL) { /* the slow path names what is wrong with it */
        PyErr_Clear();
        return 0;
    }
    int known = code_of_int(view->kind == 'i', view->itemsize, whole, code);
    Py_DECREF(whole);
    return known;
}

/* Where a single key of any type cuts the codes: at the least code that is not below it, unless it is above all. A guess
 * where the run may have it is worth the look. */
typedef struct {
    uint64_t code;
    int64_t near;
    int exact, above;
} Cut;

/* 1 and where a str or bytes cuts the codes of texts, 0 for what Python has to map, -1 on error. Which trees there are is
 * asked each time, as others may have got codes. */
static int cut_of_text(View *view, PyObject *key, Cut *cut)
{
    int is_text = view->kind == 'T';
    Text text;
    if (!(is_text ? PyUnicode_Check(key) : view->kind == 'S' && PyBytes_Check(key)))
        return 0;
    if (text_of_object(key, is_text, &text) < 0) { /* the slow path names what is wrong with it */
        PyErr_Clear();
        return 0;
    }
    PyObject *trees = trees_of(view);
    int found = trees == NULL ? -1 : code_in_trees(trees, text, view->search.keys, &cut->code, &cut->near);
    Py_XDECREF(trees);
    cut->exact = !(cut->code & 1);
    return found < 0 ? -1 : 1;
}

static int cut_of(View *view, PyObject *key, Cut *cut)
{
    *cut = (Cut){.exact = 1};
    if (code_of(view, key, &cut->code))
        return 0;
    int known = cut_of_text(view, key, cut);
    if (known)
        return known < 0 ? -1 : 0;
    PyObject *mapped = PyObject_CallFunctionObjArgs(view->cut, key, NULL), *code;
    if (mapped == NULL)
        return -1;
    if (PyArg_ParseTuple(mapped, "Op", &code, &cut->exact)) {
        cut->above = code == Py_None;
        cut->code = cut->above ? UINT64_MAX : PyLong_AsUnsignedLongLong(code);
    }
    Py_DECREF(mapped);
    return PyErr_Occurred() ? -1 : 0;
}

/* The rank of `q` in run and deltas, whose rank in the run is known. */
static inline int64_t with_shifts(const Search *s, uint64_t q, int64_t rank)
{
    int64_t shift = 0;
    for (int d = 0; d < DELTAS; d++)
        shift += s->deltas[d].n ? shift_of(s->deltas + d, q, rank) : 0;
    return rank + shift;
}

/* Whether the hot table holds the code, that which learns if it can be had, and what it knows of it. */
static inline int ask_tables(const Search *s, uint64_t code, uint64_t *found)
{
    if (s->hot.n_lines == 0 || !take_learner(s->learner))
        return look_up_hot(s->hot, code, found);
    int held = look_up_hot((Hot){s->learner.lines, s->hot.n_lines}, code, found);
    wants_lesson(s->learner, held, 0);
    leave_learner(s->learner);
    return held;
}

/* A single query, which the model answered, is learned like those of a batch. */
static inline void learn_one(const Search *s, uint64_t q, int64_t rank, int right)
{
    if (s->hot.n_lines == 0 || !take_learner(s->learner))
        return;
    if (wants_lesson(s->learner, 1, 1))
        learn_found(s, q, rank, right);
    leave_learner(s->learner);
}

/* How many keys are below a code, or, `right`, not above it; then it is not the last code that there is. */
static int64_t rank_of_code(const Search *s, uint64_t code, int right)
{
    uint64_t q = code + (uint64_t)right; /* codes are whole: right of q is left of q + 1 */
    uint64_t found;
    if (ask_tables(s, code, &found))
        return with_shifts(s, q, right ? rank_in(found) + copies_in(found) : rank_in(found));
    int64_t rank = run_rank(s, q);
    learn_one(s, q, rank, right);
    return with_shifts(s, q, rank);
}

/* Whether the first key of the run with the cut's code is where it was guessed. */
static inline int is_near(const Search *s, const Cut *cut)
{
    int64_t near = cut->near;
    return near < s->n && s->keys[near] == cut->code && (near == 0 || s->keys[near - 1] != cut->code);
}

/* The same for a reader, whose accesses are sampled. */
static int64_t ask_rank(Search *s, const Cut *cut, int right)
{
    sample_code(s, cut->code);
    if (!is_near(s, cut))
        return rank_of_code(s, cut->code, right);
    int64_t after = right ? copies_in_run(s, cut->code, cut->near) : 0;
    return with_shifts(s, cut->code + (uint64_t)right, cut->near + after);
}

/* The place of a code, for a reader, whose accesses are sampled and who may go on to the values; and its rank in the run,
 * which writers need. */
static Place ask_place(View *view, const Cut *cut, int64_t *run)
{
    Search *s = &view->search;
    uint64_t code = cut->code, found;
    sample_code(s, code);
    int near = is_near(s, cut), hot = !near && ask_tables(s, code, &found);
    int64_t rank = *run = near  ? cut->near
                          : hot ? rank_in(found)
                                : run_rank_beside(s, code, view->raw[0].buf, view->value_size);
    if (!near && !hot)
        learn_one(s, code, rank, 0);
    int in_run = hot ? copies_in(found) > 0 : is_in_run(s, code, rank);
    return place_of(s, code, rank, in_run, entry_for(s->deltas, code, rank), entry_for(s->deltas + 1, code, rank));
}

static PyObject *view_rank(View *view, PyObject *key, int right)
{
    Search *s = &view->search;
    Cut cut;
    if (cut_of(view, key, &cut) < 0)
        return NULL;
    right = right && cut.exact;
    if (cut.above || (right && cut.code == UINT64_MAX))
        return PyLong_FromLongLong(length_of(s));
    return PyLong_FromLongLong(ask_rank(s, &cut, right));
}

static PyObject *view_left(PyObject *self, PyObject *key) { return view_rank((View *)self, key, 0); }
static PyObject *view_right(PyObject *self, PyObject *key) { return view_rank((View *)self, key, 1); }

/* The place of a single key of any type; -1 on error. */
static int find(View *view, PyObject *key, Place *place)
{
    Cut cut;
    int64_t run;
    *place = (Place){0};
    if (cut_of(view, key, &cut) < 0)
        return -1;
    if (cut.exact && !cut.above)
        *place = ask_place(view, &cut, &run);
    return 0;
}

static PyObject *view_contains(PyObject *self, PyObject *key)
{
    Place place;
    return find((View *)self, key, &place) < 0 ? NULL : PyBool_FromLong(place.present);
}

static PyObject *view_get(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Place place;
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "get takes a key and a default");
        return NULL;
    }
    if (find((View *)self, args[0], &place) < 0)
        return NULL;
    return place.present ? PySequence_GetItem(((View *)self)->values[place.layer], (Py_ssize_t)place.position)
                         : Py_NewRef(args[1]);
}

/* Answer a batch of codes, the first of `count` buffers, in the others. */
static PyObject *search_batch(PyObject *self, int asked, int right, PyObject *const *arrays, int count)
{
    static const Py_ssize_t itemsizes[2][4] = {{8, 8, 8}, {8, 1, 1, 8}};
    const Py_ssize_t *sizes = itemsizes[asked == PLACES];
    Py_buffer held[4];
    Search *search = &((View *)self)->search;
    if (get_buffers(arrays, sizes, count, 1, held) < 0)
        return NULL;
    int64_t m = held[0].len / 8;
    for (int i = 1; i < count; i++)
        if (held[i].len / sizes[i] != m)
            return end_call(held, count, NOT_AS_MANY);
    Answers out = {.ranks = held[1].buf, .present = held[1].buf};
    if (count == 3)
        out.positions = held[2].buf;
    if (count == 4)
        out = (Answers){.present = held[1].buf, .layers = held[2].buf, .positions = held[3].buf};
    Py_BEGIN_ALLOW_THREADS
    int hot = search->hot.n_lines && asked != COUNTS && answers_batch(search->hot, search->learner, held[0].buf, m);
    (hot ? search_hot : search_model)(search, asked, right, held[0].buf, m, &out);
    Py_END_ALLOW_THREADS
    return end_call(held, count, NULL);
}

static PyObject *view_ranks(PyObject *self, PyObject *args)
{
    PyObject *arrays[2];
    int right, in_run;
    if (!PyArg_ParseTuple(args, "OppO", arrays, &right, &in_run, arrays + 1))
        return NULL;
    return search_batch(self, in_run ? RUN_RANKS : RANKS, right, arrays, 2);
}

static PyObject *view_count_many(PyObject *self, PyObject *args)
{
    PyObject *arrays[3];
    if (!PyArg_ParseTuple(args, "OOO", arrays, arrays + 1, arrays + 2))
        return NULL;
    return search_batch(self, COUNTS, 0, arrays, 3);
}

static PyObject *view_find_many(PyObject *self, PyObject *args)
{
    PyObject *arrays[4] = {NULL};
    if (!PyArg_ParseTuple(args, "OO|OO", arrays, arrays + 1, arrays + 2, arrays + 3))
        return NULL;
    return search_batch(self, PLACES, 0, arrays, arrays[3] == NULL ? 2 : 4);
}

static PyObject *view_within_error_bounds(PyObject *self, PyObject *unused)
{
    int within;
    (void)unused;
    Py_BEGIN_ALLOW_THREADS
    within = within_error_bounds(&((View *)self)->search);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(within);
}

#include "_level.c"
#include "_scan.c"

static PyMethodDef view_methods[] = {
    {"left", view_left, METH_O, "How many keys are below the key."},
    {"right", view_right, METH_O, "How many keys are not above the key."},
    {"contains", view_contains, METH_O, "Whether the key is in the index."},
    {"get", (PyCFunction)(void (*)(void))view_get, METH_FASTCALL, "get(key, default): a map's value for the key."},
    {"ranks", view_ranks, METH_VARARGS, "ranks(codes, right, in_run, ranks): ranks in the run alone or in the index."},
    {"find_many", view_find_many, METH_VARARGS, "find_many(codes, present[, layers, positions]): where codes lie."},
    {"count_many", view_count_many, METH_VARARGS,
     "count_many(codes, ranks, counts): ranks in the run, and how many keys of it equal each."},
    {"select", view_select, METH_O, "The code of a rank, negative ones counted from the end; None if there is none."},
    {"neighbour", (PyCFunction)(void (*)(void))view_neighbour, METH_FASTCALL,
     "neighbour(key, right, offset): the code `offset` ranks from the key's left or right rank, None if there is none."},
    {"count", (PyCFunction)(void (*)(void))view_count, METH_FASTCALL, "count(low, high): the keys between two ends."},
    {"scan", (PyCFunction)(void (*)(void))view_scan, METH_FASTCALL,
     "scan(low, high, limit, most, new): the first keys between two ends, in arrays that `new` makes."},
    {"within_error_bounds", view_within_error_bounds, METH_NOARGS,
     "Whether every key of the run lies within the error bound that its leaf states."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot view_slots[] = {
    {Py_tp_new, view_new},
    {Py_tp_dealloc, view_dealloc},
    {Py_tp_methods, view_methods},
    {Py_tp_doc, "What readers of one state search in; _native.pyi names the arguments."},
    {0, NULL},
};

static PyType_Spec view_spec = {
    .name = "doraemon._native.View",
    .basicsize = sizeof(View),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = view_slots,
};

/* fit(keys, ends, scales, bits, steepest, out): the leaves of some buckets, each given by its (start, end). */
static PyObject *fit(PyObject *self, PyObject *args)
{
    static const Py_ssize_t itemsizes[5] = {8, 16, 8, 1, sizeof(Leaf)};
    PyObject *arrays[5];
    Py_buffer held[5];
    double steepest;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOOdO", arrays, arrays + 1, arrays + 2, arrays + 3, &steepest, arrays + 4) ||
        get_buffers(arrays, itemsizes, 5, 4, held) < 0)
        return NULL;
    const int64_t *ends = held[1].buf, n = held[0].len / 8;
    int64_t count = held[1].len / 16, leaves = 0, deepest = 0;
    const uint8_t *bits = held[3].buf;
    int agree = held[2].len / 8 == count && held[3].len == count;
    for (int64_t b = 0; agree && b < count; b++) {
        int64_t start = ends[2 * b], end = ends[2 * b + 1];
        agree = 0 <= start && start < end && end <= n && bits[b] < 48;
        deepest = end - start > deepest ? end - start : deepest;
        leaves += (int64_t)1 << (bits[b] & 63);
    }
    if (!agree || leaves != held[4].len / (Py_ssize_t)sizeof(Leaf))
        return end_call(held, 5, "the arrays of a fit do not fit together");
    double *points = PyMem_Malloc(2 * ((size_t)deepest + 1) * sizeof *points);
    if (points == NULL) {
        release_buffers(held, 5);
        return PyErr_NoMemory();
    }
    Py_BEGIN_ALLOW_THREADS
    Leaf *out = held[4].buf;
    for (int64_t b = 0; b < count; out += (int64_t)1 << bits[b], b++)
        fit_bucket(held[0].buf, n, ends[2 * b], ends[2 * b + 1], ((const double *)held[2].buf)[b], bits[b], steepest,
                   out, points, points + deepest + 1);
    Py_END_ALLOW_THREADS
    PyMem_Free(points);
    return end_call(held, 5, NULL);
}

/* fill_hot(codes, ranks, copies, lines): the hot table of codes, the hottest first; how many found room. */
static PyObject *fill_hot(PyObject *self, PyObject *args)
{
    static const Py_ssize_t itemsizes[4] = {8, 8, 8, sizeof(Line)};
    PyObject *arrays[4];
    Py_buffer held[4];
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOO", arrays, arrays + 1, arrays + 2, arrays + 3) ||
        get_buffers(arrays, itemsizes, 4, 3, held) < 0)
        return NULL;
    const int64_t *ranks = held[1].buf, *copies = held[2].buf;
    int64_t m = held[0].len / 8, n_lines = held[3].len / (Py_ssize_t)sizeof(Line), placed = 0;
    int agree = m > 0 && held[1].len == held[0].len && held[2].len == held[0].len && n_lines > 0 &&
                n_lines <= UINT32_MAX;
    for (int64_t i = 0; agree && i < m; i++)
        agree = (uint64_t)ranks[i] >> RANK_BITS == 0 && (uint64_t)copies[i] <= MOST_COPIES;
    uint8_t *used = agree ? PyMem_Malloc((size_t)n_lines) : NULL;
    if (used != NULL) {
        Py_BEGIN_ALLOW_THREADS
        placed = fill_lines(held[3].buf, n_lines, used, held[0].buf, ranks, copies, m);
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(used);
    release_buffers(held, 4);
    if (placed == 0)
        PyErr_SetString(agree ? PyExc_MemoryError : PyExc_ValueError, "the arrays of a hot table do not fit together");
    return placed == 0 ? NULL : PyLong_FromLongLong(placed);
}

/* copy_learned(learned, notes, out): copy the lines of a table that learns; whether that was done, which it is not while a
 * reader has them. */
static PyObject *copy_learned(PyObject *self, PyObject *args)
{
    static const Py_ssize_t itemsizes[3] = {sizeof(Line), 8, sizeof(Line)};
    PyObject *arrays[3];
    Py_buffer held[3];
    (void)self;
    if (!PyArg_ParseTuple(args, "OOO", arrays, arrays + 1, arrays + 2) || get_buffers(arrays, itemsizes, 3, 0, held) < 0)
        return NULL;
    Learner learner = {held[0].buf, held[1].buf, 0, 0};
    if (held[0].len == 0 || held[2].len != held[0].len || held[1].len / 8 != NOTES)
        return end_call(held, 3, "the arrays of a hot table do not fit together");
    int taken = take_learner(learner);
    if (taken) {
        memcpy(held[2].buf, learner.lines, (size_t)held[0].len);
        leave_learner(learner);
    }
    release_buffers(held, 3);
    return PyBool_FromLong(taken);
}

/* held_hot(lines, codes, held): whether the hot table holds each code. */
static PyObject *held_hot(PyObject *self, PyObject *args)
{
    static const Py_ssize_t itemsizes[3] = {sizeof(Line), 8, 1};
    PyObject *arrays[3];
    Py_buffer held[3];
    (void)self;
    if (!PyArg_ParseTuple(args, "OOO", arrays, arrays + 1, arrays + 2) || get_buffers(arrays, itemsizes, 3, 2, held) < 0)
        return NULL;
    Hot hot = {held[0].buf, (uint64_t)held[0].len / sizeof(Line), 0};
    int64_t m = held[1].len / 8;
    if (hot.n_lines == 0 || hot.n_lines > UINT32_MAX || held[2].len != m)
        return end_call(held, 3, NOT_AS_MANY);
    Py_BEGIN_ALLOW_THREADS
    mark_held(hot, held[1].buf, m, held[2].buf);
    Py_END_ALLOW_THREADS
    return end_call(held, 3, NULL);
}

/* tally(samples, codes): the distinct ones, those that occur most often first; how many, and how many occur once. */
static PyObject *tally(PyObject *self, PyObject *args)
{
    static const Py_ssize_t itemsizes[2] = {8, 8};
    PyObject *arrays[2];
    Py_buffer held[2];
    (void)self;
    if (!PyArg_ParseTuple(args, "OO", arrays, arrays + 1) || get_buffers(arrays, itemsizes, 2, 1, held) < 0)
        return NULL;
    int64_t m = held[0].len / 8, n_places = 2 * m + 1, distinct = 0, once = 0;
    if (m >= INT32_MAX / 4 || held[1].len != held[0].len)
        return end_call(held, 2, NOT_AS_MANY);
    uint32_t *places = PyMem_Calloc((size_t)n_places, sizeof *places);
    uint64_t *codes = PyMem_Malloc(((size_t)m + 1) * sizeof *codes);
    int64_t *counts = PyMem_Malloc(((size_t)m + 1) * sizeof *counts);
    int enough = places != NULL && codes != NULL && counts != NULL;
    if (enough) {
        Py_BEGIN_ALLOW_THREADS
        distinct = count_distinct(held[0].buf, m, places, n_places, codes, counts);
        order_by_count(codes, counts, distinct, held[1].buf);
        for (int64_t i = 0; i < distinct; i++)
            once += counts[i] == 1;
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(places);
    PyMem_Free(codes);
    PyMem_Free(counts);
    release_buffers(held, 2);
    return enough ? Py_BuildValue("LL", (long long)distinct, (long long)once) : PyErr_NoMemory();
}

/* splice(old, at, more, out): the bytes of `out`, whose items are as large as `more` and `at` say. */
static PyObject *splice(PyObject *self, PyObject *args)
{
    static const Py_ssize_t itemsizes[4] = {1, 8, 1, 1};
    PyObject *arrays[4];
    Py_buffer held[4];
    int agree = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOO", arrays, arrays + 1, arrays + 2, arrays + 3) ||
        get_buffers(arrays, itemsizes, 4, 3, held) < 0)
        return NULL;
    int64_t m = held[1].len / 8;
    size_t size = m > 0 ? (size_t)(held[2].len / m) : 1;
    if (size > 0 && (size_t)held[2].len == size * (size_t)m && held[0].len % (Py_ssize_t)size == 0 &&
        held[3].len == held[0].len + held[2].len) {
        Py_BEGIN_ALLOW_THREADS
        agree = splice_items(held[0].buf, held[0].len / (Py_ssize_t)size, held[1].buf, held[2].buf, m, size,
                             held[3].buf);
        Py_END_ALLOW_THREADS
    }
    return end_call(held, 4, agree ? NULL : "the arrays of a splice do not fit together");
}

/* sort(codes, spare): put codes in order, with another array of as many to do it in. */
static PyObject *sort(PyObject *self, PyObject *args)
{
    static const Py_ssize_t itemsizes[2] = {8, 8};
    PyObject *arrays[2];
    Py_buffer held[2];
    (void)self;
    if (!PyArg_ParseTuple(args, "OO", arrays, arrays + 1) || get_buffers(arrays, itemsizes, 2, 0, held) < 0)
        return NULL;
    if (held[0].len != held[1].len)
        return end_call(held, 2, "there must be as much room to sort in as there are codes");
    Py_BEGIN_ALLOW_THREADS
    uint64_t *sorted = sort_codes(held[0].buf, held[1].buf, held[0].len / 8);
    if (sorted != held[0].buf)
        memcpy(held[0].buf, sorted, (size_t)held[0].len);
    Py_END_ALLOW_THREADS
    return end_call(held, 2, NULL);
}

static const char NO_DELTA[] = "the arrays of a delta do not fit together";

/* find_windows(left, bits, windows): where the windows of a delta begin. */
static PyObject *delta_windows(PyObject *self, PyObject *args)
{
    static const Py_ssize_t itemsizes[2] = {8, 4};
    PyObject *arrays[2];
    Py_buffer held[2];
    int bits;
    (void)self;
    if (!PyArg_ParseTuple(args, "OiO", arrays, &bits, arrays + 1) || get_buffers(arrays, itemsizes, 2, 1, held) < 0)
        return NULL;
    Delta delta = {.left = held[0].buf, .n = held[0].len / 8, .last_window = held[1].len / 4 - 2, .bits = bits};
    if (delta.n >= UINT32_MAX || delta.last_window < 0 || bits < 0 || bits > 62)
        return end_call(held, 2, NO_DELTA);
    Py_BEGIN_ALLOW_THREADS
    fill_windows(delta, held[1].buf);
    Py_END_ALLOW_THREADS
    return end_call(held, 2, NULL);
}

/* codes_below(codes, bits, windows, queries, ranks, out): how many codes of a delta are below each query, whose rank in the
 * run is known. */
static PyObject *delta_codes_below(PyObject *self, PyObject *args)
{
    static const Py_ssize_t itemsizes[5] = {8, 4, 8, 8, 8};
    PyObject *arrays[5];
    Py_buffer held[5];
    int bits;
    (void)self;
    if (!PyArg_ParseTuple(args, "OiOOOO", arrays, &bits, arrays + 1, arrays + 2, arrays + 3, arrays + 4) ||
        get_buffers(arrays, itemsizes, 5, 4, held) < 0)
        return NULL;
    const uint32_t *windows = held[1].buf;
    int64_t last = held[1].len / 4 - 1, n = held[0].len / 8, m = held[2].len / 8;
    if (last < 1 || windows[last] != n || held[3].len != held[2].len || held[4].len != held[2].len || bits < 0 ||
        bits > 62)
        return end_call(held, 5, NO_DELTA);
    Delta delta = {.windows = windows, .n = n, .last_window = last - 1, .bits = bits};
    Py_BEGIN_ALLOW_THREADS
    windowed_below(held[0].buf, &delta, held[2].buf, held[3].buf, m, held[4].buf);
    Py_END_ALLOW_THREADS
    return end_call(held, 5, NULL);
}

/* pack_delta(codes, net, present, left, bits, windows, entries, summaries): what is searched of a delta. */
static PyObject *pack_delta(PyObject *self, PyObject *args)
{
    static const Py_ssize_t itemsizes[7] = {8, 8, 8, 8, 4, sizeof(Entry), sizeof(Summary)};
    PyObject *arrays[7];
    Py_buffer held[7];
    int bits;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOOiOOO", arrays, arrays + 1, arrays + 2, arrays + 3, &bits, arrays + 4, arrays + 5,
                          arrays + 6) ||
        get_buffers(arrays, itemsizes, 7, 5, held) < 0)
        return NULL;
    int64_t n = held[0].len / 8, windows = held[4].len / 4;
    int fit = windows >= 2 && held[6].len / (Py_ssize_t)sizeof(Summary) == windows - 1 && bits >= 0 && bits <= 62 &&
              held[5].len / (Py_ssize_t)sizeof(Entry) == n + FEW && n < UINT32_MAX;
    for (int i = 1; i < 4; i++)
        fit = fit && held[i].len == held[0].len;
    if (!fit || ((const uint32_t *)held[4].buf)[windows - 1] != n)
        return end_call(held, 7, NO_DELTA);
    Py_BEGIN_ALLOW_THREADS
    pack_entries(held[0].buf, held[1].buf, held[2].buf, n, held[5].buf);
    Delta delta = {.entries = held[5].buf, .left = held[3].buf, .windows = held[4].buf, .n = n,
                   .last_window = windows - 2, .bits = bits};
    sum_up_windows(held[1].buf, delta, held[6].buf);
    Py_END_ALLOW_THREADS
    return end_call(held, 7, NULL);
}

/* ranks(codes, queries, right, out): how many of the sorted codes are below each query, or not above it. */
static PyObject *ranks(PyObject *self, PyObject *args)
{
    static const Py_ssize_t itemsizes[3] = {8, 8, 8};
    PyObject *arrays[3];
    Py_buffer held[3];
    int right;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOpO", arrays, arrays + 1, &right, arrays + 2) ||
        get_buffers(arrays, itemsizes, 3, 2, held) < 0)
        return NULL;
    if (held[1].len != held[2].len)
        return end_call(held, 3, NOT_AS_MANY);
    Py_BEGIN_ALLOW_THREADS
    ranks_many(held[0].buf, held[0].len / 8, held[1].buf, held[1].len / 8, right, held[2].buf);
    Py_END_ALLOW_THREADS
    return end_call(held, 3, NULL);
}

/* tell_leaves(view, out): the leaves of a view, made to tell of its deltas. */
static PyObject *native_tell_leaves(PyObject *self, PyObject *args)
{
    static const Py_ssize_t itemsizes[1] = {sizeof(ChangedLeaf)};
    PyObject *view, *out;
    Py_buffer held;
    (void)self;
    if (!PyArg_ParseTuple(args, "OO", &view, &out) || get_buffers(&out, itemsizes, 1, 0, &held) < 0)
        return NULL;
    if (PyType_GetSlot(Py_TYPE(view), Py_tp_dealloc) != (void *)view_dealloc)
        return end_call(&held, 1, "leaves are those of a View");
    const Search *s = &((View *)view)->search;
    const Py_buffer *leaves = ((View *)view)->held + LEAVES;
    if (s->n == 0 || leaves_tell(s) || s->deltas[0].n > INT32_MAX || s->deltas[1].n > INT32_MAX ||
        held.len / (Py_ssize_t)sizeof(ChangedLeaf) != leaves->len / (Py_ssize_t)sizeof(Leaf))
        return end_call(&held, 1, "the leaves of a view do not fit");
    Py_BEGIN_ALLOW_THREADS
    tell_leaves(s, held.buf);
    Py_END_ALLOW_THREADS
    return end_call(&held, 1, NULL);
}

/* What Python has to know of a learner's notes: how many there are, which is which, and in what parts `lacks` counts. */
static int add_note_names(PyObject *module)
{
    return PyModule_AddIntConstant(module, "NOTES", NOTES) < 0 || PyModule_AddIntConstant(module, "ASKED", ASKED) < 0 ||
                   PyModule_AddIntConstant(module, "MISSED", MISSED) < 0 ||
                   PyModule_AddIntConstant(module, "BEHIND", BEHIND) < 0 ||
                   PyModule_AddIntConstant(module, "PARTS", PARTS) < 0
               ? -1
               : 0;
}

/* LAYOUT is what Python has to agree with: offsets and sizes of the records in the arrays that are shared. SOURCES tells
 * from which C files this was built, see sources.py. */
static int native_exec(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &view_spec, NULL);
    PyObject *layout = Py_BuildValue("(nnnnn)(nnnn)i(nnn)i(nnn)i(nnn)(nnnnnn)", offsetof(Bucket, low), offsetof(Bucket, scale),
                                     offsetof(Bucket, start), offsetof(Bucket, place), sizeof(Bucket),
                                     offsetof(Leaf, base), offsetof(Leaf, slope), offsetof(Leaf, radius), sizeof(Leaf),
                                     PLACE_SHIFT, offsetof(Line, code), offsetof(Line, found), sizeof(Line), RANK_BITS,
                                     offsetof(Entry, code), offsetof(Entry, found), sizeof(Entry), FEW,
                                     offsetof(Summary, marks), offsetof(Summary, shift), sizeof(Summary),
                                     offsetof(ChangedLeaf, leaf), offsetof(ChangedLeaf, shift),
                                     offsetof(ChangedLeaf, marks), offsetof(ChangedLeaf, twin),
                                     offsetof(ChangedLeaf, noted), sizeof(ChangedLeaf));
    PyObject *sources = PyLong_FromUnsignedLong(SOURCES);
    int failed = type == NULL || layout == NULL || sources == NULL || PyModule_AddObjectRef(module, "View", type) < 0 ||
                 PyModule_AddObjectRef(module, "LAYOUT", layout) < 0 ||
                 PyModule_AddObjectRef(module, "SOURCES", sources) < 0 || add_note_names(module) < 0 ||
                 add_level_type(module) < 0 || add_tree_type(module) < 0;
    Py_XDECREF(type);
    Py_XDECREF(layout);
    Py_XDECREF(sources);
    return failed ? -1 : 0;
}

static PyMethodDef native_methods[] = {
    {"fit", fit, METH_VARARGS, "fit(keys, ends, scales, bits, steepest, out): the leaves of some buckets."},
    {"pack_delta", pack_delta, METH_VARARGS,
     "pack_delta(codes, net, present, left, bits, windows, entries, summaries): what is searched of a delta."},
    {"find_windows", delta_windows, METH_VARARGS, "find_windows(left, bits, windows): where those of a delta begin."},
    {"codes_below", delta_codes_below, METH_VARARGS,
     "codes_below(codes, bits, windows, queries, ranks, out): codes of a delta below others."},
    {"tell_leaves", native_tell_leaves, METH_VARARGS, "tell_leaves(view, out): its leaves, which tell of its deltas."},
    {"ranks", ranks, METH_VARARGS, "ranks(codes, queries, right, out): np.searchsorted of codes."},
    {"fill_hot", fill_hot, METH_VARARGS, "fill_hot(codes, ranks, copies, lines): the hot table of some codes."},
    {"copy_learned", copy_learned, METH_VARARGS,
     "copy_learned(learned, notes, out): copy the lines of a table that learns, unless a reader has them."},
    {"held_hot", held_hot, METH_VARARGS, "held_hot(lines, codes, held): whether the hot table holds each code."},
    {"tally", tally, METH_VARARGS, "tally(samples, codes): the distinct ones by how often they occur."},
    {"pack", pack, METH_VARARGS, "pack(items, is_text, offsets): bytes of texts, or the place of what is none."},
    {"unpack", unpack, METH_VARARGS, "unpack(data, offsets, numbers, is_text): a list of texts."},
    {"order", order, METH_VARARGS, "order(data, offsets, order, again): how to sort texts, and which occur again."},
    {"gather", gather, METH_VARARGS, "gather(data, offsets, numbers, out): the texts of some numbers."},
    {"sort", sort, METH_VARARGS, "sort(codes, spare): put codes in order, with another array of as many to do it in."},
    {"splice", splice, METH_VARARGS, "splice(old, at, more, out): `old` with `more` at the places `at` of `out`."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot native_slots[] = {
    {Py_mod_exec, native_exec},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED}, /* views change nothing but samples, and these one by one */
#endif
    {0, NULL},
};

static struct PyModuleDef native_module = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_native",
    .m_doc = "Search and fit in C.",
    .m_methods = native_methods,
    .m_slots = native_slots,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&native_module); }
