"""The head with a predictor: its kernel against what it is said to compute, whole models, and files."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from folds import SETTINGS, logits, text
from marks import in_turns, mostly_long
from models import FAMILY_NAMES, tiny_model, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from tardis_llm import FoldConfig, FoldReport, fold, save_folded
from tardis_llm.checkpoint.manifest import MANIFEST
from tardis_llm.errors import CheckpointError, InvalidInputError
from tardis_llm.evaluation.speed import step_bytes
from tardis_llm.pipeline.linears import low_bit_copy, predicted_head
from tardis_llm.runtime.cpu.library import open_library
from tardis_llm.runtime.decoding import prepare_decoding
from tardis_llm.runtime.linears.head import PredictedHead, top_of
from tardis_llm.runtime.linears.placing import predicted_heads
from tardis_llm.runtime.stepping.forward import cache_for, stepping

#: [out, in]: less than a group of rows, odd ones, several blocks of every kernel
SHAPES = [(7, 33), (70, 200), (1000, 64), (2049, 520)]
kernels = pytest.mark.skipif(open_library() is None, reason="the kernels are not built")


def inputs(count: int, columns: int) -> Tensor:
    """[count, columns] whose second moments differ."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, columns, generator=generator) * torch.linspace(0.2, 2, columns)


@cache
def dense(shape: tuple[int, int]) -> nn.Linear:
    """A layer of random weights, with a bias where it has odd outputs."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=bool(shape[0] % 2))
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    return layer.requires_grad_(False)


@cache
def made(shape: tuple[int, int], dtype: torch.dtype, bits: int, group: int) -> PredictedHead:
    """The head of `dense` for `inputs`."""
    x = inputs(500, shape[1])
    return predicted_head(copy.deepcopy(dense(shape)).to(dtype), bits, group, x.T @ x / len(x))


def head_of(
    shape: tuple[int, int], dtype: torch.dtype = torch.float32, bits: int = 4, group: int = 64
) -> PredictedHead:
    """A copy of the head of `dense`."""
    return copy.deepcopy(made(shape, dtype, bits, group))


def specified(head: PredictedHead, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [count, out] in fp32 as the head's docstring says, and which of them have all bits."""
    parts = [part.matrix.dequantise() for part in (head.predictor, head.remainder)]
    predicted, rest = F.linear(x.float(), parts[0]), F.linear(x.float(), parts[1])
    if head.bias is not None:
        predicted = predicted + head.bias.float()
    groups = [some.amax(1) for some in predicted.split(32, dim=1)]
    least = torch.stack(groups, 1).sort(descending=True).values[:, min(head.top, len(groups)) - 1]
    exact = predicted >= least[:, None]
    return torch.where(exact, predicted + rest, predicted), exact


@pytest.mark.parametrize(("shape", "count"), in_turns(SHAPES, [1, 3, 9, 100]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bits", "group"), mostly_long([(4, 64), (4, 32), (8, 128), (8, 10_000)], [(4, 32), (8, 10_000)])
)
def test_logits_are_those_specified(
    bits: int, group: int, dtype: torch.dtype, count: int, shape: tuple[int, int], isa: str
):
    head, x = head_of(shape, dtype, bits, group), inputs(count, shape[1]).to(dtype)
    y, (wanted, exact) = head(x), specified(head, x)
    assert y.dtype == dtype
    spread = wanted.std()
    # inputs are rounded to 8 bits: what lies next to the least of the greatest may go either way
    assert ((y.float() - wanted).abs() < 0.08 * spread).float().mean() > 0.99
    assert (y.float() - wanted)[exact].abs().median() < 0.02 * spread


@pytest.mark.parametrize("shape", SHAPES)
def test_without_kernels_and_where_gradients_flow_it_is_as_specified(shape: tuple[int, int], monkeypatch):
    head, x = head_of(shape), inputs(5, shape[1])
    torch.testing.assert_close(head(x.clone().requires_grad_()), specified(head, x)[0], atol=1e-4, rtol=1e-4)
    monkeypatch.setattr("tardis_llm.runtime.backend._kernels_wanted", lambda: False)
    torch.testing.assert_close(head(x), specified(head, x)[0], atol=1e-4, rtol=1e-4)


def test_the_greatest_are_nearer_to_the_dense_ones_than_those_of_a_whole_head():
    shape = (2049, 520)
    x = inputs(64, 520)
    wanted, best = F.linear(x, dense(shape).weight, dense(shape).bias), 5
    places = wanted.topk(best).indices
    moments = inputs(500, 520)
    whole = low_bit_copy(dense(shape), 4, 64, moments.T @ moments / len(moments))
    error = [(y - wanted).gather(1, places).abs().median() for y in (head_of(shape)(x), whole(x))]
    assert error[0] < 0.8 * error[1]


@kernels
def test_a_token_gets_the_same_in_every_batch(isa: str):
    head, x = head_of((1000, 64)), inputs(70, 64)
    together = head(x)
    assert all(torch.equal(head(x[i : i + 1])[0], together[i]) for i in (0, 7, 8, 69))


@kernels
@pytest.mark.parametrize("top", [1, 5, 31, 32, 10_000])
def test_as_many_groups_as_asked_for_have_a_logit_with_all_bits(top: int, isa: str):
    head, x = head_of((1000, 64)), inputs(20, 64)
    head.top = top
    plain = copy.deepcopy(head)
    plain.remainder.scale.zero_()
    changed = (head(x) != plain(x)).split(32, dim=1)
    assert all(sum(int(some[token].any()) for some in changed) == min(top, 32) for token in range(20))


@kernels
def test_equal_logits_are_all_computed(isa: str):
    layer = nn.Linear(64, 320, bias=False)
    layer.weight.data = torch.ones(320, 64)
    x = inputs(3, 64)
    y = predicted_head(layer, 4, 64, torch.eye(64))(x)
    torch.testing.assert_close(y, y[:, :1].expand_as(y))
    torch.testing.assert_close(y[:, 0], x.sum(1), atol=0.2, rtol=0.02)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_and_spoils_no_other_token(bad: float, isa: str):
    head, x = head_of((1000, 64)), inputs(4, 64)
    wanted = head(x)
    x[1, 5] = bad
    y = head(x)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2, 3]], wanted[[0, 2, 3]])


@kernels
def test_several_threads_give_what_one_does():
    head, x = head_of((2049, 520)), inputs(9, 520)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(head(x))
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_a_head_that_has_run_is_saved_copied_and_pickled_as_it_was_made():
    head = head_of((1000, 64))
    state, x = {name: part.clone() for name, part in head.state_dict().items()}, inputs(3, 64)
    wanted = head(x)
    for other in (head, copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert other.state_dict().keys() == state.keys()
        assert all(torch.equal(part, state[name]) for name, part in other.state_dict().items())
        assert torch.equal(other(x), wanted)
    assert head.half().predictor.scale.dtype == torch.float16


def test_gradients_pass_through_and_its_weight_does_not_train():
    head, x = head_of((70, 200)), inputs(3, 200).requires_grad_()
    head(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    head.weight.requires_grad_(True)
    with pytest.raises(InvalidInputError, match="weights in few bits"):
        head(x)


def test_a_compiled_head_gives_what_it_gives():
    head, x = head_of((70, 200)), inputs(3, 200)
    with torch.no_grad():
        assert torch.equal(torch.compile(head, backend="eager", fullgraph=True)(x), head(x))


# ---- whole models


@cache
def folded(name: str, bits: int = 4) -> tuple[PreTrainedModel, FoldReport]:
    """A tiny model, folded, with its linear layers in few bits."""
    model = tiny_model(name)
    return model, fold(model, text(), dataclasses.replace(SETTINGS, linear_bits=bits))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folded GPT-2 with a predictor in its head."""
    save_folded(*folded("gpt2"), tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "bits"), in_turns(FAMILY_NAMES, [4, 8], every=20))
def test_folded_models_have_one_and_load_as_they_were_saved(name: str, bits: int, tmp_path: Path):
    model, report = folded(name, bits)
    ((place, head),) = predicted_heads(model).items()
    assert model.get_output_embeddings() is head
    assert (head.bits, head.top) == ((bits // 2, 4), top_of(head.out_features))
    save_folded(model, report, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["head"] == {"name": place, "predictor_bits": bits // 2, "remainder_bits": 4, "top": head.top}
    assert place not in settings["linears"]
    assert report.linears.layers == len(settings["linears"]) + 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("settings", [{"head": "whole"}, {"rounding": "nearest"}, {"linear_bits": None}])
def test_it_is_whole_where_that_is_asked_for_or_nothing_is_known_of_its_inputs(settings: dict[str, object]):
    model = tiny_model("gpt2")
    fold(model, text(), dataclasses.replace(SETTINGS, **{"linear_bits": 4, **settings}))
    assert not predicted_heads(model)


def test_another_kind_of_head_is_refused():
    with pytest.raises(InvalidInputError, match="one of predicted, whole"):
        FoldConfig(head="half")


@kernels
@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon"])
@pytest.mark.parametrize("batch", [1, 3])
def test_steps_run_whole_with_it(name: str, batch: int):
    model, prompt = copy.deepcopy(folded(name)[0]).eval(), tokens(batch, 9)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(prompt, **options)
    prepare_decoding(model)
    with stepping(model) as steps:
        found = model.generate(prompt, past_key_values=cache_for(model), **options)
    assert (steps.why_not, steps.count) == ("", 11)
    assert torch.equal(found, wanted)


@kernels
def test_a_step_reads_its_predictor_and_few_rows_of_the_rest():
    model = copy.deepcopy(folded("llama")[0])
    before, head = step_bytes(model), model.get_output_embeddings()
    assert head.predictor.current.nbytes < head.touched < head.nbytes
    head.top = head.out_features
    assert step_bytes(model) - before == pytest.approx(head.nbytes - folded("llama")[0].get_output_embeddings().touched)


def test_a_model_without_its_head_loads(saved: Path):
    base, model = AutoModel.from_pretrained(saved), folded("gpt2")[0]
    with torch.no_grad():
        assert torch.equal(base(tokens()).last_hidden_state, model.transformer(tokens()).last_hidden_state)


@pytest.mark.parametrize("lost", ["lm_head.predictor.planes", "lm_head.remainder.scale"])
def test_a_missing_tensor_is_an_error_and_never_random(saved: Path, lost: str):
    stored = load_file(saved / "model.safetensors")
    assert stored["lm_head.weight"].shape == (0,)
    save_file({n: t for n, t in stored.items() if n != lost}, saved / "model.safetensors", {"format": "pt"})
    (saved / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=lost):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "transformer.h.9.attn.c_attn"}, "has no such linear layer"),
        ({"name": 3}, "name"),
        ({"predictor_bits": 5}, "predictor_bits of the head is 5"),
        ({"remainder_bits": True}, "remainder_bits"),
        ({"top": 0}, "top of the head is 0"),
        ({"top": 2**64}, "top of the head"),
        ({"more": 1}, "does not know"),
        ({"predictor_bits": 4}, r"lm_head\.predictor\.planes"),
    ],
)
def test_a_config_that_describes_another_one_is_refused(saved: Path, change: dict[str, object], message: str):
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["head"] |= change
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(saved)


def test_resizing_the_vocabulary_is_refused():
    with pytest.raises(InvalidInputError, match="the head of this model is stored in few bits"):
        folded("gpt2")[0].resize_token_embeddings(17)


# ---- what it costs


def test_the_benchmark_judges_heads_by_the_losses_of_their_logits(monkeypatch: pytest.MonkeyPatch):
    import heads

    monkeypatch.setattr(heads, "_ROUNDS", 2)
    monkeypatch.setattr(heads, "_FLUSHED", 10)
    model = tiny_model("llama")
    made, windows = heads.heads_of(model, tokens(6, 32)), tokens(3, 32)
    found = heads.losses(model, made, windows)
    own = model(windows).logits[:, :-1].float().flatten(0, 1)
    torch.testing.assert_close(found["dense"], F.cross_entropy(own, windows[:, 1:].flatten(), reduction="none"))
    lost = {name: float((each - found["dense"]).abs().mean()) for name, each in found.items()}
    assert 0 == lost["dense"] < lost["int8"] < lost["int4"]
    assert lost["int8, predicted"] < lost["int4, predicted"]
    assert {name: len(each) for name, each in heads.seconds(made, 64).items()} == dict.fromkeys(made, 2)
    assert heads._bytes(made["int4, predicted"]) < heads._bytes(made["int4"]) < heads._bytes(made["int8"])
