"""The folded FFN at run time: readable reference now, kernels behind the same functions later."""
