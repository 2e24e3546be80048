/* The C extension. A View is what readers of one state of an index search in: the sorted codes of the immutable run, the
 * model over them, the sorted deltas of changes since, and the table of hot codes that is asked before the model.
 *
 * Without Python: _arrays.h, _delta.h, _hot.h, _search.h, _groups.h, _batch.h, _fit.h; of texts _texts.h, _table.h. For
 * Python: _view.c, and what it includes, _texts.c, _level.c and _scan.c. Here is the module.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <structmember.h>

#include "_batch.h"
#include "_buffers.h"
#include "_fit.h"
#include "_table.h"

#include "_view.c"

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
    if (held[0].len == 0 || held[2].len != held[0].len || held[1].len / 8 != notes_of(held[0].len / (Py_ssize_t)sizeof(Line)))
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

/* tally(samples, few, codes): the distinct ones, those that occur most often first, or only one of 1 << few of them; how many
 * these are, and how many occur once. */
static PyObject *tally(PyObject *self, PyObject *args)
{
    static const Py_ssize_t itemsizes[2] = {8, 8};
    PyObject *arrays[2];
    Py_buffer held[2];
    int few;
    (void)self;
    if (!PyArg_ParseTuple(args, "OiO", arrays, &few, arrays + 1) || get_buffers(arrays, itemsizes, 2, 1, held) < 0)
        return NULL;
    int64_t m = held[0].len / 8, distinct = 0, once = 0;
    if (m >= INT32_MAX / 4 || held[1].len != held[0].len || few < 0 || few > 63)
        return end_call(held, 2, NOT_AS_MANY);
    uint64_t *chosen = PyMem_Malloc(((size_t)m + 1) * sizeof *chosen);
    int64_t n = chosen == NULL ? 0 : choose_codes(held[0].buf, m, few, chosen), n_places = 2 * n + 1;
    uint32_t *places = PyMem_Calloc((size_t)n_places, sizeof *places);
    uint64_t *codes = PyMem_Malloc(((size_t)n + 1) * sizeof *codes);
    int64_t *counts = PyMem_Malloc(((size_t)n + 1) * sizeof *counts);
    int enough = chosen != NULL && places != NULL && codes != NULL && counts != NULL;
    if (enough) {
        Py_BEGIN_ALLOW_THREADS
        distinct = count_distinct(chosen, n, places, n_places, codes, counts);
        order_by_count(codes, counts, distinct, held[1].buf);
        for (int64_t i = 0; i < distinct; i++)
            once += counts[i] == 1;
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(chosen);
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

/* What Python has to know of a learner's notes: how many there are, with what was missed, which is which, and in what parts `lacks` counts. */
static int add_note_names(PyObject *module)
{
    return PyModule_AddIntConstant(module, "NOTES", NOTES) < 0 || PyModule_AddIntConstant(module, "SEEN", SEEN) < 0 ||
                   PyModule_AddIntConstant(module, "ASKED", ASKED) < 0 ||
                   PyModule_AddIntConstant(module, "MISSED", MISSED) < 0 ||
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
    {"tally", tally, METH_VARARGS, "tally(samples, few, codes): the distinct ones by how often they occur."},
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
