"""vLLM's own features with a folded model: each gives the text that the model gives without it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import (
    MIXED,
    STACKED,
    STATIC,
    assert_same_text,
    complete,
    engine,
    environment,
    generated,
    greedy,
    needs_vllm,
    save_tiny,
)
from folds import SETTINGS
from marks import in_turns, long, mostly_long
from models import tokens
from transformers import PreTrainedModel

from tardis_llm import FoldConfig
from tardis_llm.checkpoint.folded import record_crossover
from tardis_llm.errors import CheckpointError, InvalidInputError
from tardis_llm.pipeline.linears import low_bit_copy
from tardis_llm.runtime.placing import folded_ffns
from tardis_llm.runtime.prefill import Prefill

pytestmark = needs_vllm

Tiny = tuple[Path, PreTrainedModel]


def test_requests_that_come_while_others_run_get_the_text_that_they_get_alone(tiny_gpt2: Tiny):
    directory, model = tiny_gpt2
    ids = tokens(6, 24)
    lengths = [24, 3, 17, 9, 20, 12]
    expected = [greedy(model, row[None, :size], 12)[0] for row, size in zip(ids, lengths, strict=True)]
    with engine(directory, max_num_seqs=4) as llm:  # two have to wait
        assert arriving(llm, [row[:size].tolist() for row, size in zip(ids, lengths, strict=True)], 12) == expected


def arriving(llm: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """`count` tokens behind each prompt, where each request comes two steps after the one before."""
    from vllm import SamplingParams

    running, done = llm.llm_engine, {}
    for step in range(1000):
        if step % 2 == 0 and step // 2 < len(prompts):
            settings = SamplingParams(max_tokens=count, ignore_eos=True, temperature=0.0)
            running.add_request(str(step // 2), {"prompt_token_ids": prompts[step // 2]}, settings)
        done.update({int(out.request_id): list(out.outputs[0].token_ids) for out in running.step() if out.finished})
        if len(done) == len(prompts):
            break
    return [done[number] for number in range(len(prompts))]


def test_prompts_that_are_read_in_chunks(tiny_gpt2: Tiny):
    directory, model = tiny_gpt2
    ids = tokens(3, 70)
    chunked = {"enable_chunked_prefill": True, "max_num_batched_tokens": 16, "max_num_seqs": 8}
    with engine(directory, **chunked) as llm:
        assert complete(llm, ids, 12) == greedy(model, ids, 12)


def test_more_tokens_at_once_than_the_kernels_take(tiny_gpt2: Tiny):
    directory, model = tiny_gpt2
    ids = tokens(5, 71)  # 355 tokens in one step
    with engine(directory, max_num_batched_tokens=512) as llm:
        assert complete(llm, ids, 12) == greedy(model, ids, 12)


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A fold that fixes so little that dense prompts lead to other words, and that pays for up to 4 tokens."""
    directory = tmp_path_factory.mktemp("coarse")
    model = save_tiny("gpt2", directory, replace(SETTINGS, reduction=0.8, predictor_bits=1))
    record_crossover(directory, 4)
    model.config.quantization_config.crossover = 4
    return directory, model


# three requests are decoded in folded calls, five in dense ones where that is up to the number of tokens
@pytest.mark.parametrize(("requests", "prefill"), in_turns([5, 3], ["auto", "folded", "exact"], every=2))
def test_prompts_go_where_they_go_in_transformers(prefill: Prefill, requests: int, coarse: Tiny):
    directory, model = coarse
    ids = tokens(requests, 12)
    expected = greedy(model, ids, 12, prefill)
    with engine(directory, prefill=prefill) as llm:
        assert complete(llm, ids, 12) == expected
    if prefill != "folded":
        assert expected != greedy(model, ids, 12)


def test_dense_prompts_in_chunks_are_what_they_are_in_one(coarse: Tiny):
    directory, model = coarse
    ids = tokens(3, 70)
    chunked = {"enable_chunked_prefill": True, "max_num_batched_tokens": 16, "max_num_seqs": 4}
    with engine(directory, prefill="exact", **chunked) as llm:
        texts = [complete(llm, row[None], 12)[0] for row in ids]  # one by one: chunks would be among decoded tokens
    assert texts == [greedy(model, row[None], 12, "exact")[0] for row in ids]


def test_prompts_through_low_bit_weights_go_where_they_go_in_transformers(tmp_path: Path):
    model = save_tiny("gpt2", tmp_path, STACKED)
    ids = tokens(3, 12)
    expected = greedy(model, ids, 12, "exact")
    with engine(tmp_path, prefill="exact") as llm:
        assert complete(llm, ids, 12) == expected
    assert expected != greedy(model, ids, 12)


def test_a_mode_that_cannot_be_is_refused(tmp_path: Path):
    save_tiny("gpt2", tmp_path, STACKED)
    with pytest.raises(InvalidInputError, match="give one of folded, exact, auto"), engine(tmp_path, prefill="dense"):
        pass


def test_exact_prompts_of_a_static_fold_are_refused(tmp_path: Path):
    save_tiny("gpt2", tmp_path, STATIC)
    with pytest.raises(InvalidInputError, match="this fold is static"), engine(tmp_path, prefill="exact"):
        pass


def test_prompts_whose_beginning_is_in_the_cache(tiny_gpt2: Tiny):
    from vllm import SamplingParams

    directory, model = tiny_gpt2
    ids = tokens(1, 70)
    other = torch.cat([ids[:, :64], tokens(1, 6).flip(1)], 1)
    with engine(directory, enable_prefix_caching=True, block_size=32) as llm:
        assert complete(llm, ids, 12) == greedy(model, ids, 12)
        settings = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.0)
        output = llm.generate({"prompt_token_ids": other[0].tolist()}, settings, use_tqdm=False)[0]
    assert output.num_cached_tokens == 64
    assert list(output.outputs[0].token_ids) == greedy(model, other, 12)[0]


COMPILED: dict[str, tuple[str, FoldConfig, int | None]] = {
    "dense": ("gpt2", SETTINGS, None),
    "few bits": ("gpt2", STACKED, 4),
    "gated": ("llama_biased", SETTINGS, None),
    "gated in few bits": ("gemma2", STACKED, 8),
    "static": ("gpt2", STATIC, None),
    "gated static": ("llama_biased", STATIC, 8),
    "mixed": ("gpt2", MIXED, 8),
    "gated mixed": ("llama_biased", MIXED, None),
}


@pytest.mark.parametrize("kind", mostly_long(COMPILED, ["dense", "gated in few bits"]))
def test_compiled_by_torch(kind: str, tmp_path: Path):
    name, settings, linear_bits = COMPILED[kind]
    model = save_tiny(name, tmp_path, settings, linear_bits)
    ids = tokens(3, 20)
    with engine(tmp_path, enforce_eager=False) as llm:
        assert complete(llm, ids, 16) == greedy(model, ids, 16)


def test_sampling_repeats_by_its_seed_and_keeps_to_the_likeliest(tiny_gpt2: Tiny):
    directory, model = tiny_gpt2
    ids = tokens(2, 20)
    with engine(directory) as llm:
        first, again = (complete(llm, ids, 12, temperature=1.0, seed=7) for _ in range(2))
        other = complete(llm, ids, 12, temperature=1.0, seed=8)
        only = complete(llm, ids, 12, temperature=1.0, top_k=1)
    assert first == again
    assert first != other
    assert only == greedy(model, ids, 12)


def test_log_probabilities_are_those_of_transformers(tiny_gpt2: Tiny):
    from vllm import SamplingParams

    directory, model = tiny_gpt2
    ids = tokens(1, 20)
    with engine(directory) as llm:
        settings = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.0, logprobs=5)
        output = llm.generate({"prompt_token_ids": ids[0].tolist()}, settings, use_tqdm=False)[0].outputs[0]
    with torch.no_grad():
        logits = model(torch.cat([ids, torch.tensor([list(output.token_ids)])], 1)).logits[0, 19:-1]
    for got, wanted in zip(output.logprobs, logits.log_softmax(-1), strict=True):
        values, best = wanted.topk(5)
        assert [float(got[int(token)].logprob) for token in best] == pytest.approx(values.tolist(), abs=1e-3)


IN_TWO = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=96, tensor_parallel_size=2,
              num_gpu_blocks_override=64)
    settings = SamplingParams(max_tokens=16, ignore_eos=True, temperature=0.0)
    calls = [[{"prompt_token_ids": ids} for ids in prompts] for prompts in json.loads(sys.argv[2])]
    outputs = [output for prompts in calls for output in llm.generate(prompts, settings, use_tqdm=False)]
    print("TOKENS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


# Both are `auto`. The first has dense FFNs for its prompts of 40 tokens, which come one by one: an engine in a process
# of its own begins when the first is there, and whom it mixes with whom decides what is dense. It has biases that vLLM
# adds outside of the FFN. The second, all folded and in few bits, sums attention and FFN over the processes at once.
# The third and fourth are gated: a process has its share of the gates and of the ups
@pytest.mark.parametrize(
    ("name", "settings", "linear_bits", "together"),
    mostly_long(
        [
            ("falcon_alibi", SETTINGS, None, 1),
            ("falcon_new_decoder", STACKED, 8, 3),
            ("llama_biased", SETTINGS, None, 1),
            ("gemma2", STACKED, 8, 3),
        ],
        [("gemma2", STACKED, 8, 3)],
    ),
)
def test_neurons_shared_among_two_processes(
    name: str, settings: FoldConfig, linear_bits: int | None, together: int, tmp_path: Path
):
    model = save_tiny(name, tmp_path, settings, linear_bits)
    ids = tokens(3, 40)
    both = environment(VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_CPU_OMP_THREADS_BIND="0|1")
    command = [sys.executable, "-c", IN_TWO, str(tmp_path), json.dumps([part.tolist() for part in ids.split(together)])]
    done = subprocess.run(command, capture_output=True, text=True, env=both, timeout=400)
    line = next((line for line in done.stdout.splitlines() if line.startswith("TOKENS")), None)
    assert line is not None, done.stderr[-3000:]
    found = json.loads(line.removeprefix("TOKENS"))
    for start, part in enumerate(ids.split(together)):
        # each process rounds its share of the inputs of layers in few bits by itself
        rows = found[start * together :][: len(part)]
        assert_same_text(rows, generated(model, part, 16, "auto"), apart=0.05 if linear_bits else 0.01)


def test_inputs_with_one_scale_in_common_are_not_shared_among_processes():
    from vllm.model_executor.layers.linear import LinearBase

    from tardis_llm.integrations.vllm.linears import LowBitMethod
    from tardis_llm.integrations.vllm.names import LinearForm

    method = LowBitMethod(LinearForm(4, 64), "h.0.attn.c_proj")
    with pytest.raises(CheckpointError, match=r"c_proj has 192 inputs, which 2 processes cannot share: groups of 64"):
        method.create_weights(LinearBase.__new__(LinearBase), 96, [64], 192, 64, torch.float32)


@pytest.mark.parametrize(("columns", "group_size"), [(192, 32), (96, 1000), (1600, 32)])
def test_a_share_of_the_inputs_is_that_of_the_weight(columns: int, group_size: int):
    from tardis_llm.integrations.vllm.linears import share_of_inputs

    whole = low_bit_copy(torch.nn.Linear(columns, 40), 4, group_size)
    for first in (0, columns // 2):
        part = share_of_inputs(whole, first, columns // 2)
        assert torch.equal(part.dequantise(), whole.dequantise()[:, first : first + columns // 2])


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=long)], ids=["eager", "compiled"])
def test_folds_are_exchanged_between_requests(eager: bool, tmp_path: Path):
    model, ids = save_tiny("gpt2", tmp_path), tokens(2, 20)
    folds = {name: ffn.weights for name, ffn in folded_ffns(model).items()}
    others = {name: replace(weights, bias=weights.bias.flip(0) * 9) for name, weights in folds.items()}
    expected = [greedy(model, ids, 12)]
    for name, ffn in folded_ffns(model).items():
        ffn.swap(others[name])
    expected.append(greedy(model, ids, 12))
    assert expected[0] != expected[1]
    with engine(tmp_path, enforce_eager=eager) as llm:
        served = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        assert complete(llm, ids, 12) == expected[0]
        kept = {name: served[f"{name}.tardis"].swap(weights) for name, weights in others.items()}
        llm.reset_prefix_cache()
        assert complete(llm, ids, 12) == expected[1]
        for name, weights in kept.items():
            served[f"{name}.tardis"].swap(weights)
        llm.reset_prefix_cache()
        assert complete(llm, ids, 12) == expected[0]
