/* Texts for Python: trees of them, and the way from Python's str and bytes to packed texts and back.
 *
 * Included by _native.c. Packed texts are two arrays, bytes and int64 offsets; whatever comes from outside is checked, so
 * that no offset leads out of the bytes.
 */
typedef struct {
    PyObject_HEAD
    Tree tree;
    void *memory;
    Py_buffer held[3]; /* data, offsets, codes */
    int n_held;
} TreeObject;

/* The texts of two buffers; -1 and a ValueError if the offsets are not ascending inside the data. */
static int texts_of(const Py_buffer *data, const Py_buffer *offsets, Texts *texts)
{
    const int64_t *at = offsets->buf;
    int64_t n = offsets->len / 8 - 1;
    int fits = n >= 0 && at[0] >= 0 && at[n] <= data->len;
    for (int64_t i = 0; fits && i < n; i++)
        fits = at[i] <= at[i + 1];
    *texts = (Texts){.data = data->buf, .end = (const uint8_t *)data->buf + data->len, .offsets = at, .n = n};
    if (!fits)
        PyErr_SetString(PyExc_ValueError, "the offsets of texts do not fit their bytes");
    return fits ? 0 : -1;
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
    if (self == NULL || get_buffers(arrays, itemsizes, 3, 3, self->held) < 0)
        goto failed;
    self->n_held = 3;
    if (texts_of(self->held, self->held + 1, &self->tree.texts) < 0)
        goto failed;
    if (self->held[2].len / 8 != self->tree.texts.n) {
        PyErr_SetString(PyExc_ValueError, "there must be one code for each text");
        goto failed;
    }
    if ((self->memory = PyMem_Malloc(tree_bytes(self->tree.texts.n))) == NULL) {
        PyErr_NoMemory();
        goto failed;
    }
    int ascending;
    Py_BEGIN_ALLOW_THREADS
    ascending = are_ascending(&self->tree.texts, 0);
    if (ascending)
        build_tree(&self->tree, self->memory);
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
    free_tree(object);
    Py_DECREF((PyObject *)type);
}

/* find_many(data, offsets, out): the codes of packed queries. */
static PyObject *tree_find_many(PyObject *object, PyObject *args)
{
    static const Py_ssize_t itemsizes[3] = {1, 8, 8};
    TreeObject *self = (TreeObject *)object;
    PyObject *arrays[3];
    Py_buffer held[3];
    Texts queries;
    if (!PyArg_ParseTuple(args, "OOO", arrays, arrays + 1, arrays + 2) || get_buffers(arrays, itemsizes, 3, 2, held) < 0)
        return NULL;
    if (texts_of(held, held + 1, &queries) < 0) {
        release_buffers(held, 3);
        return NULL;
    }
    if (held[2].len / 8 != queries.n)
        return end_call(held, 3, NOT_AS_MANY);
    Py_BEGIN_ALLOW_THREADS
    find_codes(&self->tree, self->held[2].buf, &queries, held[2].buf);
    Py_END_ALLOW_THREADS
    return end_call(held, 3, NULL);
}

/* The bytes of a str or of bytes, which live as long as it does; -1 and an error if it is neither, or not as wanted. */
static int text_of_object(PyObject *object, int is_text, Text *text)
{
    Py_ssize_t size;
    char *at = NULL;
    if (is_text)
        at = (char *)PyUnicode_AsUTF8AndSize(object, &size);
    else if (PyBytes_AsStringAndSize(object, &at, &size) < 0)
        at = NULL;
    *text = (Text){(const uint8_t *)at, at == NULL ? 0 : size};
    return at == NULL ? -1 : 0;
}

/* find_one(query): the code of bytes. */
static PyObject *tree_find_one(PyObject *object, PyObject *query)
{
    TreeObject *self = (TreeObject *)object;
    Text text;
    uint64_t code;
    if (text_of_object(query, 0, &text) < 0)
        return NULL;
    int64_t offsets[2] = {0, text.size};
    Texts queries = {.data = text.at, .end = text.at + text.size, .offsets = offsets, .n = 1};
    find_codes(&self->tree, self->held[2].buf, &queries, &code);
    return PyLong_FromUnsignedLongLong(code);
}

static PyMethodDef tree_methods[] = {
    {"find_many", tree_find_many, METH_VARARGS, "find_many(data, offsets, out): the codes of packed queries."},
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
    PyObject *arrays[3], *items = NULL;
    Py_buffer held[3];
    Texts texts;
    int is_text;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOp", arrays, arrays + 1, arrays + 2, &is_text) ||
        get_buffers(arrays, itemsizes, 3, 3, held) < 0)
        return NULL;
    const int64_t *numbers = held[2].buf;
    Py_ssize_t m = held[2].len / 8;
    if (texts_of(held, held + 1, &texts) == 0)
        items = PyList_New(m);
    for (Py_ssize_t i = 0; items != NULL && i < m; i++) {
        PyObject *item = NULL;
        if (numbers[i] < 0 || numbers[i] >= texts.n) {
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

/* order(data, offsets, order, again): the numbers of texts in their order, and whether each equals the one before. */
static PyObject *order(PyObject *self, PyObject *args)
{
    static const Py_ssize_t itemsizes[4] = {1, 8, 8, 1};
    PyObject *arrays[4];
    Py_buffer held[4];
    Texts texts;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOO", arrays, arrays + 1, arrays + 2, arrays + 3) ||
        get_buffers(arrays, itemsizes, 4, 2, held) < 0)
        return NULL;
    if (texts_of(held, held + 1, &texts) < 0) {
        release_buffers(held, 4);
        return NULL;
    }
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
    static const Py_ssize_t itemsizes[4] = {1, 8, 8, 1};
    PyObject *arrays[4];
    Py_buffer held[4];
    Texts texts;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOO", arrays, arrays + 1, arrays + 2, arrays + 3) ||
        get_buffers(arrays, itemsizes, 4, 3, held) < 0)
        return NULL;
    if (texts_of(held, held + 1, &texts) < 0) {
        release_buffers(held, 4);
        return NULL;
    }
    const int64_t *numbers = held[2].buf;
    int64_t m = held[2].len / 8, total = 0;
    int fits = 1;
    for (int64_t i = 0; fits && i < m; i++) {
        fits = numbers[i] >= 0 && numbers[i] < texts.n;
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
