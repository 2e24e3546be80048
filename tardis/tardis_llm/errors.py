"""Every error that TARDIS raises on purpose. A message says what is wrong and then what to do about it."""


class TardisError(Exception):
    """Base of all TARDIS errors: catch this one to catch them all."""


class UnsupportedModelError(TardisError):
    """The model's family, FFN structure or activation is one that TARDIS cannot fold."""


class InvalidInputError(TardisError):
    """An argument, a text or a weight has the wrong value, shape or type."""


class InfeasibleBudgetError(TardisError):
    """No choice of ranges and precisions fits the requested number of bytes."""


class DeviceMemoryError(TardisError):
    """The memory of the device that is computed on is full."""


class CheckpointError(TardisError):
    """A folded checkpoint is missing, incomplete, of another version, or does not match its model."""


class KernelsError(TardisError):
    """The compiled CPU kernels were built for another version of the package."""
