"""From the names of tensors and layers in a checkpoint to their names in a model.

They differ where only one of the two has a head: a model with a head prefixes the names of its base model. They also
differ where transformers renames tensors as it loads them.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def resolve_name(model: PreTrainedModel, name: str, known: Container[str]) -> str | None:
    """Find a layer by its name, with or without the prefix that a model with a head has.

    Args:
        model: the model, whose class knows the prefix.
        name: of the layer, with the prefix or without.
        known: names of layers, all with the prefix or all without.

    Returns:
        The layer's name in `known`; None where it is not there.
    """
    base = model.base_model_prefix + "."
    return next((each for each in (name, base + name, name.removeprefix(base)) if each in known), None)


class TensorNames:
    """The names in a model of the tensors in weight files.

    Args:
        model: on any device, including meta.
        tensors: the model's `state_dict`.
    """

    def __init__(self, model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
        self._prefix, self._tensors = model.base_model_prefix, tensors
        self._tied: Mapping[str, str] = model.all_tied_weights_keys
        transforms = get_model_conversion_mapping(model)
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]

    def resolve(self, name: str) -> str | None:
        """The name in the model of a tensor in the files; the first if tied, None if the model has no such tensor."""
        placed, _ = rename_source_key(name, self._renamings, self._converters, self._prefix, self._tensors)
        if placed not in self._tensors and name in self._tensors:
            placed, _ = rename_source_key(name, [], [], self._prefix, self._tensors)
        return self.first(placed) if placed in self._tensors else None

    def first(self, name: str) -> str:
        """The first name in the model of a tensor that may be tied, and so have several names."""
        return self._tied.get(name, name)
