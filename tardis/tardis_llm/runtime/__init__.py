"""The folded FFN at run time: a readable reference, and kernels behind the same functions."""
