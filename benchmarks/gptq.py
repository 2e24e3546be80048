"""Dense models in int4 as other tools store them, for vLLM's own kernels: what folding in few bits is compared with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tardis_llm.runtime.linears.placing import linear_layers

BITS, GROUP = 4, 64  # of a weight; input weights that share a scale
_ZEROS = 0x77777777  # the code of zero less one, eight times, as the format wants it


def save_gptq(model: PreTrainedModel, directory: Path) -> None:
    """Save a model with all linear layers but the head in 4 bits, rounded to the nearest, in the format of GPTQ.

    Args:
        model: dense; stays as it is.
        directory: made if missing.
    """
    head = model.get_output_embeddings()
    layers = {name: layer for name, layer in linear_layers(model, ffn=True).items() if layer is not head}
    state = {name: part for name, part in model.state_dict().items() if name.removesuffix(".weight") not in layers}
    for name, layer in layers.items():
        weight = layer.get_parameter("weight").detach()
        columns = weight.T if isinstance(layer, torch.nn.Linear) else weight
        state |= {f"{name}.{key}": part for key, part in packed(columns.float()).items()}
    model.save_pretrained(directory, state_dict=state)
    path = directory / "config.json"
    settings = {"quant_method": "gptq", "bits": BITS, "group_size": GROUP, "desc_act": False, "sym": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}, indent=2))


def packed(weight: Tensor) -> dict[str, Tensor]:
    """`qweight`, `qzeros` and `scales` of a weight [in, out] fp32, rounded by vLLM; `in` is a multiple of `GROUP`."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import gptq_pack, gptq_quantize_weights
    from vllm.scalar_type import scalar_types

    inputs, outputs = weight.shape
    _, codes, scales = gptq_quantize_weights(weight, scalar_types.uint4b8, GROUP)
    zeros = torch.full((inputs // GROUP, outputs * BITS // 32), _ZEROS, dtype=torch.int32)
    return {"qweight": gptq_pack(codes, BITS, inputs, outputs), "qzeros": zeros, "scales": scales.half()}
