"""Linear layers of vLLM's models outside the FFNs: laid out for our kernels, or, as the head may be too, in few bits.

vLLM's own layers stay, and load weights, or planes and scales, as ever: what each family has stored together or apart,
and what share a rank has, remains their business. Only the product is ours. To `torch.compile` one in few bits is an
operator, `tardis::served_linear`, that finds its layer by name as `tardis::served_ffn` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.utils import set_weight_attrs

from ...errors import CheckpointError
from ...ffn.packed import PackedMatrix, pack, unpack
from ...ffn.weights import Layout
from ...runtime.backend import lay_out, linear
from ...runtime.linears.head import PredictedHead
from ...runtime.linears.lowbit import LowBitLinear
from ...runtime.operators import library
from .names import LinearForm

library.define("served_linear(Tensor x, str name, int outputs) -> Tensor")


def _served_linear(x: Tensor, name: str, outputs: int) -> Tensor:
    """[..., outputs] for x [..., inputs], by the layer of that name in the engine that is running."""
    layer: LowBitMethod = get_forward_context().no_compile_layers[name]
    return layer.linear(x)


library.impl("served_linear", _served_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("tardis::served_linear")
def _(x: Tensor, name: str, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


class LaidOutMethod(UnquantizedLinearMethod):
    """A linear layer of vLLM whose weight is laid out for our kernels where they have an order for it; else vLLM's own.

    Measured with one thread, it is 1.07 to 1.6 times as fast as vLLM's oneDNN product up to 64 tokens, and as fast for
    128; 2 to 7 % slower for 256.
    """

    _layout: Layout | None = None

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Lay the weight out."""
        self._layout = lay_out(layer.weight.data, layer.weight.dtype)
        if self._layout is None:
            super().process_weights_after_loading(layer)
        else:
            layer.weight = nn.Parameter(self._layout.data, requires_grad=False)

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., outputs] for x [..., inputs]."""
        if self._layout is None:
            return super().apply(layer, x, bias)
        return linear(x, self._layout, bias)


class LowBitMethod(LinearMethodBase):
    """One linear layer in few bits, or a rank's share of it; vLLM's layer has planes and scales until all are loaded.

    Args:
        form: of all such layers.
        name: of the layer in vLLM's model.
    """

    linear: LowBitLinear

    def __init__(self, form: LinearForm, name: str) -> None:
        self._form, self._name = form, f"{name}.tardis"

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Give a layer `planes` and `scale` without content, shaped for a rank's share.

        Raises:
            CheckpointError: the share would divide inputs that have one scale in common.
        """
        inputs, outputs = input_size_per_partition, sum(output_partition_sizes)
        bits, size, device = self._form.bits, self._form.group_size, torch.get_default_device()
        if inputs % size and inputs != input_size > size:
            raise CheckpointError(
                f"{self._name.removesuffix('.tardis')} has {input_size} inputs, which {input_size // inputs} processes "
                f"cannot share: groups of {size} have one scale. Serve with fewer processes, or fold with a "
                "--linear-group-size that divides the share of each."
            )
        self._inputs = inputs
        # a rank takes its share of the inputs out of all, as bit-planes cannot be cut at every column
        self.linear = LowBitLinear.empty((outputs, input_size), None, bits, size, params_dtype, device)
        for key in ("planes", "scale"):
            part = nn.Parameter(self.linear.get_buffer(key), requires_grad=False)
            layer.register_parameter(key, part)
            set_weight_attrs(part, {"output_dim": 0, **attributes})
        get_current_vllm_config().compilation_config.static_forward_context[self._name] = self

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Take planes and scales from the layer, so that they can be put into the kernel's order."""
        del layer.planes, layer.scale
        if self._inputs != self.linear.in_features:
            rank = get_tensor_model_parallel_rank()
            self.linear = share_of_inputs(self.linear, rank * self._inputs, self._inputs)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., outputs] for x [..., inputs]."""
        if torch.compiler.is_compiling():
            y: Tensor = torch.ops.tardis.served_linear(x, self._name, self.linear.out_features)
        else:
            y = self.linear(x)
        return y if bias is None else y + bias


class PredictedHeadMethod(LinearMethodBase):
    """The head with a predictor, or a rank's share of it, which finds the greatest of its own logits.

    Args:
        form: of all layers in few bits.
    """

    head: PredictedHead

    def __init__(self, form: LinearForm) -> None:
        self._form = form

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Give a layer `planes` and `scale` without content for predictor and remainder, shaped for a rank's share."""
        form, outputs, device = self._form.head, sum(output_partition_sizes), torch.get_default_device()
        assert form is not None, "the head has a predictor"
        bits, top = (form.predictor_bits, form.remainder_bits), -(-form.top * outputs // output_size)
        size = self._form.group_size
        self.head = PredictedHead.empty((outputs, input_size), None, bits, size, top, params_dtype, device)
        for name in _PARTS:
            part = nn.Module()
            for key in ("planes", "scale"):
                tensor = nn.Parameter(self.head.get_buffer(f"{name}.{key}"), requires_grad=False)
                part.register_parameter(key, tensor)
                set_weight_attrs(tensor, {"output_dim": 0, **attributes})
            layer.add_module(name, part)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Take planes and scales from the layer, so that they can be put into the kernel's order."""
        for name in _PARTS:
            delattr(layer, name)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits [..., outputs] for x [..., inputs]."""
        y: Tensor = self.head(x)
        return y if bias is None else y + bias


_PARTS = ("predictor", "remainder")


def head_method(form: LinearForm, name: str) -> LowBitMethod | PredictedHeadMethod:
    """The method of the head `name` in few bits."""
    return PredictedHeadMethod(form) if form.head else LowBitMethod(form, name)


def share_of_inputs(layer: LowBitLinear, first: int, count: int) -> LowBitLinear:
    """A layer for `count` of a layer's inputs from number `first` on, where groups end unless there is only one."""
    codes = unpack(layer.planes, layer.in_features)[:, first : first + count]
    size, scale = layer.group_size, layer.scale
    if size < layer.in_features:
        scale = scale[:, first // size : (first + count) // size]
    matrix = PackedMatrix(pack(codes, layer.bits), scale.contiguous(), count, min(size, count))
    return LowBitLinear(matrix, layer.bias, layer.weight.dtype)


class SharedHeadMethod(UnquantizedEmbeddingMethod):
    """An embedding that also serves as head: vectors are its own, products are those of a head in few bits.

    Args:
        head: that head.
    """

    def __init__(self, head: ParallelLMHead) -> None:
        self._head = head

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., tokens that the model knows] for x [..., inputs]."""
        y: Tensor = self._head.quant_method.apply(self._head, x, bias)
        return y


def install_head(model: nn.Module, form: LinearForm) -> None:
    """Put the head of a model in few bits where vLLM's class did not ask how it is stored, as BLOOM's and OPT's.

    Cohere's and Gemma 2's have no head of their own, and are given one.
    """
    if not hasattr(model, "lm_head"):
        _part_head(model)
    for name, head in model.named_modules():
        if isinstance(head, ParallelLMHead) and not isinstance(head.quant_method, LowBitMethod | PredictedHeadMethod):
            del head.weight
            head.quant_method = head_method(form, name)
            head.quant_method.create_weights(
                head,
                head.input_size_per_partition,
                head.output_partition_sizes,
                head.input_size,
                head.output_size,
                params_dtype=head.params_dtype,
                weight_loader=head.weight_loader,
            )


def _part_head(model: nn.Module) -> None:
    """Give a model whose embedding is its head, too, a head without content."""
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            head = ParallelLMHead(module.num_embeddings, module.embedding_dim)
            module.quant_method = SharedHeadMethod(head)
            model.add_module("lm_head", head)
            return
