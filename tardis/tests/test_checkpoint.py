"""The folded checkpoint: round trips, damage, versions, and loaders that do not know TARDIS."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folds import SETTINGS, folded_tiny, logits, text
from marks import long
from models import ENCODER_NAMES, LAYERS, LAYOUTS, tiny_model, tiny_tokenizer, tokens
from quick_folds import save_quick
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from tardis_llm import FoldReport, fold, save_folded
from tardis_llm.checkpoint.folded import holds_fold
from tardis_llm.checkpoint.manifest import MANIFEST, read_report
from tardis_llm.errors import CheckpointError, InvalidInputError
from tardis_llm.runtime.placing import folded_ffns


def loader(name: str) -> type:
    return AutoModelForMaskedLM if name in ENCODER_NAMES else AutoModelForCausalLM


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A folded GPT-2 on disk, its logits, and those of the dense model."""
    directory = tmp_path_factory.mktemp("gpt2")
    dense = logits(tiny_model("gpt2"))
    model, report = folded_tiny("gpt2")
    save_folded(model, report, directory, tiny_tokenizer())
    return directory, logits(model), dense


@pytest.fixture
def copy(saved: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path) -> Path:
    """A copy of the saved model, to damage."""
    for file in saved[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_every_layout_saves_loads_with_bit_equal_logits_and_generates(name: str, tmp_path: Path):
    model = save_quick(tmp_path, name)
    loaded = loader(name).from_pretrained(tmp_path)
    assert len(folded_ffns(loaded)) == LAYERS
    assert torch.equal(logits(loaded), logits(model))
    if name not in ENCODER_NAMES:
        settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        generated = loaded.generate(tokens(1, 8), **settings)
        assert generated.shape == (1, 12)
        assert torch.equal(generated, model.generate(tokens(1, 8), **settings))


def test_transformers_saves_a_model_that_was_folded_in_memory_as_a_fold(tmp_path: Path):
    model = tiny_model("gpt2")
    fold(model, text(), SETTINGS)
    model.save_pretrained(tmp_path)
    loaded = loader("gpt2").from_pretrained(tmp_path)
    assert holds_fold(tmp_path) and len(folded_ffns(loaded)) == LAYERS
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(("name", "dtype"), [("gpt2", torch.float16), ("gptj", torch.bfloat16)])
def test_half_precision_loads_with_bit_equal_logits(name: str, dtype: torch.dtype, tmp_path: Path):
    # from disk, as a user has it: the tables of rotary positions differ in a half-precision model that was never saved
    tiny_model(name, dtype=dtype).save_pretrained(tmp_path / "dense")
    model = loader(name).from_pretrained(tmp_path / "dense")
    save_folded(model, fold(model, text(), SETTINGS), tmp_path)
    loaded = loader(name).from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))


def test_an_encoder_loads_without_its_head_as_an_embedding_model(tmp_path: Path):
    model, report = folded_tiny("bert")
    save_folded(model, report, tmp_path)
    embedder = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    with torch.no_grad():
        assert torch.equal(embedder(tokens()).last_hidden_state, model.bert(tokens()).last_hidden_state)


def test_sharded_files_load_to_the_same_logits(saved: tuple, tmp_path: Path):
    model, report = folded_tiny("gpt2")
    save_folded(model, report, tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), saved[1])


def test_saving_a_loaded_model_again_gives_the_same_model(saved: tuple, tmp_path: Path):
    AutoModelForCausalLM.from_pretrained(saved[0]).save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), saved[1])


def test_replacing_a_sharded_checkpoint_leaves_no_stale_shard(tmp_path: Path):
    model, report = folded_tiny("gpt2")
    save_folded(model, report, tmp_path, max_shard_size="200KB")
    save_folded(model, report, tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_loaded_model_survives_pickle_and_keeps_ranges_in_their_stored_dtype(saved: tuple):
    loaded = AutoModelForCausalLM.from_pretrained(saved[0], dtype=torch.bfloat16)
    ffn = next(iter(folded_ffns(loaded).values()))
    assert ffn.low.dtype == ffn.predictor.scale.dtype == torch.float16
    assert ffn.fold.weight.dtype == torch.bfloat16
    assert torch.equal(logits(pickle.loads(pickle.dumps(loaded))), logits(loaded))


def test_dense_weights_keep_their_own_names_and_values(saved: tuple):
    stored = load_file(saved[0] / "model.safetensors")
    dense = {n: p for n, p in tiny_model("gpt2").state_dict().items() if n != "lm_head.weight"}  # tied
    assert {n for n in stored if ".tardis." not in n} == dense.keys()
    assert all(torch.equal(stored[name], value) for name, value in dense.items())


def test_the_report_comes_back_and_touched_is_what_the_files_hold(saved: tuple):
    report = read_report(saved[0])
    stored = load_file(saved[0] / "model.safetensors")
    always = sum(t.nbytes for n, t in stored.items() if ".tardis." in n or n.endswith("mlp.c_fc.bias"))
    fixed = sum(t.nbytes * layer.fix_rate for layer in report.layers for n, t in stored.items()
                if n in (f"{layer.prefix}.c_fc.weight", f"{layer.prefix}.c_proj.weight"))  # fmt: skip
    assert report.touched == pytest.approx(always + fixed, rel=1e-9)
    assert report.reduction == pytest.approx(0.5, abs=0.02)


WITHOUT_TARDIS = """
import sys, torch
sys.modules["tardis_llm"] = None  # importing it fails, as where it is not installed
from transformers import AutoModelForCausalLM
dense, ids, out, *others = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(dense)
assert type(model).__name__ == "GPT2LMHeadModel"
with torch.no_grad():
    torch.save(model(torch.load(ids)).logits, out)
for directory in others:
    try:
        AutoModelForCausalLM.from_pretrained(directory)
        print("loaded")
    except RuntimeError as error:
        print(*str(error).split())
"""


@long
def test_without_tardis_dense_weights_load_as_the_exact_dense_model_and_weights_in_few_bits_do_not(
    saved: tuple, tmp_path: Path
):
    directory, _, dense = saved
    torch.save(tokens(2, 16), tmp_path / "ids.pt")
    in_few_bits = {"stacked": "c_fc.weight", "low-bit linears": "c_attn.weight"}
    for form in in_few_bits:
        save_quick(tmp_path / form, "gpt2", form)
    paths = (directory, tmp_path / "ids.pt", tmp_path / "logits.pt", *(tmp_path / form for form in in_few_bits))
    done = subprocess.run([sys.executable, "-c", WITHOUT_TARDIS, *paths], check=True, capture_output=True, text=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), dense, rtol=1e-5, atol=1e-5)
    for said, name in zip(done.stdout.splitlines(), in_few_bits.values(), strict=True):
        assert "mismatched_sizes" in said and name in done.stderr


def test_without_tardis_going_by_the_architecture_name_fails(saved: tuple):
    import transformers

    name = json.loads((saved[0] / "config.json").read_text())["architectures"][0]
    assert name == "TardisGPT2LMHeadModel"
    assert not hasattr(transformers, name)


def test_a_truncated_file_is_named(copy: Path):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing, truncated or damaged.*Copy it anew"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_missing_shard_is_named(tmp_path: Path):
    model, report = folded_tiny("gpt2")
    save_folded(model, report, tmp_path, max_shard_size="200KB")
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-.*is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_flipped_bit_is_found_and_its_tensor_named(copy: Path):
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the tensor .* is not the one that was written"):
        AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize("lost", ["transformer.h.1.mlp.tardis.low", "transformer.h.1.mlp.c_fc.weight"])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_missing_tensor_is_an_error_and_never_random(copy: Path, lost: str, recorded: bool):
    stored = load_file(copy / "model.safetensors")
    save_file({n: t for n, t in stored.items() if n != lost}, copy / "model.safetensors", {"format": "pt"})
    if not recorded:
        (copy / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=lost):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_checkpoint_of_a_newer_format_asks_for_an_update(copy: Path):
    edit_config(copy, format_version=99)
    with pytest.raises(CheckpointError, match=r"format version 99.*pip install -U"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_config_for_another_model_is_refused(copy: Path):
    layers = json.loads((copy / "config.json").read_text())["quantization_config"]["layers"]
    edit_config(copy, layers={name.replace("h.1", "h.7"): value for name, value in layers.items()})
    with pytest.raises(CheckpointError, match=r"folds transformer\.h\.7\.mlp"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_unknown_fields_of_a_layer_are_refused(copy: Path):
    layers = json.loads((copy / "config.json").read_text())["quantization_config"]["layers"]
    edit_config(copy, layers={name: {**value, "rotation": 1} for name, value in layers.items()})
    with pytest.raises(CheckpointError, match=r"rotation.*update TARDIS"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_dense_model_is_not_folded_and_cannot_be_saved_as_such(tmp_path: Path):
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    assert not holds_fold(tmp_path)
    with pytest.raises(InvalidInputError, match="no folded FFN"):
        save_folded(model, FoldReport([]), tmp_path / "folded")


def test_a_damaged_record_is_named(copy: Path):
    (copy / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match=r"tardis\.json"):
        read_report(copy)
