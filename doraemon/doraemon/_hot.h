/* The hot table: codes that are asked for often, each with its rank and its number of copies in the run.
 *
 * It is a cache, not an index: a code has one line of four slots, as large as a line of the processor's cache, and what
 * finds its line full is left out. Every slot holds a true statement about the run, free ones the hottest code's, so
 * whatever equals a query answers it, and nothing has to say which slots are free. A code that the run does not have
 * may be there too, with no copies and the rank that it would have.
 *
 * There are two of it: one that never changes, and one that learns. Who asks the latter has it alone meanwhile, and adds
 * codes that it lacked and the model found; who comes when it is taken asks the other. So it follows accesses that move,
 * a query after the other.
 */
#ifndef DORAEMON_HOT_H
#define DORAEMON_HOT_H

#include <string.h>

#include "_portable.h"

enum { SLOTS = 4, RANK_BITS = 40 };
static const uint64_t MOST_COPIES = ((uint64_t)1 << (64 - RANK_BITS)) - 1;

typedef struct {
    uint64_t code[SLOTS];
    uint64_t found[SLOTS]; /* copies << RANK_BITS | rank */
} Line;

typedef struct {
    const Line *lines;
    uint64_t n_lines; /* 0 where there is no table */
    int64_t least; /* how many PARTS of a batch it has to answer to pay */
} Hot;

/* What a learner's notes say: whether a reader has it now; how many codes it was asked for, and how many of them it lacked;
 * the same when it was last judged; and how many misses more are learned at once. Behind them are at least SEEN bytes
 * for each line of the table, which tell what was missed lately. */
enum { TAKEN_NOW, ASKED, MISSED, ASKED_THEN, MISSED_THEN, AT_ONCE, NOTES };
enum { SEEN = 2, PARTS = 1024, JUDGED = 512 }; /* misses, before it is judged */
enum { STRANGE = 4 }; /* where it lacks one in so many of what it used to answer, the accesses have moved */

/* The table that learns. It takes codes of the first `reach` keys only: what is said of them stays true when keys are
 * appended to the run. */
typedef struct {
    Line *lines; /* as many as those of the other table, or NULL where nothing is learned */
    uint64_t *notes;
    int64_t reach, lacks; /* how many PARTS of what is asked the table lacked when it was chosen */
} Learner;

static inline int64_t rank_in(uint64_t found) { return (int64_t)(found & (((uint64_t)1 << RANK_BITS) - 1)); }
static inline int64_t copies_in(uint64_t found) { return (int64_t)(found >> RANK_BITS); }

/* Which of `n_lines` lines a code has: its product with a number near 2**64 / golden ratio, scaled. */
static inline uint64_t line_number(uint64_t code, uint64_t n_lines)
{
    return ((code * UINT64_C(0x9E3779B97F4A7C15) >> 32) * n_lines) >> 32;
}

static inline const Line *line_of(Hot hot, uint64_t code) { return hot.lines + line_number(code, hot.n_lines); }

/* The slot of the line that holds the code, if any does. Where more than one does, as they are free, the last one is among
 * them. Slots are as good as random in a table that learns, so there are no branches. */
static inline int slot_of(const Line *line, uint64_t code)
{
    return (line->code[1] == code) | (line->code[2] == code) << 1 | 3 * (line->code[3] == code);
}

/* Whether the table holds the code, and what it knows of it. */
static inline int look_up_hot(Hot hot, uint64_t code, uint64_t *found)
{
    if (hot.n_lines == 0)
        return 0;
    const Line *line = line_of(hot, code);
    int slot = slot_of(line, code);
    *found = line->found[slot];
    return line->code[slot] == code;
}

/* Whether the table answers so much of a batch that asking it pays: of a long one, one code in so many tells. A table that
 * learns is asked anyway, or it would not learn. */
enum { PROBED = 64, LEAST_PROBES = 64, MOST_PROBES = 1024 };
static inline int answers_batch(Hot hot, Learner learner, const uint64_t *codes, int64_t m)
{
    int64_t probes = m / PROBED < MOST_PROBES ? m / PROBED : MOST_PROBES, hits = 0;
    if (learner.lines != NULL || probes < LEAST_PROBES)
        return 1;
    for (int64_t i = 0; i < probes; i++) {
        uint64_t found;
        hits += look_up_hot(hot, codes[i * (m / probes)], &found);
    }
    return hits * PARTS >= probes * hot.least;
}

static inline int take_learner(Learner learner)
{
    return learner.lines != NULL && TRY_LOCK(learner.notes + TAKEN_NOW);
}

static inline void leave_learner(Learner learner) { UNLOCK(learner.notes + TAKEN_NOW); }

/* How many words the notes of a learner with so many lines take. */
static inline int64_t notes_of(int64_t n_lines) { return NOTES + (n_lines * SEEN + 7) / 8; }

/* Note some more codes of which some were missed; whether these are to be learned at once. They are where the accesses have
 * moved, until they could have filled half the table. Else only those are that were missed before: a table that takes
 * whatever comes loses more to what is never asked for again than it gains. */
static inline int learns_at_once(Learner learner, uint64_t n_lines, int64_t asked, int64_t missed)
{
    uint64_t *notes = learner.notes;
    notes[ASKED] += (uint64_t)asked;
    notes[MISSED] += (uint64_t)missed;
    uint64_t since = notes[ASKED] - notes[ASKED_THEN], lacked = notes[MISSED] - notes[MISSED_THEN];
    if (lacked >= JUDGED) {
        uint64_t usual = since * (uint64_t)learner.lacks / PARTS;
        if (lacked > usual + (since - usual) / STRANGE)
            notes[AT_ONCE] = n_lines * SLOTS / 2;
        notes[ASKED_THEN] = notes[ASKED];
        notes[MISSED_THEN] = notes[MISSED];
    }
    int at_once = notes[AT_ONCE] > 0;
    notes[AT_ONCE] -= notes[AT_ONCE] < (uint64_t)missed ? notes[AT_ONCE] : (uint64_t)missed;
    return at_once;
}

/* Whether a code that was missed was so before, as well as one byte of its hash can tell; which is noted. */
static inline int missed_again(Learner learner, uint64_t n_lines, uint64_t code)
{
    uint64_t hash = (code ^ code >> 32) * UINT64_C(0xD6E8FEB86659FD93);
    uint8_t *seen = (uint8_t *)(learner.notes + NOTES) + ((hash >> 32) * n_lines * SEEN >> 32), byte = (uint8_t)(hash >> 24);
    int again = *seen == byte;
    *seen = byte;
    return again;
}

/* Add a code, which the run has once, in place of that which was added to its line first. */
static inline void learn_code(Line *lines, uint64_t n_lines, uint64_t code, int64_t rank)
{
    Line *line = lines + line_number(code, n_lines);
    if (line->code[slot_of(line, code)] == code) /* asked for twice before it was found */
        return;
    memmove(line->code + 1, line->code, (SLOTS - 1) * sizeof *line->code);
    memmove(line->found + 1, line->found, (SLOTS - 1) * sizeof *line->found);
    line->code[0] = code;
    line->found[0] = (uint64_t)1 << RANK_BITS | (uint64_t)rank;
}

/* Put codes, the hottest first, into the lines of a table; how many found room. `used` counts each line's codes. */
static int64_t fill_lines(Line *lines, int64_t n_lines, uint8_t *used, const uint64_t *codes, const int64_t *ranks,
                          const int64_t *copies, int64_t m)
{
    int64_t placed = 0;
    for (int64_t i = 0; i < n_lines; i++) {
        used[i] = 0;
        for (int slot = 0; slot < SLOTS; slot++) {
            lines[i].code[slot] = codes[0];
            lines[i].found[slot] = (uint64_t)copies[0] << RANK_BITS | (uint64_t)ranks[0];
        }
    }
    for (int64_t i = 0; i < m; i++) {
        uint64_t number = line_number(codes[i], (uint64_t)n_lines);
        if (used[number] == SLOTS)
            continue;
        lines[number].code[used[number]] = codes[i];
        lines[number].found[used[number]++] = (uint64_t)copies[i] << RANK_BITS | (uint64_t)ranks[i];
        placed++;
    }
    return placed;
}

/* Whether the table holds each of m codes. */
static void mark_held(Hot hot, const uint64_t *codes, int64_t m, uint8_t *held)
{
    for (int64_t i = 0; i < m; i++) {
        const Line *line = line_of(hot, codes[i]);
        held[i] = line->code[slot_of(line, codes[i])] == codes[i];
    }
}

/* One of 1 << few different codes, by a hash: all samples of those. How many these are; `out` has room for all. */
static int64_t choose_codes(const uint64_t *samples, int64_t m, int few, uint64_t *out)
{
    int64_t chosen = 0;
    for (int64_t i = 0; i < m; i++) {
        out[chosen] = samples[i];
        chosen += samples[i] * UINT64_C(0xBF58476D1CE4E5B9) <= UINT64_MAX >> few;
    }
    return chosen;
}

/* Count the distinct ones of m codes, in places of a hash table: 1 more than where each is in `codes` and `counts`. */
static int64_t count_distinct(const uint64_t *samples, int64_t m, uint32_t *places, int64_t n_places, uint64_t *codes,
                              int64_t *counts)
{
    int64_t distinct = 0;
    for (int64_t i = 0; i < m; i++) {
        uint64_t place = line_number(samples[i], (uint64_t)n_places);
        while (places[place] != 0 && codes[places[place] - 1] != samples[i])
            place = place + 1 < (uint64_t)n_places ? place + 1 : 0;
        if (places[place] == 0) {
            codes[distinct] = samples[i];
            counts[distinct] = 0;
            places[place] = (uint32_t)++distinct;
        }
        counts[places[place] - 1]++;
    }
    return distinct;
}

/* Codes by their counts, the largest first; counts above the largest that is told apart are in no order. */
enum { TOLD_APART = 256 };
static void order_by_count(const uint64_t *codes, const int64_t *counts, int64_t m, uint64_t *ordered)
{
    int64_t first[TOLD_APART + 1] = {0};
    for (int64_t i = 0; i < m; i++)
        first[counts[i] < TOLD_APART ? counts[i] : TOLD_APART]++;
    for (int64_t count = TOLD_APART, place = 0; count >= 0; count--) {
        int64_t many = first[count];
        first[count] = place;
        place += many;
    }
    for (int64_t i = 0; i < m; i++)
        ordered[first[counts[i] < TOLD_APART ? counts[i] : TOLD_APART]++] = codes[i];
}

#endif
