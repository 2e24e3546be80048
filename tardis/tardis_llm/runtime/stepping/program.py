"""A decoding step of a model as a list of operations for the kernels, on buffers that are laid out once."""

from __future__ import annotations

import ctypes
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...families.linear import bias_of
from ...families.sites import named_blocks
from ...families.steps import STEPS
from ...families.table import Family, family_of
from ...ffn.activations import identify
from ...ffn.packed import PackedMatrix
from ...ffn.weights import Matrix as AnyMatrix
from ..cpu.backend import CpuFFN
from ..cpu.library import loaded
from ..cpu.operators import ACTIVATION_BITS, readable
from ..cpu.panels import Panels
from ..cpu.structures import (
    OPERATIONS,
    Activation,
    Attention,
    Batch,
    Head,
    Matrix,
    Norm,
    Operation,
    Product,
    Rows,
    Turn,
    Vector,
)
from ..kept import KeptFFN
from ..linears.dense import ThroughKernels
from ..linears.head import PredictedHead
from ..linears.lowbit import LowBitLinear
from ..modules import FoldedFFN
from ..placing import FoldedDown, GatedFFN
from ..stored import LaidOut
from .cache import GrowingCache, GrowingLayer


class NotWholeError(Exception):
    """The kernels do not run this model's steps whole; the message says why."""


class Program:
    """The operations of one step of a model, for a batch of sequences that have the same length.

    Args:
        model: in main memory, prepared for decoding.
        batch: number of sequences.

    Raises:
        NotWholeError: the model has what the operations cannot do.
    """

    def __init__(self, model: PreTrainedModel, batch: int) -> None:
        row = STEPS.get(model.config.model_type)
        if row is None:
            raise NotWholeError(f"models of the family {model.config.model_type!r} are not in the table of steps.")
        if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
            raise NotWholeError("a module of it has a hook, which would not see the steps.")
        self._model, self._row, self._family = model, row, family_of(model.config)
        self._blocks = list(named_blocks(model).values())
        self._bits = ACTIVATION_BITS
        self._operations: list[Operation] = []
        self._kept: list[Any] = []  # what operations point to
        self._sources: list[tuple[dict[str, Any], str]] = []  # where modules keep what they were made of
        self._attentions: list[Attention] = []
        self._turns: list[tuple[Turn, str | None]] = []
        self._positions = 0
        self._rooms: dict[int, list[Tensor]] = {}
        with torch.no_grad():
            self._build(batch)
        self._found = [place[name] for place, name in self._sources]
        self._counted = [found for found in self._found if isinstance(found, Tensor) and not found.is_inference()]
        self._versions = [found._version for found in self._counted]
        self._array = (Operation * len(self._operations))(*self._operations)

    @property
    def folded(self) -> bool:
        """Whether an FFN is folded."""
        return any(operation.kind == OPERATIONS.index("folded") for operation in self._operations)

    def fits(self, batch: int) -> bool:
        """Whether it is for so many sequences, and all that it reads is what it was made of."""
        found = [place.get(name) for place, name in self._sources]  # in every step: so it is quick
        same = batch == self._batch and all(map(operator.is_, found, self._found))
        return same and [tensor._version for tensor in self._counted] == self._versions

    def run(self, hidden: Tensor, cache: GrowingCache) -> Tensor:
        """Logits [batch, 1, vocabulary], which the next call overwrites; the cache grows by a token.

        Args:
            hidden: [batch, 1, d] embeddings of the tokens.
            cache: what came before, the same number of positions in every layer.
        """
        position = cache.get_seq_length()
        self._bind(cache)
        if self._turns and position >= self._positions:
            self._lay_out_angles(cache.layers[0].capacity)
        self._stream.copy_(hidden[:, 0])
        if self._row.positions:
            self._stream += _part(self._model.base_model, self._row.positions).get_parameter("weight")[position]
        loaded().step(self._array, Batch.of(self._stream, self._logits, self._bits), position)
        for layer in cache.layers:
            layer.length += 1
        return self._logits[:, None]

    def parts(self, position: int) -> Iterator[tuple[str, Callable[[], None]]]:
        """Every operation by its kind, to be run by itself at a position up to that of the last step: to time it."""
        batch = Batch.of(self._stream, self._logits, self._bits)
        for operation in self._operations:
            alone = (Operation * 1)(operation)
            yield OPERATIONS[operation.kind], functools.partial(loaded().step, alone, batch, position)

    # ---- building

    def _build(self, batch: int) -> None:
        model, row = self._model, self._row
        embeddings = model.get_input_embeddings().weight
        self._batch, self._dtype = batch, embeddings.dtype
        self._d = _part(self._blocks[0], row.before_attention).get_parameter("weight").shape[0]
        self._stream, read, given = (self._rows(self._d) for _ in range(3))
        for block in self._blocks:
            self._attend(block, read, given)
            if row.before_ffn:
                self._add(self._stream, given, self._stream)
                self._norm(_part(block, row.before_ffn), self._stream, read)
                self._ffn(block, read, given)
            else:
                other = self._rows(self._d)
                self._ffn(block, read, other)
                self._add(other, given, given)
            self._add(self._stream, given, self._stream)
        self._norm(_part(model.base_model, row.last), self._stream, read)
        head = model.get_output_embeddings()
        if head is None:
            raise NotWholeError(f"{type(model).__name__} has no head.")
        self._logits = self._rows(_outputs(head))
        if isinstance(head, PredictedHead):
            self._predicted_head(head, read)
        else:
            self._products([head], read, [self._logits])

    def _attend(self, block: nn.Module, read: Tensor, given: Tensor) -> None:
        """Attention of a block, from the stream to `given`; what it reads stays in `read`."""
        row, config = self._row, self._model.config
        module = _part(block, row.attention)
        self._norm(_part(block, row.before_attention), self._stream, read)
        size = _first(module, "head_dim") or self._d // config.num_attention_heads
        projections = [_part(block, path) for path in row.projections]
        heads = _inputs(_part(block, row.output)) // size
        if len(projections) == 3:
            query, key, value = (self._rows(_outputs(layer)) for layer in projections)
            self._products(projections, read, [query, key, value])
        else:
            whole = self._rows(_outputs(projections[0]))
            self._products(projections, read, [whole])
            shared = (whole.shape[1] - heads * size) // 2
            query, key, value = whole.split([heads * size, shared, shared], dim=1)
        groups = key.shape[1] // size
        for path, rows, vectors in zip(row.heads, (query, key), (heads, groups), strict=False):
            self._norm(_part(block, path), rows, rows, vectors)
        kind = _first(module, "layer_type")
        for rows, vectors in ((query, heads), (key, groups)) if row.rotary else ():
            turn = Turn(Vector(), Vector(), vectors, size, 0)
            self._turns.append((turn, kind))
            self._operation("turn", turn, rows, None, rows)
        attended = self._heads(module, query, key, value, size)
        self._products([_part(block, row.output)], attended, [given])
        if row.after_attention:
            self._norm(_part(block, row.after_attention), given, given)

    def _heads(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, size: int) -> Tensor:
        """What heads of a size give, [batch, heads * size]; blocks come in order."""
        attention = Attention(Rows.of(key), Rows.of(value))
        attention.heads, attention.groups, attention.size = query.shape[1] // size, key.shape[1] // size, size
        window = module if hasattr(module, "sliding_window") else self._model.config
        attention.window = getattr(window, "sliding_window", None) or 0
        attention.scale = _first(module, "scaling", "inv_norm_factor") or size**-0.5
        if _first(module, "attn_logit_softcapping"):
            raise NotWholeError("the scores of its attention are capped.")
        self._attentions.append(attention)
        attended = self._rows(query.shape[1])
        self._operation("attend", attention, query, None, attended)
        return attended

    def _ffn(self, block: nn.Module, read: Tensor, given: Tensor) -> None:
        """The FFN of a block, folded or not, and the norm behind it."""
        family = self._family
        around = _part(block, family.ffn) if family.ffn else block
        down = around if isinstance(around, GatedFFN) else _part(block, family.down)
        if isinstance(down, GatedFFN | FoldedDown):
            self._folded(down, read, given)
        else:
            self._dense_ffn(block, family, read, given)
        if family.norm:
            self._norm(_part(block, family.norm), given, given)

    def _folded(self, folded: GatedFFN | FoldedDown, read: Tensor, given: Tensor) -> None:
        ffn: FoldedFFN = folded.parts.ffn
        if ffn.exact or (ffn.goes_dense is not None and ffn.goes_dense(read)):
            raise NotWholeError("a folded FFN computes every neuron.")
        prepared = ffn.prepared(read, folded.parts.dense)
        self._sources.append((vars(ffn), "_ready"))
        self._kept.append(prepared)
        whole = prepared.together if isinstance(prepared, KeptFFN) else prepared
        if not isinstance(whole, CpuFFN):
            raise NotWholeError("the kernels do not read the weights of a folded FFN as they lie.")
        self._operation("folded", whole.arguments, read, None, given)

    def _dense_ffn(self, block: nn.Module, family: Family, read: Tensor, given: Tensor) -> None:
        up, down = _part(block, family.up), _part(block, family.down)
        activation = Activation.of(identify(_part(block, family.activation)))
        gated = [_part(block, family.gate), up] if family.gate else [up]
        rows = [self._rows(_outputs(layer)) for layer in gated]
        self._products(gated, read, rows)
        if family.merged:
            rows = list(rows[0].chunk(2, dim=1))
        inner = self._rows(rows[0].shape[1]) if family.merged else rows[0]
        self._operation("gate", activation, rows[0], rows[1] if len(rows) == 2 else None, inner)
        self._products([down], inner, [given])

    # ---- operations

    def _operation(self, kind: str, of: Any, x: Tensor, other: Tensor | None, y: Tensor, count: int = 1) -> None:
        places = [Rows() if rows is None else Rows.of(rows) for rows in (x, other, y)]
        pointer = None if of is None else ctypes.cast(ctypes.pointer(of), ctypes.c_void_p)
        self._kept += [of, x, other, y]
        self._operations.append(Operation(OPERATIONS.index(kind), count, pointer, *places, x.shape[1]))

    def _add(self, x: Tensor, other: Tensor, y: Tensor) -> None:
        self._operation("add", None, x, other, y)

    def _norm(self, module: nn.Module, x: Tensor, y: Tensor, vectors: int = 1) -> None:
        factor, bias, eps, centred = _parts_of_norm(module, x.shape[1] // vectors)
        self._kept += [factor, bias]
        self._sources.append((module._parameters, "weight"))
        rounded_first = not centred and hasattr(module, "variance_epsilon")  # as the norms of LLaMA do
        size = x.shape[1] // vectors
        self._operation(
            "norm",
            Norm(Vector.of(factor, size), Vector.of(bias, size), eps, centred, rounded_first, vectors),
            x,
            None,
            y,
        )

    def _products(self, layers: Sequence[nn.Module], x: Tensor, outputs: Sequence[Tensor]) -> None:
        products = (Product * len(layers))()
        for product, layer, y in zip(products, layers, outputs, strict=True):
            matrix, bias = self._matrix(layer)
            if not readable(matrix, self._dtype):
                raise NotWholeError("the kernels do not read the weights of a layer as they lie.")
            self._kept += [matrix, bias, y]
            product.weight, product.bias, product.y = Matrix.of(matrix), Vector.of(bias, y.shape[1]), y.data_ptr()  # type: ignore[arg-type]
        self._operation("products", products, x, None, outputs[0], len(layers))

    def _predicted_head(self, head: PredictedHead, x: Tensor) -> None:
        predictor, remainder = head.prepared(x)
        if not (isinstance(predictor, PackedMatrix | Panels) and isinstance(remainder, PackedMatrix)):
            raise NotWholeError("the kernels do not read the weights of the head as they lie.")
        self._kept += [predictor, remainder, head.bias]
        for part in (head.predictor, head.remainder):
            self._watch(part, part._buffers, "planes")
        self._operation("head", Head.of(predictor, remainder, head.bias, head.top), x, None, self._logits)

    def _matrix(self, layer: nn.Module) -> tuple[AnyMatrix, Tensor | None]:
        """The weight of a linear layer as the kernels read it, and its bias."""
        if isinstance(layer, LowBitLinear):
            matrix = layer.prepared(self._stream)
            self._watch(layer, layer._buffers, "planes")
        elif isinstance(layer, ThroughKernels):
            matrix = layer.layout or layer.current
            self._watch(layer, layer._parameters, "weight")
        else:
            raise NotWholeError(
                f"a {type(layer).__name__} of it does not go through the kernels; see prepare_decoding."
            )
        return matrix, bias_of(layer)

    def _watch(self, layer: LaidOut, stored: dict[str, Any], name: str) -> None:
        """The operations read a layer's matrix as it is laid out or, under this name, stored."""
        self._sources.append((stored, name) if layer.layout is None else (vars(layer), "_layout"))

    def _rows(self, width: int) -> Tensor:
        return torch.zeros(self._batch, width, dtype=self._dtype)

    # ---- what follows the cache

    def _bind(self, cache: GrowingCache) -> None:
        """Point the attentions to where keys and values lie, with room for one more."""
        for index, (attention, layer) in enumerate(zip(self._attentions, cache.layers, strict=True)):
            assert isinstance(layer, GrowingLayer), "the cache is one that grows"
            layer.make_room(1)
            if layer.rooms is not self._rooms.get(index):
                self._rooms[index] = layer.rooms
                attention.keys, attention.values = (room.data_ptr() for room in layer.rooms)
                attention.capacity = layer.capacity

    def _lay_out_angles(self, positions: int) -> None:
        """Ask the model for the angles of so many positions."""
        rotary: Any = _part(self._model.base_model, self._row.rotary)
        types = rotary.rope_type
        by_kind = isinstance(types, dict)
        if {"dynamic", "longrope"} & set(types.values() if by_kind else [types]):
            raise NotWholeError("its rotary embedding depends on the length of the text.")
        where = torch.arange(positions)[None]
        tables: dict[str | None, list[Tensor]] = {}
        for turn, kind in self._turns:
            if kind not in tables:
                tables[kind] = [
                    part[0].contiguous() for part in rotary(self._stream[None], where, *([kind] if by_kind else []))
                ]
            cosine, sine = tables[kind]
            turn.turned = cosine.shape[1]
            turn.cosine, turn.sine = (Vector.of(part.view(-1), part.numel()) for part in (cosine, sine))
        self._tables, self._positions = tables, positions


def _part(module: nn.Module, path: str) -> nn.Module:
    """The module at a path from another one."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise NotWholeError(f"a {type(module).__name__} of it has no {path}, as others of its family have.") from None


def _outputs(layer: nn.Module) -> int:
    """How many numbers a linear layer gives."""
    return _sizes(layer)[0]


def _inputs(layer: nn.Module) -> int:
    """How many numbers a linear layer takes."""
    return _sizes(layer)[1]


def _sizes(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    if isinstance(layer, nn.Linear | LowBitLinear | PredictedHead):
        return layer.out_features, layer.in_features
    raise NotWholeError(f"a {type(layer).__name__} of it is no linear layer.")


def _first(module: nn.Module, *names: str) -> Any:
    """The first attribute of these names that a module has; None without."""
    return next((getattr(module, name) for name in names if getattr(module, name, None) is not None), None)


def _parts_of_norm(module: nn.Module, size: int) -> tuple[Tensor, Tensor | None, float, bool]:
    """Factor [size] and bias of a norm, what it adds to the mean square, and whether it takes the mean off."""
    if isinstance(module, nn.LayerNorm):
        return module.weight.detach(), None if module.bias is None else module.bias.detach(), module.eps, True
    eps = _first(module, "variance_epsilon", "eps")
    if eps is None:
        raise NotWholeError(f"{type(module).__name__} is a norm that is not known.")
    signs = torch.ones(1, size)
    signs[:, 1::2] = -1  # of mean square 1, which no norm changes but by its factor
    factor = (module(signs) * signs)[0].float().contiguous()
    return factor, None, float(eps), False
