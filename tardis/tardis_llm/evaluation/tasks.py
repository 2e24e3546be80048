"""Zero-shot tasks of lm-eval, over local files or over the hub's data: accuracies with their standard errors.

With a folder of data, tasks are those of `harness_tasks/`, and no network is used. Without one, they are lm-eval's own.
Both have the same prompts and scores; `Task` says which file and which stock task a name stands for. The module is a
little longer than others: scores, their pairing and the table of tasks are read together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.text import spread
from ..errors import InvalidInputError
from ..integrations.lm_eval import check_available, harness_model, quiet
from ..precision import quick_products
from ..report import Progress, silent
from .perplexity import exp_ratio

_FOLDER = Path(__file__).parent / "harness_tasks"
#: metrics that are the mean of one value per item
ACCURACIES = ("acc", "acc_norm")


class Task(NamedTuple):
    """Where a task's items come from.

    Attributes:
        stock: name of the task or group in lm-eval.
        file: name of the local file.
        headline: the metric that is reported first, as is usual for the task.
        whole: whether the file is one text, and not one item per line.
    """

    stock: str
    file: str
    headline: str
    whole: bool = False


#: the tasks by name
TASKS = {
    "hellaswag": Task("hellaswag", "hellaswag_val.jsonl", "acc_norm"),
    "arc_easy": Task("arc_easy", "arc_easy_test.jsonl", "acc"),
    "piqa": Task("piqa", "piqa_valid.jsonl", "acc"),
    "winogrande": Task("winogrande", "winogrande_valid.jsonl", "acc"),
    "lambada": Task("lambada_openai", "lambada-test.jsonl", "acc"),
    "blimp": Task("blimp", "blimp.jsonl", "acc"),
    "wikitext": Task("wikitext", "wikitext2-test.txt", "word_perplexity", whole=True),
}


class Metric(NamedTuple):
    """A value and its standard error."""

    value: float
    standard_error: float

    def percent(self) -> str:
        """The value in percent with its standard error, such as "61.2 ± 0.4"."""
        return f"{100 * self.value:.1f} ± {100 * self.standard_error:.1f}"


@dataclass(frozen=True)
class TaskScore:
    """What a model reached on a task.

    Attributes:
        task: a name in `TASKS`.
        metric: what `value` is. `acc` is the share of items whose right choice is the likeliest; `acc_norm` divides
            each choice's log-likelihood by its number of characters first; `word_perplexity` has no share.
        value: value of the metric.
        standard_error: standard error of `value`, from the variation between items.
        items: number of items.
        also: the task's other metrics.
        correct: 0 or 1 for each item, in order; empty where the metric has no such thing.

    Examples:
        >>> ours = TaskScore("blimp", "acc", 0.75, 0.25, 4, correct=(1, 1, 0, 1))
        >>> theirs = TaskScore("blimp", "acc", 0.5, 0.29, 4, correct=(1, 0, 0, 1))
        >>> change, error = ours.difference(theirs)
        >>> change, error
        (0.25, 0.25)
    """

    task: str
    metric: str
    value: float
    standard_error: float
    items: int
    also: dict[str, Metric] = field(default_factory=dict)
    correct: tuple[float, ...] = field(default=(), repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without those of single items."""
        values = {key: value for key, value in vars(self).items() if key != "correct"}
        return {**values, "also": {name: metric._asdict() for name, metric in self.also.items()}}

    def difference(self, reference: TaskScore) -> tuple[float, float]:
        """This accuracy less that of another model on the same items, and its standard error.

        Pairing the items takes out how hard each is, so the error is less than that of either accuracy.

        Raises:
            InvalidInputError: the items are not the same, or have no accuracy.
        """
        ours, theirs = ((score.task, score.metric, len(score.correct)) for score in (self, reference))
        if ours != theirs or len(self.correct) < 2:
            raise InvalidInputError(
                f"{' and '.join(f'{s.task} ({s.metric}, {s.items} items)' for s in (self, reference))} cannot be "
                "paired; give scores of one task with an accuracy, run with the same limit."
            )
        return _mean([a - b for a, b in zip(self.correct, reference.correct, strict=True)])


@dataclass(frozen=True)
class Tasks:
    """Zero-shot tasks and how much of them to run.

    Attributes:
        limits: items of each task, by its name in `TASKS`; None for all of them.
        data: folder of local files, or None for the hub's.
    """

    limits: dict[str, int | None] = field(default_factory=dict)
    data: Path | None = None

    @classmethod
    def parse(cls, text: str, data: Path | None, limit: int) -> Tasks:
        """The tasks in text such as "blimp:2010,lambada", checked.

        Args:
            text: names, each with its number of items behind a colon or without; empty for no tasks.
            data: folder of local files, or None for the hub's.
            limit: items of a task without a number; 0 for all of them.

        Raises:
            InvalidInputError: a number that is none, a task without an accuracy, or as `check_tasks`.
        """
        limits: dict[str, int | None] = {}
        for part in filter(None, text.split(",")):
            name, _, items = part.partition(":")
            if items and not items.isdigit():
                raise InvalidInputError(f"--tasks has {part!r}; write for example blimp:2010.")
            limits[name] = int(items or limit) or None
            check_tasks([name], data, limits[name])
            if TASKS[name].headline not in ACCURACIES:
                raise InvalidInputError(f"{name} has no accuracy to compare; give its text as --eval-text.")
        return cls(limits, data)

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, progress: Progress
    ) -> tuple[TaskScore, ...]:
        """The scores of every task; arguments and errors as `run_tasks`."""
        each = (run_tasks(model, tokenizer, [name], self.data, n, length, progress) for name, n in self.limits.items())
        return tuple(score for scores in each for score in scores)


@quick_products()
def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    data: Path | None,
    limit: int | None,
    length: int,
    progress: Progress = silent,
    batch_tokens: int | None = None,
) -> list[TaskScore]:
    """Run zero-shot tasks on a model with lm-eval.

    Args:
        model: dense, folded or otherwise changed, in eval mode.
        tokenizer: the model's tokenizer.
        names: names in `TASKS`.
        data: folder of the tasks' files; None takes lm-eval's stock tasks from the hub.
        limit: items per task, evenly spread over all; None takes all.
        length: tokens that the model sees at once; see `loading.window_length`.
        progress: told of the requests done, one stage per task.
        batch_tokens: tokens per forward; None for what suits the device.

    Returns:
        Scores in the order of `names`.

    Raises:
        InvalidInputError: an unknown task, a limit below 2, a missing file, no access to the hub's data, an encoder,
            or lm-eval is not installed.

    Examples:
        >>> (score,) = run_tasks(model, tokenizer, ["blimp"], data=Path("tasks"), limit=8, length=64)
        >>> score.task, score.metric, score.items
        ('blimp', 'acc', 8)
    """
    check_tasks(names, data, limit)
    wrapped = harness_model(model, tokenizer, length, batch_tokens)
    return [_run(wrapped, name, data, limit, progress) for name in names]


def check_tasks(names: Sequence[str], data: Path | None, limit: int | None) -> None:
    """Raise InvalidInputError where `run_tasks` would for its arguments, before a model is loaded."""
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise InvalidInputError(f"there is no task {', '.join(unknown) or 'named'}; choose from {', '.join(TASKS)}.")
    if limit is not None and limit < 2:
        raise InvalidInputError(f"the limit is {limit}; a standard error needs two items per task at least.")
    for path in (data / TASKS[name].file for name in names if data):
        if not path.is_file():
            raise InvalidInputError(
                f"there is no file {path}; put the task's items there, or leave out the data folder to take them from "
                "the hub."
            )
    check_available()


def _run(wrapped: Any, name: str, data: Path | None, limit: int | None, progress: Progress) -> TaskScore:
    from lm_eval import evaluate

    path = data and data / TASKS[name].file
    wrapped.watch(f"task {name}", progress)
    with quiet():
        tasks = _load(name, path, path and path.stat().st_mtime_ns, limit)
        # no resampling for standard errors: it starts processes and takes minutes, and `_metrics` has formulas
        found = evaluate(wrapped, {"tasks": tasks, "groups": {}}, bootstrap_iters=0, log_samples=True)
    return _score(name, [sample for task in tasks for sample in found["samples"][task]])


@lru_cache(maxsize=16)
def _load(name: str, path: Path | None, changed: int | None, limit: int | None) -> dict[str, Any]:
    """lm-eval's task objects with the items to run, by name: one, or the members of a group.

    Reading the files takes longer than a small model takes to run, so the tasks are kept for other models; `changed`
    is the time of the file's last change.
    """
    if path is None:
        tasks = _load_stock(name)
    else:
        files: dict[str, Any] = {"data_files": {"test": str(path)}}
        if TASKS[name].whole:
            files["sample_by"] = "document"
        group = {"group": "local", "task": [{"task": name, "dataset_kwargs": files}]}
        tasks = _manager(local=True).load(group)["tasks"]
    return dict(_limited(tasks, limit))


def _load_stock(name: str) -> dict[str, Any]:
    try:
        tasks: dict[str, Any] = _manager(local=False).load(TASKS[name].stock)["tasks"]
    except Exception as error:  # the libraries raise many kinds, all with the same remedy
        raise InvalidInputError(
            f"the data of {name} cannot be had from the hub ({type(error).__name__}: {error}). Check the network, or "
            f"give a folder that has {TASKS[name].file}: --task-data DIR."
        ) from error
    return tasks


@lru_cache(maxsize=2)
def _manager(local: bool) -> Any:
    """lm-eval's index of tasks; to make that of the stock tasks takes ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=_FOLDER, include_defaults=False) if local else TaskManager()


def _limited(tasks: dict[str, Any], limit: int | None) -> Iterator[tuple[str, Any]]:
    """The tasks that have an item among `limit` evenly spread over all of them together, cut down to these items."""
    documents = {name: task.eval_docs for name, task in tasks.items()}
    chosen = spread(sum(map(len, documents.values())), limit)
    first = 0
    for name, task in tasks.items():
        behind = first + len(documents[name])
        here = [index - first for index in chosen if first <= index < behind]
        first = behind
        if here:
            task.dataset = {task.config.test_split or task.config.validation_split: documents[name].select(here)}
            task.config.process_docs = None  # done
            yield name, task


def _score(name: str, samples: list[dict[str, Any]]) -> TaskScore:
    headline = TASKS[name].headline
    metrics = {metric: _metric(metric, [sample[metric] for sample in samples]) for metric in samples[0]["metrics"]}
    first = metrics.pop(headline)
    correct = tuple(float(sample[headline]) for sample in samples) if headline in ACCURACIES else ()
    return TaskScore(name, headline, *first, len(samples), metrics, correct)


def _metric(name: str, values: list[Any]) -> Metric:
    """A metric of all items and its standard error. For accuracies both are lm-eval's; for perplexities, which lm-eval
    resamples, the error is that of the mean logarithm by the delta method."""
    if name in ACCURACIES:
        return _mean(values)
    pairs = [value if isinstance(value, tuple) else (value, 1) for value in values]
    likelihoods, counts = torch.tensor(pairs, dtype=torch.float64).T
    return Metric(*exp_ratio(-likelihoods, counts))


def _mean(values: Sequence[float]) -> Metric:
    from lm_eval.api.metrics import mean, mean_stderr

    return Metric(float(mean(values)), float(mean_stderr(values)))
