/* The fit: leaves of buckets, and whether they are true. */
#ifndef DORAEMON_FIT_H
#define DORAEMON_FIT_H

#include <math.h>
#include <stdint.h>

#include "_search.h"

/* What a line through some points (f, r) is made of: sums from the first point on, as keys of one leaf may differ in the last
 * digits only. */
typedef struct {
    double f, r, ff, fr;
} Sums;

/* The least-squares line through m points, moved so that it errs as much above as below. */
static inline Leaf fit_leaf(const double *f, const double *r, int64_t m, Sums sums, double steepest)
{
    double least = INFINITY, most = -INFINITY;
    double ff = sums.ff - sums.f * sums.f / (double)m, fr = sums.fr - sums.f * sums.r / (double)m;
    double steep = ff > 0 ? fr / ff : 0.0;
    float slope = (float)(steep < steepest ? steep : steepest);
    for (int64_t i = 0; i < m; i++) {
        double rest = r[i] - (double)slope * f[i];
        least = rest < least ? rest : least;
        most = rest > most ? rest : most;
    }
    return (Leaf){(float)(0.5 * (least + most)), slope, (float)(0.5 * (most - least) + 1.0)};
}

/* The 1 << bits leaves of the keys at [start, end], each over an equal width of codes; `f` and `r` have room for all of them.
 * A leaf without keys has the rank of what comes after it. */
WIDE static void fit_bucket(const uint64_t *keys, int64_t n, int64_t start, int64_t end, double scale, int bits,
                            double steepest, Leaf *out, double *f, double *r)
{
    int64_t leaves = (int64_t)1 << bits, current = 0, m = 0;
    Sums sums = {0};
    for (int64_t i = start; i <= end && i < n; i++) {
        if (i > start && keys[i] == keys[i - 1])
            continue; /* the rank of a key is that of its first copy */
        double t = (double)(keys[i] - keys[start]) * scale;
        int64_t leaf = t < (double)leaves ? (int64_t)t : leaves - 1;
        while (current < leaf) {
            Leaf empty = {(float)(i - start), 0.0f, 0.0f};
            out[current++] = m ? fit_leaf(f, r, m, sums, steepest) : empty;
            sums = (Sums){0};
            m = 0;
        }
        f[m] = t - (double)leaf;
        r[m] = (double)(i - start);
        double df = f[m] - f[0], dr = r[m] - r[0];
        sums = (Sums){sums.f + df, sums.r + dr, sums.ff + df * df, sums.fr + df * dr};
        m++;
    }
    while (current < leaves) {
        Leaf empty = {(float)(end - start), 0.0f, 0.0f};
        out[current++] = m ? fit_leaf(f, r, m, sums, steepest) : empty;
        m = 0;
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

#endif
