"""Speed of decoding, measured so that it cannot flatter: variants of one model take turns in one process.

A machine's speed drifts while it is measured, so two models are only compared by runs next to each other: a speed-up is
the median of the ratios of neighbouring runs, given with their quartiles.
"""

from __future__ import annotations

import inspect
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, StaticCache

from ..errors import InvalidInputError
from ..families.sites import FFNSite
from ..families.table import position_limit, vocabulary
from ..ffn.weights import DenseFFN, nbytes
from ..report import Progress
from ..runtime.backend import dense_ffn
from ..runtime.decoding import compile_errors_explained, compiled_call
from ..runtime.linears.lowbit import LowBitLinear
from ..runtime.modules import FoldedFFN
from ..runtime.placing import FoldedDown, KeptLinear, folded_ffns, install, lay_out, uninstall

_BANDWIDTH_BYTES = 2**29  # far more than any cache
_BANDWIDTH_RUNS = 5
#: tokens at once for which a fold is compared with the dense FFN
CROSSOVER_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CROSSOVER_ROUNDS = 9
_LOST = 0.7  # the ratio below which more tokens are not tried


@dataclass(frozen=True)
class Ratio:
    """How many times faster one variant is than another.

    Attributes:
        value: median of the ratios of neighbouring runs.
        low, high: their quartiles.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, slow: Sequence[float], fast: Sequence[float]) -> Ratio:
        """From seconds of runs that took turns, two at least."""
        ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
        low, value, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(value, low, high)


@contextmanager
def folded(model: PreTrainedModel, folds: Sequence[tuple[FFNSite, FoldedFFN]]) -> Iterator[None]:
    """Within the context, the model's FFNs are folded and laid out; dense weights are shared, which moves them."""
    for site, ffn in folds:
        install(model, site, ffn)
    lay_out(model)
    try:
        yield
    finally:
        for site, _ in folds:
            uninstall(model, site)


def take_turns(
    runs: dict[str, Callable[[], float]], rounds: int, progress: Progress, stage: str
) -> dict[str, list[float]]:
    """Seconds of each run by name, `rounds` of each, one after the other; one round before is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        progress(stage, number, rounds + 1)
        for name, run in runs.items():
            taken = run()
            if number:
                seconds[name].append(taken)
    progress(stage, rounds + 1, rounds + 1)
    return seconds


class Decoder:
    """Decodes a batch step by step behind a prompt, always from the same place.

    Args:
        model: in eval mode, as it is when the decoder is made: its cache is what the prompt leaves.
        prompt: [batch, tokens] token ids.
        compiled: run steps as one compiled graph, so many at most; None leaves them to torch's eager mode.

    Raises:
        InvalidInputError: the model cannot be compiled, or its constant cache cannot be cut back.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, prompt: Tensor, compiled: int | None = None) -> None:
        self.model = model
        self._step: Callable[..., Any] = model if compiled is None else compiled_call(model)
        cache = None if compiled is None else _static_cache(model, prompt.shape[1] + compiled)
        start = time.perf_counter()
        output = model(input_ids=prompt, past_key_values=cache, use_cache=True, **_last_logits(model))
        self.prefill = time.perf_counter() - start
        self.cache = output.past_key_values
        self.first = output.logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def seconds(self, steps: int) -> float:
        """Seconds per step over `steps` greedy steps; the cache is then cut back to the prompt.

        One step before is not counted; see `settle`.
        """
        self.settle()
        start = time.perf_counter()
        self._decode(steps, self._step)
        return (time.perf_counter() - start) / steps

    @torch.no_grad()
    def settle(self) -> None:
        """Run one step, which may compile it, and lay weights out anew that another variant had in its own order."""
        with compile_errors_explained():
            self._decode(1, self._step)

    @torch.no_grad()
    def step_eagerly(self) -> None:
        """Run one step in eager mode, where hooks see what happens."""
        self._decode(1, self.model)

    def _decode(self, steps: int, step: Callable[..., Any]) -> None:
        ids = self.first
        for _ in range(steps):
            output = step(input_ids=ids, past_key_values=self.cache, use_cache=True)
            ids = output.logits[:, -1:].argmax(-1)
        _cut(self.cache, steps)


def _static_cache(model: PreTrainedModel, tokens: int) -> StaticCache:
    cache = StaticCache(model.config, tokens)
    if any(layer.is_sliding for layer in cache.layers):
        raise InvalidInputError(
            f"{type(model).__name__} attends within a sliding window, whose compiled steps cannot go back to where the "
            "prompt ended; measure it without --compile."
        )
    return cache


def _cut(cache: Cache, tokens: int) -> None:
    """Take so many tokens off the end of a cache that holds all there were."""
    if isinstance(cache, StaticCache):
        for layer in cache.layers:
            layer.cumulative_length.sub_(tokens)
    else:
        cache.crop(-tokens)


def _last_logits(model: PreTrainedModel) -> dict[str, Any]:
    """The argument that keeps a prompt's logits to its last token, where the model has it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


@dataclass
class Union:
    """Share of the neurons that at least one token of a forward fixes, summed over forwards and FFNs."""

    share: float = 0.0
    forwards: int = 0

    @property
    def mean(self) -> float:
        """Per forward and FFN; 0 before anything ran."""
        return self.share / max(self.forwards, 1)


@contextmanager
def count_union(model: nn.Module) -> Iterator[Union]:
    """Within the context, count what a batch reads together. Every FFN predicts twice then: not for timing."""
    union = Union()

    def count(ffn: FoldedFFN, args: tuple[Tensor, DenseFFN]) -> None:
        x, dense = args
        fixed = ffn.fixed(x.reshape(-1, x.shape[-1]).contiguous(), dense)
        union.share += float(fixed.any(0).float().mean())
        union.forwards += 1

    with ExitStack() as stack:
        for ffn in folded_ffns(model).values():
            stack.callback(ffn.register_forward_pre_hook(partial(count)).remove)
        yield union


def crossover(model: PreTrainedModel, progress: Progress) -> dict[int, Ratio]:
    """How many times faster than dense a model's middle folded FFN is, by the number of tokens at once.

    Args:
        model: folded, its dense FFN weights resident; its inputs are those that random tokens give.
        progress: told how far it is.
    """
    ffn = list(folded_ffns(model).values())[len(folded_ffns(model)) // 2]
    x, weights = _call_of(model, ffn, CROSSOVER_TOKENS[-1])
    dense = replace(weights, w1=weights.w1.contiguous(), w2=weights.w2.contiguous())
    by_neuron = replace(dense, w2=weights.w2.T.contiguous().T)
    found: dict[int, Ratio] = {}
    with torch.inference_mode():
        for count in CROSSOVER_TOKENS:
            some = x[:count].contiguous()
            runs = {"dense": partial(dense_ffn, some, dense), "folded": partial(ffn, some, by_neuron)}
            timed: dict[str, Callable[[], float]] = {name: partial(_seconds, run) for name, run in runs.items()}
            taken = take_turns(timed, _CROSSOVER_ROUNDS, progress, f"crossover, {count} tokens")
            found[count] = Ratio.of(taken["dense"], taken["folded"])
            if found[count].value < _LOST:
                break
    return found


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def pays_up_to(ratios: dict[int, Ratio]) -> int:
    """The most tokens up to which folding was faster throughout; 0 if it never was."""
    most = 0
    for count, ratio in sorted(ratios.items()):
        if ratio.value <= 1:
            break
        most = count
    return most


def _call_of(model: PreTrainedModel, ffn: FoldedFFN, tokens: int) -> tuple[Tensor, DenseFFN]:
    """What a folded FFN gets when the model sees so many random tokens: x [tokens, d], and the dense weights."""
    calls: list[tuple[Tensor, DenseFFN]] = []
    handle = ffn.register_forward_pre_hook(lambda module, args: calls.append(args))
    length = min(tokens, position_limit(model.config) or tokens)
    shape = -(-tokens // length), length
    ids = torch.randint(vocabulary(model), shape, generator=torch.Generator().manual_seed(4))
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    x, dense = calls[0]
    return x.reshape(-1, x.shape[-1])[:tokens], dense


def step_bytes(model: PreTrainedModel, share: float = 0.0) -> float:
    """Bytes of weights that a step of decoding reads: all but embeddings, and fallback weights of fixed neurons only.

    Args:
        model: dense or folded.
        share: of the neurons, that at least one token of the step fixes.
    """
    head = model.get_output_embeddings()
    seen: set[int] = set()

    def read(module: nn.Module) -> float:
        if isinstance(module, FoldedDown):
            return _ffn_bytes(module, share)
        if isinstance(module, LowBitLinear):
            return module.nbytes
        total = 0.0
        for parameter in module.parameters(recurse=False):
            embedding = isinstance(module, nn.Embedding) and (head is None or module.weight is not head.weight)
            if not embedding and parameter.data_ptr() not in seen:
                seen.add(parameter.data_ptr())
                total += parameter.nbytes
        children = (child for child in module.children() if not isinstance(child, FoldedFFN | KeptLinear))
        downs = (child for child in module.children() if isinstance(child, FoldedDown))
        return total + sum(map(read, [*children, *downs]))

    return read(model)


def _ffn_bytes(down: FoldedDown, share: float) -> float:
    """Bytes that a folded FFN reads as it lies in memory, if it fixes this share of the neurons, or none if exact."""
    dense, down_bias = down.dense, nbytes(down.bias)
    return dense.nbytes if down.ffn.exact else down.ffn.current.beside(dense).touched(share) + down_bias


def cpu_name() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def read_bandwidth() -> float:
    """Bytes per second at which this machine reads memory, with torch's threads: the best of a few sums."""
    data = torch.ones(_BANDWIDTH_BYTES // 4, dtype=torch.float32)
    best = 0.0
    for _ in range(_BANDWIDTH_RUNS):
        start = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - start))
    return best
