/* Texts for Python: trees of them, and the way from Python's str and bytes to packed texts and back.
 *
 * Included by _native.c. Packed texts are two arrays, bytes and int64 offsets; whatever comes from outside is checked, so
 * that no offset leads out of the bytes.
 */
enum { CHUNK_ITEMS = 2048 }; /* of a list that are read before the GIL is let go */

typedef struct {
    PyObject_HEAD
    Tree tree;
    Table table;
    void *memory, *bins;
    Py_buffer held[3]; /* data, offsets, codes */
    int n_held;
} TreeObject;

/* Whether there is a text of that number, inside the data. */
static inline int has_text(const Texts *texts, int64_t i)
{
    const int64_t *at = texts->offsets + i;
    return i >= 0 && i < texts->n && at[0] >= 0 && at[0] <= at[1] && at[1] <= texts->end - texts->data;
}

/* Hold the buffers of some arrays, as `get_buffers` does, of which the first two are texts. Unless all of these are
 * inside their data, which takes O(texts) to see, `has_text` has to be asked of each. */
static int get_texts(PyObject *const *arrays, const Py_ssize_t *itemsizes, int count, int written, int all,
                     Py_buffer *held, Texts *texts)
{
    if (get_buffers(arrays, itemsizes, count, written, held) < 0)
        return -1;
    *texts = (Texts){held[0].buf, (const uint8_t *)held[0].buf + held[0].len, held[1].buf, held[1].len / 8 - 1};
    int fits = texts->n >= 0;
    for (int64_t i = 0; all && fits && i < texts->n; i++)
        fits = has_text(texts, i);
    if (fits)
        return 0;
    PyErr_SetString(PyExc_ValueError, "the offsets of texts do not fit their bytes");
    release_buffers(held, count);
    return -1;
}

/* ------------------------------------------------------------------ trees */

/* Memory for the nodes of a tree and its table, whose bins begin where lines of the processor's cache do. */
static int reserve(TreeObject *self)
{
    self->table.n_bins = bins_for(self->tree.texts.n);
    self->memory = PyMem_Malloc(tree_bytes(self->tree.texts.n));
    self->bins = PyMem_Malloc((self->table.n_bins + 1) * sizeof(Bin));
    if (self->memory == NULL || self->bins == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    self->table.bins = (Bin *)(((uintptr_t)self->bins + sizeof(Bin) - 1) / sizeof(Bin) * sizeof(Bin));
    return 0;
}

static PyObject *tree_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static const Py_ssize_t itemsizes[3] = {1, 8, 8};
    PyObject *arrays[3];
    (void)kwargs;
    if (!PyArg_ParseTuple(args, "OOO", arrays, arrays + 1, arrays + 2))
        return NULL;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    TreeObject *self = (TreeObject *)allocate(type, 0);
    if (self == NULL || get_texts(arrays, itemsizes, 3, 3, 1, self->held, &self->tree.texts) < 0)
        goto failed;
    self->n_held = 3;
    if (self->held[2].len / 8 != self->tree.texts.n) {
        PyErr_SetString(PyExc_ValueError, "there must be one code for each text");
        goto failed;
    }
    if (reserve(self) < 0)
        goto failed;
    int ascending;
    Py_BEGIN_ALLOW_THREADS
    ascending = are_ascending(&self->tree.texts, 0);
    if (ascending) {
        build_tree(&self->tree, self->memory);
        fill_table(&self->table, &self->tree.texts);
    }
    Py_END_ALLOW_THREADS
    if (ascending)
        return (PyObject *)self;
    PyErr_SetString(PyExc_ValueError, "the texts are not in order");
failed:
    Py_XDECREF((PyObject *)self);
    return NULL;
}

static void tree_dealloc(PyObject *object)
{
    TreeObject *self = (TreeObject *)object;
    PyTypeObject *type = Py_TYPE(object);
    freefunc free_tree = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release_buffers(self->held, self->n_held);
    PyMem_Free(self->memory);
    PyMem_Free(self->bins);
    free_tree(object);
    Py_DECREF((PyObject *)type);
}

static void find_texts(const TreeObject *self, const Texts *queries, int asked, uint64_t *out)
{
    Errand errand = {.tree = &self->tree, .table = &self->table, .codes = self->held[2].buf, .queries = queries,
                     .asked = asked, .out = out};
    run_errand(&errand);
}

/* What `right` asks for: None the codes, else ranks; -1 on error. */
static int asked_of(PyObject *right)
{
    int is_right = right == Py_None ? 0 : PyObject_IsTrue(right);
    return right == Py_None ? CODES : is_right < 0 ? -1 : is_right ? NOT_ABOVE : BELOW;
}

/* find_many(data, offsets, right, out): the codes of packed queries; or how many texts are below each, or (`right`) not
 * above it. */
static PyObject *tree_find_many(PyObject *object, PyObject *args)
{
    static const Py_ssize_t itemsizes[3] = {1, 8, 8};
    PyObject *arrays[3], *right;
    Py_buffer held[3];
    Texts queries;
    if (!PyArg_ParseTuple(args, "OOOO", arrays, arrays + 1, &right, arrays + 2))
        return NULL;
    int asked = asked_of(right);
    if (asked < 0 || get_texts(arrays, itemsizes, 3, 2, 1, held, &queries) < 0)
        return NULL;
    if (held[2].len / 8 != queries.n)
        return end_call(held, 3, NOT_AS_MANY);
    Py_BEGIN_ALLOW_THREADS
    find_texts((TreeObject *)object, &queries, asked, held[2].buf);
    Py_END_ALLOW_THREADS
    return end_call(held, 3, NULL);
}

/* The bytes of a str or of bytes, which live as long as it does; -1 and an error if it is neither, or not as wanted. */
static int text_of_object(PyObject *object, int is_text, Text *text)
{
    Py_ssize_t size;
    char *at = NULL;
    if (object == NULL) /* from a list that became shorter */
        return -1;
    if (is_text)
        at = (char *)PyUnicode_AsUTF8AndSize(object, &size);
    else if (PyBytes_AsStringAndSize(object, &at, &size) < 0)
        at = NULL;
    *text = (Text){(const uint8_t *)at, at == NULL ? 0 : size};
    return at == NULL ? -1 : 0;
}

/* The code of a text. If it is that of a text of the tree and easily found, `*number` is this text's. */
static uint64_t code_of_text(const TreeObject *self, Text text, const uint64_t *keys, int64_t *number)
{
    const uint64_t *codes = self->held[2].buf;
    int64_t found = number_by_table(&self->table, &self->tree.texts, codes, keys, text);
    if (found >= 0) {
        *number = found;
        return codes[found];
    }
    int64_t offsets[2] = {0, text.size};
    Texts queries = {.data = text.at, .end = text.at + text.size, .offsets = offsets, .n = 1};
    Table none = {0};
    uint64_t code;
    Errand errand = {.tree = &self->tree, .table = &none, .codes = codes, .queries = &queries, .asked = CODES, .out = &code};
    run_errand(&errand);
    return code;
}

/* find_one(query): the code of bytes. */
static PyObject *tree_find_one(PyObject *object, PyObject *query)
{
    Text text;
    int64_t number;
    if (text_of_object(query, 0, &text) < 0)
        return NULL;
    return PyLong_FromUnsignedLongLong(code_of_text((TreeObject *)object, text, NULL, &number));
}

/* lexicon.tiers.finders, a tuple of trees; NULL on error. */
static PyObject *trees_of(const View *view)
{
    PyObject *tiers = PyObject_GetAttr(view->lexicon, view->names[TIERS]);
    PyObject *trees = tiers == NULL ? NULL : PyObject_GetAttr(tiers, view->names[FINDERS]);
    Py_XDECREF(tiers);
    return trees;
}

/* The code of a text, the least that any of the trees has, and where a run of the texts of the first one has it; -1 and a
 * TypeError if they are no trees. */
static int code_in_trees(PyObject *trees, Text text, const uint64_t *keys, uint64_t *code, int64_t *near)
{
    Py_ssize_t n = PyTuple_Size(trees);
    int64_t elsewhere;
    *code = UINT64_MAX;
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *tree = PyTuple_GetItem(trees, i);
        if (PyType_GetSlot(Py_TYPE(tree), Py_tp_dealloc) != (void *)tree_dealloc) {
            PyErr_SetString(PyExc_TypeError, "a lexicon's finders are Trees");
            return -1;
        }
        uint64_t own = code_of_text((TreeObject *)tree, text, keys, i == 0 ? near : &elsewhere);
        *code = own < *code ? own : *code;
    }
    return n < 0 ? -1 : 0;
}

/* ------------------------------------------------------------------ lists */

/* Some items of a list, and their bytes one after the other. */
typedef struct {
    Text items[CHUNK_ITEMS];
    int64_t offsets[CHUNK_ITEMS + 1];
    uint8_t *data;
    int64_t n, room;
} Chunk;

/* Look at the next m items of a list, from `first` on; the place of the first that is none of what is wanted, or -1. */
static Py_ssize_t read_items(PyObject *items, Py_ssize_t first, Py_ssize_t m, int is_text, Chunk *chunk)
{
    chunk->n = m < CHUNK_ITEMS ? m : CHUNK_ITEMS;
    chunk->offsets[0] = 0;
    for (int64_t i = 0; i < chunk->n; i++) {
        if (i + 8 < chunk->n) {
            const char *ahead = (const char *)PyList_GetItem(items, first + (Py_ssize_t)i + 8);
            PREFETCH(ahead);
            PREFETCH(ahead + 64);
        }
        if (text_of_object(PyList_GetItem(items, first + (Py_ssize_t)i), is_text, chunk->items + i) < 0) {
            PyErr_Clear();
            return first + (Py_ssize_t)i;
        }
        chunk->offsets[i + 1] = chunk->offsets[i] + chunk->items[i].size;
    }
    return -1;
}

/* Keep the bytes of the items, so that they may go; -1 and an error without memory. */
static int keep_items(Chunk *chunk)
{
    int64_t size = chunk->offsets[chunk->n];
    if (size > chunk->room) {
        PyMem_Free(chunk->data);
        chunk->room = 2 * size;
        if ((chunk->data = PyMem_Malloc((size_t)chunk->room)) == NULL) {
            chunk->room = 0;
            PyErr_NoMemory();
            return -1;
        }
    }
    for (int64_t i = 0; i < chunk->n; i++)
        memcpy(chunk->data + chunk->offsets[i], chunk->items[i].at, (size_t)chunk->items[i].size);
    return 0;
}

/* find_items(items, is_text, right, out): what find_many says of the items of a list; or the place of the first that is no
 * query, as an int. */
static PyObject *tree_find_items(PyObject *object, PyObject *args)
{
    static const Py_ssize_t itemsizes[1] = {8};
    PyObject *items, *right, *array;
    Py_buffer held[1];
    int is_text;
    if (!PyArg_ParseTuple(args, "O!pOO", &PyList_Type, &items, &is_text, &right, &array))
        return NULL;
    int asked = asked_of(right);
    if (asked < 0 || get_buffers(&array, itemsizes, 1, 0, held) < 0)
        return NULL;
    Py_ssize_t n = held[0].len / 8, bad = -1;
    if (PyList_Size(items) != n)
        return end_call(held, 1, NOT_AS_MANY);
    Chunk *chunk = PyMem_Calloc(1, sizeof *chunk);
    int failed = chunk == NULL;
    for (Py_ssize_t first = 0; !failed && first < n; first += CHUNK_ITEMS) {
        if ((bad = read_items(items, first, n - first, is_text, chunk)) >= 0)
            break;
        if ((failed = keep_items(chunk) < 0))
            break;
        Texts queries = {chunk->data, chunk->data + chunk->offsets[chunk->n], chunk->offsets, chunk->n};
        Py_BEGIN_ALLOW_THREADS
        find_texts((TreeObject *)object, &queries, asked, (uint64_t *)held[0].buf + first);
        Py_END_ALLOW_THREADS
    }
    if (chunk != NULL)
        PyMem_Free(chunk->data);
    PyMem_Free(chunk);
    release_buffers(held, 1);
    if (failed)
        return PyErr_NoMemory();
    return bad < 0 ? Py_NewRef(Py_None) : PyLong_FromSsize_t(bad);
}

static PyMethodDef tree_methods[] = {
    {"find_many", tree_find_many, METH_VARARGS, "find_many(data, offsets, right, out): codes or ranks of packed queries."},
    {"find_items", tree_find_items, METH_VARARGS, "find_items(items, is_text, right, out): codes or ranks of a list."},
    {"find_one", tree_find_one, METH_O, "The code of bytes."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot tree_slots[] = {
    {Py_tp_new, tree_new},
    {Py_tp_dealloc, tree_dealloc},
    {Py_tp_methods, tree_methods},
    {Py_tp_doc, "Tree(data, offsets, codes): finds the codes of sorted, distinct texts."},
    {0, NULL},
};

static PyType_Spec tree_spec = {
    .name = "doraemon._native.Tree",
    .basicsize = sizeof(TreeObject),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = tree_slots,
};

/* pack(items, is_text, offsets): the bytes of a list of str or of bytes one after the other, offsets written; or the place
 * of the first item that is none, as an int. */
static PyObject *pack(PyObject *self, PyObject *args)
{
    static const Py_ssize_t itemsizes[1] = {8};
    PyObject *items, *array;
    Py_buffer held[1];
    int is_text;
    Text text;
    (void)self;
    if (!PyArg_ParseTuple(args, "O!pO", &PyList_Type, &items, &is_text, &array) ||
        get_buffers(&array, itemsizes, 1, 0, held) < 0)
        return NULL;
    Py_ssize_t n = PyList_Size(items);
    int64_t *offsets = held[0].buf;
    if (held[0].len / 8 != n + 1)
        return end_call(held, 1, "there must be one offset more than items");
    offsets[0] = 0;
    for (Py_ssize_t i = 0; i < n; i++) {
        if (text_of_object(PyList_GetItem(items, i), is_text, &text) < 0) {
            PyErr_Clear();
            release_buffers(held, 1);
            return PyLong_FromSsize_t(i);
        }
        offsets[i + 1] = offsets[i] + text.size;
    }
    PyObject *packed = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)offsets[n]);
    uint8_t *to = packed == NULL ? NULL : (uint8_t *)PyBytes_AsString(packed);
    for (Py_ssize_t i = 0; to != NULL && i < n; i++)
        if (text_of_object(PyList_GetItem(items, i), is_text, &text) == 0 && text.size == offsets[i + 1] - offsets[i])
            memcpy(to + offsets[i], text.at, (size_t)text.size);
    release_buffers(held, 1);
    return packed;
}

/* unpack(data, offsets, numbers, is_text): a list of the texts of some numbers. */
static PyObject *unpack(PyObject *self, PyObject *args)
{
    static const Py_ssize_t itemsizes[3] = {1, 8, 8};
    PyObject *arrays[3], *items;
    Py_buffer held[3];
    Texts texts;
    int is_text;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOp", arrays, arrays + 1, arrays + 2, &is_text) ||
        get_texts(arrays, itemsizes, 3, 3, 0, held, &texts) < 0)
        return NULL;
    const int64_t *numbers = held[2].buf;
    Py_ssize_t m = held[2].len / 8;
    items = PyList_New(m);
    for (Py_ssize_t i = 0; items != NULL && i < m; i++) {
        PyObject *item = NULL;
        if (!has_text(&texts, numbers[i])) {
            PyErr_SetString(PyExc_IndexError, "there is no text of that number");
        } else {
            Text text = text_of(&texts, numbers[i]);
            item = is_text ? PyUnicode_DecodeUTF8((const char *)text.at, (Py_ssize_t)text.size, NULL)
                           : PyBytes_FromStringAndSize((const char *)text.at, (Py_ssize_t)text.size);
        }
        if (item != NULL)
            PyList_SetItem(items, i, item);
        else
            Py_CLEAR(items);
    }
    release_buffers(held, 3);
    return items;
}

/* Hold the four arrays of `order` and `gather`: bytes and offsets of texts, numbers, and bytes. */
static int get_four(PyObject *args, int written, int all, Py_buffer *held, Texts *texts)
{
    static const Py_ssize_t itemsizes[4] = {1, 8, 8, 1};
    PyObject *arrays[4];
    if (!PyArg_ParseTuple(args, "OOOO", arrays, arrays + 1, arrays + 2, arrays + 3))
        return -1;
    return get_texts(arrays, itemsizes, 4, written, all, held, texts);
}

/* order(data, offsets, order, again): the numbers of texts in their order, and whether each equals the one before. */
static PyObject *order(PyObject *self, PyObject *args)
{
    Py_buffer held[4];
    Texts texts;
    (void)self;
    if (get_four(args, 2, 1, held, &texts) < 0)
        return NULL;
    if (held[2].len / 8 != texts.n || held[3].len != texts.n)
        return end_call(held, 4, NOT_AS_MANY);
    Item *items = PyMem_Malloc(((size_t)texts.n + 1) * sizeof *items);
    if (items == NULL) {
        release_buffers(held, 4);
        return PyErr_NoMemory();
    }
    Py_BEGIN_ALLOW_THREADS
    order_texts(&texts, items, held[2].buf, held[3].buf);
    Py_END_ALLOW_THREADS
    PyMem_Free(items);
    return end_call(held, 4, NULL);
}

/* gather(data, offsets, numbers, out): the texts of some numbers, one after the other. */
static PyObject *gather(PyObject *self, PyObject *args)
{
    Py_buffer held[4];
    Texts texts;
    (void)self;
    if (get_four(args, 3, 0, held, &texts) < 0)
        return NULL;
    const int64_t *numbers = held[2].buf;
    int64_t m = held[2].len / 8, total = 0;
    int fits = 1;
    for (int64_t i = 0; fits && i < m; i++) {
        fits = has_text(&texts, numbers[i]);
        total += fits ? text_of(&texts, numbers[i]).size : 0;
    }
    if (!fits || total != held[3].len)
        return end_call(held, 4, "the arrays of gathered texts do not fit together");
    Py_BEGIN_ALLOW_THREADS
    gather_texts(&texts, numbers, m, held[3].buf);
    Py_END_ALLOW_THREADS
    return end_call(held, 4, NULL);
}

static int add_tree_type(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &tree_spec, NULL);
    int failed = type == NULL || PyModule_AddObjectRef(module, "Tree", type) < 0;
    Py_XDECREF(type);
    return failed ? -1 : 0;
}
