"""A small random Whisper, its feature extractor and tokenizer, and speech: of espeak-ng, or vowels without it."""

from __future__ import annotations

import shutil
import subprocess
import wave
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from models import END, HEADS, HIDDEN, INTERMEDIATE, VOCAB, randomise, tiny_tokenizer
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

RATE, MELS, SECONDS, TOKENS = 16_000, 16, 1, 32
#: frames of a window, and positions that the encoder makes of them
FRAMES, POSITIONS = 100 * SECONDS, 50 * SECONDS
START = 257  # the token that every transcript begins with
ENCODER_LAYERS, DECODER_LAYERS = 3, 2
_SENTENCE = "The quick brown fox jumps over the lazy dog, while five wizards pack a box with liquor jugs. "
_VOWELS = ((730, 1090), (270, 2290), (300, 870), (530, 1840), (570, 840))  # Hz of the first two formants


def tiny_whisper(seed: int = 0, dtype: torch.dtype = torch.float32) -> WhisperForConditionalGeneration:
    """A random Whisper in eval mode: 3 encoder and 2 decoder blocks, windows of one second, up to 32 tokens."""
    config = WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=MELS,
        d_model=HIDDEN,
        encoder_layers=ENCODER_LAYERS,
        decoder_layers=DECODER_LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=INTERMEDIATE,
        decoder_ffn_dim=INTERMEDIATE,
        max_source_positions=POSITIONS,
        max_target_positions=TOKENS,
        decoder_start_token_id=START,
        pad_token_id=END,
        bos_token_id=END,
        eos_token_id=END,
        begin_suppress_tokens=None,
    )
    with torch.random.fork_rng(devices=[]):
        model = WhisperForConditionalGeneration(config)
    randomise(model, seed)
    # the generator decides which window ends early: some do, so that there is padding
    model.generation_config.max_length = TOKENS
    return model.to(dtype).eval()


def follow_script(model: WhisperForConditionalGeneration, windows: Tensor, texts: list[list[int]]) -> None:
    """Make a model write down `texts[i]`, between its first token and its end, where it hears `windows[i]`.

    What a random model writes down by itself depends on rounding, and so on the processor.
    """
    said: list[list[int]] = []

    def listen(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        heard = args[0] if args else kwargs["input_features"]
        said[:] = [[*texts[number_of(window)], END] for window in heard]

    def number_of(window: Tensor) -> int:
        return next(i for i, each in enumerate(windows) if torch.equal(each, window))

    def write(head: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        following = torch.tensor([text.pop(0) if text else END for text in said])
        return F.one_hot(following, logits.shape[-1]).to(logits.dtype)[:, None].expand_as(logits)

    model.model.encoder.register_forward_pre_hook(listen, with_kwargs=True)
    model.proj_out.register_forward_hook(write)


def tiny_extractor() -> WhisperFeatureExtractor:
    """What makes the features of `tiny_whisper`."""
    return WhisperFeatureExtractor(feature_size=MELS, sampling_rate=RATE, chunk_length=SECONDS)


def speech_tokenizer() -> WhisperTokenizer:
    """The byte tokenizer as one of Whisper; the last tokens of the vocabulary are no text."""
    vocabulary = tiny_tokenizer().get_vocab()
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{i}|>" for i in range(START, VOCAB)]})
    return tokenizer


@cache
def features(windows: int = 40) -> Tensor:
    """[windows, mels, frames] of speech."""
    size = RATE * SECONDS
    samples = np.resize(speech(), windows * size)
    pieces = [samples[start : start + size] for start in range(0, len(samples), size)]
    return tiny_extractor()(pieces, sampling_rate=RATE, return_tensors="pt").input_features


def save_wav(path: Path, seconds: float, rate: int = RATE) -> Path:
    """Write some seconds of speech in PCM of 16 bits."""
    samples = np.resize(speech(), int(seconds * rate))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32_767).astype("<i2").tobytes())
    return path


@cache
def speech() -> NDArray[np.float32]:
    """Speech from -1 to 1 at 16 kHz."""
    return _spoken() if shutil.which("espeak-ng") else _vowels()


def _spoken() -> NDArray[np.float32]:
    """What espeak-ng says, whose 22,050 samples a second are taken for 16,000: a slow, deep voice."""
    said = subprocess.run(
        ["espeak-ng", "--stdout", "-s", "170", _SENTENCE * 3], capture_output=True, check=True, timeout=60
    ).stdout
    return np.frombuffer(said[44:], "<i2").astype(np.float32) / 32_768


def _vowels() -> NDArray[np.float32]:
    """Harmonics of a voice under the formants of vowels, a fifth of a second each, with gaps."""
    time = np.arange(RATE // 5) / RATE
    pieces = []
    for number, pitch in enumerate(np.linspace(90, 180, 60)):
        overtones = pitch * np.arange(1, 40)
        gain = sum(1 / (1 + ((overtones - formant) / 80) ** 2) for formant in _VOWELS[number % len(_VOWELS)])
        wave_ = (gain[:, None] * np.sin(2 * np.pi * overtones[:, None] * time)).sum(0) * np.hanning(len(time))
        pieces += [wave_ / np.abs(wave_).max(), np.zeros(RATE // 20)]
    return np.concatenate(pieces).astype(np.float32)
