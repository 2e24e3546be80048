"""Models that the baselines for whole FFNs are tested on: one for each way in which an FFN is made."""

from __future__ import annotations

import torch
from models import END, HEADS, HIDDEN, LAYERS, POSITIONS, VOCAB, randomise, tiny_model, tokens
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tardis_llm.calibration.text import split_windows
from tardis_llm.families.sites import FFNSite, find_ffns

WINDOWS = split_windows(tokens(16, 24), 24, 0.25)
NEURONS = 172  # of the gated ones
_GATED = {
    **{"hidden_size": HIDDEN, "intermediate_size": NEURONS, "num_hidden_layers": LAYERS, "vocab_size": VOCAB},
    **{"num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS},
    **{"bos_token_id": END, "eos_token_id": END, "pad_token_id": 0, "mlp_bias": True},
}
#: transposed weights; no biases; gate and up apart, with biases; merged, without
RIVALS = ("gpt2", "falcon", "llama", "phi3")


def rival_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model in eval mode: 2 blocks, d = 64."""
    if name not in ("llama", "phi3"):
        return tiny_model(name, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **_GATED), dtype=dtype)
    randomise(model, 0)
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.weight.data += 1
    return model.eval()


def inputs_of(model: PreTrainedModel, layers: list[nn.Module], ids: Tensor) -> list[Tensor]:
    """[tokens, in] what each layer gets in one forward of the whole model, as it multiplies it."""
    seen: dict[nn.Module, Tensor] = {}
    hooks = [layer.register_forward_hook(lambda m, args, out: seen.__setitem__(m, args[0].clone())) for layer in layers]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [seen[layer].flatten(0, -2) for layer in layers]


def outputs_of(model: PreTrainedModel, site: FFNSite, ids: Tensor) -> Tensor:
    """[tokens, d] what an FFN gives in one forward of the whole model."""
    seen: list[Tensor] = []
    hook = site.down.register_forward_hook(lambda m, args, out: seen.append(out.clone()))
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    return seen[0].flatten(0, -2)


def ffn_bytes(model: PreTrainedModel) -> int:
    """Bytes of all FFNs."""
    return sum(
        part.nbytes for site in find_ffns(model) for layer in site.linears.values() for part in layer.parameters()
    )


def logits(model: PreTrainedModel) -> Tensor:
    """Of some text that nothing is calibrated on."""
    with torch.no_grad():
        return model(tokens(3, 20).flip(1)).logits
