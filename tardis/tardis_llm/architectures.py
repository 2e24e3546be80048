"""THE table of model families: where each FFN is and which of its parts are up, activation and down.

Nothing else in TARDIS knows a family's attribute names. A new family is a row here and a line in the test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import InvalidInputError, UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """Where a family of transformers models keeps its FFNs, `down(activation(up(x)))`.

    Attributes:
        model_type: `config.model_type`.
        layers: dotted path from `model.base_model` to the `nn.ModuleList` of blocks.
        ffn: dotted path from a block to the module that gets the child `tardis`; "" for the block itself.
        up, activation, down: dotted paths from a block to the three parts of its FFN.
        causal: whether the family generates text from left to right.
        refused_flags: config fields that, when true, make the FFN compute something else.
        alibi: whether positions bias the attention; see `has_alibi`.
        positions: config field that limits the length of a text; "" where nothing does.
        padding_first: whether positions are counted from behind `pad_token_id`, so that as many fewer are left.
    """

    model_type: str
    layers: str
    ffn: str
    up: str
    activation: str
    down: str
    causal: bool = True
    refused_flags: tuple[str, ...] = ()
    alibi: bool = False
    positions: str = "max_position_embeddings"
    padding_first: bool = False


_ROWS = (
    Family("gpt2", "h", "mlp", "mlp.c_fc", "mlp.act", "mlp.c_proj"),
    Family("gpt_bigcode", "h", "mlp", "mlp.c_fc", "mlp.act", "mlp.c_proj"),
    Family("starcoder2", "layers", "mlp", "mlp.c_fc", "mlp.act", "mlp.c_proj"),
    Family("gptj", "h", "mlp", "mlp.fc_in", "mlp.act", "mlp.fc_out"),
    Family("codegen", "h", "mlp", "mlp.fc_in", "mlp.act", "mlp.fc_out"),
    Family("gpt_neox", "layers", "mlp", "mlp.dense_h_to_4h", "mlp.act", "mlp.dense_4h_to_h"),
    Family("falcon", "h", "mlp", "mlp.dense_h_to_4h", "mlp.act", "mlp.dense_4h_to_h"),
    # slow_but_exact multiplies slices of the down weight and leaves out its bias.
    Family(
        "bloom", "h", "mlp", "mlp.dense_h_to_4h", "mlp.gelu_impl", "mlp.dense_4h_to_h",
        refused_flags=("slow_but_exact",), alibi=True, positions="",
    ),
    Family("phi", "layers", "mlp", "mlp.fc1", "mlp.activation_fn", "mlp.fc2"),
    # its table of biases has an end
    Family("mpt", "blocks", "ffn", "ffn.up_proj", "ffn.act", "ffn.down_proj", alibi=True, positions="max_seq_len"),
    Family("opt", "decoder.layers", "", "fc1", "activation_fn", "fc2"),
    Family(
        "bert", "encoder.layer", "",
        "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense", causal=False,
    ),
    Family(
        "roberta", "encoder.layer", "",
        "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense", causal=False, padding_first=True,
    ),
)  # fmt: skip

#: model_type -> row, for every supported family.
FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}

_GATED = """
    afmoe aria_text bamba bitnet cohere cohere2 cohere2_moe cwm dbrx deepseek_v2 deepseek_v3
    deepseek_v32 deepseek_v4 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon_h1
    flex_olmo gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text glm glm4 glm4_moe
    glm4_moe_lite gpt_oss granite granitemoe granitemoehybrid granitemoeshared helium hunyuan_v1_dense
    hunyuan_v1_moe hyperclovax jamba kimi_linear lfm2 lfm2_moe llama llama4 llama4_text longcat_flash
    mimo_v2_flash minicpm3 minimax minimax_m2 ministral ministral3 mistral mixtral modernbert
    modernbert-decoder olmo olmo2 olmo3 olmo_hybrid olmoe phi3 phi4_multimodal phimoe qwen2 qwen2_moe
    qwen3 qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next recurrent_gemma
    seed_oss smollm3 solar_open stablelm vaultgemma zamba zamba2
"""
#: model types whose FFN is `down(act(gate(x)) * up(x))`, dense or in experts: known, and not supported yet.
GATED_MODEL_TYPES: frozenset[str] = frozenset(_GATED.split())


def family_of(config: PreTrainedConfig) -> Family:
    """The row of the table for a model's config.

    Raises:
        UnsupportedModelError: a gated family, an unknown one, or a config flag under which the FFN differs.
    """
    supported = f"TARDIS folds these families: {', '.join(sorted(FAMILIES))}; choose a model of one of them."
    kind = config.model_type
    if kind in GATED_MODEL_TYPES:
        raise UnsupportedModelError(
            f"{kind!r} has a gated FFN (SwiGLU or GeGLU), which is not supported yet. {supported}"
        )
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"unknown model family {kind!r}. {supported} If its FFN is down(act(up(x))), you can add a row "
            "for it to tardis_llm/architectures.py."
        )
    for flag in FAMILIES[kind].refused_flags:
        if getattr(config, flag, False):
            raise UnsupportedModelError(
                f"with config.{flag} the FFN of {kind!r} is not down(act(up(x))). Load the model with "
                f"{flag}=False. {supported}"
            )
    return FAMILIES[kind]


def has_alibi(config: PreTrainedConfig) -> bool:
    """Whether a model adds ALiBi (arXiv 2108.12409) to its attention; in Falcon's family some models do."""
    return family_of(config).alibi or bool(getattr(config, "alibi", False))


def position_limit(config: PreTrainedConfig) -> int | None:
    """The most tokens that a model takes in one text; None if it sets no limit."""
    family = family_of(config)
    if not family.positions or getattr(config, "alibi", False):  # Falcon's, which is computed for any length
        return None
    limit = getattr(config, family.positions, None)
    if limit is None:
        return None
    return int(limit) - (config.pad_token_id + 1 if family.padding_first else 0)


def vocabulary(model: PreTrainedModel) -> int:
    """How many tokens a model knows: the rows of its input embedding."""
    rows: int = model.get_input_embeddings().weight.shape[0]
    return rows


class FFNWeights(NamedTuple):
    """The weights of one FFN, `act(x w1^T + b1) w2^T + b2`: views of the model's own tensors, in its dtype.

    Attributes:
        w1: [h, d] up weight; one row per neuron.
        b1: [h] up bias, or None.
        w2: [d, h] down weight; one column per neuron.
        b2: [d] down bias, or None.
    """

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None


@dataclass(eq=False)
class FFNSite:
    """One FFN found in a model.

    Attributes:
        index: number of its block, from 0.
        prefix: full name of `parent` in the model; tensors of the folded FFN are called `<prefix>.tardis.*`.
        up_name, activation_name, down_name: full names of the three parts in the model.
        block: the transformer block around the FFN.
        parent: the module that gets the child `tardis`; the block itself in OPT and BERT.
        up, activation, down: the three parts.
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

    def weights(self) -> FFNWeights:
        """The four weight tensors as detached views, never copies, so writing to them writes to the model.

        Raises:
            InvalidInputError: a part is no dense linear layer, or their shapes do not fit together.
        """
        w1, b1 = _linear(self.up, self.up_name)
        w2, b2 = _linear(self.down, self.down_name)
        if w2.shape != w1.T.shape:
            raise InvalidInputError(
                f"the parts of an FFN do not fit: {self.up_name} is {list(w1.shape)} and {self.down_name} is "
                f"{list(w2.shape)} [out, in]; one must be the other reversed. Reload the model from a sound "
                "checkpoint, or correct the row of its family in tardis_llm/architectures.py."
            )
        return FFNWeights(w1, b1, w2, b2)

    @property
    def hidden_size(self) -> int:
        """d, the width of the FFN's input and output."""
        return self.weights().w1.shape[1]

    @property
    def intermediate_size(self) -> int:
        """h, the number of neurons."""
        return self.weights().w1.shape[0]


def _linear(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of an nn.Linear or a transformers Conv1D, which stores [in, out]."""
    if not isinstance(module, nn.Linear | Conv1D):
        raise InvalidInputError(
            f"{name} is a {type(module).__name__}, not a linear layer. Merge adapters, and pass the original "
            "model rather than one that is already folded or wrapped."
        )
    stored: Tensor = module.weight.detach()
    if stored.ndim != 2 or not stored.is_floating_point():
        raise InvalidInputError(
            f"{name}.weight is {stored.dtype} of shape {list(stored.shape)}, not a floating matrix. Load the "
            "model without quantisation, in float32, bfloat16 or float16."
        )
    weight = stored.T if isinstance(module, Conv1D) else stored
    bias = None if module.bias is None else module.bias.detach()
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InvalidInputError(
            f"{name}.bias has shape {list(bias.shape)} but the layer has {weight.shape[0]} outputs. Reload "
            "the model from a sound checkpoint."
        )
    return weight, bias


def find_ffns(model: PreTrainedModel) -> list[FFNSite]:
    """Locate and check every FFN of a model, in the order of its blocks. Works on meta too.

    Raises:
        UnsupportedModelError: see `family_of`.
        InvalidInputError: a part is missing or is no dense linear layer, or shapes do not fit together.
    """
    family = family_of(model.config)
    name = layer_list_name(model)
    sites = [_site(family, i, f"{name}.{i}", block) for i, block in enumerate(layer_list(model))]
    for site in sites:
        site.weights()
    return sites


def _site(family: Family, index: int, name: str, block: nn.Module) -> FFNSite:
    """The FFN of one block, whose full name in the model is `name`."""
    return FFNSite(
        index=index,
        prefix=_join(name, family.ffn),
        up_name=_join(name, family.up),
        activation_name=_join(name, family.activation),
        down_name=_join(name, family.down),
        block=block,
        parent=_submodule(block, family.ffn, name),
        up=_submodule(block, family.up, name),
        activation=_submodule(block, family.activation, name),
        down=_submodule(block, family.down, name),
    )


def ffn_linear_names(model: PreTrainedModel) -> set[str]:
    """Full names of the up and down projections of every FFN, dense or folded."""
    family, name = family_of(model.config), layer_list_name(model)
    blocks = range(len(layer_list(model)))
    return {_join(f"{name}.{block}", part) for block in blocks for part in (family.up, family.down)}


def layer_list_name(model: PreTrainedModel) -> str:
    """Full name of the list of blocks in the model, e.g. `transformer.h`."""
    base = next(name for name, module in model.named_modules() if module is model.base_model)
    return _join(base, family_of(model.config).layers)


def layer_list(model: PreTrainedModel) -> nn.ModuleList:
    """The model's list of transformer blocks.

    Raises:
        UnsupportedModelError: see `family_of`.
        InvalidInputError: the model has no such list.
    """
    name = layer_list_name(model)
    layers = _submodule(model, name, type(model).__name__)
    if not isinstance(layers, nn.ModuleList):
        found = type(layers).__name__
        raise InvalidInputError(f"{name} is a {found}, not a ModuleList. Pass an unmodified model.")
    return layers


def block_at(model: PreTrainedModel, index: int) -> nn.Module:
    """Block `index` of the model.

    Raises:
        InvalidInputError: there is no such block.
    """
    layers = layer_list(model)
    if not 0 <= index < len(layers):
        raise InvalidInputError(f"no block {index}: choose one from 0 to {len(layers) - 1}.")
    return layers[index]


@contextmanager
def only_layer(model: PreTrainedModel, index: int) -> Iterator[nn.Module]:
    """Within the context, the model consists of its embeddings, block `index` and its head; yields the block.

    A forward through the whole model then runs just that block, called as the model calls it: blocks are
    never called by hand, because their signatures change with every release of transformers. The list of
    blocks is put back on leaving, after an exception too.

    Raises:
        InvalidInputError: there is no block `index`.
    """
    layers, name, block = layer_list(model), layer_list_name(model), block_at(model, index)
    set_module(model, name, nn.ModuleList([block]))
    try:
        yield block
    finally:
        set_module(model, name, layers)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted `name` below `model`, in place of what is there or as a new child.

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
            f"{name} has no module {path!r}. Pass an unmodified model, neither folded nor wrapped."
        ) from error


def _join(*names: str) -> str:
    """Join dotted names, leaving out empty ones."""
    return ".".join(name for name in names if name)
