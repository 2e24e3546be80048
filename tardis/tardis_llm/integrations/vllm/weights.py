"""Load a checkpoint into a folded model of vLLM: check every tensor, and let none be missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...checkpoint.contents import ExpectedTensors, refuse_missing
from ...checkpoint.manifest import Manifest
from ...checkpoint.weight_files import TensorInfo
from ...errors import CheckpointError
from .ffn import ServedFFN

_MARK = ".tardis."
_HEAD = {f"lm_head.{part}{key}" for part in ("", "predictor.", "remainder.") for key in ("planes", "scale")}


class FoldLoader:
    """Fills folded FFNs and a low-bit head from a checkpoint's tensors, and passes all others on to the stock model.

    Every tensor is compared with what config.json describes, and with tardis.json if that lies beside the files.

    Args:
        model: the model to fill.
        folded: its folded FFNs by their names in the checkpoint; None where another pipeline rank has them.
        directory: the checkpoint's directory, or its name on the hub.
        contents: the tensors that its files must hold.
    """

    def __init__(
        self,
        model: nn.Module,
        folded: dict[str, ServedFFN | None],
        directory: str,
        contents: ExpectedTensors,
    ) -> None:
        self._model, self._folded, self._directory = model, folded, Path(directory)
        self._contents = contents
        self._manifest = Manifest.read(self._directory)
        self._seen: set[str] = set()
        # loaded here because the stock class of BLOOM loads no head that is not shared with the embedding
        self._head: dict[str, Any] = {name: part for name, part in model.named_parameters() if name in _HEAD}
        parts = {f"{name}{_MARK}{key}" for name, ffn in folded.items() if ffn for key in ffn.state_dict()}
        self._missing = parts | self._head.keys()

    def others(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Load what is folded, and yield the names and tensors that the stock model loads.

        Args:
            weights: names and tensors of the checkpoint.

        Raises:
            CheckpointError: a tensor does not fit, is there twice, or is not the one that was written.
        """
        for name, tensor in weights:
            self._verify(name, tensor)
            if _MARK in name:
                self._load(name, tensor)
            elif name in self._head:
                self._head[name].weight_loader(self._head[name], tensor)
                self._missing.discard(name)
            elif tensor.numel():  # empty where low-bit weights replace it
                yield name, tensor

    def check(self, loaded: set[str]) -> None:
        """Check that every parameter of the model was loaded.

        Args:
            loaded: names, in the model, of the parameters that the stock class loaded.

        Raises:
            CheckpointError: the files lack a tensor.
        """
        stock = {name for name, value in self._model.named_parameters() if _MARK not in f".{name}" and value.numel()}
        refuse_missing(sorted((self._missing | (stock - self._head.keys())) - loaded), self._directory)

    def _load(self, name: str, tensor: Tensor) -> None:
        prefix, _, key = name.partition(_MARK)
        if prefix not in self._folded:
            raise CheckpointError(f"the weight files fold {prefix}, which config.json does not; copy it anew.")
        ffn = self._folded[prefix]
        if ffn is not None:
            ffn.load(key, tensor)
            self._missing.discard(name)

    def _verify(self, name: str, tensor: Tensor) -> None:
        """Raise CheckpointError unless a tensor is new, fits config.json, and is the one that was written."""
        stored = TensorInfo(self._directory, tensor.dtype, tuple(tensor.shape))
        placed = self._contents.check(name, stored, None)
        if placed in self._seen:
            raise CheckpointError(f"{self._directory} has the tensor {name} twice; copy the checkpoint anew.")
        if placed is not None:
            self._seen.add(placed)
        if self._manifest is not None:
            self._manifest.check_tensor(name, tensor.cpu(), self._directory)
