"""lm-eval's tasks over local files: prompts as in the stock tasks, scores as by hand, and no network."""

from __future__ import annotations

import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from folds import folded_tiny
from harness_data import ITEMS, stock_items, write_items, write_lines
from models import ENCODER_NAMES, tiny_model, tiny_tokenizer, tokens

from tardis_llm.calibration.text import spread
from tardis_llm.errors import InvalidInputError
from tardis_llm.evaluation import tasks
from tardis_llm.evaluation.tasks import TASKS, TaskScore, run_tasks
from tardis_llm.integrations.lm_eval import harness_model, quiet

LENGTH = 128


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks' files."""
    return write_items(tmp_path_factory.mktemp("data"))


def score(name: str, data: Path, model: Any = None, limit: int | None = None) -> TaskScore:
    return run_tasks(model or tiny_model("gpt2"), tiny_tokenizer(), [name], data, limit, LENGTH)[0]


@torch.no_grad()
def log_probability(model: Any, context: str, continuation: str) -> float:
    """Of a continuation, byte by byte, as the tiny tokenizer has one token per byte."""
    tokenizer = tiny_tokenizer()
    before, after = tokenizer.encode(context) or [tokenizer.bos_token_id], tokenizer.encode(continuation)
    logits = model(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(before) + i - 1, token]) for i, token in enumerate(after))


def best(values: list[float]) -> int:
    return values.index(max(values))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


@pytest.mark.parametrize("name", ["hellaswag", "arc_easy", "piqa"])
def test_the_likeliest_choice_counts_and_by_character_too(name: str, data: Path):
    model, plain, by_character = tiny_model("gpt2"), [], []
    for item in ITEMS[name]:
        context = item["ctx"] if name == "hellaswag" else f"Question: {item['ctx']}\nAnswer:"
        for small, capital in ((" he", " He"), (" then", " Then"), (" the woman", " The woman")):
            context = context.replace(small, capital) if context.endswith(small) or small == " then" else context
        found = [log_probability(model, context, " " + choice) for choice in item["choices"]]
        plain.append(float(best(found) == item["label"]))
        lengths = [len(choice) for choice in item["choices"]]
        by_character.append(
            float(best([value / length for value, length in zip(found, lengths, strict=True)]) == item["label"])
        )
    result = score(name, data, model)
    headline, other = (by_character, "acc") if name == "hellaswag" else (plain, "acc_norm")
    assert result.metric == ("acc_norm" if name == "hellaswag" else "acc")
    assert result.correct == tuple(headline)
    assert (result.value, result.standard_error) == pytest.approx(mean_and_error(headline))
    assert result.also[other] == pytest.approx(mean_and_error(plain if name == "hellaswag" else by_character))
    assert result.items == len(ITEMS[name])


def test_winogrande_scores_the_rest_of_the_sentence_behind_each_name(data: Path):
    model = tiny_model("gpt2")
    correct = []
    for item in ITEMS["winogrande"]:
        before, after = item["ctx"].split("_")
        found = [log_probability(model, before + choice, after) for choice in item["choices"]]
        correct.append(float(best(found) == item["label"]))
    assert score("winogrande", data, model).correct == tuple(correct)


def test_the_last_word_of_lambada_counts_if_each_token_of_it_is_the_likeliest(data: Path):
    model = tiny_model("gpt2")
    following = torch.zeros(320, dtype=torch.long)
    o, space, b = tiny_tokenizer().encode("o b")
    following[o], following[space] = space, b

    def favour(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)[:, -output.logits.shape[1] :]
        output.logits += 50 * torch.nn.functional.one_hot(following[ids], 320)

    model.register_forward_hook(favour, with_kwargs=True)
    result = score("lambada", data, model)
    assert result.correct == (1, 0, 0)
    texts = [item["text"].rpartition(" ") for item in ITEMS["lambada"]]
    mean = sum(log_probability(model, before, " " + word) for before, _, word in texts) / 3
    assert result.also["perplexity"].value == pytest.approx(math.exp(-mean), rel=1e-4)


def test_blimp_prefers_the_good_sentence_after_the_prefix_token(data: Path):
    model = tiny_model("gpt2")
    expected = [
        float(log_probability(model, "", " " + item["good"]) > log_probability(model, "", " " + item["bad"]))
        for item in ITEMS["blimp"]
    ]
    assert score("blimp", data, model).correct == tuple(expected)


@pytest.mark.parametrize("name", TASKS)
def test_requests_are_those_of_the_stock_task_on_the_same_items(name: str, data: Path, tmp_path: Path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    stock, folder, items = stock_items(name)
    write_lines(tmp_path / "items.jsonl", items)
    files = {"data_files": dict.fromkeys(("train", "validation", "test"), str(tmp_path / "items.jsonl"))}
    task = {"task": stock, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": files}
    with quiet():
        manager = TaskManager(include_path=Path(lm_eval.__file__).parent / "tasks" / folder, include_defaults=False)
        theirs = manager.load({"group": "stock", "task": [task]})["tasks"][stock]
        ours = tasks._load(name, data / TASKS[name].file, 0, None)[name]
        for one in (theirs, ours):
            one.build_all_requests()
    assert [i.args for i in ours.instances] == [i.args for i in theirs.instances]
    for number, (document, other) in enumerate(zip(ours.eval_docs, theirs.eval_docs, strict=True)):
        asked = sum(instance.doc_id == number for instance in ours.instances)
        results = [-5.0] if name == "wikitext" else [(-float(choice), False) for choice in range(asked)]
        found, expected = ours.process_results(document, results), theirs.process_results(other, results)
        assert found
        assert found == {metric: value for metric, value in expected.items() if metric in found}


def test_a_limit_spreads_over_all_items():
    assert [index // 1000 for index in spread(67_000, 2010)] == [uid for uid in range(67) for _ in range(30)]
    assert spread(5, None) == spread(5, 9) == [0, 1, 2, 3, 4]


def test_a_limited_task_has_the_spread_items(data: Path):
    whole, part = score("blimp", data), score("blimp", data, limit=3)
    assert part.items == 3
    assert part.correct == tuple(whole.correct[index] for index in (0, 2, 4))


def test_a_limited_group_spreads_over_its_members(data: Path):
    with quiet():
        members = {name: tasks._load(name, data / TASKS[name].file, 1, None)[name] for name in ("arc_easy", "blimp")}
        chosen = dict(tasks._limited(members, 3))  # of 3 + 6 items: 0, 3 and 6
    assert {name: len(task.eval_docs) for name, task in chosen.items()} == {"arc_easy": 1, "blimp": 2}
    assert [document["good"] for document in chosen["blimp"].eval_docs] == ["The dog sleeps.", "The bird sleeps."]


def test_the_difference_to_another_model_is_paired():
    ours = TaskScore("piqa", "acc", 0.5, 0.29, 4, correct=(1.0, 0.0, 1.0, 0.0))
    theirs = TaskScore("piqa", "acc", 0.75, 0.25, 4, correct=(1.0, 1.0, 1.0, 0.0))
    assert ours.difference(theirs) == pytest.approx(mean_and_error([0, -1, 0, 0]))
    assert ours.difference(ours) == (0, 0)
    for other in (TaskScore("piqa", "acc", 1, 0, 2, correct=(1.0, 1.0)), TaskScore("wikitext", "ppl", 9, 1, 4)):
        with pytest.raises(InvalidInputError, match="cannot be paired"):
            ours.difference(other)


def test_plain_values_have_no_single_items():
    values = TaskScore("piqa", "acc", 0.5, 0.1, 2, {"acc_norm": tasks.Metric(0.4, 0.2)}, (1.0, 0.0)).as_dict()
    assert values == {
        "task": "piqa",
        "metric": "acc",
        "value": 0.5,
        "standard_error": 0.1,
        "items": 2,
        "also": {"acc_norm": {"value": 0.4, "standard_error": 0.2}},
    }


def test_a_folder_of_data_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    names = list(TASKS)
    found = run_tasks(tiny_model("gpt2"), tiny_tokenizer(), names, write_items(tmp_path), None, LENGTH)
    assert [result.task for result in found] == names


def test_data_that_changed_is_read_again(tmp_path: Path):
    write_items(tmp_path)
    assert score("piqa", tmp_path).items == 3
    write_lines(tmp_path / TASKS["piqa"].file, ITEMS["piqa"] + ITEMS["piqa"])
    assert score("piqa", tmp_path).items == 6


def test_the_hubs_data_without_a_network_says_what_to_give(monkeypatch: pytest.MonkeyPatch):
    class Manager:
        def load(self, name: str) -> None:
            raise ConnectionError(f"no route to {name}")

    monkeypatch.setattr(tasks, "_manager", lambda local: Manager())
    with pytest.raises(InvalidInputError, match=r"lambada_openai\).*lambada-test\.jsonl: --task-data DIR"):
        run_tasks(tiny_model("gpt2"), tiny_tokenizer(), ["lambada"], None, None, LENGTH)


@pytest.mark.parametrize(
    ("names", "limit", "message"),
    [
        (["piqa", "hellswag"], None, "there is no task hellswag; choose from hellaswag, arc_easy"),
        ([], None, "there is no task named; choose from"),
        (["piqa"], 1, "the limit is 1; a standard error needs two"),
        (["piqa"], None, r"there is no file .*piqa_valid\.jsonl; put the task's items there"),
    ],
)
def test_wrong_input_is_refused(names: list[str], limit: int | None, message: str, tmp_path: Path):
    with pytest.raises(InvalidInputError, match=message):
        run_tasks(tiny_model("gpt2"), tiny_tokenizer(), names, tmp_path, limit, LENGTH)


def test_without_lm_eval_it_says_how_to_install_it(data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidInputError, match=r"pip install 'tardis-llm\[eval\]'"):
        score("piqa", data)


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_encoders_are_refused(name: str, data: Path):
    with pytest.raises(InvalidInputError, match="is an encoder"):
        score("piqa", data, tiny_model(name))


def test_nothing_is_printed_and_progress_is_told(data: Path, capfd: pytest.CaptureFixture[str]):
    steps: list[tuple[str, int, int]] = []
    names = ["blimp", "lambada", "wikitext"]
    run_tasks(
        tiny_model("gpt2"),
        tiny_tokenizer(),
        names,
        data,
        None,
        LENGTH,
        lambda *step: steps.append(step),
        batch_tokens=64,
    )
    assert capfd.readouterr() == ("", "")
    assert {stage: (done, total) for stage, done, total in steps} == {
        "task blimp": (12, 12),
        "task lambada": (3, 3),
        "task wikitext": (2, 2),
    }


REQUESTS = [
    ([1, 2, 3], [4]),
    ([1, 2, 3], [5]),  # differs in the last token alone
    ([1, 2], [3, 7]),
    ([9], list(range(20, 60))),
    (list(range(40)), [1, 2]),  # the context is cut
    (list(range(30)), list(range(50, 53))),
    ([256], [8, 9, 10, 11]),
]


@pytest.mark.parametrize("name", ["gpt2", "bloom", "falcon_alibi", "mpt", "opt", "phi"])
@pytest.mark.parametrize("batch_tokens", [16, 100_000])
def test_batches_change_nothing_of_what_lm_eval_itself_finds(name: str, batch_tokens: int):
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = tiny_model(name), tiny_tokenizer()
    with quiet():
        theirs = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", max_length=32, logits_cache=False)
        fitting = [(None, *request) for request in REQUESTS if len(request[1]) <= 32]
        expected = theirs._loglikelihood_tokens(fitting)
        ours = harness_model(model, tokenizer, 32, batch_tokens)
        found = ours._loglikelihood_tokens([(None, *request) for request in REQUESTS])
        end = theirs._loglikelihood_tokens([(None, [27], list(range(28, 60)))])  # of one too long for the window
    assert found.pop(3)[0] == pytest.approx(end[0][0], rel=1e-5)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_probabilities_of_a_bf16_model_are_not_rounded_to_bf16():
    model = tiny_model("gpt2", dtype=torch.bfloat16)
    ids = tokens(1, 24)[0].tolist()
    with quiet():
        [(found, _)] = harness_model(model, tiny_tokenizer(), LENGTH)._loglikelihood_tokens([(None, ids[:4], ids[4:])])
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0].float().log_softmax(-1)
    exact = sum(float(logits[position, ids[position + 1]]) for position in range(3, 23))
    assert found == pytest.approx(exact, rel=1e-5)


def test_wrapping_changes_neither_model_nor_tokenizer():
    model, _ = folded_tiny("gpt2")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with torch.no_grad():
        before = model(tokens()).logits
        harness_model(model, tokenizer, LENGTH)
        assert torch.equal(model(tokens()).logits, before)
    assert tokenizer.pad_token is None


def test_a_folded_model_has_the_probabilities_of_its_own_forward():
    model, _ = folded_tiny("gpt2")
    with quiet():
        wrapped = harness_model(model, tiny_tokenizer(), LENGTH)
        found = wrapped._loglikelihood_tokens([(None, *request) for request in REQUESTS])
    for (context, continuation), (value, _) in zip(REQUESTS, found, strict=True):
        ids = torch.tensor([context + continuation])
        with torch.no_grad():
            logits = model(ids).logits[0].float().log_softmax(-1)
        exact = sum(float(logits[len(context) + i - 1, token]) for i, token in enumerate(continuation))
        # batches of few tokens go through the kernels, which may select a neuron next to its bound differently
        assert value == pytest.approx(exact, rel=1e-3)
