"""Whisper: both lists of blocks fold, on speech and on the dense model's own transcripts of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Result, assert_refused
from marks import long
from models import END, record, tiny_model, tokens
from safetensors.torch import load_file, save_file
from speech import (
    DECODER_LAYERS,
    ENCODER_LAYERS,
    FRAMES,
    MELS,
    POSITIONS,
    RATE,
    START,
    TOKENS,
    features,
    follow_script,
    save_wav,
    speech,
    speech_tokenizer,
    tiny_extractor,
    tiny_whisper,
)
from synthetic import everything_fixed, half_fixed, nothing_fixed
from torch import Tensor
from transformers import AutoModelForSpeechSeq2Seq, WhisperForConditionalGeneration, pipeline

from tardis_llm import Family, FoldConfig, FoldReport, fold, save_folded
from tardis_llm.calibration.audio import read_audio
from tardis_llm.calibration.blocks import run_block, run_encoder_end, run_head
from tardis_llm.calibration.inputs import Speech
from tardis_llm.calibration.speech import hear, transcribe
from tardis_llm.calibration.stream import Stream
from tardis_llm.errors import CheckpointError, InvalidInputError
from tardis_llm.families.sites import find_ffns, named_blocks
from tardis_llm.ffn.weights import DenseFFN, FoldedWeights
from tardis_llm.pipeline.session import sound_weights
from tardis_llm.report import LayerReport
from tardis_llm.runtime.backend import dense_ffn
from tardis_llm.runtime.modules import FoldedFFN
from tardis_llm.runtime.placing import folded_ffns, install

SETTINGS = FoldConfig(reduction=0.5, predictor_bits=1, probe_tokens=256)
QUICK = ("--predictor-bits", 1, "--reduction", 0.5, "--probe-tokens", 256)
PREFIXES = [f"model.encoder.layers.{i}" for i in range(ENCODER_LAYERS)]
PREFIXES += [f"model.decoder.layers.{i}" for i in range(DECODER_LAYERS)]


def heard(padding: int = 0) -> Speech:
    """Four windows of speech with tokens of any text, the last `padding` of which are no text in two of them."""
    ids = tokens(4, 12)
    ids[:, 0] = START
    return Speech(features()[:4], ids, torch.tensor([12 - padding, 12, 12 - padding, 12]))


def put(model: WhisperForConditionalGeneration, made: Callable[[DenseFFN], FoldedWeights]) -> None:
    """Fold every FFN into a fold that is made without calibration."""
    for site in find_ffns(model):
        install(model, site, FoldedFFN(made(sound_weights(site).in_fp32())))


def stream(model: WhisperForConditionalGeneration, inputs: Speech, scratch: Path) -> Stream:
    """Speech at the start of a model, in batches of one window in the encoder."""
    return Stream(model, inputs, scratch, 1e9, batch_tokens=POSITIONS)


@torch.no_grad()
def logits(model: WhisperForConditionalGeneration) -> Tensor:
    """What the model makes of `heard`."""
    return model(input_features=heard().features, decoder_input_ids=heard().ids).logits


@pytest.fixture(scope="module")
def whisper_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense random Whisper with its tokenizer and feature extractor."""
    directory = tmp_path_factory.mktemp("whisper")
    tiny_whisper().save_pretrained(directory)
    speech_tokenizer().save_pretrained(directory)
    tiny_extractor().save_pretrained(directory)
    return directory


def save(directory: Path, made: Callable[[DenseFFN], FoldedWeights]) -> WhisperForConditionalGeneration:
    """A Whisper whose folds are made without calibration, saved with all that belongs to it."""
    model = tiny_whisper()
    put(model, made)
    layers = [LayerReport(name, 2, 0.5, 0.1, 0.1, None, None, 4, 2.0, 6) for name in folded_ffns(model)]
    save_folded(model, FoldReport(layers), directory, speech_tokenizer(), extractor=tiny_extractor())
    return model


def test_the_ffns_of_encoder_and_decoder_are_found_and_numbered_through():
    model = tiny_whisper()
    sites = find_ffns(model)
    assert [site.prefix for site in sites] == list(named_blocks(model)) == PREFIXES
    assert [site.index for site in sites] == list(range(ENCODER_LAYERS + DECODER_LAYERS))
    inputs = heard()
    for site in sites:
        given = {"input_features": inputs.features, "decoder_input_ids": inputs.ids}
        (x, _), (_, y) = record(model, [site.up, site.down], **given)
        torch.testing.assert_close(dense_ffn(x, site.weights()), y, rtol=1e-4, atol=1e-5)
        assert y.std() > 0.1


def test_blocks_run_one_by_one_reproduce_the_whole_model():
    model, inputs = tiny_whisper(), heard()
    blocks = list(named_blocks(model).values())
    _, out = record(model, blocks, input_features=inputs.features, decoder_input_ids=inputs.ids)
    hidden = None
    for index, wanted in enumerate(out):
        hidden = run_block(model, index, inputs, hidden=hidden)
        torch.testing.assert_close(hidden, wanted, rtol=1e-5, atol=1e-5)
        if index == ENCODER_LAYERS - 1:
            inputs, hidden = inputs.with_encoded(run_encoder_end(model, inputs, hidden)), None
    torch.testing.assert_close(run_head(model, inputs, hidden).logits, logits(model), rtol=1e-5, atol=1e-5)
    assert list(named_blocks(model).values()) == blocks


@torch.no_grad()
def test_a_stream_keeps_the_output_of_the_encoder_as_it_is_folded_for_the_decoder(tmp_path: Path):
    model, inputs = tiny_whisper(), heard()
    for site in find_ffns(model)[:ENCODER_LAYERS]:
        install(model, site, FoldedFFN(nothing_fixed(sound_weights(site).in_fp32())))
    run = stream(model, inputs, tmp_path)
    for _ in range(ENCODER_LAYERS):
        assert run.inputs.encoded is None
        run.advance()
    other = stream(tiny_whisper(), inputs, tmp_path)
    seen = [other.observe(site, advance=True) for site in find_ffns(other.model)[:ENCODER_LAYERS]][-1]
    hidden = run_encoder_end(other.model, inputs, seen.after.view(4, POSITIONS, -1))
    torch.testing.assert_close(other.inputs.encoded, hidden, rtol=1e-5, atol=1e-5)  # and what was seen is still there
    expected = model.model.encoder(inputs.features).last_hidden_state
    torch.testing.assert_close(run.inputs.encoded, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, tiny_whisper().model.encoder(inputs.features).last_hidden_state, atol=0.1)


def test_padding_behind_transcripts_is_neither_observed_nor_counted_in_the_loss(tmp_path: Path):
    model, padded = tiny_whisper(), heard(padding=5)
    other = replace(padded, ids=torch.where(padded.spoken, padded.ids, 7))
    seen = []
    for inputs in (padded, other):
        run = stream(model, inputs, tmp_path)
        assert run.loss() == pytest.approx(expected_loss(model, padded), rel=1e-5)
        sites = find_ffns(model)
        assert len(run.observe(sites[0]).x) == 4 * POSITIONS  # the encoder hears silence, too
        for _ in range(ENCODER_LAYERS):
            run.advance()
        assert run.loss() == pytest.approx(expected_loss(model, padded), rel=1e-5)
        assert torch.equal(run.ffn_inputs(sites[ENCODER_LAYERS]), run.observe(sites[ENCODER_LAYERS]).x)
        seen.append(run.observe(sites[ENCODER_LAYERS], advance=True))
        assert run.position == ENCODER_LAYERS + 1
    one, two = seen
    assert len(one.x) == len(one.y) == len(one.after) == len(one.weight) == 2 * 12 + 2 * 7
    for name in ("x", "y", "after", "weight"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name))


@torch.no_grad()
def expected_loss(model: WhisperForConditionalGeneration, inputs: Speech) -> float:
    """Cross-entropy of the tokens of transcripts, by the whole model."""
    out = model(input_features=inputs.features, decoder_input_ids=inputs.ids).logits
    losses = [
        F.cross_entropy(row[: n - 1], ids[1:n], reduction="none")
        for row, ids, n in zip(out, inputs.ids, inputs.lengths, strict=True)
    ]
    return float(torch.cat(losses).mean())


def test_a_transcript_is_what_the_model_itself_writes_down_with_its_first_token_and_its_end():
    model, heard = tiny_whisper(), features()[:6]
    texts = [list(range(10 * i + 1, 10 * i + 1 + length)) for i, length in enumerate((3, 5, 1, 5, 8, TOKENS - 1))]
    follow_script(model, heard, texts)
    whole = [[START, *text, END] for text in texts[:-1]] + [[START, *texts[-1]]]  # no room for the end of the last
    assert [transcribe(model, window[None])[0].tolist() for window in heard] == whole
    found = []
    for some in hear(model, heard, 0.25):
        for ids, length, spoken in zip(some.ids.tolist(), some.lengths, some.spoken, strict=True):
            assert spoken.sum() == length and ids[length:] == [ids[length - 1]] * (TOKENS - length)
            found.append(ids[:length])
    assert sorted(found) == sorted(whole)


def test_encoder_and_decoder_fold_within_the_budget_and_load_as_saved(tmp_path: Path):
    model = tiny_whisper()
    report = fold(model, features(), SETTINGS)
    assert [layer.prefix for layer in report.layers] == list(folded_ffns(model)) == PREFIXES
    assert report.reduction == pytest.approx(0.5, abs=0.02)
    assert all(layer.error < 0.1 for layer in report.layers)
    save_folded(model, report, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["TardisWhisperForConditionalGeneration"]
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    assert list(folded_ffns(loaded)) == PREFIXES
    assert torch.equal(logits(loaded), logits(model))


@long
def test_blocks_of_both_lists_may_be_chosen_and_the_decoder_alone_is_folded():
    model = tiny_whisper()
    fold(model, features(), replace(SETTINGS, layers=(1, ENCODER_LAYERS + 1)))
    assert list(folded_ffns(model)) == [PREFIXES[1], PREFIXES[ENCODER_LAYERS + 1]]


@long
def test_a_resumed_fold_has_the_same_layers(tmp_path: Path):
    first = fold(tiny_whisper(), features(), SETTINGS, tmp_path)
    assert fold(tiny_whisper(), features(), SETTINGS, tmp_path, resume=True).layers == first.layers
    with pytest.raises(InvalidInputError, match=r"text\.sha256 was"):
        fold(tiny_whisper(), features().flip(0), SETTINGS, tmp_path, resume=True)


def test_a_checkpoint_that_lacks_a_tensor_or_claims_too_many_blocks_is_refused(tmp_path: Path):
    save(tmp_path, half_fixed)
    weights = load_file(tmp_path / "model.safetensors")
    lost = "model.decoder.layers.1.tardis.fold.weight"
    save_file(
        {name: part for name, part in weights.items() if name != lost}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match=f"lack 1 tensors, the first is {lost}"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "decoder_layers": 10**6}))
    with pytest.raises(CheckpointError, match="1000000 blocks"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)


def test_the_pipeline_of_transformers_writes_down_what_the_reference_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save(tmp_path, half_fixed)
    text = asr(AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path).eval())
    monkeypatch.setenv("TARDIS_KERNELS", "off")
    assert asr(AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path).eval()) == text != asr(tiny_whisper())


def test_with_everything_fixed_the_pipeline_writes_down_what_the_dense_model_does():
    model = tiny_whisper()
    text = asr(model)
    put(model, everything_fixed)
    assert asr(model) == text


def asr(model: WhisperForConditionalGeneration) -> str:
    """The transcript of a second of speech by the pipeline of transformers."""
    parts = {"tokenizer": speech_tokenizer(), "feature_extractor": tiny_extractor()}
    found = pipeline("automatic-speech-recognition", model=model, **parts)(np.array(speech()[:RATE]))
    return found["text"]


def test_the_command_line_folds_and_writes_down(whisper_dir: Path, tardis: Callable[..., Result], tmp_path: Path):
    audio, out = save_wav(tmp_path / "long.wav", 39.7), tmp_path / "out"
    result = tardis("fold", whisper_dir, "-o", out, "--audio", audio, *QUICK, "--force")
    assert result.code == 0
    assert "calibration: 40 windows of speech, 1,280 tokens in their transcripts" in result.err
    assert "held-out perplexity" in result.out and f"next: tardis generate {out} FILE" in result.err
    short = save_wav(tmp_path / "short.wav", 2.5)
    found = tardis("generate", out, short, "--json")
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(out).eval()
    ids = transcribe(loaded, read_audio([short], loaded, tiny_extractor()))
    said = "".join(speech_tokenizer().decode(each, skip_special_tokens=True) for each in ids).strip()
    assert len(ids) == 3
    # the logits of a random model are close together: kernels and reference may part at the end
    assert json.loads(found.out)["text"][:40] == said[:40]
    assert tardis("generate", whisper_dir, short).out
    assert (out / "preprocessor_config.json").is_file()


def test_features_in_files_are_taken_as_they_are(tmp_path: Path):
    model = tiny_whisper()
    np.save(tmp_path / "some.npy", features()[:3].numpy())
    torch.save(features()[3], tmp_path / "one.pt")
    files = [tmp_path / "some.npy", tmp_path / "one.pt"]
    assert torch.equal(read_audio(files, model, tiny_extractor()), features()[:4])
    assert torch.equal(read_audio(files, model, tiny_extractor(), positions=2 * POSITIONS), features()[:4:2])


def test_sound_at_another_rate_is_resampled(tmp_path: Path):
    read = read_audio([save_wav(tmp_path / "cd.wav", 1, rate=44_100)], tiny_whisper(), tiny_extractor())
    assert read.shape == (1, MELS, FRAMES)


def test_without_scipy_sound_at_another_rate_is_refused_with_what_converts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    audio = save_wav(tmp_path / "cd.wav", 1, rate=44_100)
    with pytest.raises(InvalidInputError, match=r"44100 samples a second.*ffmpeg -i cd\.wav -ar 16000.*sox"):
        read_audio([audio], tiny_whisper(), tiny_extractor())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(40, MELS + 1, FRAMES), rf"\[windows, {MELS}, {FRAMES}\]"),
        (torch.zeros(40, MELS, FRAMES - 1), "have 99 frames, and this model takes 100"),
        (torch.zeros(1, MELS, FRAMES), "less than two windows"),
        (features()[:2], r"tokens in the transcripts .* are too few .* need 256 at least"),
        (tokens(40, 32), "hears speech, and text is given"),
    ],
)
def test_what_whisper_does_not_take_is_refused(given: Tensor, message: str):
    with pytest.raises(InvalidInputError, match=message):
        fold(tiny_whisper(), given, SETTINGS)


def test_speech_is_refused_by_a_model_of_text():
    with pytest.raises(InvalidInputError, match="GPT2LMHeadModel reads text, and speech is given"):
        fold(tiny_model("gpt2"), features(), SETTINGS)


def test_a_family_with_an_encoder_cannot_be_named():
    family = Family("whisper", "decoder.layers", "", "fc1", "activation_fn", "fc2", encoder="encoder.layers")
    with pytest.raises(InvalidInputError, match="cannot be named"):
        fold(tiny_whisper(), features(), SETTINGS, family=family)


def test_the_command_line_says_what_kind_of_input_a_model_takes(
    whisper_dir: Path, tiny_dir: Path, tiny_text: Path, tardis: Callable[..., Result], tmp_path: Path
):
    audio, out = save_wav(tmp_path / "short.wav", 0.2), ("-o", tmp_path / "out")
    noise = tmp_path / "noise.wav"
    noise.write_bytes(b"no sound")
    assert_refused(tardis("fold", whisper_dir, *out, "--text", tiny_text), "hears speech, and not text: give --audio")
    assert_refused(tardis("fold", whisper_dir, *out), "give --audio FILE")
    assert_refused(tardis("fold", tiny_dir, *out, "--audio", audio), "reads text, and --audio is for models of speech")
    assert_refused(tardis("fold", whisper_dir, *out, "--audio", audio), "has 0.20 seconds of sound")
    assert_refused(tardis("generate", whisper_dir, noise), "cannot be read as sound")
    assert_refused(tardis("generate", whisper_dir, "Hello"), "there is no file Hello")
    assert_refused(tardis("generate", whisper_dir, audio, "--temperature", 1), "leave out --temperature")
    assert_refused(tardis("eval", whisper_dir, "--text", tiny_text), "hears speech, and text is given")
