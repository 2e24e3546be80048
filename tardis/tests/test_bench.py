"""Speed: shapes are those published, folds fix what is stated, and ratios are of runs that took turns."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import Result, assert_refused
from folds import folds_at_random
from marks import long
from models import LAYERS, tiny_model, tiny_tokenizer, tokens
from transformers import AutoConfig, PreTrainedModel

from tardis_llm.checkpoint.loading import load_model
from tardis_llm.errors import InvalidInputError
from tardis_llm.evaluation.crossover import TOKEN_COUNTS, ffn_speed_ups, pays_up_to
from tardis_llm.evaluation.decoder import Decoder
from tardis_llm.evaluation.fix_rate import count_fixes, count_union
from tardis_llm.evaluation.machine import cpu_name, read_bandwidth
from tardis_llm.evaluation.shapes import SHAPES, shaped_model
from tardis_llm.evaluation.speed import step_bytes
from tardis_llm.evaluation.turns import Ratio, take_turns
from tardis_llm.evaluation.variants import RIVALS, Variant, folded, rival
from tardis_llm.families.sites import find_ffns
from tardis_llm.ffn.weights import Storage
from tardis_llm.runtime.placing import folded_ffns
from tardis_llm.runtime.prefill import crossover as recorded
from vllm_checkpoints import save_random_fold


def quiet(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_of_models_that_fold(name: str):
    model_type, fields = SHAPES[name]
    config = AutoConfig.for_model(model_type, **{"bos_token_id": 0, "eos_token_id": 0, **fields})
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    sites = find_ffns(model)
    neurons = {
        "llama-3-8b": 14336,
        "qwen2.5-0.5b": 4864,
        "qwen2.5-1.5b": 8960,
        "gemma-2-2b": 9216,
        "mistral-7b": 14336,
    }  # gated
    assert len(sites) == config.num_hidden_layers
    assert sites[0].intermediate_size == neurons.get(name, 4 * sites[0].hidden_size)
    billions = {"gpt2": 0.124, "gpt2-xl": 1.56, "opt-1.3b": 1.32, "opt-6.7b": 6.66, "falcon-7b": 6.92}
    billions |= {"pythia-6.9b": 6.86, "phi-2": 2.78, "starcoder2-7b": 7.17}
    billions |= {
        "llama-3-8b": 8.03,
        "qwen2.5-0.5b": 0.494,
        "qwen2.5-1.5b": 1.54,
        "gemma-2-2b": 2.61,
        "mistral-7b": 7.25,
    }
    billions |= {"gpt2-16x2048": 0.81, "falcon-16x2048": 0.677}  # of small vocabularies, to time layers
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions[name], rel=0.02)


def test_a_shaped_model_computes_and_its_fold_fixes_what_is_stated():
    model = shaped_model("gpt2", layers=2)
    ids = torch.randint(50_000, (1, 64), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        before = model(ids).logits
    assert bool(torch.isfinite(before).all())
    assert before.float().std() > 0.01
    folds = folds_at_random(model, 2, Storage(256, 8, 4), 0.05)
    with folded(model, folds), count_fixes(model) as counts, torch.no_grad():
        assert len(folded_ffns(model)) == 2
        model(ids)
    assert all(rate == pytest.approx(0.05, abs=0.01) for rate in counts.rates.values())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_shapes_and_layers_that_do_not_exist_are_refused():
    with pytest.raises(InvalidInputError, match="no shape 'gpt9'; choose from gpt2, "):
        shaped_model("gpt9")
    with pytest.raises(InvalidInputError, match="12 layers"):
        shaped_model("gpt2", layers=13)


def test_a_ratio_is_of_neighbours():
    # the machine gets three times slower half-way: the ratio does not notice
    found = Ratio.of([2.0, 2.0, 6.0, 6.0, 6.0], [1.0, 1.0, 3.0, 3.0, 2.0])
    assert (found.value, found.low, found.high) == (2, 2, 2)
    assert Ratio.of([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]).value == 2


def test_runs_take_turns_and_the_first_round_does_not_count():
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    seconds = take_turns({"a": lambda: run("a"), "b": lambda: run("b")}, 2, quiet, "stage")
    assert order == ["a", "b"] * 3
    assert seconds == {"a": [3, 5], "b": [4, 6]}


@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon", "gpt_neox"])
def test_a_decoder_starts_again_where_the_prompt_ended(name: str):
    model = tiny_model(name)
    decoder = Decoder(model, tokens(2, 12))
    chosen: list[torch.Tensor] = []
    forward = model.forward

    def watch(*args, **kwargs):  # type: ignore[no-untyped-def]
        chosen.append(kwargs["input_ids"])
        return forward(*args, **kwargs)

    model.forward = watch  # type: ignore[method-assign]
    assert decoder.seconds(3) > 0
    assert decoder.seconds(3) > 0
    assert [ids.tolist() for ids in chosen[:4]] == [ids.tolist() for ids in chosen[4:]]
    counted = chosen[1:4]  # the step before is not
    model.forward = forward  # type: ignore[method-assign]
    expected = tokens(2, 12)
    for _ in range(3):
        with torch.no_grad():
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert [ids[:, 0].tolist() for ids in counted] == expected[:, 12:].T.tolist()


def test_bytes_of_a_step_are_those_of_the_weights_read():
    model = tiny_model("gpt2")
    everything = sum(p.nbytes for p in {p.data_ptr(): p for p in model.parameters()}.values())
    dense = step_bytes(model)
    assert dense == everything - model.transformer.wpe.weight.nbytes  # the head shares its weight with the embedding
    other = dense - LAYERS * 4 * (2 * 64 * 256 + 64 + 256)
    for storage in (Storage(64), Storage(64, 8, 4)):
        folds = random_folds_of(model, storage)
        stored = sum(t.nbytes for _, fold in folds for t in fold.state_dict().values())
        fallback = sum(fold.weights.fixing for _, fold in folds)
        biases = LAYERS * 4 * (256 + 64)
        with folded(model, folds):
            none, every = (step_bytes(model, share) for share in (0.0, 1.0))
        assert none == other + stored - fallback + biases
        assert every == none + (fallback or LAYERS * 4 * 2 * 64 * 256)


def test_bytes_of_low_bit_layers_and_of_dense_ffns_in_a_folded_model():
    model = tiny_model("gpt2", dtype=torch.bfloat16)
    dense = step_bytes(model)
    with rival("int8", model).within():
        assert 0.5 * dense < step_bytes(model) < 0.6 * dense
    assert step_bytes(model) == dense
    folds = random_folds_of(model, Storage(64))
    with folded(model, folds):
        for _, fold in folds:
            fold.exact = True
        assert step_bytes(model) == dense


@pytest.mark.parametrize("kind", RIVALS)
def test_rivals_compute_what_the_model_does_and_leave_it_as_it_was(kind: str):
    model = tiny_model("gpt2", dtype=torch.bfloat16)
    ids = tokens(2, 4)
    with torch.no_grad():
        expected = model(ids).logits.float()
        variant = rival(kind, model)
        with variant.within():
            found = model(ids).logits.float()
        assert torch.equal(model(ids).logits.float(), expected)
    bound = {"dense": 0.0, "kernels": 0.02, "int8": 0.05, "int4": 0.3}[kind]
    assert float((found - expected).norm() / expected.norm()) <= bound


def test_kinds_that_do_not_exist_are_refused():
    with pytest.raises(InvalidInputError, match="choose from dense, kernels, int8, int4"):
        rival("int3", tiny_model("gpt2"))


def test_the_crossover_is_the_last_size_before_folding_loses():
    def ratio(value: float) -> Ratio:
        return Ratio(value, value, value)

    assert pays_up_to({1: ratio(3.0), 2: ratio(1.5), 4: ratio(0.9), 8: ratio(1.2)}) == 2
    assert pays_up_to({1: ratio(0.9), 2: ratio(1.5)}) == 0


def test_the_crossover_is_measured_on_a_folded_model():
    model = tiny_model("gpt2")
    with folded(model, random_folds_of(model, Storage(64))):
        found = ffn_speed_ups(model, quiet)
    assert list(found) == list(TOKEN_COUNTS[: len(found)])
    assert all(ratio.low <= ratio.value <= ratio.high for ratio in found.values())


def random_folds_of(model, storage: Storage):  # type: ignore[no-untyped-def]
    """Folds of a tiny model, which has biases that are not zero."""
    return folds_at_random(model, 1, storage, 0.1)


def test_a_fold_that_is_taken_out_keeps_nothing_of_the_weights_beside_it():
    model = tiny_model("gpt2")
    folds = random_folds_of(model, Storage(64))
    with folded(model, folds), torch.no_grad():
        model(tokens(1, 4))
    assert all(ffn._ready is None for _, ffn in folds)


def test_the_union_of_a_batch_is_at_least_what_one_token_fixes():
    model = tiny_model("gpt2")
    with folded(model, random_folds_of(model, Storage(64))), torch.no_grad():
        with count_union(model) as one:
            model(tokens(1, 1))
        with count_union(model) as many, count_fixes(model) as counts:
            model(tokens(4, 8))
    mean = sum(counts.rates.values()) / len(counts.rates)
    assert 0 < one.mean < many.mean <= 1
    assert many.mean > mean


def test_generations_of_a_processor_are_told_apart():
    name = cpu_name()
    assert name
    if "cpu family" in (Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""):
        assert re.search(r"\(family \d+, model \d+\)$", name)


def test_the_pace_of_memory_is_measured():
    assert 1e8 < read_bandwidth() < 1e13


def test_the_command_prints_both_variants_and_json(tardis: Callable[..., Result], small_shape: str):
    arguments = ("bench", "--shape", small_shape, "--layers", 1, "--batch", "1,2", "--rounds", 2, "--steps", 2)
    arguments += ("--prompt", 8, "--fold-dtype", "int8", "--fallback", "int4", "--fix-rate", "0.1")
    result = tardis(*arguments)
    assert result.code == 0
    for part in ("dense", "folded", "tokens/s", "fold is faster", "GB/s"):
        assert part in result.out
    figures = json.loads(tardis(*arguments, "--json").out)
    assert [(row["batch"], row["variant"]) for row in figures["rows"]] == [
        (1, "dense"), (1, "folded"), (2, "dense"), (2, "folded"),
    ]  # fmt: skip
    dense, fold = figures["rows"][:2]
    assert fold["folded_speed_up"] == {"value": 1, "low": 1, "high": 1}
    assert figures["pays_up_to"] is None  # no dense weights beside stacked ones
    assert figures["peak_bytes"] > 1e8
    assert fold["step_bytes"] < dense["step_bytes"]
    assert fold["union_fix_rate"] == pytest.approx(0.1, abs=0.05)
    assert dense["bytes_per_second"] == pytest.approx(dense["step_bytes"] / dense["step_seconds"])


FEW = ("--batch", 1, "--rounds", 2, "--steps", 2, "--prompt", 8)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the machine nor the crossover is measured."""
    monkeypatch.setattr("tardis_llm.evaluation.machine.read_bandwidth", lambda: 1e10)
    monkeypatch.setattr("tardis_llm.evaluation.speed.ffn_speed_ups", lambda *_: {})


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
def test_a_checkpoint_is_measured_in_the_dtype_that_generate_loads(
    stored: str, tardis: Callable[..., Result], tmp_path: Path, unmeasured: None
):
    model, dense, fold = tiny_model("gpt2", dtype=getattr(torch, stored)), tmp_path / "dense", tmp_path / "fold"
    model.save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    save_random_fold(model, fold, tokenizer=tiny_tokenizer())
    for directory in (dense, fold):
        made = json.loads(tardis("generate", directory, "some words", "--max-new-tokens", 2, "--json").out)
        figures = json.loads(tardis("bench", directory, *FEW, "--json").out)
        assert made["dtype"] == figures["dtype"] == stored
    other = "float32" if stored == "float16" else "float16"
    result = tardis("bench", fold, *FEW, "--against", dense, "--dtype", other)
    assert f"{fold} in {other}: " in result.err.replace("\n", "") and f"Decoding in {other}" in result.out


def test_shapes_are_in_bfloat16_unless_another_dtype_is_asked_for(
    tardis: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, unmeasured: None
):
    made = "tardis_llm.cli.bench.shaped_model"
    monkeypatch.setattr(made, lambda name, layers, dtype: tiny_model("gpt2", dtype=dtype))
    shape = ("bench", "--shape", "gpt2", "--layers", 1, *FEW)
    assert json.loads(tardis(*shape, "--json").out)["dtype"] == "bfloat16"
    assert json.loads(tardis(*shape, "--dtype", "float16", "--json").out)["dtype"] == "float16"
    monkeypatch.setattr(made, lambda *_: pytest.fail("a model was made"))
    assert_refused(tardis(*shape, "--dtype", "float64"), "float32, bfloat16, float16")
    assert_refused(tardis(*shape, "--dtype", "float16", "--fallback", "bf16"), "parts in bf16 are asked for")


def test_a_model_of_ones_own_is_measured_too(tardis: Callable[..., Result], tiny_dir: Path):
    arguments = (tiny_dir, "--batch", 1, "--rounds", 2, "--steps", 2, "--prompt", 8, "--fix-rate", "0.2")
    figures = json.loads(tardis("bench", *arguments, "--against", "dense,kernels,int8", "--json").out)
    assert [row["variant"] for row in figures["rows"]] == ["dense", "kernels", "int8", "folded"]
    assert figures["rows"][-1]["union_fix_rate"] == pytest.approx(0.2, abs=0.1)
    assert figures["pays_up_to"] is not None


def test_an_unknown_rival_is_refused_before_a_model_is_made(
    tardis: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tardis_llm.cli.bench.shaped_model", lambda *_: pytest.fail("a model was made"))
    assert_refused(tardis("bench", "--shape", "falcon-7b", "--against", "dense,kernel"), "no variant 'kernel'")


def test_a_checkpoint_is_measured_and_records_its_crossover(
    tardis: Callable[..., Result], fold: Callable[..., Result], tiny_dir: Path, tmp_path: Path
):
    assert fold("--reduction", "0.3", "--tokens", 2048).code == 0
    folded_dir = tmp_path / "out"
    few = ("--batch", 1, "--rounds", 2, "--steps", 2, "--prompt", 8)
    figures = json.loads(tardis("bench", folded_dir, *few, "--record", "--prefill", "exact", "--json").out)
    assert [row["variant"] for row in figures["rows"]] == ["dense", "folded"]
    assert recorded(load_model(str(folded_dir))) == figures["pays_up_to"]
    rivals = tardis("bench", folded_dir, *few, "--against", f"{tiny_dir},int8", "--json")
    assert [row["variant"] for row in json.loads(rivals.out)["rows"]] == ["dense", "int8", "folded"]
    assert_refused(tardis("bench", folded_dir, *few, "--against", "int8"), "--against MODEL,int8")


@long
def test_prompts_are_of_the_text_that_is_given(
    tardis: Callable[..., Result], hub: str, tiny_gpt2: tuple[Path, PreTrainedModel], tmp_path: Path
):
    text = tmp_path / "text.txt"
    text.write_text("What is fixed depends on the text that a model reads. " * 8)
    quick = ("--batch", 2, "--steps", 1, "--rounds", 2, "--prompt", 4)
    assert "random tokens" in tardis("bench", hub, *quick).err
    given = tardis("bench", hub, *quick, "--text", text)
    assert given.code == 0 and "random tokens" not in given.err
    assert_refused(tardis("bench", hub, *quick, "--prompt", 400, "--text", text), "do not fit")
    text.write_text("Short.")
    assert_refused(tardis("bench", hub, *quick, "--text", text), "give more text")


def test_prompts_are_stretches_of_a_text_spread_over_it():
    variant = Variant("any", tiny_model("gpt2"), nullcontext, torch.arange(11))
    assert variant.prompt(2, 3).tolist() == [[0, 1, 2], [5, 6, 7]]
    with pytest.raises(InvalidInputError, match="11 tokens"):
        variant.prompt(2, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--shape NAME"),
        (("--shape", "gpt2", "--text", "x"), "--text is for a MODEL"),
        (("x", "--shape", "gpt2"), "--shape NAME"),
        (("--shape", "gpt2", "--record"), "folded directory"),
        (("--shape", "gpt9"), "no shape"),
        (("--shape", "gpt2", "--batch", "one"), "give numbers such as 1,8"),
        (("--shape", "gpt2", "--batch", "0"), "at least"),
        (("--shape", "gpt2", "--fix-rate", "1"), "below 1"),
    ],
)
def test_wrong_arguments_are_refused(tardis: Callable[..., Result], arguments: tuple[str, ...], message: str):
    assert_refused(tardis("bench", *arguments), message)


@pytest.fixture
def hub(tiny_gpt2: tuple[Path, PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a folded model that was downloaded from the hub."""
    folder = tmp_path / "models--someone--folded"
    shutil.copytree(tiny_gpt2[0], folder / "snapshots" / "0")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return "someone/folded"


def test_a_folded_model_on_the_hub_is_timed_as_one_in_a_directory(tardis: Callable[..., Result], hub: str):
    quick = ("--batch", 1, "--steps", 1, "--rounds", 2, "--prompt", 4)
    result = tardis("bench", hub, *quick, "--json")
    assert result.code == 0
    assert [row["variant"] for row in json.loads(result.out)["rows"]] == ["dense", "folded"]
    assert_refused(tardis("bench", hub, *quick, "--record"), "--record writes into a folded directory")


def test_prompt_and_steps_stay_within_the_positions(tardis: Callable[..., Result], tiny_dir: Path):
    command = ("bench", tiny_dir, "--batch", 1, "--prompt", 125, "--steps", 4)
    assert_refused(tardis(*command), "windows of 129 tokens do not fit this model, which takes 128 at most")
