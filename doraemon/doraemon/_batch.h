/* Batches: groups of queries in turns, the hot table before them, and what is written of each query. */
#ifndef DORAEMON_BATCH_H
#define DORAEMON_BATCH_H

#include <stdint.h>
#include <string.h>

#include "_groups.h"

enum { BLOCK = 32 }; /* codes that the hot table is asked for at once */
enum { RUN_RANKS, RANKS, PLACES, COUNTS }; /* what a batch asks for */

/* Where the answers of a batch go: ranks, or places without or with their positions; or ranks in the run with the counts
 * of keys there. */
typedef struct {
    int64_t *ranks, *positions;
    uint8_t *present, *layers;
} Answers;

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

/* ------------------------------------------------------------------ search */

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

/* Choose what is learned of a group that was missed and searched, and ask memory for what learning it will read: a key's
 * neighbours may be in other lines of the cache. */
static inline void prepare_lesson(const Search *s, const Group *g, const int64_t *rank, int right, int at_once,
                                  Lesson *lesson)
{
    lesson->m = 0;
    for (int64_t i = 0; i < g->m; i++) {
        lesson->q[lesson->m] = g->q[i];
        lesson->rank[lesson->m] = rank[i];
        lesson->m += missed_again(s->learner, s->hot.n_lines, g->q[i] - (uint64_t)right) | at_once;
    }
    for (int64_t i = 0; i < lesson->m; i++) {
        int64_t at = lesson->rank[i];
        PREFETCH(s->learner.lines + line_number(lesson->q[i] - (uint64_t)right, s->hot.n_lines));
        PREFETCH(s->keys + at - (at > right ? right + 1 : 0));
        PREFETCH(s->keys + at + 1 - right);
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
                int at_once = learns_at_once(s->learner, s->hot.n_lines, done - noted, last->m);
                prepare_lesson(s, last, rank, right, at_once, &lesson);
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
        learns_at_once(s->learner, s->hot.n_lines, m - noted, 0);
        leave_learner(s->learner);
    }
    STORE(&s->random, random);
}

#endif
