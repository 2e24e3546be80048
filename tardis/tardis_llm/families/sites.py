"""Find the FFNs of a model by the table of families: their modules, their weights, and the lists of blocks.

Blocks are numbered from 0 in the order in which they run; where there are two lists, through both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InvalidInputError
from ..ffn.activations import identify
from ..ffn.weights import DenseFFN
from .linear import bias_of, check_linear, joined, one_below_the_other, weight_of
from .table import Family, family_of

#: the field of configs that says of each block whether its attention is full or within a sliding window
_LAYER_TYPES = "layer_types"


@dataclass(eq=False)
class FFNSite:
    """One FFN found in a model.

    Attributes:
        index: number of its block, from 0.
        prefix: full name of `parent` in the model; tensors of the folded FFN are called `<prefix>.tardis.*`.
        up_name, activation_name, down_name: full names in the model of the modules `up`, `activation`, `down`.
        block: the transformer block around the FFN.
        parent: the module that gets the child `tardis`; the block itself in OPT and BERT.
        up, activation, down: the modules that make up the FFN; the input of `up` is the FFN's.
        gated: whether the FFN has a gate.
        projections: the layers that read the FFN's input, by their full names: the gate, if it is apart, and `up`.
        replaced: the dense modules that the folded FFN replaces, by their full names: `up`, `activation` and `down`,
            or for a gated FFN, whose parts do not follow one another, the module around them.
        norm: the norm that the FFN's output goes through before it is added to the residual stream; None without.
    """

    index: int
    prefix: str
    up_name: str
    activation_name: str
    down_name: str
    block: nn.Module = field(repr=False)
    parent: nn.Module = field(repr=False)
    up: nn.Module = field(repr=False)
    activation: nn.Module = field(repr=False)
    down: nn.Module = field(repr=False)
    gated: bool
    projections: dict[str, nn.Module] = field(repr=False)
    replaced: dict[str, nn.Module] = field(repr=False)
    norm: nn.Module | None = field(repr=False)

    @classmethod
    def of(cls, family: Family, index: int, name: str, block: nn.Module) -> FFNSite:
        """Find the FFN of a block.

        Args:
            family: the model's.
            index: number of the block, from 0.
            name: full name of the block in the model.
            block: the transformer block itself.

        Raises:
            InvalidInputError: a part is missing.
        """
        paths = family.up, family.activation, family.down
        parts = [(_join(name, path), _submodule(block, path, name)) for path in paths]
        (up_name, up), (activation_name, activation), (down_name, down) = parts
        prefix, parent = _join(name, family.ffn), _submodule(block, family.ffn, name)
        ups = {_join(name, path): _submodule(block, path, name) for path in (family.gate, family.up) if path}
        names, modules = (up_name, activation_name, down_name), (block, parent, up, activation, down)
        replaced = {prefix: parent} if family.gated else dict(parts)
        norm = _submodule(block, family.norm, name) if family.norm else None
        return cls(index, prefix, *names, *modules, family.gated, ups, replaced, norm)

    def weights(self) -> DenseFFN:
        """The dense weights, detached: views of the model's tensors, but copies of a gate and up apart from it.

        Raises:
            UnsupportedModelError: the activation cannot be folded.
            InvalidInputError: a part is no dense linear layer, or their shapes do not fit together.
        """
        return DenseFFN(*self.parts(), self.activation_kind)

    def outline(self) -> DenseFFN:
        """The weights without their numbers, on the meta device: what sizes and bytes follow from.

        Raises:
            UnsupportedModelError, InvalidInputError: as `weights`.
        """
        ups, b1, w2, b2 = self._found()
        h, d = sum(map(len, ups)), w2.shape[0]
        w1 = w2.new_empty(h, d, device="meta")
        return DenseFFN(w1, b1, w2.to("meta"), b2, self.activation_kind)

    @cached_property
    def activation_kind(self) -> str:
        """The function that the activation computes, as a name in `ACTIVATIONS`.

        Raises:
            UnsupportedModelError: it computes another function.
        """
        return identify(self.activation)

    def parts(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """w1 [k h, d], b1 [k h], w2 [d, h] and b2 [d], as in `weights`; None for a bias that is not there.

        Raises:
            InvalidInputError: a part is no dense linear layer, or their shapes do not fit together.
        """
        ups, b1, w2, b2 = self._found()
        return one_below_the_other(ups), b1, w2, b2

    def _found(self) -> tuple[list[Tensor], Tensor | None, Tensor, Tensor | None]:
        """The up-projections, their bias, the down-projection and its bias; errors as `parts`."""
        for name, layer in self.linears.items():
            check_linear(layer, name)
        ups, w2 = [weight_of(layer) for layer in self.projections.values()], weight_of(self.down)
        rows = (2 if self.gated else 1) * w2.shape[1] // len(ups)
        for name, weight in zip(self.projections, ups, strict=True):
            if weight.shape != (rows, w2.shape[0]):
                raise InvalidInputError(
                    f"the parts of an FFN do not fit: {name} is {list(weight.shape)} and {self.down_name} is "
                    f"{list(w2.shape)} [out, in]; {[rows, w2.shape[0]]} is wanted beside it. Reload the model from a "
                    "sound checkpoint, or correct the parts that its Family names."
                )
        biases = [bias_of(layer) for layer in self.projections.values()]
        return ups, joined(biases, ups), w2, bias_of(self.down)

    @property
    def linears(self) -> dict[str, nn.Module]:
        """The linear layers of the FFN by their full names: the gate first, down last."""
        return {**self.projections, self.down_name: self.down}

    @property
    def hidden_size(self) -> int:
        """d, the width of the FFN's input and output."""
        return self._found()[2].shape[0]

    @property
    def intermediate_size(self) -> int:
        """h, the number of neurons."""
        return self._found()[2].shape[1]


def find_ffns(model: PreTrainedModel) -> list[FFNSite]:
    """Find and check every FFN of a model, in the order of its blocks; the model may be on the meta device.

    Raises:
        UnsupportedModelError: the family is gated or unknown, or a flag of the config makes its FFN another one.
        InvalidInputError: a part is missing or is no dense linear layer, or shapes do not fit together.
    """
    family = family_of(model.config)
    sites = [FFNSite.of(family, i, name, block) for i, (name, block) in enumerate(named_blocks(model).items())]
    for site in sites:
        site._found()
    return sites


def ffn_linear_names(model: PreTrainedModel) -> set[str]:
    """Full names of the linear layers of every FFN, dense or folded."""
    return {_join(block, part) for block in named_blocks(model) for part in family_of(model.config).linears}


def layer_lists(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """The model's lists of transformer blocks by their full names, e.g. `transformer.h`, in the order they run in.

    Raises:
        UnsupportedModelError: the family is unknown, or a flag of the config makes its FFN another one.
        InvalidInputError: the model has no such list.
    """
    base = next(name for name, module in model.named_modules() if module is model.base_model)
    names = [_join(base, path) for path in family_of(model.config).lists]
    return {name: _list_at(model, name) for name in names}


def _list_at(model: PreTrainedModel, name: str) -> nn.ModuleList:
    layers = _submodule(model, name, type(model).__name__)
    if not isinstance(layers, nn.ModuleList):
        found = type(layers).__name__
        raise InvalidInputError(f"{name} is a {found}, not a ModuleList. Pass an unmodified model.")
    return layers


def layer_list(model: PreTrainedModel) -> nn.ModuleList:
    """The model's list of transformer blocks; of two lists the last. Errors as `layer_lists`."""
    return list(layer_lists(model).values())[-1]


def named_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """All transformer blocks of a model by their full names, in the order of their numbers. Errors as `layer_lists`."""
    lists = layer_lists(model).items()
    return {f"{name}.{place}": block for name, layers in lists for place, block in enumerate(layers)}


def encoder_blocks(model: PreTrainedModel) -> int:
    """How many blocks are an encoder's, which come first; 0 for a model with one list. Errors as `layer_lists`."""
    return sum(len(layers) for layers in list(layer_lists(model).values())[:-1])


def block_at(model: PreTrainedModel, index: int) -> nn.Module:
    """The transformer block of a model with a number, from 0.

    Raises:
        InvalidInputError: there is no such block.
    """
    blocks = list(named_blocks(model).values())
    if not 0 <= index < len(blocks):
        raise InvalidInputError(f"no block {index}: choose one from 0 to {len(blocks) - 1}.")
    return blocks[index]


@contextmanager
def only_layer(model: PreTrainedModel, index: int) -> Iterator[nn.Module]:
    """Within the context, block `index` is alone in its list; yields the block.

    A forward of the model then runs just that block between embeddings and head, with the arguments that the model
    gives it; another list runs whole. The list of blocks is restored on leaving, also after an exception.

    Raises:
        InvalidInputError: there is no block `index`.
    """
    block = block_at(model, index)
    name, place = list(named_blocks(model))[index].rsplit(".", 1)
    layers, parent = layer_lists(model)[name], name.rpartition(".")[0]
    config = _submodule(model, parent, type(model).__name__).config
    set_module(model, name, nn.ModuleList([block]))
    try:
        with _only_layer_type(config, int(place)):
            yield block
    finally:
        set_module(model, name, layers)


@contextmanager
def without_blocks(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, a model's lists of blocks are empty, so that what is done to it leaves the blocks alone."""
    lists = layer_lists(model)
    for name in lists:
        set_module(model, name, nn.ModuleList())
    try:
        yield
    finally:
        for name, layers in lists.items():
            set_module(model, name, layers)


@contextmanager
def running(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context, a module's forward is another function; its hooks stay."""
    own = vars(module).get("forward")
    setattr(module, "forward", forward)  # noqa: B010 - mypy takes it for a method
    try:
        yield
    finally:
        delattr(module, "forward")
        if own is not None:
            setattr(module, "forward", own)  # noqa: B010


@contextmanager
def _only_layer_type(config: Any, index: int) -> Iterator[None]:
    """Within the context, block `index` is the only one that a config has a type of attention for.

    Models choose the mask and the rotary embedding of a block, by `config.layer_types`, for its place in the list.
    """
    types = getattr(config, _LAYER_TYPES, None)
    if types is None:
        yield
        return
    setattr(config, _LAYER_TYPES, [types[index]])
    try:
        yield
    finally:
        setattr(config, _LAYER_TYPES, types)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set the module with a dotted name below `model`, in place of one that exists or as a new child.

    Raises:
        InvalidInputError: the module that should contain it does not exist.
    """
    parent, _, child = name.rpartition(".")
    setattr(_submodule(model, parent, type(model).__name__), child, module)


def _submodule(module: nn.Module, path: str, name: str) -> nn.Module:
    """`module.get_submodule(path)` ("" is the module itself), with an error that names the remedy."""
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise InvalidInputError(
            f"{name} has no module {path!r}: {_children(module, path, name)}. Pass an unmodified model, neither folded "
            "nor wrapped, or correct the path in its Family."
        ) from error


def _children(module: nn.Module, path: str, name: str) -> str:
    """For a message: the children of the last module on a path that exists."""
    first, _, rest = path.partition(".")
    children = dict(module.named_children())
    if first in children:
        return _children(children[first], rest, f"{name}.{first}")
    return f"{name} has {', '.join(children) or 'no modules'}"


def _join(*names: str) -> str:
    """Join dotted names, leaving out empty ones."""
    return ".".join(name for name in names if name)
