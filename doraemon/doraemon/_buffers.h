/* Arrays of Python's that a call holds. */
#ifndef DORAEMON_BUFFERS_H
#define DORAEMON_BUFFERS_H

#include <Python.h>

static void release_buffers(Py_buffer *held, int count)
{
    while (count > 0)
        PyBuffer_Release(held + --count);
}

/* Hold the buffers of some arrays, of which those from `written` on are written to; -1 and none held on error. */
static int get_buffers(PyObject *const *arrays, const Py_ssize_t *itemsizes, int count, int written, Py_buffer *held)
{
    for (int i = 0; i < count; i++) {
        if (PyObject_GetBuffer(arrays[i], held + i, i < written ? PyBUF_CONTIG_RO : PyBUF_CONTIG) < 0) {
            release_buffers(held, i);
            return -1;
        }
        if (held[i].len % itemsizes[i] != 0) {
            PyErr_Format(PyExc_ValueError, "%zd bytes do not hold items of %zd", held[i].len, itemsizes[i]);
            release_buffers(held, i + 1);
            return -1;
        }
    }
    return 0;
}

/* Let go of a call's buffers and return None, or raise a ValueError if there is a message. */
static PyObject *end_call(Py_buffer *held, int count, const char *error)
{
    release_buffers(held, count);
    if (error == NULL)
        Py_RETURN_NONE;
    PyErr_SetString(PyExc_ValueError, error);
    return NULL;
}

static const char NOT_AS_MANY[] = "there must be as many places for answers as queries";

#endif
