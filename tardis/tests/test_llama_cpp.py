"""What llama.cpp is compared with: models of a shape in little memory, and files of the same shape."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from equal_models import in_type, rounded
from llama_cpp import model_of_shape, steps_of
from llama_library import _only
from shape_files import in_q4_0
from tardis_llm.calibration.text import split_windows
from tardis_llm.checkpoint.loading import load_dense
from tardis_llm.evaluation.decoder import Decoder
from tardis_llm.evaluation.shapes import SHAPES, RandomFold, random_ids
from tardis_llm.evaluation.variants import random_rival, random_variant
from tardis_llm.runtime.cpu.library import open_library

gguf = pytest.importorskip("gguf")
_FIELDS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
_LAYERS, _VOCABULARY = 3, 256
with_kernels = pytest.mark.skipif(open_library() is None, reason="the CPU kernels are not built")


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {**_FIELDS, "num_hidden_layers": _LAYERS, "vocab_size": _VOCABULARY, "tie_word_embeddings": False}
    monkeypatch.setitem(SHAPES, "tiny", ("qwen2", fields))


def test_layers_of_a_shape_share_their_weights_and_keep_caches_of_their_own():
    model = model_of_shape("tiny", _LAYERS)
    one = model_of_shape("tiny", 1)
    assert sum(weight.numel() for weight in model.parameters()) == sum(weight.numel() for weight in one.parameters())
    ids = random_ids(model, 1, 6, seed=0)
    with torch.no_grad():
        start = model(input_ids=ids[:, :5], use_cache=True)
        step = model(input_ids=ids[:, 5:], past_key_values=start.past_key_values)
        whole = model(input_ids=ids)
    assert len(start.past_key_values.layers) == _LAYERS
    torch.testing.assert_close(step.logits[:, -1], whole.logits[:, -1], rtol=0.05, atol=0.02)


@with_kernels
@pytest.mark.parametrize("kind", ["int4", "folded"])
def test_forms_of_a_shape_decode(kind: str):
    model = model_of_shape("tiny", _LAYERS)
    variant = random_rival("int4", model) if kind == "int4" else random_variant(model, RandomFold(2, 4, 4, 4, 0.2))
    with variant.within():
        decoder = Decoder(variant.model, variant.prompt(2, 4))
        assert decoder.seconds(3) > 0
    assert decoder.why_not == ""


@with_kernels
def test_what_does_not_run_whole_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    run = steps_of(random_rival("int4", model_of_shape("tiny", 1)), 4, Namespace(steps=2, compile=False, batch=1))
    assert run() > 0
    monkeypatch.setattr(Decoder, "why_not", "its family has none")
    with pytest.raises(RuntimeError, match="do not run whole: its family has none"):
        run()


def test_llama_cpp_may_be_left_one_kind_of_kernels(tmp_path: Path):
    kernels = tmp_path / "libggml-cpu-haswell.so"
    kernels.touch()
    for _ in range(2):
        folder = _only(kernels, tmp_path)
    assert [path.resolve() for path in folder.iterdir()] == [kernels.resolve()]
    with pytest.raises(FileNotFoundError):
        _only(tmp_path / "libggml-cpu-zen4.so", tmp_path)


def test_files_of_a_shape_have_every_matrix_in_q4_0(tmp_path: Path):
    path = tmp_path / "tiny.gguf"
    in_q4_0("tiny", _LAYERS, path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) == 2]
    assert {tensor.tensor_type for tensor in matrices} == {gguf.GGMLQuantizationType.Q4_0}
    assert len(matrices) == 2 + 7 * _LAYERS
    assert tensors["blk.2.ffn_down.weight"].shape.tolist() == [128, 64]
    assert tensors["output.weight"].shape.tolist() == [64, _VOCABULARY]


def test_a_model_in_q4_0_has_16_levels_a_block(tiny_dir: Path):
    model = in_type(load_dense(str(tiny_dir), "bfloat16"), gguf.GGMLQuantizationType.Q4_0)
    head = model.get_output_embeddings().weight
    blocks = head[:8, :32]
    assert max(len(row.unique()) for row in blocks) <= 16


@pytest.mark.parametrize("name", ["int4", "int4-head"])
def test_rounding_every_layer_keeps_the_model_near(name: str, tiny_dir: Path):
    dense = load_dense(str(tiny_dir), "bfloat16")
    windows = split_windows(random_ids(dense, 64, 32, seed=0).flatten(), 32, 0.125)
    ids = random_ids(dense, 2, 16, seed=1)
    with torch.no_grad():
        before = dense(input_ids=ids).logits.float()
        after = rounded(load_dense(str(tiny_dir), "bfloat16"), name, windows)(input_ids=ids).logits.float()
    error = (after - before).square().mean() / before.var()
    assert 0 < float(error) < 0.1
