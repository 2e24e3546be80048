"""The table of families whose decoding steps our kernels run whole: where a block keeps its norms and its attention.

A family that is not here decodes through the modules of transformers, which is the same but slower. What a row cannot
say, such as another scale of the residual stream, is found when a model's first token comes out otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Step:
    """How the blocks of a family are put together. Paths are dotted: of norms from the block, of projections likewise.

    Attributes:
        model_type: the family's name.
        projections: of query, key and value; or one that gives all three, in this order.
        output: the projection behind the heads.
        attention: the module of attention, which knows its scale and window.
        before_attention: the norm of what attention reads.
        before_ffn: the norm of what the FFN reads; "" where it reads what attention reads, and both are added at once.
        after_attention: a norm of what attention gives, before it is added; "" without.
        heads: norms of the queries and of the keys, each head by itself; empty without.
        last: path from `model.base_model` to the norm behind the blocks.
        rotary: path from `model.base_model` to the module of rotary embeddings; "" where positions are learned.
        positions: path from `model.base_model` to the embedding of positions, added to that of tokens; "" without.
    """

    model_type: str
    projections: tuple[str, ...]
    output: str
    attention: str = "self_attn"
    before_attention: str = "input_layernorm"
    before_ffn: str = "post_attention_layernorm"
    after_attention: str = ""
    heads: tuple[str, ...] = ()
    last: str = "norm"
    rotary: str = "rotary_emb"
    positions: str = ""


_APART = Step("", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj")
_WITH_HEADS = replace(_APART, heads=("self_attn.q_norm", "self_attn.k_norm"))
_AROUND = replace(_WITH_HEADS, before_ffn="pre_feedforward_layernorm", after_attention="post_attention_layernorm")
_ROWS = (
    *(replace(_APART, model_type=name) for name in ("llama", "ministral", "mistral", "qwen2", "starcoder2")),
    replace(_WITH_HEADS, model_type="qwen3"),
    replace(_AROUND, model_type="gemma3_text"),
    replace(_APART, model_type="phi3", projections=("self_attn.qkv_proj",)),
    replace(
        _APART, model_type="phi", output="self_attn.dense", before_ffn="", last="final_layernorm",
    ),
    Step(
        "falcon", ("self_attention.query_key_value",), "self_attention.dense", attention="self_attention",
        before_ffn="", last="ln_f",
    ),
    Step(
        "gpt2", ("attn.c_attn",), "attn.c_proj", attention="attn", before_attention="ln_1", before_ffn="ln_2",
        last="ln_f", rotary="", positions="wpe",
    ),
)  # fmt: skip

#: model_type -> row
STEPS: dict[str, Step] = {row.model_type: row for row in _ROWS}
