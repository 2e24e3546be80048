"""Linear layers around the FFNs: dense ones through our kernels, and ones that are stored in few bits."""

from .int8 import Int8Linear
from .lowbit import LowBitLinear
from .nf4 import Nf4Linear

#: bits per weight -> the linear layer that stores its weight in them
LOW_BIT_LAYERS: dict[int, type[LowBitLinear]] = {layer.bits: layer for layer in (Int8Linear, Nf4Linear)}
