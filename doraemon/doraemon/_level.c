/* The level: single changes on their way into the deltas, in memory that is changed in place.
 *
 * Included by _native.c after the View, whose search it begins with. Entries lie in blocks of sorted codes; each block
 * knows by how much the blocks before it shift ranks, so a rank costs two short binary searches and one short sum.
 * Every method changes or reads the level within one hold of the GIL: what runs Python (mapping a key, converting a
 * value) comes before, and letting go of a replaced value after. So a question sees one moment, a frozen level changes
 * no more, and neither readers nor writers need a lock.
 */
enum { ENTRIES = 64 };

typedef struct {
    int64_t count;
    uint64_t codes[ENTRIES];
    int64_t ranks[ENTRIES];     /* how many keys of the base are below the code */
    int64_t net[ENTRIES];       /* by how many keys the code's count differs from the base's */
    PyObject *values[ENTRIES];  /* of a map, NULL where the key was removed; NULL in a multiset */
    uint64_t bytes[ENTRIES];    /* of values that would be items of `one`, in whose places `one` stands for these */
} Block;

typedef struct {
    PyObject_HEAD
    View *base;
    PyObject *convert;        /* makes a value a map's; None for a multiset */
    PyObject *plain, *one;    /* a value of type `plain` that fits is an item of `one`, once its bytes are put there */
    Py_buffer held;           /* the memory of `one`: an int64 or a float64, or where there is none NULL */
    PyObject *no_value;       /* stands for a value that is not given */
    Block **blocks;
    uint64_t *first; /* first[b]: no code of block b is below it, for b > 0 */
    int64_t *before; /* before[b]: the net of all blocks before b */
    int64_t n_blocks, room, size, capacity;
    long long net, version; /* of all entries; how often it was changed */
    uint64_t last_code; /* that was looked for in the base, and where it is there */
    Place last;
    int64_t last_run;
    char frozen, has_last;
} Level;

/* Whether the level has an entry for `code`; it is, or would be, entry `*i` of block `*b`. */
static int seek(const Level *level, uint64_t code, int64_t *b, int64_t *i)
{
    *b = *i = 0;
    if (level->n_blocks == 0)
        return 0;
    *b = below(level->first + 1, level->n_blocks - 1, code);
    *b += *b + 1 < level->n_blocks && level->first[*b + 1] == code;
    const Block *block = level->blocks[*b];
    *i = below(block->codes, block->count, code);
    return *i < block->count && block->codes[*i] == code;
}

static int64_t sum(const int64_t *net, int64_t n)
{
    int64_t total = 0;
    for (int64_t i = 0; i < n; i++)
        total += net[i];
    return total;
}

/* By how much the entries below `q` shift ranks. */
static int64_t shift_below(const Level *level, uint64_t q)
{
    if (level->n_blocks == 0)
        return 0;
    int64_t b = below(level->first + 1, level->n_blocks - 1, q);
    const Block *block = level->blocks[b];
    return level->before[b] + sum(block->net, below(block->codes, block->count, q));
}

static int grow(Level *level)
{
    int64_t room = 2 * level->room + 4;
    size_t bytes = (size_t)room * 8;
    Block **blocks = PyMem_Realloc(level->blocks, (size_t)room * sizeof *blocks);
    level->blocks = blocks != NULL ? blocks : level->blocks;
    uint64_t *first = PyMem_Realloc(level->first, bytes);
    level->first = first != NULL ? first : level->first;
    int64_t *before = PyMem_Realloc(level->before, bytes);
    level->before = before != NULL ? before : level->before;
    if (blocks == NULL || first == NULL || before == NULL)
        return -1;
    level->room = room;
    return 0;
}

/* A new block `b` that the entries of the block before it move to from `from` on; its codes are not below `first`. */
static int add_block(Level *level, int64_t b, int64_t from, uint64_t first)
{
    if (level->n_blocks == level->room && grow(level) < 0)
        return -1;
    Block *block = PyMem_Malloc(sizeof *block);
    if (block == NULL)
        return -1;
    size_t after = (size_t)(level->n_blocks - b) * 8;
    memmove(level->blocks + b + 1, level->blocks + b, (size_t)(level->n_blocks - b) * sizeof *level->blocks);
    memmove(level->first + b + 1, level->first + b, after);
    memmove(level->before + b + 1, level->before + b, after);
    level->blocks[b] = block;
    level->first[b] = first;
    level->before[b] = 0;
    level->n_blocks++;
    block->count = 0;
    if (b == 0)
        return 0;
    Block *left = level->blocks[b - 1];
    block->count = left->count - from;
    memcpy(block->codes, left->codes + from, (size_t)block->count * sizeof *left->codes);
    memcpy(block->ranks, left->ranks + from, (size_t)block->count * sizeof *left->ranks);
    memcpy(block->net, left->net + from, (size_t)block->count * sizeof *left->net);
    memcpy(block->values, left->values + from, (size_t)block->count * sizeof *left->values);
    memcpy(block->bytes, left->bytes + from, (size_t)block->count * sizeof *left->bytes);
    left->count = from;
    level->before[b] = level->before[b - 1] + sum(left->net, from);
    return 0;
}

/* An entry of no change for `code`, whose rank in the base is known, where `seek` placed it. Full blocks are halved, but
 * appended codes fill them. */
static int add_entry(Level *level, uint64_t code, int64_t rank, int64_t *b, int64_t *i)
{
    if (level->n_blocks == 0 && add_block(level, 0, 0, 0) < 0)
        return -1;
    if (level->blocks[*b]->count == ENTRIES) {
        int appended = *b == level->n_blocks - 1 && *i == ENTRIES;
        int64_t half = appended ? ENTRIES : ENTRIES / 2;
        if (add_block(level, *b + 1, half, appended ? code : level->blocks[*b]->codes[half]) < 0)
            return -1;
        if (appended || *i > half) {
            *b += 1;
            *i -= half;
        }
    }
    Block *block = level->blocks[*b];
    size_t after = (size_t)(block->count - *i);
    memmove(block->codes + *i + 1, block->codes + *i, after * sizeof *block->codes);
    memmove(block->ranks + *i + 1, block->ranks + *i, after * sizeof *block->ranks);
    memmove(block->net + *i + 1, block->net + *i, after * sizeof *block->net);
    memmove(block->values + *i + 1, block->values + *i, after * sizeof *block->values);
    memmove(block->bytes + *i + 1, block->bytes + *i, after * sizeof *block->bytes);
    block->codes[*i] = code;
    block->ranks[*i] = rank;
    block->net[*i] = 0;
    block->values[*i] = NULL;
    block->count++;
    level->size++;
    return 0;
}

/* Where `seek` found a code, or where it belongs, and then what its rank in the base is. */
typedef struct {
    uint64_t code;
    int64_t b, i, rank;
    int found;
} Spotted;

/* Change an entry by `net` keys and give it a value, whose reference is taken; -1 if memory is out. */
static int change_entry(Level *level, const Spotted *at, int64_t net, PyObject *value, uint64_t bytes)
{
    int64_t b = at->b, i = at->i;
    if (!at->found && add_entry(level, at->code, at->rank, &b, &i) < 0) {
        Py_XDECREF(value);
        PyErr_NoMemory();
        return -1;
    }
    Block *block = level->blocks[b];
    PyObject *old = block->values[i];
    block->net[i] += net;
    block->values[i] = value;
    block->bytes[i] = bytes;
    for (int64_t later = b + 1; net != 0 && later < level->n_blocks; later++)
        level->before[later] += net;
    level->net += net;
    level->version++;
    Py_XDECREF(old); /* may run Python: last */
    return 0;
}

/* ------------------------------------------------------------------ keys of base and level together */

static int64_t base_count(Level *level, uint64_t code)
{
    const Search *s = &level->base->search;
    int64_t end = code == UINT64_MAX ? length_of(s) : rank_of_code(s, code, 1);
    return end - rank_of_code(s, code, 0);
}

static int is_map(const Level *level) { return level->convert != Py_None; }

/* The place of a code in the base, and its rank in the run. What was read is often changed next, so the last code that was
 * looked for is known. */
static Place place_in_base(Level *level, const Cut *cut, int64_t *run)
{
    if (!level->has_last || level->last_code != cut->code) {
        level->last = ask_place(level->base, cut, &level->last_run);
        level->last_code = cut->code;
        level->has_last = 1;
    }
    *run = level->last_run;
    return level->last;
}

/* Look for a code. Whether it is in the index. */
static int spot(Level *level, const Cut *cut, Spotted *at)
{
    uint64_t code = at->code = cut->code;
    at->found = seek(level, code, &at->b, &at->i);
    if (!at->found) {
        Place place = place_in_base(level, cut, &at->rank);
        at->rank = with_shifts(&level->base->search, code, at->rank);
        return place.present;
    }
    const Block *block = level->blocks[at->b];
    if (is_map(level))
        return block->values[at->i] != NULL;
    return block->net[at->i] > 0 || base_count(level, code) + block->net[at->i] > 0;
}

static int is_closed(const Level *level) { return level->frozen || level->size >= level->capacity; }

/* ------------------------------------------------------------------ Python */

static long long version_of(const Level *level) { return level != NULL ? level->version : 0; }

/* Where a key cuts the codes as they are now: where those of texts are cut depends on the texts that there are, and other
 * threads may add some while Python maps the key. */
static int cut_now(View *view, const Level *level, PyObject *key, Cut *cut)
{
    long long version;
    do {
        version = version_of(level);
        if (cut_of(view, key, cut) < 0)
            return -1;
    } while (version_of(level) != version);
    return 0;
}

static PyObject *level_rank(Level *level, PyObject *key, int right)
{
    Search *s = &level->base->search;
    Cut cut;
    if (cut_now(level->base, level, key, &cut) < 0)
        return NULL;
    right = right && cut.exact;
    if (cut.above || (right && cut.code == UINT64_MAX))
        return PyLong_FromLongLong(length_of(s) + level->net);
    uint64_t q = cut.code + (uint64_t)right;
    return PyLong_FromLongLong(ask_rank(s, &cut, right) + shift_below(level, q));
}

static PyObject *level_left(PyObject *self, PyObject *key) { return level_rank((Level *)self, key, 0); }
static PyObject *level_right(PyObject *self, PyObject *key) { return level_rank((Level *)self, key, 1); }

static PyObject *level_contains(PyObject *self, PyObject *key)
{
    Level *level = (Level *)self;
    Cut cut;
    Spotted at;
    if (cut_of(level->base, key, &cut) < 0)
        return NULL;
    return PyBool_FromLong(cut.exact && !cut.above && spot(level, &cut, &at));
}

/* A value of an entry. */
static PyObject *value_of(const Level *level, PyObject *value, uint64_t bytes)
{
    if (value != level->one)
        return Py_NewRef(value);
    memcpy(level->held.buf, &bytes, sizeof bytes);
    return PySequence_GetItem(level->one, 0);
}

static PyObject *level_get(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Level *level = (Level *)self;
    Cut cut;
    int64_t b, i, run;
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "get takes a key and a default");
        return NULL;
    }
    if (cut_of(level->base, args[0], &cut) < 0)
        return NULL;
    if (!cut.exact || cut.above)
        return Py_NewRef(args[1]);
    if (seek(level, cut.code, &b, &i)) {
        const Block *block = level->blocks[b];
        return block->values[i] != NULL ? value_of(level, block->values[i], block->bytes[i]) : Py_NewRef(args[1]);
    }
    Place place = place_in_base(level, &cut, &run);
    return place.present ? PySequence_GetItem(level->base->values[place.layer], (Py_ssize_t)place.position)
                         : Py_NewRef(args[1]);
}

/* The bytes of a value of type `plain` as an item of `one`; 0 if it does not fit. */
static int bytes_of(PyObject *given, uint64_t *bytes)
{
    int overflow = 0;
    if (PyLong_Check(given)) {
        long long number = PyLong_AsLongLongAndOverflow(given, &overflow);
        memcpy(bytes, &number, sizeof number);
    } else {
        double number = PyFloat_AsDouble(given);
        memcpy(bytes, &number, sizeof number);
    }
    return !overflow;
}

/* A map's value, or `one` with the bytes of what would be its item. */
static PyObject *converted(Level *level, PyObject *given, uint64_t *bytes)
{
    if ((PyObject *)Py_TYPE(given) == level->plain && bytes_of(given, bytes))
        return Py_NewRef(level->one);
    PyObject *value = PyObject_CallFunctionObjArgs(level->convert, given, NULL);
    if (value == NULL || level->held.buf == NULL)
        return value;
    int failed = PySequence_SetItem(level->one, 0, value) < 0;
    memcpy(bytes, level->held.buf, sizeof *bytes);
    Py_DECREF(value);
    return failed ? NULL : Py_NewRef(level->one);
}

/* True, False if a key that a map has is not to be replaced, None if the level does not take the change. */
static PyObject *put_one(Level *level, PyObject *key, PyObject *given, int replace)
{
    Cut cut;
    Spotted at;
    PyObject *value = NULL;
    uint64_t bytes = 0;
    if (is_map(level) == (given == level->no_value))
        Py_RETURN_NONE;
    if (cut_of(level->base, key, &cut) < 0)
        return NULL;
    if (!cut.exact || cut.above || is_closed(level))
        Py_RETURN_NONE;
    if (is_map(level) && (value = converted(level, given, &bytes)) == NULL)
        return NULL;
    if (is_closed(level)) { /* meanwhile */
        Py_XDECREF(value);
        Py_RETURN_NONE;
    }
    int there = spot(level, &cut, &at) && is_map(level);
    if (there && !replace) {
        Py_DECREF(value);
        Py_RETURN_FALSE;
    }
    if (change_entry(level, &at, !there, value, bytes) < 0)
        return NULL;
    Py_RETURN_TRUE;
}

static PyObject *level_put(PyObject *self, PyObject *const *args, Py_ssize_t count, int replace)
{
    if (count == 2)
        return put_one((Level *)self, args[0], args[1], replace);
    PyErr_SetString(PyExc_TypeError, "insert and update take a key and a value");
    return NULL;
}

static PyObject *level_insert(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    return level_put(self, args, count, 0);
}

static PyObject *level_update(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    return level_put(self, args, count, 1);
}

static PyObject *level_discard(PyObject *self, PyObject *key)
{
    Level *level = (Level *)self;
    Cut cut;
    Spotted at;
    if (cut_of(level->base, key, &cut) < 0)
        return NULL;
    if (is_closed(level))
        Py_RETURN_NONE;
    if (!cut.exact || cut.above)
        Py_RETURN_FALSE;
    if (!spot(level, &cut, &at))
        Py_RETURN_FALSE;
    if (change_entry(level, &at, -1, NULL, 0) < 0)
        return NULL;
    Py_RETURN_TRUE;
}

static PyObject *level_freeze(PyObject *self, PyObject *unused)
{
    (void)unused;
    ((Level *)self)->frozen = 1;
    Py_RETURN_NONE;
}

static PyObject *level_entries(PyObject *self, PyObject *unused)
{
    Level *level = (Level *)self;
    Py_ssize_t n = (Py_ssize_t)level->size, at = 0;
    int as_bytes = level->held.buf != NULL, listed = is_map(level) && !as_bytes;
    PyObject *codes = PyBytes_FromStringAndSize(NULL, 8 * n), *net = PyBytes_FromStringAndSize(NULL, 8 * n);
    PyObject *alive = PyBytes_FromStringAndSize(NULL, n);
    PyObject *values = as_bytes ? PyBytes_FromStringAndSize(NULL, 8 * n) : PyList_New(listed ? n : 0);
    (void)unused;
    if (codes == NULL || net == NULL || alive == NULL || values == NULL) {
        Py_XDECREF(codes);
        Py_XDECREF(net);
        Py_XDECREF(alive);
        Py_XDECREF(values);
        return NULL;
    }
    for (int64_t b = 0; b < level->n_blocks; at += (Py_ssize_t)level->blocks[b]->count, b++) {
        const Block *block = level->blocks[b];
        memcpy(PyBytes_AsString(codes) + 8 * at, block->codes, (size_t)block->count * 8);
        memcpy(PyBytes_AsString(net) + 8 * at, block->net, (size_t)block->count * 8);
        if (as_bytes)
            memcpy(PyBytes_AsString(values) + 8 * at, block->bytes, (size_t)block->count * 8);
        for (int64_t i = 0; i < block->count; i++) {
            PyObject *value = block->values[i];
            PyBytes_AsString(alive)[at + i] = value != NULL;
            if (listed)
                PyList_SetItem(values, at + (Py_ssize_t)i, Py_NewRef(value != NULL ? value : Py_None));
        }
    }
    return Py_BuildValue("(LNNNN)", level->version, codes, net, alive, values);
}

static PyObject *level_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *base, *convert, *plain, *one, *no_value;
    Py_ssize_t capacity;
    (void)kwargs;
    if (!PyArg_ParseTuple(args, "OnOOOO", &base, &capacity, &convert, &plain, &one, &no_value))
        return NULL;
    if (PyType_GetSlot(Py_TYPE(base), Py_tp_dealloc) != (void *)view_dealloc) {
        PyErr_SetString(PyExc_TypeError, "a level lies over a View");
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Level *level = (Level *)allocate(type, 0);
    if (level == NULL || (one != Py_None && PyObject_GetBuffer(one, &level->held, PyBUF_CONTIG) < 0))
        goto failed;
    if ((one == Py_None) != (plain == Py_None) || (one != Py_None && level->held.len != 8)) {
        PyErr_SetString(PyExc_ValueError, "a plain value of a level has 8 bytes");
        goto failed;
    }
    level->one = Py_NewRef(one);
    level->base = (View *)Py_NewRef(base);
    level->convert = Py_NewRef(convert);
    level->plain = Py_NewRef(plain);
    level->no_value = Py_NewRef(no_value);
    level->capacity = capacity;
    return (PyObject *)level;
failed:
    Py_XDECREF((PyObject *)level);
    return NULL;
}

static void level_dealloc(PyObject *self)
{
    Level *level = (Level *)self;
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_level = (freefunc)PyType_GetSlot(type, Py_tp_free);
    for (int64_t b = 0; b < level->n_blocks; b++) {
        for (int64_t i = 0; i < level->blocks[b]->count; i++)
            Py_XDECREF(level->blocks[b]->values[i]);
        PyMem_Free(level->blocks[b]);
    }
    PyMem_Free(level->blocks);
    PyMem_Free(level->first);
    PyMem_Free(level->before);
    Py_XDECREF((PyObject *)level->base);
    Py_XDECREF(level->convert);
    Py_XDECREF(level->plain);
    if (level->held.obj != NULL)
        PyBuffer_Release(&level->held);
    Py_XDECREF(level->one);
    Py_XDECREF(level->no_value);
    free_level(self);
    Py_DECREF((PyObject *)type);
}

static PyObject *level_select(PyObject *self, PyObject *rank); /* in _scan.c, as are the next */
static PyObject *level_neighbour(PyObject *self, PyObject *const *args, Py_ssize_t count);
static PyObject *level_count(PyObject *self, PyObject *const *args, Py_ssize_t count);
static PyObject *level_scan(PyObject *self, PyObject *const *args, Py_ssize_t count);

static PyMethodDef level_methods[] = {
    {"left", level_left, METH_O, "How many keys are below the key."},
    {"right", level_right, METH_O, "How many keys are not above the key."},
    {"contains", level_contains, METH_O, "Whether the key is in the index."},
    {"get", (PyCFunction)(void (*)(void))level_get, METH_FASTCALL, "get(key, default): a map's value for the key."},
    {"insert", (PyCFunction)(void (*)(void))level_insert, METH_FASTCALL,
     "insert(key, value): True; False if a map has the key, None if the level does not take it."},
    {"update", (PyCFunction)(void (*)(void))level_update, METH_FASTCALL,
     "update(key, value): True; None if the level does not take it."},
    {"discard", level_discard, METH_O, "Whether the key was there, once less now; None if the level does not take it."},
    {"select", level_select, METH_O, "The code of a rank, as in a View."},
    {"neighbour", (PyCFunction)(void (*)(void))level_neighbour, METH_FASTCALL, "As in a View."},
    {"count", (PyCFunction)(void (*)(void))level_count, METH_FASTCALL, "As in a View."},
    {"scan", (PyCFunction)(void (*)(void))level_scan, METH_FASTCALL, "As in a View."},
    {"freeze", level_freeze, METH_NOARGS, "Take no more changes."},
    {"entries", level_entries, METH_NOARGS,
     "Version, codes, net changes, which are alive, values or their bytes, of one moment."},
    {NULL, NULL, 0, NULL},
};

static PyObject *level_closed(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(is_closed((Level *)self));
}

static PyGetSetDef level_getters[] = {
    {"closed", level_closed, NULL, "Whether it takes no more changes.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef level_members[] = {
    {"net", T_LONGLONG, offsetof(Level, net), READONLY, "How many keys more than in the base."},
    {"version", T_LONGLONG, offsetof(Level, version), READONLY, "How many changes were made."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot level_slots[] = {
    {Py_tp_new, level_new},
    {Py_tp_dealloc, level_dealloc},
    {Py_tp_methods, level_methods},
    {Py_tp_members, level_members},
    {Py_tp_getset, level_getters},
    {Py_tp_doc, "Level(view, capacity, convert, plain, one, no_value): single changes over the view of a state."},
    {0, NULL},
};

static PyType_Spec level_spec = {
    .name = "doraemon._native.Level",
    .basicsize = sizeof(Level),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = level_slots,
};

/* Without a GIL a level would need locks, so there is none, and every change goes to the delta. */
static int add_level_type(PyObject *module)
{
#ifdef Py_GIL_DISABLED
    return PyModule_AddObjectRef(module, "Level", Py_None);
#else
    PyObject *type = PyType_FromModuleAndSpec(module, &level_spec, NULL);
    int failed = type == NULL || PyModule_AddObjectRef(module, "Level", type) < 0;
    Py_XDECREF(type);
    return failed ? -1 : 0;
#endif
}
