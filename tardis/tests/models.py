"""Small random models of the real transformers classes, one per family and layout, and a byte tokenizer.

Every weight is drawn at random, biases and norms too, so that no term of an FFN can be lost unnoticed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

HIDDEN, INTERMEDIATE, LAYERS, HEADS, VOCAB, POSITIONS = 64, 256, 2, 4, 320, 128
END = 256  # id of <|endoftext|>: the byte tokenizer has the 256 bytes before it

_GPT = {
    "n_embd": HIDDEN,
    "n_head": HEADS,
    "n_layer": LAYERS,
    "n_inner": INTERMEDIATE,
    "n_positions": POSITIONS,
}
_COMMON = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
}
_BLOOM = {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}
_FALCON = {
    "hidden_size": HIDDEN,
    "ffn_hidden_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
_OPT = {
    "hidden_size": HIDDEN,
    "ffn_dim": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "word_embed_proj_dim": HIDDEN,
    "pad_token_id": END,
}

#: grouped heads, no biases, and a number of neurons that is no multiple of 64, as in many gated models
_GATED = {**_COMMON, "intermediate_size": 172, "num_key_value_heads": 2, "pad_token_id": 0}
#: full attention and a window that is shorter than the texts of tests, in turn
_WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_LONG_ROPE = {
    **{"rope_type": "llama3", "rope_theta": 10_000.0},
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# name -> (model_type, config fields). Names beyond the model type are other layouts of the same family; layer types are
# repeated to the number of blocks.
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT),
    "gpt_bigcode": ("gpt_bigcode", _GPT),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 8}),
    "codegen": ("codegen", {**_GPT, "rotary_dim": 8}),
    "starcoder2": ("starcoder2", {**_COMMON, "num_key_value_heads": 2}),
    "phi": ("phi", _COMMON),
    "persimmon": ("persimmon", _COMMON),
    # squared ReLU
    "nemotron": ("nemotron", {**_COMMON, "num_key_value_heads": 2}),
    "arcee": ("arcee", {**_COMMON, "num_key_value_heads": 2, "mlp_bias": True}),
    "gpt_neox": ("gpt_neox", _COMMON),
    "gpt_neox_sequential": ("gpt_neox", {**_COMMON, "use_parallel_residual": False}),
    "bloom": ("bloom", _BLOOM),
    "mpt": ("mpt", {"d_model": HIDDEN, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": POSITIONS}),
    # Falcon 7B (rotary, one key head, attention beside FFN), 40B and 180B, RW (ALiBi, FFN after attention)
    "falcon": ("falcon", {**_FALCON, "bias": False}),
    "falcon_new_decoder": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": (
        "falcon",
        {**_FALCON, "alibi": True, "parallel_attn": False, "multi_query": False, "bias": True},
    ),
    # OPT has ReLU; like OPT-350m, opt_post_norm normalises after each part and embeds in fewer dimensions
    "opt": ("opt", _OPT),
    "opt_post_norm": ("opt", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": HIDDEN // 2}),
    "biogpt": ("biogpt", _COMMON),
    "xglm": (
        "xglm",
        {
            **{"d_model": HIDDEN, "ffn_dim": INTERMEDIATE, "num_layers": LAYERS, "attention_heads": HEADS},
            "max_position_embeddings": POSITIONS,
        },
    ),
    "bert": ("bert", _COMMON),
    # RoBERTa counts positions from pad_token_id + 1 = 2
    "roberta": ("roberta", {**_COMMON, "max_position_embeddings": POSITIONS + 2}),
    # gate and up apart; llama_biased has the biases of InternLM, and a tied head and a stretched rope beside
    "llama": ("llama", _GATED),
    "llama_biased": (
        "llama",
        {
            **{**_GATED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
            "rope_parameters": _LONG_ROPE,
        },
    ),
    "mistral": ("mistral", {**_GATED, "sliding_window": 4, "head_dim": 32}),
    "ministral": ("ministral", {**_GATED, **_WINDOWS, "head_dim": 16, "rope_parameters": _ROPE}),
    "qwen2": ("qwen2", {**_GATED, **_WINDOWS, "use_sliding_window": True, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_GATED, **_WINDOWS, "use_sliding_window": True, "head_dim": 32}),
    "gemma": ("gemma", {**_GATED, "head_dim": 16, "intermediate_size": INTERMEDIATE}),
    "olmo": ("olmo", {**_GATED, "clip_qkv": 1.0}),
    "granite": ("granite", {**_GATED, "mlp_bias": True, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
    "stablelm": ("stablelm", {**_GATED, "qk_layernorm": True, "use_qkv_bias": True}),
    "stablelm_parallel": ("stablelm", {**_GATED, "use_parallel_residual": True}),
    "smollm3": ("smollm3", {**_GATED, **_WINDOWS, "use_sliding_window": True, "no_rope_layer_interval": 2}),
    "cohere": ("cohere", {**_GATED, "use_qk_norm": True, "logit_scale": 1.0}),
    "cohere2": ("cohere2", {**_GATED, **_WINDOWS, "logit_scale": 1.0}),
    "helium": ("helium", {**_GATED, "head_dim": 16}),
    # apart, with a norm behind the FFN
    "gemma2": ("gemma2", {**_GATED, **_WINDOWS, "head_dim": 16}),
    "gemma3_text": ("gemma3_text", {**_GATED, **_WINDOWS, "head_dim": 16}),
    "olmo2": ("olmo2", _GATED),
    "olmo3": ("olmo3", {**_GATED, **_WINDOWS}),
    "exaone4": ("exaone4", {**_GATED, **_WINDOWS}),
    # merged, with a norm behind the FFN in GLM-4
    "phi3": ("phi3", _GATED),
    "glm": ("glm", {**_GATED, "head_dim": 16}),
    "glm4": ("glm4", {**_GATED, "head_dim": 16}),
    # its activation has parameters, which it learned
    "apertus": ("apertus", {**_COMMON, "num_key_value_heads": 2, "rope_parameters": _ROPE}),
}

_BLOCKS = {"n_layer", "n_layers", "num_layers", "num_hidden_layers"}
ENCODER_NAMES = ["bert", "roberta"]
#: families of models of speech, whose tiny model is in speech.py
SPEECH = {"whisper"}
#: one model for each way in which a folded FFN sits in a block, for tests that would take long over all names
LAYOUTS = {
    "gpt2": "transposed weights, and a head that shares the embedding",
    "falcon_new_decoder": "beside the attention, which is added to its output in place; no biases",
    "falcon_alibi": "after the attention; no cache of a constant shape",
    "bloom": "an activation of its own, and the residual in the module around",
    "opt_post_norm": "in the block itself, with a norm behind the residual stream",
    "bert": "in an encoder, over two modules",
    "llama_biased": "gate and up apart, with biases",
    "phi3": "gate and up merged",
    "gemma2": "apart, with a norm behind, and windows of attention",
}
FAMILY_NAMES = list(_MODELS)
CAUSAL_NAMES = [name for name in FAMILY_NAMES if name not in ENCODER_NAMES]


def tiny_model(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, blocks: int = LAYERS, **overrides: Any
) -> PreTrainedModel:
    """A random model in eval mode: 2 blocks, d = 64, h = 256, 320 tokens, 128 positions.

    Args:
        name: one of `FAMILY_NAMES`: a model type, or a variant of one such as "falcon_new_decoder".
        seed: the same seed gives the same weights; the global generator is left alone.
        dtype: dtype of the parameters.
        blocks: how many it has.
        **overrides: fields of the family's config.

    Returns:
        The family's causal LM class, or its masked LM class for `ENCODER_NAMES`.
    """
    auto = AutoModelForMaskedLM if name in ENCODER_NAMES else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        model = auto.from_config(tiny_config(name, blocks, **overrides), dtype=dtype)
    randomise(model, seed)
    return model.eval()


def tiny_config(name: str, blocks: int = LAYERS, **overrides: Any) -> PreTrainedConfig:
    """The config of `tiny_model`; arguments as there."""
    model_type, fields = _MODELS[name]
    fields = {key: blocks if key in _BLOCKS else value for key, value in fields.items()}
    if "layer_types" in fields:
        fields["layer_types"] = (blocks * fields["layer_types"])[:blocks]
    fixed = {"vocab_size": VOCAB, "bos_token_id": END, "eos_token_id": END}
    return AutoConfig.for_model(model_type, **{**fixed, **fields, **overrides})


def guide_families() -> dict[str, tuple[str, str]]:
    """What the guide's table of families says of each model type: its FFN, and what vLLM has."""
    text = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.split("## Families")[1].split("\n## ")[0].splitlines()]
    cells = [row for row in rows if len(row) == 4 and row[1].startswith("`")]
    return {kind: (ffn, vllm) for _, kinds, ffn, vllm in cells for kind in kinds.strip("`").split("`, `")}


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Draw every parameter anew: N(0, 0.1), around where it starts for the weights of norms.

    That is one, or zero in norms that multiply by one more than their weight.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            norm = "Norm" in type(module).__name__ and name == "weight"
            parameter.copy_(noise + parameter.mean().round() if norm else noise)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: one token per byte of UTF-8, and <|endoftext|> with id 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end, model_max_length=POSITIONS
    )


def begun_tokenizer() -> PreTrainedTokenizerFast:
    """`tiny_tokenizer` that begins every text with <|endoftext|>."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_bos_token = True
    return tokenizer


def tokens(batch: int = 2, length: int = 12) -> Tensor:
    """Token ids [batch, tokens] of random bytes, the same on every call."""
    return torch.randint(2, 256, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def record(
    model: PreTrainedModel, modules: list[nn.Module], **inputs: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """First input and output of each module in one forward of the whole model.

    They are cloned, because Falcon adds the attention to its FFN's output in place.
    """
    into: dict[nn.Module, Tensor] = {}
    out: dict[nn.Module, Tensor] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        into[module], out[module] = (
            args[0].clone(),
            (output[0] if isinstance(output, tuple) else output).clone(),
        )

    hooks = [module.register_forward_hook(hook) for module in modules]
    model(**inputs, use_cache=False)
    for handle in hooks:
        handle.remove()
    return [into[m] for m in modules], [out[m] for m in modules]
