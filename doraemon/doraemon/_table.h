/* Where most texts of a tree are, by a hash of them: a query that is there has no need of the way down the tree.
 *
 * This is a cache, not an index. A bin, as large as a line of the processor's cache, has room for WAYS texts; what finds
 * its bin full is left to the tree, and so is a query that the table does not have. Two bytes of the hash tell the texts of
 * a bin apart, and whatever they find is compared as a whole, so that no answer depends on the hash.
 */
#ifndef DORAEMON_TABLE_H
#define DORAEMON_TABLE_H

#include "_texts.h"

/* A bin has PER_BIN texts on average, so that few find it full. Where less than one query in SELDOM of a group is found,
 * the next PAUSE groups go down the tree at once. */
enum { WAYS = 10, PER_BIN = 6, PROBES = 64, SELDOM = 8, PAUSE = 15 };
enum { CODES, BELOW, NOT_ABOVE }; /* what is asked: the codes of queries, or how many texts are below or not above them */

typedef struct {
    uint32_t number[WAYS]; /* of the texts in the tree; free ways have 0, and are told as little apart as others */
    uint16_t tag[WAYS], used, unused;
} Bin;

typedef struct {
    Bin *bins;
    uint64_t n_bins; /* 0 where there is no table */
} Table;

static inline uint64_t bins_for(int64_t n) { return n <= UINT32_MAX ? (uint64_t)(n + PER_BIN - 1) / PER_BIN : 0; }

/* The upper half tells the bin, the lowest bytes are the tag. */
static inline uint64_t hash_of(Text text, const uint8_t *end)
{
    uint64_t hash = (uint64_t)text.size * UINT64_C(0x9E3779B97F4A7C15);
    for (int64_t from = 0; from < text.size; from += 8) {
        hash = (hash ^ chunk_of(text, from, end)) * UINT64_C(0xD6E8FEB86659FD93);
        hash ^= hash >> 32;
    }
    hash *= UINT64_C(0x9E3779B97F4A7C15);
    return hash ^ hash >> 32;
}

static inline Bin *bin_of(const Table *table, uint64_t hash)
{
    return table->bins + ((hash >> 32) * table->n_bins >> 32);
}

/* The way of the bin whose text may have this hash, below 0 if none has; without branches. */
static inline int way_of(const Bin *bin, uint64_t hash)
{
    int found = -1;
    for (int way = 0; way < WAYS; way++)
        found = bin->tag[way] == (uint16_t)hash ? way : found;
    return found;
}

static void fill_table(Table *table, const Texts *texts)
{
    memset(table->bins, 0, table->n_bins * sizeof *table->bins);
    for (int64_t i = 0; table->n_bins && i < texts->n; i++) {
        uint64_t hash = hash_of(text_of(texts, i), texts->end);
        Bin *bin = bin_of(table, hash);
        if (bin->used == WAYS)
            continue;
        bin->number[bin->used] = (uint32_t)i;
        bin->tag[bin->used++] = (uint16_t)hash;
    }
}

/* What is asked of many queries, and where the answers go. */
typedef struct {
    const Tree *tree;
    const Table *table;
    const uint64_t *codes; /* of the tree's texts */
    const Texts *queries;
    int asked;
    uint64_t *out;
} Errand;

/* Write the answer to a query that so many texts are below. The code of one that no text equals is 1 less than that of the
 * next text, as these are even, or the largest number there is. */
static inline void answer(const Errand *errand, int64_t query, int64_t below, int exact)
{
    if (errand->asked == CODES)
        errand->out[query] = (below < errand->tree->texts.n ? errand->codes[below] : 0) - !exact;
    else
        errand->out[query] = (uint64_t)(below + (exact && errand->asked == NOT_ABOVE));
}

/* The number of the text that equals a query, below 0 if the table does not have it. Memory is asked for its code as well,
 * and for the key that has this code where all keys are texts of the tree. */
static inline int64_t number_by_table(const Table *table, const Texts *texts, const uint64_t *codes, const uint64_t *keys,
                                      Text q)
{
    if (table->n_bins == 0)
        return -1;
    uint64_t hash = hash_of(q, q.at + q.size);
    const Bin *bin = bin_of(table, hash);
    int way = way_of(bin, hash);
    if (way < 0)
        return -1;
    int64_t number = bin->number[way];
    PREFETCH(codes + number);
    PREFETCH(keys + number);
    Text text = text_of(texts, number);
    return q.size == text.size && memcmp(q.at, text.at, (size_t)q.size) == 0 ? number : -1;
}

/* Numbers of queries that go down the tree. */
typedef struct {
    int64_t query[PROBES + TEXT_GROUP], n;
} Misses;

static void answer_by_tree(const Errand *errand, const int64_t *query, int64_t m)
{
    Descent d = {.m = m, .end = errand->queries->end};
    for (int64_t i = 0; i < m; i++)
        d.q[i] = text_of(errand->queries, query[i]);
    find_group(errand->tree, &d);
    for (int64_t i = 0; errand->asked == CODES && i < m; i++)
        PREFETCH(errand->codes + d.at[i]);
    for (int64_t i = 0; i < m; i++)
        answer(errand, query[i], d.at[i], d.exact[i]);
}

/* Answer those of m queries from `first` on that the table has; the others are added to the misses. Each loop asks memory
 * for what the next one reads. Both lists are written for every query, and only one of them grows. */
static int64_t answer_by_table(const Errand *errand, int64_t first, int64_t m, Misses *misses)
{
    const Texts *queries = errand->queries, *texts = &errand->tree->texts;
    int64_t query[PROBES], number[PROBES], n = 0, found = 0;
    uint64_t hash[PROBES];
    for (int64_t i = 0; i < m; i++) {
        hash[i] = hash_of(text_of(queries, first + i), queries->end);
        PREFETCH(bin_of(errand->table, hash[i]));
    }
    for (int64_t i = 0; i < m; i++) {
        const Bin *bin = bin_of(errand->table, hash[i]);
        int way = way_of(bin, hash[i]);
        query[n] = misses->query[misses->n] = first + i;
        number[n] = bin->number[way < 0 ? 0 : way];
        PREFETCH(texts->offsets + number[n]);
        PREFETCH(errand->codes + (errand->asked == CODES ? number[n] : 0));
        n += way >= 0;
        misses->n += way < 0;
    }
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *at = texts->data + texts->offsets[number[i]];
        PREFETCH(at);
        PREFETCH(at + 48);
    }
    for (int64_t i = 0; i < n; i++) {
        Text q = text_of(queries, query[i]), text = text_of(texts, number[i]);
        if (q.size == text.size && memcmp(q.at, text.at, (size_t)q.size) == 0) {
            answer(errand, query[i], number[i], 1);
            found++;
        } else
            misses->query[misses->n++] = query[i];
    }
    return found;
}

static void run_errand(const Errand *errand)
{
    Misses misses = {.n = 0};
    int64_t paused = errand->table->n_bins ? 0 : INT64_MAX;
    for (int64_t first = 0; first < errand->queries->n; first += PROBES) {
        int64_t m = errand->queries->n - first < PROBES ? errand->queries->n - first : PROBES;
        if (paused == 0)
            paused = answer_by_table(errand, first, m, &misses) * SELDOM < m ? PAUSE : 0;
        else {
            paused--;
            for (int64_t i = 0; i < m; i++)
                misses.query[misses.n++] = first + i;
        }
        for (; misses.n >= TEXT_GROUP; misses.n -= TEXT_GROUP)
            answer_by_tree(errand, misses.query + misses.n - TEXT_GROUP, TEXT_GROUP);
    }
    answer_by_tree(errand, misses.query, misses.n);
}

#endif
