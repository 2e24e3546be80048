"""Make a loaded model decode fast on this machine, without changing its numbers but by rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from transformers import CompileConfig, PreTrainedModel

from ..errors import InvalidInputError
from ..families.table import has_alibi
from .linears.dense import lay_out_linears
from .linears.placing import put_linears, through_kernels
from .placing import lay_out, move_into_huge_pages

#: how a step of decoding is compiled: as one graph, or not at all
COMPILED = CompileConfig(fullgraph=True, dynamic=False, mode="default")
COMPILED._compile_all_devices = True  # else transformers compiles on GPUs only


def prepare_decoding(model: PreTrainedModel) -> None:
    """Ready a dense or folded model on the CPU for decoding, in place; for inference only.

    Its linear layers go through our kernel, what fixing reads is laid out neuron by neuron and all else in panels, and
    large weights move into huge pages. Takes some times as long as copying the weights. Weights that were laid out
    anew take no gradients.

    Raises:
        InvalidInputError: weights are elsewhere than in main memory: on a GPU, or offloaded.

    Examples:
        >>> from tardis_llm.checkpoint.loading import load_model
        >>> folded = load_model("folded")
        >>> before = folded(windows).logits
        >>> prepare_decoding(folded)
        >>> bool(torch.allclose(folded(windows).logits, before, atol=1e-4))
        True
    """
    elsewhere = next((name for name, part in model.named_parameters() if not part.is_cpu), None)
    if elsewhere is not None:
        raise InvalidInputError(
            f"{elsewhere} is not in main memory, and decoding can be prepared on a CPU only. Load the model without "
            "device_map, or leave the preparation out: the model computes the same without."
        )
    put_linears(model, through_kernels(model, ffn=True))
    lay_out_linears(model)
    lay_out(model)
    move_into_huge_pages(model)


def compiled(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments with which `model.generate` of transformers runs each token as one compiled graph.

    Weights push everything else out of the caches, so that what Python and torch do between the layers costs memory
    accesses; a graph has little of it. Compiling takes from seconds to a minute, and again for a longer text or other
    batch than any before.

    Raises:
        InvalidInputError: a model with ALiBi, for which transformers has no cache of a constant shape.
    """
    if has_alibi(model.config):
        raise InvalidInputError(
            f"{type(model).__name__} with ALiBi cannot be compiled: transformers has no cache of a constant shape for "
            "it. Decode without, leaving out --compile."
        )
    return {"cache_implementation": "static", "compile_config": COMPILED}


def compiled_call(model: PreTrainedModel) -> Callable[..., Any]:
    """A model's forward as one compiled graph of its own, which other calls do not share.

    Raises:
        InvalidInputError: a model with ALiBi; see `compiled`.
    """
    settings = compiled(model)["compile_config"].to_dict() | {"isolate_recompiles": True}
    call: Callable[..., Any] = torch.compile(model.__call__, **settings)
    return call


@contextmanager
def compile_errors_explained() -> Iterator[None]:
    """Within the context, turn torch's errors about compiling into ones that say what to do.

    Raises:
        InvalidInputError: the model cannot be compiled.
    """
    try:
        yield
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidInputError(
            f"this model cannot be compiled here ({reason}); see that a C++ compiler is installed, or leave out "
            "--compile."
        ) from error
