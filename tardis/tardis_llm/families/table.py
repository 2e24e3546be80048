"""The table of model families: where each FFN is, and which of its modules are up, activation and down.

A new family is a row here and a line in its test. For a model of a family that is not here, the user gives a `Family`,
whose fields are then kept in the model's config under `NAMED`.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import InvalidInputError, UnsupportedModelError

#: the field of a model's config, and so of config.json, with the family that a user has named
NAMED = "tardis_family"


@dataclass(frozen=True)
class Family:
    """Where the models of a family keep their FFNs, `down(activation(up(x)))` or `down(activation(gate(x)) * up(x))`.

    `fold(model, text, family=Family(...))` folds a model of a family that TARDIS does not know. Paths are dotted, such
    as `mlp.fc1`; `print(model)` shows them.

    Attributes:
        model_type: the family's name, which is `model.config.model_type`.
        layers: path from `model.base_model` to the list of blocks, an `nn.ModuleList`.
        ffn: path from a block to the module around its FFN; "" where that is the block itself.
        up: path from a block to the up projection, a linear layer.
        activation: path from a block to the module that computes the activation.
        down: path from a block to the down projection, a linear layer.
        gate: path from a block to the gate projection of a gated FFN; "" where there is none. The parts of a gated FFN
            are children of the module around them, which the folded FFN replaces.
        merged: whether `up` is gate and up projection in one layer, the gate's rows first.
        norm: path from a block to the norm that the FFN's output goes through before it is added to the residual
            stream; "" where there is none.
        causal: whether the models generate text from left to right; encoders do not.
        refused_flags: fields of the config that, when true, make the FFN compute something else.
        alibi: whether ALiBi (arXiv 2108.12409) biases the attention of every model of the family.
        positions: field of the config with the most tokens that a text may have; "" where there is no limit.
        padding_first: whether positions are numbered from `pad_token_id + 1`, which leaves that many fewer for text.
        encoder: path from `model.base_model` to the list of blocks of an encoder of speech, whose output the blocks in
            `layers` attend to; "" where there is none.

    Raises:
        InvalidInputError: a field is of the wrong type, or the parts of a gated FFN are not children of `ffn`.

    Example:
        >>> import torch
        >>> from transformers import NanoChatConfig, NanoChatForCausalLM
        >>> from tardis_llm import Family, FoldConfig, fold
        >>> sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = NanoChatForCausalLM(NanoChatConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
        >>> paths = {"up": "mlp.fc1", "activation": "mlp.activation_fn", "down": "mlp.fc2"}
        >>> family = Family("nanochat", layers="layers", ffn="mlp", **paths)
        >>> text = torch.randint(256, (24, 16))  # token ids; real text tells more
        >>> fold(model.eval(), text, FoldConfig(reduction=0.3), family=family).layers[0].prefix
        'model.layers.0.mlp'
    """

    model_type: str
    layers: str
    ffn: str
    up: str
    activation: str
    down: str
    gate: str = ""
    merged: bool = False
    norm: str = ""
    causal: bool = True
    refused_flags: tuple[str, ...] = ()
    alibi: bool = False
    positions: str = "max_position_embeddings"
    padding_first: bool = False
    encoder: str = ""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            many = isinstance(value, tuple) and all(isinstance(part, str) for part in value)
            if ("tuple[str, ...]" if many else type(value).__name__) != each.type:
                raise InvalidInputError(f"{each.name} of a Family is {value!r}, and {each.type} is wanted.")
        if self.gate and self.merged:
            raise InvalidInputError(
                f"a Family has the gate {self.gate!r} and is merged, too. Give `gate` where gate and up projection are "
                "two layers, `merged=True` where they are one."
            )
        wrong = [path for path in self.linears if self.gated and path.rpartition(".")[0] != self.ffn]
        if wrong or (self.gated and not self.ffn):
            raise InvalidInputError(
                f"{(wrong or self.linears)[0]!r} is no child of ffn, which is {self.ffn!r}. A folded FFN replaces the "
                "module around a gated one: give its path as `ffn`, and those of gate, up and down directly below it."
            )

    @classmethod
    def from_config(cls, values: object) -> Family:
        """The family that `as_config` wrote into a model's config.

        Raises:
            InvalidInputError: a field is missing, unknown or of the wrong type.
        """
        if not isinstance(values, dict):
            raise InvalidInputError(f"{NAMED} in the model's config is {values!r}; give it the fields of a Family.")
        flags = values.get("refused_flags", [])
        try:
            return cls(**{**values, "refused_flags": tuple(flags) if isinstance(flags, list) else flags})
        except TypeError as error:
            raise InvalidInputError(f"{NAMED} in the model's config is no Family ({error}); correct it.") from error

    def as_config(self) -> dict[str, Any]:
        """The fields for a model's config and config.json, without those that have their default value."""
        found = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {each.name: found[each.name] for each in fields(self) if getattr(self, each.name) != each.default}

    @property
    def lists(self) -> tuple[str, ...]:
        """Paths from `model.base_model` to the lists of blocks, in the order in which they run."""
        return tuple(path for path in (self.encoder, self.layers) if path)

    @property
    def speech(self) -> bool:
        """Whether the models write down speech: windows of sound go in beside the tokens so far."""
        return bool(self.encoder)

    @property
    def language_model(self) -> bool:
        """Whether the models go on from a text alone."""
        return self.causal and not self.speech

    @property
    def gated(self) -> bool:
        """Whether the FFN has a gate, in a layer of its own or merged with up."""
        return self.merged or bool(self.gate)

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths from a block to the linear layers of its FFN."""
        return tuple(path for path in (self.gate, self.up, self.down) if path)

    def locate(self, name: str) -> tuple[int, str] | None:
        """The number in `layers` of a module's block, and the module's path from that block; None where it is in none.

        Args:
            name: full name of the module in a model of the family, with or without a head, of transformers or vLLM.
        """
        found = re.search(rf"(?:^|\.){re.escape(self.layers)}\.(\d+)(?:\.(.+))?$", name)
        return (int(found[1]), found[2] or "") if found else None


_ROWS = (
    Family("gpt2", "h", "mlp", "mlp.c_fc", "mlp.act", "mlp.c_proj"),
    Family("gpt_bigcode", "h", "mlp", "mlp.c_fc", "mlp.act", "mlp.c_proj"),
    Family("starcoder2", "layers", "mlp", "mlp.c_fc", "mlp.act", "mlp.c_proj"),
    Family("gptj", "h", "mlp", "mlp.fc_in", "mlp.act", "mlp.fc_out"),
    Family("codegen", "h", "mlp", "mlp.fc_in", "mlp.act", "mlp.fc_out"),
    Family("gpt_neox", "layers", "mlp", "mlp.dense_h_to_4h", "mlp.act", "mlp.dense_4h_to_h"),
    Family("persimmon", "layers", "mlp", "mlp.dense_h_to_4h", "mlp.act", "mlp.dense_4h_to_h"),
    Family("falcon", "h", "mlp", "mlp.dense_h_to_4h", "mlp.act", "mlp.dense_4h_to_h"),
    # slow_but_exact multiplies slices of the down weight and leaves out its bias.
    Family(
        "bloom", "h", "mlp", "mlp.dense_h_to_4h", "mlp.gelu_impl", "mlp.dense_4h_to_h",
        refused_flags=("slow_but_exact",), alibi=True, positions="",
    ),
    Family("phi", "layers", "mlp", "mlp.fc1", "mlp.activation_fn", "mlp.fc2"),
    *(
        Family(name, "layers", "mlp", "mlp.up_proj", "mlp.act_fn", "mlp.down_proj")
        for name in ("apertus", "arcee", "nemotron")
    ),
    # The table of ALiBi biases has max_seq_len columns.
    Family("mpt", "blocks", "ffn", "ffn.up_proj", "ffn.act", "ffn.down_proj", alibi=True, positions="max_seq_len"),
    Family("opt", "decoder.layers", "", "fc1", "activation_fn", "fc2"),
    Family("biogpt", "layers", "", "fc1", "activation_fn", "fc2"),
    Family("xglm", "layers", "", "fc1", "activation_fn", "fc2"),
    Family(
        "bert", "encoder.layer", "",
        "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense", causal=False,
    ),
    Family(
        "roberta", "encoder.layer", "",
        "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense", causal=False, padding_first=True,
    ),
    Family(
        "whisper", "decoder.layers", "", "fc1", "activation_fn", "fc2",
        positions="max_target_positions", encoder="encoder.layers",
    ),
)  # fmt: skip

_GATE_APART = Family("", "layers", "mlp", "mlp.up_proj", "mlp.act_fn", "mlp.down_proj", gate="mlp.gate_proj")
_GATE_MERGED = Family("", "layers", "mlp", "mlp.gate_up_proj", "mlp.activation_fn", "mlp.down_proj", merged=True)
#: gated families, by how they name the parts: gate and up apart or merged, with or without a norm behind the FFN
_GATED_ROWS = (
    *(replace(_GATE_APART, model_type=name) for name in (
        "cohere", "cohere2", "gemma", "granite", "helium", "llama", "ministral", "mistral", "olmo", "qwen2", "qwen3",
        "smollm3", "stablelm",
    )),
    *(replace(_GATE_APART, model_type=name, norm="post_feedforward_layernorm") for name in (
        "exaone4", "gemma2", "gemma3_text", "olmo2", "olmo3",
    )),
    replace(_GATE_MERGED, model_type="phi3"),
    replace(_GATE_MERGED, model_type="glm"),
    replace(_GATE_MERGED, model_type="glm4", norm="post_mlp_layernorm"),
)  # fmt: skip

#: model_type -> row, for every supported family.
FAMILIES: dict[str, Family] = {row.model_type: row for row in (*_ROWS, *_GATED_ROWS)}

#: what errors about models of other families end with
SUPPORTED = f"TARDIS folds these families: {', '.join(sorted(FAMILIES))}; choose a model of one of them."

_WITH_EXPERTS = """
    afmoe aria_text axk1 axk2 cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 doge dots1
    ernie4_5_moe exaone_moe flex_olmo gemma4_text glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granitemoe
    granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 jamba jetmoe kimi_linear laguna
    lfm2_moe llama4_text longcat_flash mellum mimo_v2_flash minimax minimax_m2 mistral4 mixtral nemotron_h olmoe
    phimoe qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next solar_open step3p5 zaya
"""

#: model types whose FFNs are mixtures of experts, or can be
WITH_EXPERTS: frozenset[str] = frozenset(_WITH_EXPERTS.split())


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model: the one that its config names, or else the row of the table.

    Raises:
        UnsupportedModelError: the family is not in the table, or a flag of the config makes its FFN another one.
        InvalidInputError: the config has a `Family` of another model type, or an invalid one.
    """
    kind, named = config.model_type, getattr(config, NAMED, None)
    family = FAMILIES.get(kind) if named is None else Family.from_config(named)
    if family is None:
        raise UnsupportedModelError(_why_not(config))
    if family.model_type != kind:
        raise InvalidInputError(
            f"the Family is that of {family.model_type!r} models, and this model is a {kind!r}; give a Family for it."
        )
    for flag in family.refused_flags:
        if getattr(config, flag, False):
            raise UnsupportedModelError(
                f"with config.{flag} the FFN of {kind!r} is not down(act(up(x))). Load the model with "
                f"{flag}=False. {SUPPORTED}"
            )
    return family


def _why_not(config: PreTrainedConfig) -> str:
    """Why a model of a family that is not in the table cannot be folded, and what can be done."""
    kind, text = config.model_type, config.get_text_config()
    if text.model_type in WITH_EXPERTS:
        return f"{kind!r} has experts, and mixtures of experts cannot be folded. {SUPPORTED}"
    if text.model_type in FAMILIES:
        return (
            f"{kind!r} has other inputs beside text, and TARDIS folds its text model alone, a {text.model_type!r}: "
            "save that as a checkpoint of its own, as the guide shows."
        )
    return (
        f"unknown model family {kind!r}. {SUPPORTED} If its FFN is down(act(up(x))) or down(act(gate(x)) * up(x)), say "
        "where the parts are: give tardis_llm.fold a `family=Family(...)`, or write the fields of one as "
        f"{NAMED!r} into config.json."
    )


def kind_of(model: PreTrainedModel) -> str:
    """For a message about a model that is no language model: what it is."""
    return f"{type(model).__name__} {'writes down speech' if family_of(model.config).speech else 'is an encoder'}"


def has_alibi(config: PreTrainedConfig) -> bool:
    """Whether a model adds ALiBi (arXiv 2108.12409) to its attention; of the Falcon models, some do."""
    return family_of(config).alibi or bool(getattr(config, "alibi", False))


def position_limit(config: PreTrainedConfig) -> int | None:
    """The most tokens that a text may have for a model; None if there is no limit."""
    family = family_of(config)
    if not family.positions or getattr(config, "alibi", False):  # of Falcon, computed for any length
        return None
    limit = getattr(config, family.positions, None)
    if limit is None:
        return None
    return int(limit) - (config.pad_token_id + 1 if family.padding_first else 0)


@dataclass(frozen=True)
class Sound:
    """The windows of speech that a model takes, all of one length.

    Attributes:
        mels: features of a frame.
        frames: frames of a window.
        positions: what the encoder makes of them, one position per token of its blocks.
    """

    mels: int
    frames: int
    positions: int


def sound_of(config: PreTrainedConfig) -> Sound:
    """The windows of a model of speech."""
    positions = config.max_source_positions
    return Sound(config.num_mel_bins, 2 * positions, positions)  # of two convolutions, one has a stride of 2


def vocabulary(model: PreTrainedModel) -> int:
    """How many tokens a model knows: the number of rows of its input embedding."""
    rows: int = model.get_input_embeddings().weight.shape[0]
    return rows
