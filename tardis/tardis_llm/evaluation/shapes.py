"""Models of well-known shapes with random weights, to measure speed without a download.

A shape is what speed depends on: family, width, neurons, layers, heads, vocabulary. The fold of such a model is random
too, with ranges set so that a stated share of the neurons is fixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from ..config import Select
from ..errors import InvalidInputError
from ..families.sites import FFNSite, find_ffns
from ..families.table import vocabulary
from ..ffn.weights import DenseFFN, FoldedWeights, FoldFormat, Storage, written_out
from ..runtime.linears.head import REMAINDER_BITS, PredictedHead, top_of
from ..runtime.linears.lowbit import GROUP_SIZE, LowBitLinear
from ..runtime.linears.placing import empty_head_like, empty_like, linear_layers
from ..runtime.modules import FoldedFFN


def _of(width: int, layers: int, heads: int) -> dict[str, Any]:
    """The fields of a config that most families have."""
    return {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}


def _gated(width: int, layers: int, heads: int, groups: int, neurons: int, vocabulary: int) -> dict[str, Any]:
    """The fields of families with gated FFNs, whose heads share keys and values in groups."""
    more = {"num_key_value_heads": groups, "intermediate_size": neurons, "vocab_size": vocabulary}
    return {**_of(width, layers, heads), **more}


#: model type and the fields of its config, as published; the last two are layouts of 16 layers without the large
#: vocabulary, whose share of the bytes would hide that of the FFNs
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "opt-1.3b": ("opt", {**_of(2048, 24, 32), "ffn_dim": 8192, "word_embed_proj_dim": 2048}),
    "opt-6.7b": ("opt", {**_of(4096, 32, 32), "ffn_dim": 16384, "word_embed_proj_dim": 4096}),
    "falcon-7b": ("falcon", {**_of(4544, 32, 71), "vocab_size": 65024, "bias": False}),
    "pythia-6.9b": ("gpt_neox", {**_of(4096, 32, 32), "intermediate_size": 16384}),
    "phi-2": ("phi", {**_of(2560, 32, 32), "intermediate_size": 10240}),
    "starcoder2-7b": ("starcoder2", {**_of(4608, 32, 36), "intermediate_size": 18432, "num_key_value_heads": 4}),
    "llama-3-8b": ("llama", {**_gated(4096, 32, 32, 8, 14336, 128256), "tie_word_embeddings": False}),
    "qwen2.5-0.5b": ("qwen2", {**_gated(896, 24, 14, 2, 4864, 151936), "tie_word_embeddings": True}),
    "qwen2.5-1.5b": ("qwen2", {**_gated(1536, 28, 12, 2, 8960, 151936), "tie_word_embeddings": True}),
    "gemma-2-2b": ("gemma2", {**_gated(2304, 26, 8, 4, 9216, 256000), "head_dim": 256, "tie_word_embeddings": True}),
    "mistral-7b": (
        "mistral",
        {**_gated(4096, 32, 32, 8, 14336, 32768), "sliding_window": None, "tie_word_embeddings": False},
    ),
    "gpt2-16x2048": ("gpt2", {"n_embd": 2048, "n_layer": 16, "n_head": 16, "vocab_size": 1024}),
    "falcon-16x2048": ("falcon", {**_of(2048, 16, 32), "vocab_size": 1024, "bias": False}),
}
_DEVIATION = 0.02  # of the weights
_PROBE = 64  # tokens on which the ranges are set


@dataclass(frozen=True)
class RandomFold:
    """What a random fold is made with, and what it is made to fix.

    Attributes:
        predictor_bits: random fold: bits per weight of the predictor.
        fold_bits: random fold: precision of the stored fold; default: the model's dtype.
        fallback_bits: random fold: precision of the W1 and W2 that fixing reads; default: the dense weights.
        linear_bits: random fold: precision of the linear layers outside the FFNs; default: the model's dtype.
        fix_rate: random fold: share of the neurons that a token fixes.
        select: random fold: which neurons are computed exactly: dynamic, static or mixed, as of `tardis fold`.
        kept: random fold: share of the neurons that a static or mixed fold keeps.
        group_size: random fold: weights that share one scale.
    """

    predictor_bits: int = 2
    fold_bits: int | None = None
    fallback_bits: int | None = None
    linear_bits: int | None = None
    fix_rate: float = 0.05
    select: Select = "dynamic"
    kept: float = 0.5
    group_size: int = 256

    def __post_init__(self) -> None:
        if self.select not in get_args(Select):
            raise InvalidInputError(f"select is {self.select!r}; give one of {', '.join(get_args(Select))}.")
        if self.select != "dynamic" and not (0 < self.kept <= 1 and self.fallback_bits):
            raise InvalidInputError(
                f"a {self.select} fold is to keep {self.kept:g} of the neurons; give a share above 0, at most 1, and "
                "the bits that they are stored in (--fallback int4)."
            )
        if not 0 <= self.fix_rate < 1:
            raise InvalidInputError(f"the fix rate is {self.fix_rate}; give a share from 0 to below 1.")

    @property
    def storage(self) -> Storage:
        """How the parts of each folded FFN are stored."""
        return Storage(self.group_size, self.fold_bits, self.fallback_bits)

    def format(self, dense: DenseFFN) -> FoldFormat:
        """How a fold of this FFN is stored, no group longer than a row of W1; it keeps whole groups of neurons."""
        size = min(self.storage.group_size, dense.d)
        storage = replace(self.storage, group_size=size)
        if self.select == "dynamic":
            return storage.format(dense.activation, self.predictor_bits, dense.k == 2)
        kept = max(1, round(self.kept * dense.h / size)) * size
        if self.select == "mixed" and kept < dense.h:
            return storage.mixed_format(dense, self.predictor_bits, kept)
        return storage.static_format(dense, min(dense.h, kept))


@torch.no_grad()
def shaped_model(name: str, layers: int | None = None, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A causal model of a shape with random weights, in eval mode.

    Args:
        name: name in `SHAPES`.
        layers: number of layers; None for all of the shape.
        dtype: dtype of the weights.

    Raises:
        InvalidInputError: there is no such shape, or it has fewer layers.
    """
    if name not in SHAPES:
        raise InvalidInputError(f"there is no shape {name!r}; choose from {', '.join(SHAPES)}.")
    model_type, fields = SHAPES[name]
    config = AutoConfig.for_model(model_type, **{"bos_token_id": 0, "eos_token_id": 0, **fields})
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise InvalidInputError(f"{name} has {config.num_hidden_layers} layers; give 1 to as many.")
        config.num_hidden_layers = layers
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _fill(model)
    model.tie_weights()
    return model.eval()


def _fill(model: PreTrainedModel) -> None:
    """Give the parameters of a model random content: small weights, norms of one, biases of zero."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, _DEVIATION, generator=generator)


@torch.no_grad()
def random_folds(model: PreTrainedModel, fold: RandomFold) -> Iterator[tuple[FFNSite, FoldedFFN]]:
    """A fold for every FFN of a model, random but for its ranges, which leave `fix_rate` of those predicted outside.

    The predictor's output is spread like the inputs of the FFN on random tokens, so that every token fixes other
    neurons, about as many as stated. Lines are zero.

    Args:
        model: dense.
        fold: what to make.
    """
    sites = find_ffns(model)
    generator = torch.Generator().manual_seed(1)
    calls = arguments_of(model, [site.up for site in sites], random_ids(model, 1, _PROBE, seed=2))
    for site, args in zip(sites, calls, strict=True):
        dense = site.weights()
        form = fold.format(dense)
        ffn = FoldedFFN(FoldedWeights.empty(form, dense.d, dense.h, model.dtype, torch.device("cpu")))
        for name, tensor in ffn.state_dict().items():
            _randomise(name, tensor, generator)
        if not ffn.static:
            _set_ranges(ffn, dense, args[0].reshape(-1, site.hidden_size), fold.fix_rate)
        yield site, ffn


def _randomise(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    if tensor.dtype == torch.uint8:
        tensor.random_(0, 256, generator=generator)
    elif name.endswith("scale"):
        tensor.fill_(_DEVIATION / 4)
    elif name.endswith("fold.weight"):
        tensor.normal_(0.0, _DEVIATION, generator=generator)
    else:
        tensor.zero_()


def _set_ranges(ffn: FoldedFFN, dense: DenseFFN, x: Tensor, fix_rate: float) -> None:
    """Bounds around zero with `fix_rate` of what is predicted for inputs x [tokens, d] outside."""
    weights = ffn.weights.beside(dense)
    v = F.linear(x.float(), written_out(weights.predictor), None if weights.b1 is None else weights.b1.float())
    size = weights.neurons.tested(v).abs().flatten()
    bound = size.kthvalue(max(1, round((1 - fix_rate) * len(size)))).values
    ffn.low.fill_(-float(bound))
    ffn.high.fill_(float(bound))


@torch.no_grad()
def random_linears(model: PreTrainedModel, bits: int, *, ffn: bool = False) -> dict[str, LowBitLinear]:
    """Random low-bit layers by the names of a model's linear layers, those of its dense FFNs only with `ffn`."""
    generator, layers = torch.Generator().manual_seed(4), {}
    for name, layer in linear_layers(model, ffn=ffn).items():
        layers[name] = empty_like(layer, bits, GROUP_SIZE)
        for key, tensor in layers[name].state_dict().items():
            if key in layers[name].format_tensors:
                _randomise(key, tensor, generator)
    return layers


@torch.no_grad()
def random_head(model: PreTrainedModel, bits: int) -> dict[str, PredictedHead]:
    """A random head with a predictor of half of these bits, by the name of a model's head, which is dense."""
    head = model.get_output_embeddings()
    (name,) = (name for name, layer in linear_layers(model).items() if layer is head)
    made = empty_head_like(head, (bits // 2, REMAINDER_BITS), GROUP_SIZE, top_of(len(head.weight)))
    generator = torch.Generator().manual_seed(6)
    for part in (made.predictor, made.remainder):
        for key, tensor in part.state_dict().items():
            _randomise(key, tensor, generator)
    made.remainder.scale /= 2**REMAINDER_BITS  # what a predictor leaves lies between two of its levels
    return {name: made}


def random_ids(model: PreTrainedModel, batch: int, tokens: int, seed: int) -> Tensor:
    """Token ids [batch, tokens] that the model knows, the same for the same seed."""
    return torch.randint(vocabulary(model), (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def arguments_of(model: PreTrainedModel, modules: Sequence[nn.Module], ids: Tensor) -> list[tuple[Any, ...]]:
    """The positional arguments of each of the modules, in the order of their calls, when the model sees ids."""
    calls: list[tuple[Any, ...]] = []
    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(lambda _, args: calls.append(args)).remove)
        model(input_ids=ids, use_cache=False)
    return calls
