"""What a transformers model may be put through, and comes out of as it went in: every layout, in every form of ours.

The forms are made once per layout and handed out as copies. Random folds stand for real ones: what is asked here is
not how good they are, but that they stay what they are.
"""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from folds import folds_at_random
from marks import in_turns
from models import ENCODER_NAMES, LAYOUTS, VOCAB, tiny_model, tokens
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from tardis_llm import freeze
from tardis_llm.checkpoint.folded import mark_folded
from tardis_llm.errors import InvalidInputError
from tardis_llm.ffn.weights import Storage
from tardis_llm.pipeline.linears import quantise_linears
from tardis_llm.runtime.cpu.backend import CpuBackend
from tardis_llm.runtime.decoding import prepare_decoding
from tardis_llm.runtime.linears.lowbit import LowBitLinear
from tardis_llm.runtime.linears.placing import low_bit_linears
from tardis_llm.runtime.modules import FoldedFFN
from tardis_llm.runtime.placing import GatedFFN, KeptLinear, install
from tardis_llm.runtime.stored import Stored


class Form(NamedTuple):
    """A form in which a model runs.

    Attributes:
        dtype: of the dense model.
        storage: of its folds; None where it stays dense.
        linears: bits of its other linear layers.
        prepared: whether it is ready for decoding.
    """

    dtype: torch.dtype = torch.float32
    storage: Storage | None = None
    linears: int | None = None
    prepared: bool = False


FORMS = {
    "dense_prepared": Form(torch.bfloat16, prepared=True),
    "folded": Form(storage=Storage(64)),
    "folded_prepared": Form(torch.bfloat16, Storage(64), prepared=True),
    "stacked": Form(storage=Storage(64, 8, 4), prepared=True),
    "stacked_prepared": Form(torch.bfloat16, Storage(64, 4, 4), prepared=True),
    "few_bits": Form(torch.float16, Storage(64, 8, 4), linears=8, prepared=True),
    "fewer_bits": Form(storage=Storage(64, 4, 4), linears=4),
}
FOLDED = {name: form for name, form in FORMS.items() if form.storage}
#: whose products are the same bits whatever else is in a batch, as sums are in fp32
EXACT = {name: form for name, form in FORMS.items() if form.dtype == torch.float32}

#: for these, transformers has no cache of a constant shape
ALIBI = ("bloom", "falcon_alibi")
#: relative errors: of bf16 sums in another order; in another dtype, where neurons next to a bound are fixed in one only
CLOSE, CAST = 0.07, 0.15

DECODERS = [name for name in LAYOUTS if name not in ENCODER_NAMES]


def in_forms(forms: Iterable[str], families: Iterable[str] = LAYOUTS) -> pytest.MarkDecorator:
    """A test of every family in each of these forms; the families take turns in those that are not long."""
    return pytest.mark.parametrize(("family", "form"), in_turns(families, list(forms), every=6))


@cache
def _made(family: str, form: str) -> PreTrainedModel:
    dtype, storage, linears, prepared = FORMS[form]
    blocks = 3 if family in ENCODER_NAMES else 2  # accelerate finds no place for two blocks of an encoder
    model = tiny_model(family, dtype=dtype, blocks=blocks)
    if storage:
        for site, ffn in folds_at_random(model, 2, storage, 0.2):
            _give_lines(ffn)
            install(model, site, ffn)
    if linears:
        quantise_linears(model, linears)
    if storage:
        mark_folded(model, {})
    if prepared:
        prepare_decoding(model)
    return model


@torch.no_grad()
def _give_lines(ffn: FoldedFFN) -> None:
    """Lines near the neurons in place of zeros, and scales that differ: what is lost or misread then shows."""
    generator, slope = torch.Generator().manual_seed(1), 0.0 if ffn.weights.format.gated else 0.5
    for name, tensor in ffn.state_dict().items():
        if name in ("slope", "offset", "fold.bias"):
            tensor.normal_(slope if name == "slope" else 0.0, 0.03, generator=generator)
        elif name.endswith("scale"):
            tensor.mul_(1 + 0.5 * torch.rand(tensor.shape, generator=generator).to(tensor.dtype))


@pytest.fixture
def model(family: str, form: str) -> PreTrainedModel:
    """A copy of a family's model in a form; prepared again, since copies are not."""
    made = copy.deepcopy(_made(family, form))
    if FORMS[form].prepared:
        prepare_decoding(made)
    return made


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    """Of random tokens, the same on every call."""
    found: Tensor = model(tokens(2, 12) if ids is None else ids).logits
    return found


def assert_same(model: nn.Module, expected: Tensor, close: float | None = None) -> None:
    """The same numbers, but for sums in another order, or as close as is said.

    A sum in another order may fix one neuron more or less, whose prediction is next to a bound. Of a gated FFN that is
    a bound on its error, so it shows. So does an input of a linear layer in few bits, which has 16 bits, where it is
    rounded to the next number.
    """
    found = logits(model)
    coarse = any(isinstance(module, GatedFFN | LowBitLinear) for module in model.modules())
    exact = 1e-3 if coarse else 1e-5
    assert_near(found, expected, close or (exact if found.dtype == torch.float32 else CLOSE))


def assert_near(found: Tensor, expected: Tensor, close: float) -> None:
    """Finite, and apart by so much, relative to the whole."""
    assert found.isfinite().all()
    assert float((found.float() - expected.float()).norm() / expected.float().norm()) < close


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all that it stores."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_stores(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bytes."""
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def reloaded(model: PreTrainedModel, directory: Path, **options: object) -> PreTrainedModel:
    """Saved by transformers and loaded again."""
    model.save_pretrained(directory)
    auto = AutoModelForMaskedLM if model.config.model_type in ENCODER_NAMES else AutoModelForCausalLM
    return auto.from_pretrained(directory, **options).eval()


def parts_of_folds(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are solved for together, kept dense weights included."""
    folds = [module for module in model.modules() if isinstance(module, FoldedFFN | KeptLinear)]
    return [part for module in folds for part in module.parameters()]


def format_tensors(model: nn.Module) -> dict[str, tuple[torch.dtype, Tensor]]:
    """What the format says the dtype of, by name."""
    owned = [(name, module) for name, module in model.named_modules() if isinstance(module, Stored)]
    return {
        f"{name}.{key}": (tensor.dtype, tensor)
        for name, module in owned
        for key, tensor in module.state_dict().items()
        if key in module.format_tensors
    }


# casts and moves


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@in_forms(FORMS)
def test_a_cast_changes_the_models_dtype_and_not_the_formats(family: str, form: str, model, dtype: torch.dtype) -> None:
    before, expected = format_tensors(model), logits(model)
    model = nn.Module.to(model, dtype)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {dtype}
    after = format_tensors(model)
    assert before.keys() == after.keys()
    assert all(after[name][0] == kind and torch.equal(after[name][1], kept) for name, (kind, kept) in before.items())
    assert_same(model, expected, CAST)
    prepare_decoding(model)
    assert_same(model, expected, CAST)


@in_forms(FORMS)
def test_a_cast_to_the_dtype_that_it_has_changes_nothing(family: str, form: str, model) -> None:
    before, expected = stored(model), logits(model)
    assert_same(model.to(model.dtype), expected)
    casts = {torch.bfloat16: nn.Module.bfloat16, torch.float16: nn.Module.half, torch.float32: nn.Module.float}
    assert_same(casts[model.dtype](model), expected)
    assert_same(model.to("cpu"), expected)
    assert_stores(model, before)


@in_forms(FORMS)
def test_a_model_that_is_emptied_can_be_filled_again(family: str, form: str, model) -> None:
    before, expected = stored(model), logits(model)
    for module in model.modules():
        if isinstance(module, Stored):
            module.to_empty(device="cpu", recurse=False)
    model.load_state_dict(before)
    assert_same(model, expected)
    model.load_state_dict(stored(model), assign=True)
    assert_same(model, expected)
    assert_stores(model, before)


@in_forms(FORMS)
def test_other_weights_take_effect_when_they_are_loaded(family: str, form: str, model) -> None:
    logits(model)
    other = {name: turned(tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(other)
    if FORMS[form].prepared:
        prepare_decoding(model)
    fresh = copy.deepcopy(_made(family, form))
    fresh.load_state_dict(other)
    if FORMS[form].prepared:
        prepare_decoding(fresh)
    assert_same(model, logits(fresh))


def turned(tensor: Tensor) -> Tensor:
    """The same numbers in another order, scales and ranges apart."""
    return tensor.roll(1, 0) if tensor.dim() > 1 else tensor.clone()


# copies and files


@in_forms(FORMS)
def test_copies_compute_the_same_and_are_their_own(family: str, form: str, model) -> None:
    before, expected = stored(model), logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_stores(twin, before)
        assert_same(twin, expected)
        with torch.no_grad():
            for tensor in twin.state_dict().values():
                tensor.zero_()
        assert_same(model, expected)
    assert_stores(model, before)


@in_forms(FORMS)
def test_saving_and_loading_again_and_again_changes_nothing(family: str, form: str, model, tmp_path: Path) -> None:
    before, expected = stored(model), logits(model)
    once = reloaded(model, tmp_path / "once")
    assert_same(once, expected)
    assert_stores(once, before)
    assert FORMS[form].storage is None or not any(part.requires_grad for part in parts_of_folds(once))
    if FORMS[form].prepared:
        prepare_decoding(once)
    twice = reloaded(once, tmp_path / "twice")
    assert_stores(twice, before)
    assert_same(twice, expected)
    assert_same(model, expected)


@in_forms(["folded", "few_bits"])
def test_a_dtype_asked_for_at_loading_is_a_cast(family: str, form: str, model, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        loaded = reloaded(model, tmp_path, dtype=dtype)
        assert_stores(loaded, nn.Module.to(copy.deepcopy(model), dtype).state_dict())


@in_forms(FOLDED)
def test_the_base_model_of_a_checkpoint_has_its_folds(family: str, form: str, model, tmp_path: Path) -> None:
    ids = tokens(2, 12)
    with torch.no_grad():
        expected = model.base_model(ids).last_hidden_state
        model.save_pretrained(tmp_path)
        found = AutoModel.from_pretrained(tmp_path).eval()(ids).last_hidden_state
    assert_near(found, expected, CLOSE)


# offloading


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded FFNs by the reference, which offloaded ones run through: the kernels find other neurons next to bounds."""
    monkeypatch.setattr(CpuBackend, "accepts", lambda self, x: False)


@in_forms(FOLDED)
def test_offloaded_weights_are_fetched(family: str, form: str, tmp_path: Path, reference: None) -> None:
    made = copy.deepcopy(_made(family, form))
    expected = logits(made)
    for offload in (
        lambda model: disk_offload(model, str(tmp_path)),
        lambda model: cpu_offload(model, offload_buffers=True),
    ):
        model = copy.deepcopy(made)
        offload(model)
        assert any(parameter.is_meta for parameter in model.parameters())
        assert_same(model, expected)
        with pytest.raises(InvalidInputError, match="device_map"):
            prepare_decoding(model)


@in_forms(["folded", "stacked", "few_bits"])
def test_a_checkpoint_loads_onto_disk(family: str, form: str, model, tmp_path: Path, reference: None) -> None:
    expected = logits(model)
    too_little = {"cpu": int(0.75 * model.get_memory_footprint())}
    options = {"device_map": "auto", "max_memory": too_little, "offload_folder": str(tmp_path / "offload")}
    loaded = reloaded(model, tmp_path / "files", **options)
    assert any(parameter.is_meta for parameter in loaded.parameters())
    assert_same(loaded, expected)


# training


@in_forms(["dense_prepared", "folded", "folded_prepared", "stacked", "stacked_prepared"])
def test_adapters_train_around_folds(family: str, form: str, model) -> None:
    ids, before = tokens(2, 12), stored(model)
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    tuned(ids).logits.float().square().mean().backward()
    trained = {name: part for name, part in tuned.named_parameters() if part.requires_grad}
    assert trained and all("lora" in name for name in trained)
    for name, part in trained.items():
        assert part.grad is not None and part.grad.isfinite().all() and part.grad.any(), name
    assert_stores(tuned.unload(), before)


@in_forms(FOLDED)
def test_training_what_was_solved_for_is_refused(family: str, form: str, model) -> None:
    ids = tokens(1, 4)
    parts = parts_of_folds(model)
    assert not any(part.requires_grad for part in parts)
    for part in parts:
        part.requires_grad_(True)
        with pytest.raises(InvalidInputError, match=r"tardis_llm\.freeze"):
            model(ids)
        part.requires_grad_(False)
    model.requires_grad_(True)
    with pytest.raises(InvalidInputError, match=r"tardis_llm\.freeze"):
        model(ids)
    freeze(model)
    model(ids).logits.float().sum().backward()
    others = [part for part in model.parameters() if part.requires_grad]
    assert others and any(part.grad is not None and part.grad.any() for part in others)
    assert all(part.grad is None for part in parts_of_folds(model))


# generation


def generated(model: PreTrainedModel, ids: Tensor, count: int = 8, **options: object) -> Tensor:
    """The tokens made after a prompt."""
    made = model.generate(
        ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None, **options
    )
    return (made.sequences if hasattr(made, "sequences") else made)[:, ids.shape[1] :]


@in_forms(EXACT, DECODERS)
def test_left_padding_changes_no_text(family: str, form: str, model) -> None:
    short, long = tokens(1, 5), tokens(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)
    mask = torch.cat([(torch.arange(9) >= 4)[None], torch.ones(1, 9, dtype=torch.bool)]).long()
    both = generated(model, torch.cat([padded, long]), attention_mask=mask)
    assert torch.equal(both[:1], generated(model, short)) and torch.equal(both[1:], generated(model, long))


@in_forms(FORMS, DECODERS)
def test_beams_have_the_probabilities_that_they_are_said_to_have(family: str, form: str, model) -> None:
    ids = tokens(1, 6)
    options = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=5, min_new_tokens=5, pad_token_id=0, eos_token_id=None, **options)
    likelihoods = logits(model, made.sequences).float().log_softmax(-1)
    steps = likelihoods[:, 5:-1].gather(2, made.sequences[:, 6:, None])
    tolerance = 1e-3 if FORMS[form].dtype == torch.float32 else 0.3
    assert abs(float(steps.sum() - made.sequences_scores)) < tolerance


@in_forms(EXACT, [name for name in DECODERS if name not in ALIBI])
def test_a_static_cache_changes_no_text(family: str, form: str, model) -> None:
    ids = tokens(2, 6)
    assert torch.equal(generated(model, ids, cache_implementation="static"), generated(model, ids))


@in_forms([name for name, form in FORMS.items() if not form.linears])
def test_resized_embeddings_keep_the_logits_of_the_tokens_there_were(family: str, form: str, model) -> None:
    expected = logits(model)
    model.resize_token_embeddings(VOCAB + 16)
    found = logits(model)
    assert found.shape[-1] == VOCAB + 16
    torch.testing.assert_close(found[..., :VOCAB], expected, rtol=2e-2, atol=2e-2)


@in_forms(["few_bits", "fewer_bits"], DECODERS)
def test_a_head_in_few_bits_is_not_resized_and_nothing_is_lost(family: str, form: str, model) -> None:
    before, expected = stored(model), logits(model)
    assert low_bit_linears(model)
    with pytest.raises(InvalidInputError, match="before it is folded"):
        model.resize_token_embeddings(VOCAB + 16)
    assert_stores(model, before)
    assert_same(model, expected)


# several at once


@contextmanager
def pool(workers: int) -> Iterator[Callable[..., list[Tensor]]]:
    """Runs a function over arguments in threads."""
    with ThreadPoolExecutor(workers) as threads:
        yield lambda function, arguments: list(threads.map(function, arguments))


@in_forms(["dense_prepared", "folded", "few_bits"])
def test_preparing_moves_no_tensor_that_a_call_may_be_reading(family: str, form: str, model) -> None:
    fresh = copy.deepcopy(model)
    owned = [tensors for module in fresh.modules() for tensors in (module._parameters, module._buffers)]
    held = [tensor for tensors in owned for tensor in tensors.values() if tensor is not None]
    at = [(tensor.data_ptr(), tensor.stride()) for tensor in held]
    prepare_decoding(fresh)
    assert [(tensor.data_ptr(), tensor.stride()) for tensor in held] == at


@in_forms(FORMS)
def test_threads_share_a_model(family: str, form: str, model) -> None:
    prompts = [tokens(1, length) for length in (1, 3, 20, 7)]
    fresh = copy.deepcopy(model)  # whose weights no thread has laid out yet
    expected = [logits(model, ids) for ids in prompts]
    with pool(4) as run:
        for found, ids in zip(run(lambda ids: logits(fresh, ids), prompts * 2), expected * 2, strict=True):
            torch.testing.assert_close(found, ids, rtol=2e-2, atol=2e-2)


@in_forms(FORMS)
def test_threads_prepare_run_and_save_one_model(family: str, form: str, model) -> None:
    before, expected = stored(model), logits(model)

    def work(number: int) -> None:
        if number % 3 == 0:
            prepare_decoding(model)
        elif number % 3 == 1:
            assert_stores(model, before)
        else:
            assert_same(model, expected)

    with pool(3) as run:
        run(work, range(9))
    assert_stores(model, before)


@pytest.mark.parametrize("form", list(FORMS))
def test_models_side_by_side_keep_apart(form: str) -> None:
    families = DECODERS[-6:]
    models = [copy.deepcopy(_made(family, form)) for family in families]
    expected = [logits(model) for model in models]
    for _ in range(2):
        for model, found in zip(models, expected, strict=True):
            assert_same(model, found)
    del models[::2]
    gc.collect()
    for model, found in zip(models, expected[1::2], strict=True):
        assert_same(model, found)
