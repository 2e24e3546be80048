/* Views: what readers of one state of an index search in, for Python.
 *
 * Included by _native.c. A View borrows NumPy's arrays through the buffer protocol and changes none but `samples`, the
 * codes that were asked for lately, and the table that learns.
 */
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
        (count[LEARNED] > 0 && (count[LEARNED] != count[HOT] || count[LEARNER_NOTES] != notes_of(count[LEARNED]))) ||
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
    int held = look_up_hot((Hot){s->learner.lines, s->hot.n_lines, 0}, code, found);
    learns_at_once(s->learner, s->hot.n_lines, held, 0);
    leave_learner(s->learner);
    return held;
}

/* A single query, which the model answered, is learned like those of a batch. */
static inline void learn_one(const Search *s, uint64_t q, int64_t rank, int right)
{
    if (s->hot.n_lines == 0 || !take_learner(s->learner))
        return;
    int at_once = learns_at_once(s->learner, s->hot.n_lines, 1, 1);
    if (missed_again(s->learner, s->hot.n_lines, q - (uint64_t)right) | at_once)
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

