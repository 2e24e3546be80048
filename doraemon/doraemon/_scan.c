/* Ranges and ranks back to keys: of a View, or of the Level over one, which is then merged on the fly.
 *
 * Included by _native.c after both. A scan walks along the run and copies whole stretches of it, up to the next code that
 * a delta or the level has an entry for. What of it runs Python comes before or after: see _level.c. Numbers of a file
 * that was not verified may lie, so nothing is written beyond what was allocated.
 */

/* How many keys of the run and entries of each delta are below a code, and how many keys of all. */
typedef struct {
    int64_t run, entry[DELTAS], rank;
} Spot;

/* An entry of the level that lies in a scanned range, and where the scan put it. Its value is an object, or as `bytes`. */
typedef struct {
    uint64_t code, bytes;
    int64_t net, place;
    PyObject *value;
    int as_bytes;
} Single;

/* Arrays to fill: codes, and either the bytes of values or where values are. Codes of int64 become the keys that they are
 * of: both differ in the bits of `flip`. What was `cut` has no room for the last copies of its last code. */
typedef struct {
    uint64_t *codes, flip;
    char *raw;
    uint8_t *layers;
    int64_t *positions, count, filled;
    int cut;
} Filling;

static const char NO_FIT[] = "the changes do not fit the keys: the file is damaged, open it with verify=True";

static int64_t merged_length(const View *view, const Level *level)
{
    return length_of(&view->search) + (level != NULL ? (int64_t)level->net : 0);
}

static int64_t merged_rank(View *view, const Level *level, const Cut *cut, int right)
{
    right = right && cut->exact;
    if (cut->above || (right && cut->code == UINT64_MAX))
        return merged_length(view, level);
    int64_t shift = level != NULL ? shift_below(level, cut->code + (uint64_t)right) : 0;
    return ask_rank(&view->search, cut, right) + shift;
}

/* ------------------------------------------------------------------ select */

/* The rank in run and older deltas of the first key that entry `i` of delta `d` is about. */
static int64_t rank_below(const Search *s, int d, int64_t i)
{
    const Delta *delta = s->deltas + d, *older = s->deltas;
    int64_t left = delta->left[i];
    return left + (d > 0 ? shift_at(older, entry_of(older, delta->entries[i].code, left)) : 0);
}

/* How many keys there are of an entry's code. */
static int64_t count_with(const Search *s, int d, int64_t i)
{
    const Delta *delta = s->deltas + d, *older = s->deltas;
    uint64_t code = delta->entries[i].code;
    int64_t count = copies_in_run(s, code, delta->left[i]) + net_of(delta, i);
    int64_t entry = d > 0 ? entry_of(older, code, delta->left[i]) : 0;
    return count + (d > 0 && has_entry(older, entry, code) ? net_of(older, entry) : 0);
}

/* The code of the key of a rank in run and deltas; 0 if their numbers lie. Going down, each delta answers what it knows,
 * or says which rank below it is meant. */
static int select_code(const Search *s, int64_t rank, uint64_t *code)
{
    for (int d = DELTAS - 1; d >= 0; d--) {
        const Delta *delta = s->deltas + d;
        int64_t low = 0, high = delta->n; /* the first entry whose first key has a higher rank */
        while (low < high) {
            int64_t middle = (low + high) >> 1;
            if (rank_below(s, d, middle) + shift_at(delta, middle) <= rank)
                low = middle + 1;
            else
                high = middle;
        }
        if (low == 0)
            continue;
        *code = delta->entries[low - 1].code;
        if (rank < rank_below(s, d, low - 1) + shift_at(delta, low - 1) + count_with(s, d, low - 1))
            return 1;
        rank -= shift_at(delta, low);
    }
    if (rank < 0 || rank >= s->n)
        return 0;
    *code = s->keys[rank];
    return 1;
}

static int merged_select(View *view, Level *level, int64_t rank, uint64_t *code)
{
    int64_t low = 0, high = level != NULL ? level->n_blocks : 0, shift, last = 0, start = 0;
    while (low < high) {
        int64_t middle = (low + high) >> 1;
        if (level->blocks[middle]->ranks[0] + level->before[middle] <= rank)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == 0)
        return select_code(&view->search, rank, code);
    const Block *block = level->blocks[low - 1];
    shift = level->before[low - 1];
    for (int64_t i = 0; i < block->count && block->ranks[i] + shift <= rank; i++) {
        start = block->ranks[i] + shift;
        shift += block->net[i];
        last = i;
    }
    *code = block->codes[last];
    int64_t count = is_map(level) ? block->values[last] != NULL : base_count(level, *code) + block->net[last];
    return rank < start + count ? 1 : select_code(&view->search, rank - shift, code);
}

static PyObject *code_or_none(View *view, Level *level, int64_t rank)
{
    uint64_t code;
    if (rank < 0 || rank >= merged_length(view, level))
        Py_RETURN_NONE;
    if (merged_select(view, level, rank, &code))
        return PyLong_FromUnsignedLongLong(code);
    PyErr_SetString(PyExc_ValueError, NO_FIT);
    return NULL;
}

static PyObject *do_select(View *view, Level *level, PyObject *given)
{
    long long rank = PyLong_AsLongLong(given);
    if (rank == -1 && PyErr_Occurred())
        return NULL;
    return code_or_none(view, level, rank < 0 ? rank + merged_length(view, level) : rank);
}

static PyObject *do_neighbour(View *view, Level *level, PyObject *const *args, Py_ssize_t count)
{
    Cut cut;
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "neighbour takes a key, a side and an offset");
        return NULL;
    }
    int right = PyObject_IsTrue(args[1]);
    long long offset = PyLong_AsLongLong(args[2]);
    if (PyErr_Occurred() || cut_now(view, level, args[0], &cut) < 0)
        return NULL;
    return code_or_none(view, level, merged_rank(view, level, &cut, right) + offset);
}

static PyObject *do_count(View *view, Level *level, PyObject *const *args, Py_ssize_t count)
{
    Cut low, high;
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "count takes two ends");
        return NULL;
    }
    long long version;
    do {
        version = version_of(level);
        if (cut_of(view, args[0], &low) < 0 || cut_of(view, args[1], &high) < 0)
            return NULL;
    } while (version_of(level) != version);
    int64_t wide = merged_rank(view, level, &high, 0) - merged_rank(view, level, &low, 0);
    return PyLong_FromLongLong(wide > 0 ? wide : 0);
}

/* ------------------------------------------------------------------ scan */

static Spot spot_of(View *view, const Level *level, const Cut *cut)
{
    const Search *s = &view->search;
    Spot spot = {.run = s->n, .rank = merged_length(view, level)};
    for (int d = 0; d < DELTAS; d++)
        spot.entry[d] = s->deltas[d].n;
    if (cut->above)
        return spot;
    spot.run = spot.rank = run_rank(s, cut->code);
    spot.rank += level != NULL ? shift_below(level, cut->code) : 0;
    for (int d = 0; d < DELTAS; d++) {
        spot.entry[d] = entry_of(s->deltas + d, cut->code, spot.run);
        spot.rank += shift_at(s->deltas + d, spot.entry[d]);
    }
    return spot;
}

/* How many of so many keys there is room for; below 0 if that is not as many as there should be. */
static int64_t fitting(const Filling *out, int64_t count)
{
    int64_t room = out->count - out->filled;
    return count <= room ? count : out->cut ? room : -1;
}

static int put_run(const View *view, Filling *out, int64_t from, int64_t count)
{
    if ((count = fitting(out, count)) < 0)
        return -1;
    int64_t at = out->filled, size = view->value_size;
    const uint64_t *keys = view->search.keys + from;
    uint64_t *codes = out->codes + at, flip = out->flip;
    for (int64_t i = 0; i < count; i++)
        codes[i] = keys[i] ^ flip;
    if (out->raw != NULL)
        memcpy(out->raw + at * size, (const char *)view->raw[0].buf + from * size, (size_t)(count * size));
    for (int64_t i = 0; out->layers != NULL && i < count; i++) {
        out->layers[at + i] = 0;
        out->positions[at + i] = from + i;
    }
    out->filled += count;
    return 0;
}

/* Some copies of a code; of a map the value of the layer that changed it last. That of the level comes later. */
static int put_changed(const View *view, Filling *out, uint64_t code, int64_t count, int layer, int64_t position)
{
    if (count < 0 || (count = fitting(out, count)) < 0)
        return -1;
    int64_t size = view->value_size;
    for (int64_t i = 0; i < count; i++, out->filled++) {
        int64_t at = out->filled;
        out->codes[at] = code ^ out->flip;
        if (out->raw != NULL && layer <= DELTAS)
            memcpy(out->raw + at * size, (const char *)view->raw[layer].buf + position * size, (size_t)size);
        else if (out->raw != NULL)
            memset(out->raw + at * size, 0, (size_t)size);
        if (out->layers != NULL) {
            out->layers[at] = (uint8_t)layer;
            out->positions[at] = position;
        }
    }
    return 0;
}

/* Fill what lies between two spots; -1 if that is not as much as there is room for. */
static int fill_between(const View *view, Spot at, Spot end, Single *single, int64_t singles, Filling *out)
{
    const Search *s = &view->search;
    const Single *after = single + singles;
    for (;;) {
        int more = single < after;
        uint64_t code = more ? single->code : UINT64_MAX;
        for (int d = 0; d < DELTAS; d++)
            if (at.entry[d] < end.entry[d]) {
                uint64_t next = s->deltas[d].entries[at.entry[d]].code;
                code = next < code ? next : code;
                more = 1;
            }
        int64_t next = more ? gallop(s->keys, at.run, end.run, at.run, code) : end.run;
        if (put_run(view, out, at.run, next - at.run) < 0)
            return -1;
        if (!more)
            return out->filled == out->count ? 0 : -1;
        int64_t copies = next < end.run ? copies_in_run(s, code, next) : 0, count = copies, position = 0;
        int layer = 0;
        at.run = next + copies;
        for (int d = 0; d < DELTAS; d++)
            if (at.entry[d] < end.entry[d] && s->deltas[d].entries[at.entry[d]].code == code) {
                layer = d + 1;
                position = at.entry[d]++;
                count += net_of(s->deltas + d, position);
            }
        if (single < after && single->code == code) {
            layer = DELTAS + 1;
            position = 0;
            count += single->net;
            single->place = out->filled;
            single++;
        }
        const Single *late = layer > DELTAS ? single - 1 : NULL;
        if (put_changed(view, out, code, count, layer, position) < 0)
            return -1;
        if (late != NULL && late->as_bytes && out->raw != NULL && late->place < out->filled)
            memcpy(out->raw + late->place * view->value_size, &late->bytes, sizeof late->bytes);
    }
}

/* The level's entries from `low` on and below `high`, their values referred to; -1 if memory is out. */
static int64_t singles_between(const Level *level, const Cut *low, const Cut *high, Single **out)
{
    int64_t count = 0, room = 0, b, i;
    if (level == NULL || low->above)
        return 0;
    for (seek(level, low->code, &b, &i); b < level->n_blocks; b++, i = 0) {
        const Block *block = level->blocks[b];
        for (; i < block->count; i++) {
            if (!high->above && block->codes[i] >= high->code)
                return count;
            if (count == room) {
                Single *larger = PyMem_Realloc(*out, (size_t)(room = 2 * room + 8) * sizeof *larger);
                if (larger == NULL)
                    return -1;
                *out = larger;
            }
            PyObject *value = block->values[i];
            (*out)[count++] = (Single){.code = block->codes[i], .bytes = block->bytes[i], .net = block->net[i],
                                       .value = value, .as_bytes = value != NULL && value == level->one};
            Py_XINCREF(value);
        }
    }
    return count;
}

/* (place, value) of each of the level's entries that has a value which is an object. */
static PyObject *late_values(const Single *single, int64_t singles)
{
    PyObject *late = PyList_New(0);
    for (int64_t i = 0; late != NULL && i < singles; i++) {
        if (single[i].value == NULL || single[i].as_bytes)
            continue;
        PyObject *pair = Py_BuildValue("(LO)", (long long)single[i].place, single[i].value);
        if (pair == NULL || PyList_Append(late, pair) < 0)
            Py_CLEAR(late);
        Py_XDECREF(pair);
    }
    return late;
}

/* Hold the arrays of a tuple as a filling; -1 on error. How many there are tells what they are. */
static int hold_arrays(const View *view, PyObject *arrays, int64_t count, Py_buffer *held, Filling *out)
{
    Py_ssize_t given = PyTuple_Check(arrays) ? PyTuple_Size(arrays) : 0;
    Py_ssize_t itemsizes[3] = {8, given == 2 ? view->value_size : 1, 8};
    PyObject *parts[3];
    for (Py_ssize_t i = 0; i < given && i < 3; i++)
        parts[i] = PyTuple_GetItem(arrays, i);
    int fit = given >= 1 && given <= 3 && (given != 2 || view->value_size > 0);
    if (fit && get_buffers(parts, itemsizes, (int)given, 0, held) < 0)
        return -1;
    for (Py_ssize_t i = 0; fit && i < given; i++)
        fit = held[i].len == count * itemsizes[i];
    if (!fit) {
        PyErr_SetString(PyExc_ValueError, "the arrays of a scan do not fit");
        return -1;
    }
    *out = (Filling){.codes = held[0].buf, .count = count};
    out->flip = view->kind == 'i' && view->itemsize == 8 ? (uint64_t)INT64_MIN : 0;
    if (given == 2)
        out->raw = held[1].buf;
    if (given == 3) {
        out->layers = held[1].buf;
        out->positions = held[2].buf;
    }
    return (int)given;
}

/* Fill arrays with what lies between two spots, and name the values that are the level's. */
static PyObject *scan_into(View *view, Level *level, Spot from, Spot to, const Cut *low, const Cut *high,
                           PyObject *arrays, int64_t count)
{
    Single *single = NULL;
    Py_buffer held[3];
    Filling out;
    PyObject *late = NULL;
    int given = hold_arrays(view, arrays, count, held, &out), failed = -1;
    if (given < 0)
        return NULL;
    out.cut = count < to.rank - from.rank;
    int64_t singles = count > 0 ? singles_between(level, low, high, &single) : 0;
    if (level != NULL && singles >= 0)
        failed = count > 0 && fill_between(view, from, to, single, singles, &out) < 0;
    if (level == NULL) {
        Py_BEGIN_ALLOW_THREADS
        failed = count > 0 && fill_between(view, from, to, NULL, 0, &out) < 0;
        Py_END_ALLOW_THREADS
    }
    release_buffers(held, given);
    if (failed)
        PyErr_SetString(singles < 0 ? PyExc_MemoryError : PyExc_ValueError, NO_FIT);
    else
        late = late_values(single, singles);
    for (int64_t i = 0; i < singles; i++)
        Py_XDECREF(single[i].value);
    PyMem_Free(single);
    return late;
}

static int cut_of_end(View *view, PyObject *end, int is_high, Cut *cut)
{
    *cut = (Cut){.above = is_high};
    if (end == Py_None)
        return 0;
    int failed = cut_of(view, end, cut);
    if (!failed && !cut->above)
        sample_code(&view->search, cut->code);
    return failed;
}

/* The spot behind the last of so many keys from a spot on, and the cut there; -1 and an error if numbers lie. */
static int spot_after(View *view, Level *level, Spot from, int64_t count, Cut *cut, Spot *to)
{
    uint64_t code;
    if (!merged_select(view, level, from.rank + count - 1, &code)) {
        PyErr_SetString(PyExc_ValueError, NO_FIT);
        return -1;
    }
    *cut = code == UINT64_MAX ? (Cut){.above = 1} : (Cut){.code = code + 1};
    *to = spot_of(view, level, cut);
    return 0;
}

/* scan(low, high, limit, most, new): the first `limit` keys of those from `low` on and below `high`, in arrays that `new`
 * makes for so many. The arrays, and pairs of places and values that the level has; None for more than `most` keys. */
static PyObject *do_scan(View *view, Level *level, PyObject *const *args, Py_ssize_t arguments)
{
    Cut low, high;
    if (arguments != 5) {
        PyErr_SetString(PyExc_TypeError, "scan takes two ends, two numbers and a function");
        return NULL;
    }
    long long limit = PyLong_AsLongLong(args[2]), most = PyLong_AsLongLong(args[3]), version;
    if (PyErr_Occurred())
        return NULL;
    for (;;) {
        version = version_of(level);
        if (cut_of_end(view, args[0], 0, &low) < 0 || cut_of_end(view, args[1], 1, &high) < 0)
            return NULL;
        if (version_of(level) != version) /* meanwhile, and where texts are cut depends on the others: see cut_now */
            continue;
        Spot from = spot_of(view, level, &low), to = spot_of(view, level, &high);
        int64_t count = to.rank > from.rank ? to.rank - from.rank : 0;
        if (limit < count) {
            count = limit;
            if (count > 0 && spot_after(view, level, from, count, &high, &to) < 0)
                return NULL;
        }
        if (count > most)
            Py_RETURN_NONE;
        PyObject *arrays = PyObject_CallFunction(args[4], "L", (long long)count), *late;
        if (arrays == NULL)
            return NULL;
        if (version_of(level) != version) {
            Py_DECREF(arrays);
            continue;
        }
        late = scan_into(view, level, from, to, &low, &high, arrays, count);
        if (late == NULL)
            Py_DECREF(arrays);
        return late == NULL ? NULL : Py_BuildValue("(NN)", arrays, late);
    }
}

/* ------------------------------------------------------------------ Python */

static PyObject *view_select(PyObject *self, PyObject *rank) { return do_select((View *)self, NULL, rank); }

static PyObject *view_neighbour(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    return do_neighbour((View *)self, NULL, args, count);
}

static PyObject *view_count(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    return do_count((View *)self, NULL, args, count);
}

static PyObject *view_scan(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    return do_scan((View *)self, NULL, args, count);
}

static PyObject *level_select(PyObject *self, PyObject *rank)
{
    return do_select(((Level *)self)->base, (Level *)self, rank);
}

static PyObject *level_neighbour(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    return do_neighbour(((Level *)self)->base, (Level *)self, args, count);
}

static PyObject *level_count(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    return do_count(((Level *)self)->base, (Level *)self, args, count);
}

static PyObject *level_scan(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    return do_scan(((Level *)self)->base, (Level *)self, args, count);
}
