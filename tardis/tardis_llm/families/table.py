"""THE table of model families: where each FFN is and which of its parts are up, activation and down.

Nothing else in TARDIS knows a family's attribute names. A new family is a row here and a line in the test.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError


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
            "for it to tardis_llm/families/table.py."
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
