"""A fold is exchanged between steps: at once, as a whole, also in compiled models, laid out or not, and back again."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from marks import mostly_long
from models import tiny_model, tokens
from synthetic import correlated, edited, stored_fold
from torch import Tensor

from tardis_llm.errors import InvalidInputError
from tardis_llm.ffn.weights import FoldedWeights, Storage
from tardis_llm.runtime.backend import lay_out
from tardis_llm.runtime.cpu.backend import CpuBackend
from tardis_llm.runtime.decoding import prepare_decoding
from tardis_llm.runtime.modules import FoldedFFN
from tardis_llm.runtime.placing import folded_ffns

STORAGES = [Storage(64), Storage(64, 8, 4), Storage(64, 4), Storage(64, None, 8)]
D, H = 128, 192


def two_folds(storage: Storage, dtype: torch.dtype = torch.bfloat16):  # type: ignore[no-untyped-def]
    """Two folds of one format that fix other neurons and add other biases, and the dense weights."""
    old, dense = stored_fold(D, H, storage, dtype)
    other, _ = stored_fold(D, H, storage, dtype, ranges="all")
    return old, edited(replace(other, bias=other.bias + 1), offset=other.neurons.offset + 1), dense


@pytest.fixture(params=["kernels", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the folds run."""
    if request.param == "reference":
        monkeypatch.setattr(CpuBackend, "accepts", lambda self, x: False)
    return str(request.param)


@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@torch.no_grad()
def test_the_next_call_has_the_new_fold_and_swapping_back_gives_the_old_bits(
    storage: Storage, laid_out: bool, backend: str
) -> None:
    old, new, dense = two_folds(storage)
    module, wanted, x = FoldedFFN(old), FoldedFFN(new), correlated(5, D).bfloat16()
    if laid_out:
        module.lay_out(torch.bfloat16)
        wanted.lay_out(torch.bfloat16)
    before, expected = module(x, dense), wanted(x, dense)
    assert not torch.equal(before, expected)
    kept = module.swap(new)
    assert torch.equal(module(x, dense), expected)
    assert (module.fold.layout is None) == (wanted.fold.layout is None)
    again = module.swap(kept)
    assert torch.equal(module(x, dense), before)
    module.swap(again)
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in wanted.state_dict().items())
    assert again.format == new.format == module.weights.format


@torch.no_grad()
def test_a_fold_may_come_laid_out_already() -> None:
    old, new, dense = two_folds(Storage(64))
    module, x = FoldedFFN(old), correlated(5, D).bfloat16()
    module.lay_out(torch.bfloat16)
    assert isinstance(new.fold, Tensor)
    ready = replace(new, fold=lay_out(new.fold, torch.bfloat16) or new.fold)
    module.swap(ready)
    plain = FoldedFFN(new)
    plain.lay_out(torch.bfloat16)
    assert torch.equal(module(x, dense), plain(x, dense))


@torch.no_grad()
def test_compiled_calls_run_the_new_fold(backend: str) -> None:
    old, new, dense = two_folds(Storage(64), torch.float32)
    module, x = FoldedFFN(old), correlated(5, D)
    run = torch.compile(lambda x: module(x, dense) + 1, backend="eager", fullgraph=True)
    before = run(x)
    module.swap(new)
    with torch._dynamo.config.patch(error_on_recompile=backend == "kernels"):
        torch.testing.assert_close(run(x), FoldedFFN(new)(x, dense) + 1, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(run(x), before)


@pytest.mark.parametrize("laid_out", [False, True])
@torch.no_grad()
def test_calls_beside_a_swap_see_one_fold_as_a_whole(laid_out: bool, backend: str) -> None:
    old, new, dense = two_folds(Storage(64, 8, 4))
    module, x = FoldedFFN(old), correlated(3, D).bfloat16()
    folds: list[FoldedWeights] = [old, new]
    expected: list[Tensor] = []
    for weights in folds:
        alone = FoldedFFN(weights)
        if laid_out:
            alone.lay_out(torch.bfloat16)
        expected.append(alone(x, dense))
    if laid_out:
        module.lay_out(torch.bfloat16)
    wrong: list[Tensor] = []
    done = threading.Event()

    @torch.no_grad()
    def call() -> None:
        while not done.is_set():
            y = module(x, dense)
            if not any(torch.equal(y, one) for one in expected):
                wrong.append(y)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for number in range(60):
        module.swap(folds[(number + 1) % 2])
    done.set()
    for caller in callers:
        caller.join()
    assert not wrong


def test_another_format_shape_or_device_is_refused_and_nothing_changes() -> None:
    old, new, _ = two_folds(Storage(64))
    module = FoldedFFN(old)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    narrower, _ = stored_fold(D, H // 2, Storage(64), torch.bfloat16)
    for wrong in (
        two_folds(Storage(64, 8))[1],
        two_folds(Storage(64, None, 4))[1],
        two_folds(Storage(32))[1],
        two_folds(Storage(64), torch.float32)[1],
        replace(new, neurons=new.neurons.map(torch.Tensor.half)),
        narrower,
        replace(new, neurons=new.neurons.map(lambda tensor: tensor.to("meta"))),
    ):
        with pytest.raises(InvalidInputError, match="the new fold has another"):
            module.swap(wrong)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", mostly_long(["gpt2", "opt"], ["gpt2"]))
@torch.no_grad()
def test_a_model_decodes_on_with_another_fold(name: str) -> None:
    from folds import SETTINGS, text

    from tardis_llm import fold

    one, two = tiny_model(name), tiny_model(name)
    fold(one, text(), replace(SETTINGS, predictor_bits=2))
    fold(two, text(), replace(SETTINGS, predictor_bits=2, refit=False))
    expected = two(tokens()).logits
    prepare_decoding(one)
    for ffn, other in zip(folded_ffns(one).values(), folded_ffns(two).values(), strict=True):
        ffn.swap(other.weights)
    torch.testing.assert_close(one(tokens()).logits, expected, rtol=1e-3, atol=1e-3)
