"""What the tensors and layers of a checkpoint are called in a model.

A model with a head has the name of its base before all others, and transformers renames some tensors as it loads them.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def spelled(model: PreTrainedModel, name: str, known: Container[str]) -> str | None:
    """A layer's name as `known` has it, be that of a model with a head or without; None where it has none such.

    Args:
        model: with the layer, or saved from one that has it.
        name: of the layer.
        known: names of layers.
    """
    base = model.base_model_prefix + "."
    return next((each for each in (name, base + name, name.removeprefix(base)) if each in known), None)


class TensorNames:
    """What the tensors of weight files are called in a model.

    Args:
        model: on any device, meta too.
        tensors: its `state_dict`.
    """

    def __init__(self, model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
        self._prefix, self._tensors = model.base_model_prefix, tensors
        self._tied: Mapping[str, str] = model.all_tied_weights_keys
        transforms = get_model_conversion_mapping(model)
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]

    def place(self, name: str) -> str | None:
        """What a tensor of the files is called in the model, None where it has none such; of tied ones, the first."""
        placed, _ = rename_source_key(name, self._renamings, self._converters, self._prefix, self._tensors)
        if placed not in self._tensors and name in self._tensors:
            placed, _ = rename_source_key(name, [], [], self._prefix, self._tensors)
        return self.first(placed) if placed in self._tensors else None

    def first(self, name: str) -> str:
        """The first name of a tensor in the model: tied ones have several."""
        return self._tied.get(name, name)
