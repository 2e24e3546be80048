"""From sound files to windows of log-mel features: read, brought to one channel and 16 kHz, cut, and transformed."""

from __future__ import annotations

import importlib
import importlib.util
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InvalidInputError
from ..families.table import sound_of
from .speech import check_features
from .text import spread

Samples = NDArray[np.float32]


class Extractor(Protocol):
    """The part of a feature extractor of transformers that is used here."""

    sampling_rate: int
    n_samples: int

    def __call__(self, raw_speech: list[Samples], sampling_rate: int, return_tensors: str) -> Any:
        """Features of windows of samples, each padded with silence to `n_samples`."""
        ...


#: endings of files with features that are ready: a tensor [windows, mels, frames], or [mels, frames]
_READY = (".npy", ".pt")
_LEAST = 0.5  # seconds; less is no speech
_CONVERT = "Convert it: ffmpeg -i {name} -ar {rate} -ac 1 out.wav, or sox {name} -r {rate} -c 1 -b 16 out.wav."


def read_audio(
    sources: Sequence[str | Path], model: PreTrainedModel, extractor: Extractor, positions: int | None = None
) -> Tensor:
    """Windows of features [windows, mels, frames] of files of speech, as a model takes them.

    Files are cut into windows one after the other, and the last window of each is padded with silence. Tensors in .npy
    and .pt files are taken as they are.

    Args:
        sources: files: .wav in PCM, whatever else the package `soundfile` reads, or log-mel features as .npy or .pt.
        model: of speech.
        extractor: the model's, which makes the features.
        positions: take evenly spread windows, in which the encoder has so many positions in all, but two windows at
            least; default: all of them.

    Raises:
        InvalidInputError: a file cannot be read, is too short, has another rate and there is nothing to convert it
            with, or features do not fit the model.
    """
    windows = torch.cat([_read(Path(source), model, extractor) for source in sources])
    count = None if positions is None else max(2, positions // sound_of(model.config).positions)
    return windows[spread(len(windows), count)]


def _read(path: Path, model: PreTrainedModel, extractor: Extractor) -> Tensor:
    """Windows of features [windows, mels, frames] of one file. Errors as `read_audio`."""
    if not path.is_file():
        raise InvalidInputError(f"there is no file {path}; give files of speech, such as .wav.")
    if path.suffix in _READY:
        features = _ready(path)
    else:
        features = _features(_samples(path, extractor.sampling_rate), path, extractor)
    check_features(model, features)
    return features


def _ready(path: Path) -> Tensor:
    """Features from a file that holds them."""
    try:
        found = torch.load(path, weights_only=True) if path.suffix == ".pt" else torch.from_numpy(np.load(path))
    except Exception as error:  # the libraries raise many kinds, all for the same reason
        raise InvalidInputError(f"{path} holds no tensor that can be read ({error}).") from error
    if not isinstance(found, Tensor):
        raise InvalidInputError(f"{path} holds a {type(found).__name__}; give a tensor [windows, mels, frames].")
    return found[None] if found.dim() == 2 else found


def _features(samples: Samples, path: Path, extractor: Extractor) -> Tensor:
    """Features [windows, mels, frames] of samples."""
    rate, size = extractor.sampling_rate, extractor.n_samples
    pieces = [samples[start : start + size] for start in range(0, len(samples), size)]
    whole = [piece for piece in pieces if len(piece) >= _LEAST * rate]
    if not whole:
        raise InvalidInputError(
            f"{path} has {len(samples) / rate:.2f} seconds of sound; give {_LEAST} seconds of speech at least."
        )
    features: Tensor = extractor(whole, sampling_rate=rate, return_tensors="pt").input_features
    return features


def _samples(path: Path, rate: int) -> Samples:
    """[samples] of a file, in one channel and at a rate."""
    samples, found = _decode(path, rate)
    return _at_rate(samples.mean(1), found, rate, path)


def _decode(path: Path, rate: int) -> tuple[Samples, int]:
    """Samples [samples, channels] from -1 to 1, and how many there are in a second."""
    try:
        if importlib.util.find_spec("soundfile") is not None:
            found: tuple[Samples, int] = importlib.import_module("soundfile").read(
                path, dtype="float32", always_2d=True
            )
            return found
        with wave.open(str(path)) as file:
            return _pcm(file), file.getframerate()
    except Exception as error:  # the libraries raise many kinds, all for the same reason
        convert = _CONVERT.format(name=path.name, rate=rate)
        raise InvalidInputError(
            f"{path} cannot be read as sound ({error}). Without the package soundfile, TARDIS reads .wav in PCM only. "
            f"{convert}"
        ) from error


def _pcm(file: Any) -> Samples:
    """Samples [samples, channels] from -1 to 1 of a file of the module `wave`."""
    width, raw = file.getsampwidth(), file.readframes(file.getnframes())
    if width == 1:  # the one that has no sign
        values = np.frombuffer(raw, np.uint8).astype(np.float32) / 128 - 1
    elif width in (2, 4):
        values = np.frombuffer(raw, f"<i{width}").astype(np.float32) / 2 ** (8 * width - 1)
    else:
        raise InvalidInputError(f"samples have {8 * width} bits, and 8, 16 or 32 are read")
    return np.asarray(values.reshape(-1, file.getnchannels()), np.float32)


def _at_rate(samples: Samples, found: int, rate: int, path: Path) -> Samples:
    """Samples at another rate, by the package `scipy`."""
    if found == rate:
        return samples
    if importlib.util.find_spec("scipy") is None:
        convert = _CONVERT.format(name=path.name, rate=rate)
        raise InvalidInputError(f"{path} has {found} samples a second, and the model takes {rate}. {convert}")
    resampled = importlib.import_module("scipy.signal").resample_poly(samples, rate, found)
    return np.asarray(resampled, np.float32)
