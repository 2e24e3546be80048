"""Every family that vLLM serves loads and generates as in transformers; what cannot be served is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from engines import (
    NOT_SERVED,
    STACKED,
    Text,
    assert_same_text,
    complete,
    engine,
    generated,
    heads,
    needs_vllm,
    save_tiny,
)
from folds import SETTINGS
from marks import mostly_long
from models import CAUSAL_NAMES, guide_families, tiny_config, tiny_model, tokens
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tardis_llm import FoldConfig
from tardis_llm.checkpoint.manifest import MANIFEST
from tardis_llm.errors import CheckpointError, UnsupportedModelError
from tardis_llm.families.table import FAMILIES
from tardis_llm.integrations.vllm.names import check_served
from tardis_llm.runtime.cpu.library import available
from tardis_llm.runtime.reference import ReferenceFFN

pytestmark = needs_vllm

#: one gated model for each way in which vLLM has their FFNs
GATED = {
    "llama_biased": "gate and up merged as they are loaded, with biases",
    "qwen3": "the same without",
    "gemma2": "GeGLU, with a norm behind, and an embedding that is the head, too",
    "phi3": "merged in the checkpoint",
    "olmo2": "merged by the Transformers backend",
    "glm": "merged in the checkpoint, in the Transformers backend",
}
PLAIN = [name for name in CAUSAL_NAMES if not FAMILIES[tiny_config(name).model_type].gated]
SERVED = [name for name in (*PLAIN, *GATED) if name not in NOT_SERVED]
IN_FEW_BITS = ["gpt2", "falcon_alibi", "opt", "gpt_neox", "llama_biased", "gemma2", "glm"]
#: linear layers outside the FFNs in few bits: vLLM's own classes and its Transformers backend, heads shared and not
LINEARS = {
    "gpt2": 4,
    "bloom": 8,
    "falcon_alibi": 8,
    "falcon_new_decoder": 4,
    "gptj": 8,
    "opt": 4,
    "gpt_neox": 4,
    "phi": 8,
    "qwen3": 4,
    "gemma2": 8,
}
#: folded in blocks 0 and 2, all else in few bits
ALL_IN_FEW_BITS = ["opt", "llama_biased"]
IN_PART = (0, 2)


class Wanted(NamedTuple):
    """A fold of a tiny model, and how far apart logits of vLLM and transformers may be."""

    name: str
    settings: FoldConfig = SETTINGS
    linear_bits: int | None = None
    apart: float = 0.02


FOLDS = {
    **{name: Wanted(name) for name in SERVED},
    **{f"{name} in few bits": Wanted(name, STACKED) for name in IN_FEW_BITS},
    # in 4 bits their outputs and so the logits are bf16, whose last bit differs with the processor and the batch
    **{
        f"{name} with linears": Wanted(name, SETTINGS, bits, 0.25 if bits == 4 else 0.02)
        for name, bits in LINEARS.items()
    },
    "gpt2 in part": Wanted("gpt2", replace(SETTINGS, layers=IN_PART)),
    **{f"{name} all in few bits": Wanted(name, replace(STACKED, layers=IN_PART), 8) for name in ALL_IN_FEW_BITS},
}
#: vLLM's own classes and its Transformers backend, gated and not, in each way of storing
QUICK = [
    *("gpt2", "falcon_alibi", "llama_biased", "phi3", "olmo2", "gpt2 in few bits", "glm in few bits"),
    *("falcon_new_decoder with linears", "gemma2 with linears", "gpt2 in part", "llama_biased all in few bits"),
]


class Made(NamedTuple):
    """A folded model on disk, and what transformers generates with it behind `tokens(3, 20)`."""

    directory: Path
    text: Text


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """`FOLDS` that tests of this run ask for as `key`.

    All of them are made before vLLM's first engine: that changes the classes of transformers which it uses.
    """
    callspecs = (getattr(item, "callspec", None) for item in request.session.items)
    keys = dict.fromkeys(spec.params["key"] for spec in callspecs if spec and "key" in spec.params)
    folds = {}
    for key in keys:
        name, settings, bits, _ = FOLDS[key]
        directory = tmp_path_factory.mktemp("made")
        folds[key] = Made(directory, generated(save_tiny(name, directory, settings, bits), tokens(3, 20), 16))
    return folds


def assert_served(made: Made, apart: float = 0.02) -> None:
    """vLLM's text is that of transformers, but where two tokens are nearly equally good."""
    with engine(made.directory) as llm:
        assert_same_text(complete(llm, tokens(3, 20), 16), made.text, apart)


@pytest.mark.parametrize("key", mostly_long(FOLDS, QUICK))
def test_folds_generate_as_in_transformers(key: str, made: dict[str, Made]):
    assert_served(made[key], FOLDS[key].apart)


def test_with_every_neuron_fixed_it_is_the_dense_model(copy: Path):
    stored = load_file(copy / "model.safetensors")
    for name, tensor in stored.items():
        if name.endswith(("tardis.low", "tardis.high")):
            tensor.fill_(torch.nan)  # nothing is within such a range
        elif name.endswith(("tardis.slope", "tardis.offset", "tardis.fold.weight")):
            tensor.zero_()  # lines of zero, and their fold
        elif name.endswith("tardis.fold.bias"):
            tensor.copy_(stored[name.replace("tardis.fold", "c_proj")])
    save_file(stored, copy / "model.safetensors", {"format": "pt"})
    (copy / MANIFEST).unlink()
    assert_served(Made(copy, generated(tiny_model("gpt2", **heads("gpt2")), tokens(3, 20), 16)))


@pytest.mark.parametrize(("dtype", "apart"), [("bfloat16", 0.15), ("float16", 0.05)])
def test_in_halves_the_probabilities_are_those_of_transformers(
    dtype: str, apart: float, tiny_gpt2: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
):
    from vllm import SamplingParams

    if available():
        monkeypatch.setattr(ReferenceFFN, "__call__", lambda *_: pytest.fail("not by the kernels"))
    directory, _ = tiny_gpt2
    ids = tokens(2, 40)
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
        expected = reference(ids).logits.float().log_softmax(-1)
    with engine(directory, dtype=dtype) as llm:
        prompts = [{"prompt_token_ids": row.tolist()} for row in ids]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    for row, output, wanted in zip(ids, outputs, expected, strict=True):
        for at in range(1, len(row)):
            got = output.prompt_logprobs[at][int(row[at])].logprob
            assert got == pytest.approx(float(wanted[at - 1, row[at]]), abs=apart)


@pytest.mark.parametrize("name", mostly_long(NOT_SERVED, ["mpt"]))
def test_a_family_that_vllm_lacks_is_refused_by_name(name: str, tmp_path: Path):
    model = save_tiny(name, tmp_path)
    (tmp_path / "model.safetensors").unlink()  # it is refused before weights are read
    stock = type(model).__name__
    message = rf"vLLM has no {stock}.*it serves ApertusFor.*LlamaFor.*tardis generate"
    with pytest.raises(UnsupportedModelError, match=message), engine(tmp_path):
        pass


@pytest.mark.parametrize(
    ("kind", "layer", "message"),
    [
        ("glm", "gate_up_proj", "parts the gates of h.0.mlp from its ups. Serve it with --tensor-parallel-size 1"),
        ("olmo2", "up_proj", "no mlp.gate_up_proj in the block of h.0.mlp.*[Uu]se transformers"),
    ],
    ids=["shared by rows", "gate apart"],
)
def test_a_gate_that_is_not_where_its_up_projection_is_is_refused(kind: str, layer: str, message: str):
    from tardis_llm.integrations.vllm.ffn import install_empty_fold

    block = nn.Module()
    block.mlp = nn.Module()
    part = nn.Linear(4, 12)
    part.output_size = 24
    block.mlp.add_module(layer, part)
    with pytest.raises(UnsupportedModelError, match=message):
        install_empty_fold(block, FAMILIES[kind], *3 * [None], "h.0.mlp")


def test_the_guide_says_which_families_vllm_has():
    from vllm import ModelRegistry

    archs, native = ModelRegistry.get_supported_archs(), ModelRegistry.models
    for kind, (_, said) in guide_families().items():
        stock = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, "-")
        theirs = stock in archs and FAMILIES[kind].language_model
        backend = theirs and "Transformers" in native[stock].class_name
        assert said == ("Transformers backend" if backend else "own class" if theirs else "-"), kind


def test_linear_layers_in_unlike_bits_are_refused_before_weights_are_read(tmp_path: Path):
    save_tiny("gpt2", tmp_path, linear_bits=8)
    (tmp_path / "model.safetensors").unlink()
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    settings["linears"]["lm_head"] = 4
    edit_config(tmp_path, quantization_config=settings)
    with pytest.raises(CheckpointError, match=r"linear layers in \[4, 8\] bits.*tardis generate"), engine(tmp_path):
        pass


def test_an_encoder_is_refused_before_its_weights_are_read(tmp_path: Path):
    save_tiny("bert", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="does not serve folded encoders such as bert; use transformers"):
        check_served(AutoConfig.from_pretrained(tmp_path))
    with pytest.raises(Exception, match="TardisBertForMaskedLM"), engine(tmp_path):  # in vLLM's words
        pass


@pytest.fixture
def copy(tiny_gpt2: tuple[Path, PreTrainedModel], tmp_path: Path) -> Path:
    """A copy of the folded GPT-2, to damage."""
    for file in tiny_gpt2[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_refused(directory: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message), engine(directory):
        pass


def test_a_checkpoint_of_a_newer_format_asks_for_an_update(copy: Path):
    settings = json.loads((copy / "config.json").read_text())["quantization_config"]
    edit_config(copy, quantization_config={**settings, "format_version": 99})
    with pytest.raises(Exception, match=r"format version 99.*pip install -U"), engine(copy):
        pass


@pytest.mark.parametrize("lost", ["transformer.h.1.mlp.tardis.low", "transformer.h.1.mlp.c_fc.weight"])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_missing_tensor_is_an_error_and_never_random(copy: Path, lost: str, recorded: bool):
    stored = load_file(copy / "model.safetensors")
    save_file({n: t for n, t in stored.items() if n != lost}, copy / "model.safetensors", {"format": "pt"})
    if not recorded:
        (copy / MANIFEST).unlink()
    assert_refused(copy, rf"lack 1 tensors, the first is {lost}")


def test_a_flipped_bit_is_found_and_its_tensor_named(copy: Path):
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    assert_refused(copy, "is not the one that was written")


def test_weights_of_another_shape_than_the_config_says_are_refused(copy: Path):
    stored = load_file(copy / "model.safetensors")
    stored["transformer.h.1.mlp.tardis.low"] = torch.zeros(7)
    save_file(stored, copy / "model.safetensors", {"format": "pt"})
    (copy / MANIFEST).unlink()
    assert_refused(copy, r"tardis\.low is float32 \[7\], and float16 \[256\] is what config\.json describes")


def test_a_config_for_a_deeper_model_is_refused(copy: Path):
    settings = json.loads((copy / "config.json").read_text())["quantization_config"]
    layers = {name.replace("h.2", "h.7"): values for name, values in settings["layers"].items()}
    edit_config(copy, quantization_config={**settings, "layers": layers})
    assert_refused(copy, r"folds transformer\.h\.7\.mlp, which this model does not have")
