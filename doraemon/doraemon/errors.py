"""The error of files that are no whole index."""

from __future__ import annotations


class CorruptFileError(ValueError):
    """A file that is damaged, incomplete or not an index.

    >>> import os
    >>> from doraemon import Index
    >>> Index.open(os.devnull)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    doraemon.errors.CorruptFileError: ... is not an index: give a file that Index.save wrote
    """


def damaged(what: str) -> CorruptFileError:
    """The error to raise where a file contradicts itself; the message goes on from the file's name."""
    return CorruptFileError(f"is damaged: {what}; copy it again or save it anew")
