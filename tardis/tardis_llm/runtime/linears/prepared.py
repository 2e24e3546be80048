"""What kernels multiply with: a weight in few bits, prepared for the one kernel that reads its order of memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...ffn.weights import nbytes


@dataclass(frozen=True)
class PreparedWeight:
    """A weight [out, in] in few bits, ready for a product; a subclass for each kernel says how its tensors lie.

    Attributes:
        codes: of the weights.
        scale: what the codes are multiplied by.
    """

    codes: Tensor
    scale: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, which a product reads."""
        return nbytes(*(part for part in vars(self).values() if isinstance(part, Tensor)))

    def product(self, x: Tensor) -> Tensor:
        """x W^T, [tokens, out], in the dtype of x [tokens, in]."""
        raise NotImplementedError

    def restored(self) -> tuple[Tensor, Tensor]:
        """Codes and scales as they are stored."""
        raise NotImplementedError
