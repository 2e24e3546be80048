"""Recipe -> untrained model."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from training.recipe import Activation, Recipe


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model at the random point that the recipe's seed names. It has no dropout: small models underfit."""
    torch.manual_seed(recipe.seed)
    build = _llama if recipe.activation is Activation.SWIGLU else _gpt2
    return build(recipe, tokenizer)


def _gpt2(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    config = GPT2Config(
        activation_function="relu" if recipe.activation is Activation.RELU else "gelu_pytorch_tanh",
        n_layer=recipe.layers,
        n_embd=recipe.width,
        n_inner=recipe.hidden,
        n_head=recipe.heads,
        n_positions=recipe.context,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def _llama(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    config = LlamaConfig(
        hidden_act="silu",
        num_hidden_layers=recipe.layers,
        hidden_size=recipe.width,
        intermediate_size=recipe.hidden,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)
