"""Models as compiled graphs: one graph, whatever is folded or in few bits, and the same numbers but for rounding."""

from __future__ import annotations

import copy
import gc
import json
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, assert_refused
from folds import badly_folded, folds_at_random
from marks import long, mostly_long
from models import CAUSAL_NAMES, tiny_model, tokens
from quick_folds import quick_fold
from synthetic import correlated, stored_fold
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.fx import GraphModule
from transformers import Cache, PreTrainedModel

from tardis_llm.errors import InvalidInputError
from tardis_llm.evaluation.decoder import Decoder
from tardis_llm.evaluation.variants import folded_variant
from tardis_llm.ffn.weights import Storage
from tardis_llm.pipeline.linears import low_bit_copy, quantise_linears
from tardis_llm.runtime.cpu.library import available
from tardis_llm.runtime.decoding import COMPILED, compiled, prepare_decoding
from tardis_llm.runtime.linears.lowbit import BITS
from tardis_llm.runtime.modules import FoldedFFN
from tardis_llm.runtime.operators import numbered
from tardis_llm.runtime.prefill import set_prefill

needs_library = pytest.mark.skipif(
    not available(), reason="the CPU kernels are not built, for want of a C++ compiler, or turned off"
)
ALIBI_NAMES = ["bloom", "mpt", "falcon_alibi"]
STORAGES = [Storage(64), Storage(64, 8, 4)]
#: inductor makes code of a graph, for which it calls a C++ compiler again and again
every_backend = pytest.mark.parametrize("backend", ["aot_eager", "inductor"])


@pytest.fixture(autouse=True)
def from_scratch() -> Iterator[None]:
    """Nothing is compiled yet."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


#: transformers chooses their positions by values of tensors, which no graph can
NO_GRAPH = ("xglm",)
#: caches of sliding windows have several states, and transformers compiles a graph for each
SLIDING = ("mistral", "ministral", "smollm3", "qwen2", "qwen3", "cohere2", "gemma2", "gemma3_text", "exaone4", "olmo3")


def generated(model: PreTrainedModel, **settings: Any) -> Tensor:
    """Tokens that a model generates greedily behind prompts."""
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 5}
    found: Tensor = model.generate(tokens(2, 8), **greedy, **settings)
    return found


def counting(model: PreTrainedModel, graphs: list[int]) -> dict[str, Any]:
    """`decoding.compiled`, but that graphs are listed and run as they are, without code being made of them."""

    def backend(graph: GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        graphs.append(len(example))
        return graph.forward

    settings = compiled(model)
    config = copy.copy(settings["compile_config"])
    config.backend, config.mode = backend, None
    return {**settings, "compile_config": config}


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    mostly_long((name for name in CAUSAL_NAMES if name not in (*ALIBI_NAMES, *NO_GRAPH)), {"gpt2", "phi3"}),
)
def test_every_family_without_alibi_decodes_as_one_graph(name: str) -> None:
    model, graphs = quick_fold(name, blocks=2), list[int]()
    prepare_decoding(model)
    settings = counting(model, graphs)
    assert torch.equal(generated(model, **settings), generated(model))
    made = len(graphs)
    assert torch.equal(generated(model, **settings), generated(model))
    assert len(graphs) == made and (made == 1 or name in SLIDING)


@pytest.mark.parametrize("name", ALIBI_NAMES)
def test_models_with_alibi_are_refused(name: str) -> None:
    model = tiny_model(name)
    with pytest.raises(InvalidInputError, match=r"with ALiBi cannot be compiled.*leaving out --compile"):
        compiled(model)
    with pytest.raises(InvalidInputError, match="cannot be compiled"):
        Decoder(model, tokens(1, 4), compiled=3)


def test_a_cache_that_cannot_be_cut_back_is_refused() -> None:
    model = tiny_model("starcoder2", sliding_window=16)
    with pytest.raises(InvalidInputError, match="measure it without --compile"):
        Decoder(model, tokens(1, 4), compiled=3)


@torch.no_grad()
@pytest.mark.parametrize("bits", BITS)
def test_folds_and_layers_in_few_bits_decode_as_one_graph(bits: int) -> None:
    model, graphs = quick_fold("gpt2", "stacked", blocks=1), list[int]()
    quantise_linears(model, bits)
    prepare_decoding(model)
    assert torch.equal(generated(model, **counting(model, graphs)), generated(model))
    assert len(graphs) == 1


@torch.no_grad()
def test_prompts_go_where_they_should_and_decoding_stays_one_graph() -> None:
    model, _ = badly_folded("falcon")
    prepare_decoding(model)
    texts = []
    for mode in ("folded", "exact", "auto"):
        torch._dynamo.reset()
        graphs: list[int] = []
        set_prefill(model, mode)
        texts.append(generated(model, **counting(model, graphs)))
        assert torch.equal(texts[-1], generated(model))
        assert len(graphs) == 1
    assert not torch.equal(texts[0], texts[1])


@torch.no_grad()
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_folded_ffn_is_one_graph_with_the_kernels_and_without(storage: Storage, dtype: torch.dtype) -> None:
    weights, dense = stored_fold(64, 96, storage, dtype)
    module, x = FoldedFFN(weights), correlated(5, 64).to(dtype)  # the kernels take no fp64
    found = torch.compile(module, backend="aot_eager", fullgraph=True)(x, dense)
    torch.testing.assert_close(found, module(x, dense), rtol=1e-4, atol=1e-4)


@needs_library
@torch.no_grad()
def test_weights_that_do_not_lie_as_the_kernels_read_them_compute_the_same_and_are_said() -> None:
    weights, dense = stored_fold(64, 96, Storage(64), torch.float32, ranges="all")
    module, x = FoldedFFN(weights), correlated(5, 64)
    run = torch.compile(module, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings(), torch.enable_grad():  # which changes nothing, as nothing needs gradients
        warnings.simplefilter("error", RuntimeWarning)
        expected = run(x, dense)
    with pytest.warns(RuntimeWarning, match=r"call tardis_llm.runtime.decoding.prepare_decoding"):
        found = run(x, replace(dense, w2=dense.w2.contiguous()))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@needs_library
def test_the_operators_pass_the_checks_of_torch() -> None:
    weights, dense = stored_fold(64, 96, Storage(64), torch.float32)
    ffn, x = FoldedFFN(weights), correlated(5, 64)
    layer = nn.Linear(64, 96)
    layer.weight.data = dense.w1
    linear = low_bit_copy(layer, 8, 64)
    calls = {
        torch.ops.tardis.numbered_ffn.default: (x, ffn.number, dense.w1, dense.b1, dense.w2, dense.b2, False),
        torch.ops.tardis.numbered_linear.default: (x, linear.number, 96),
    }
    for op, arguments in calls.items():
        found = torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy], ids=["deep", "shallow"])
def test_a_copy_has_a_number_of_its_own_and_no_module_is_kept_alive(clone: Callable[[nn.Module], nn.Module]) -> None:
    weights, _ = stored_fold(64, 96, Storage(64), torch.float32)
    ffn = FoldedFFN(weights)
    other: Any = clone(ffn)
    assert other.number != ffn.number
    assert numbered(other.number) is other and numbered(ffn.number) is ffn
    number, gone = ffn.number, weakref.ref(ffn)
    del ffn
    gc.collect()
    assert gone() is None
    with pytest.raises(KeyError):
        numbered(number)


@needs_library
@torch.no_grad()
@pytest.mark.parametrize(
    ("backend", "dtype"), [("aot_eager", torch.bfloat16), pytest.param("inductor", torch.float32, marks=long)]
)
def test_compiled_steps_begin_behind_the_prompt_each_time(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(COMPILED, "backend", backend)
    model = tiny_model("falcon", dtype=dtype, blocks=1)
    variant = folded_variant(model, folds_at_random(model, 1, Storage(64), 0.1))
    with variant.within():
        decoder, plain = Decoder(model, tokens(2, 8), compiled=3), Decoder(model, tokens(2, 8))
        chosen = [record(each) for each in (decoder, plain)]
    for _ in range(2):  # the variant's modules are put in anew
        with variant.within():
            for each, ids in zip((decoder, plain), chosen, strict=True):
                ids.clear()
                assert each.seconds(3) > 0
        assert chosen[0] == chosen[1] and len(chosen[0]) == 4 and chosen[0][0] == chosen[0][1]
        assert int(decoder.cache.layers[0].cumulative_length) == plain.cache.get_seq_length() == 8


def record(decoder: Decoder) -> list[list[list[int]]]:
    """The tokens that enter each step from now on."""
    seen: list[list[list[int]]] = []
    following = decoder._following

    def watched(ids: Tensor, cache: Cache) -> Tensor:
        seen.append(ids.tolist())
        return following(ids, cache)

    decoder._following = watched
    return seen


@long
@every_backend
def test_the_command_line_generates_the_same_text_compiled(
    backend: str, tardis: Callable[..., Result], sample_folded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(COMPILED, "backend", backend)
    arguments = ("generate", sample_folded, "The history of", "--max-new-tokens", 8, "--dtype", "float32", "--json")
    assert json.loads(tardis(*arguments, "--compile").out)["text"] == json.loads(tardis(*arguments).out)["text"]


@long
@every_backend
def test_the_command_line_measures_compiled_steps(
    backend: str, tardis: Callable[..., Result], small_shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(COMPILED, "backend", backend)
    arguments = ("--shape", small_shape, "--layers", 1, "--batch", 1, "--rounds", 2, "--steps", 2, "--prompt", 8)
    figures = json.loads(tardis("bench", *arguments, "--against", "dense,kernels", "--compile", "--json").out)
    assert figures["compiled"] and [row["variant"] for row in figures["rows"]] == ["dense", "kernels", "folded"]
    assert figures["rows"][-1]["union_fix_rate"] == pytest.approx(0.05, abs=0.03)


@long
def test_without_a_compiler_it_says_what_to_do(tardis: Callable[..., Result], tiny_dir: Path) -> None:
    with inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        result = tardis("generate", tiny_dir, "abc", "--compile", "--max-new-tokens", 4, "--json")
    assert_refused(result, "see that a C++ compiler is installed, or leave out --compile")
