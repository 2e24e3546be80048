"""Where the time of a decoded token goes, for a model of a shape with random weights in int4 that runs whole.

    python benchmarks/step.py [--shape falcon-7b] [--layers 8] [--fix-rate 0.2] [--position 64]

Every operation of the step is timed by itself, in the step's order, so that weights come from memory as they do in it;
the whole step stands below, and what Python and torch do for a token around it: in a bare loop, by our `generate`
and by that of transformers, which both take their steps whole.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tardis_llm.allocator import keep_freed_memory
from tardis_llm.evaluation.machine import cpu_name, read_bandwidth
from tardis_llm.evaluation.shapes import SHAPES, RandomFold, shaped_model
from tardis_llm.evaluation.speed import step_bytes
from tardis_llm.evaluation.variants import Variant, lay_out_all, random_rival, random_variant
from tardis_llm.runtime.stepping.forward import Steps, cache_for, stepping
from tardis_llm.runtime.stepping.program import Program
from tardis_llm.runtime.stepping.sampling import greedy

_MS = 1e3
_SHORT, _LONG = 4, 20  # tokens that are generated; what both take beside them is the same


def table(variant: Variant, position: int, rounds: int) -> list[tuple[str, float]]:
    """Milliseconds of each kind of operation of a step, of the step, and of a token with all around it: medians."""
    model = variant.model
    with variant.within(), torch.no_grad(), stepping(model) as steps:
        ids, cache = variant.prompt(1, position), cache_for(model)
        assert cache is not None, "the shapes are of families whose steps run whole"
        model(input_ids=ids, past_key_values=cache)
        token, program, ways = ids[:, -1:], Program(model, 1), generates(model, steps, ids)
        hidden = model.get_input_embeddings()(token)

        def whole() -> None:
            program.run(hidden, cache)
            cache.crop(-1)

        def decoded() -> None:
            greedy(steps.following(token, cache))
            cache.crop(-1)

        whole()
        decoded()
        kinds: dict[str, list[float]] = defaultdict(list)
        for _ in range(rounds):
            spent: dict[str, float] = defaultdict(float)
            for kind, run in program.parts(position):
                spent[kind] += _seconds(run)
            for kind, seconds in spent.items():
                kinds[kind].append(seconds)
            kinds["the whole step"].append(_seconds(whole))
            kinds["a token"].append(_seconds(decoded))
            for kind, generate in ways.items():
                kinds[kind].append(_seconds(partial(generate, _LONG)) - _seconds(partial(generate, _SHORT)))
    if steps.why_not:
        raise RuntimeError(f"steps do not run whole: {steps.why_not}")
    medians = {kind: _MS * statistics.median(seconds) for kind, seconds in kinds.items()}
    return [(kind, each / (_LONG - _SHORT if "generate" in kind else 1)) for kind, each in medians.items()]


def generates(model: PreTrainedModel, steps: Steps, ids: Tensor) -> dict[str, Callable[[int], object]]:
    """Ways to generate so many tokens behind ids [1, tokens], by name."""
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def by_transformers(count: int) -> Tensor:
        found: Tensor = model.generate(ids, past_key_values=cache_for(model), max_new_tokens=count, **settings)
        return found

    return {
        "by our generate": lambda count: steps.generate(ids, max_new_tokens=count, **settings),
        "by transformers' generate": by_transformers,
    }


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="falcon-7b", choices=sorted(SHAPES), help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="of the shape (default: %(default)s)")
    parser.add_argument("--fix-rate", type=float, default=0.2, help="of the random fold (default: %(default)s)")
    parser.add_argument("--position", type=int, default=64, help="of the token (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    chosen = parser.parse_args()
    keep_freed_memory()
    model = shaped_model(chosen.shape, chosen.layers)
    fold = RandomFold(2, 4, 4, 4, chosen.fix_rate)
    variants = {"int4": random_rival("int4", model), "folded": random_variant(model, fold)}
    lay_out_all(list(variants.values()))
    bandwidth = read_bandwidth()
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, reads memory at {bandwidth / 1e9:.1f} GB/s")
    for name, variant in variants.items():
        with variant.within():
            reading = _MS * step_bytes(variant.model) / bandwidth
        rows = table(variant, chosen.position, chosen.rounds)
        print(f"\n{chosen.shape}, {chosen.layers} layers, {name}; its weights, without fixed neurons: {reading:.2f} ms")
        for kind, milliseconds in rows:
            print(f"  {kind:25} {milliseconds:8.3f} ms")


if __name__ == "__main__":
    main()
