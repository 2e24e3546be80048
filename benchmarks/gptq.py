"""Dense models in int4 as other tools store them, for vLLM's own kernels: what folding in few bits is compared with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tardis_llm.linears import linear_layers

GROUP = 64  # input weights that share a scale
_ZERO = 8  # the code of zero
_CODES = 8  # in an int32


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
        rows = weight if isinstance(layer, torch.nn.Linear) else weight.T
        state |= {f"{name}.{key}": part for key, part in packed(rows.float()).items()}
    model.save_pretrained(directory, state_dict=state)
    path = directory / "config.json"
    settings = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}, indent=2))


def packed(weight: Tensor) -> dict[str, Tensor]:
    """`qweight`, `qzeros` and `scales` of a weight [out, in] fp32, `in` a multiple of `GROUP`."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(2, keepdim=True) / (_ZERO - 1)).clamp_min(1e-8).half()
    codes = (groups / scale.float()).round_().clamp_(-_ZERO, _ZERO - 1).add_(_ZERO).flatten(1)
    scales = scale[..., 0].T.contiguous()  # [in / GROUP, out]
    # the format has zeros less one
    zeros = torch.full_like(scales, _ZERO - 1)
    return {"qweight": _words(codes.T), "qzeros": _words(zeros.T).T.contiguous(), "scales": scales}


def _words(codes: Tensor) -> Tensor:
    """[n / 8, columns] int32 of codes [n, columns], the first in the lowest bits."""
    parts = codes.to(torch.int64).unflatten(0, (-1, _CODES))
    words = sum(parts[:, place] << (4 * place) for place in range(_CODES))
    return torch.as_tensor(words).to(torch.int32)  # keeps the low 32 bits
