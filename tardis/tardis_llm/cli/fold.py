"""`tardis fold`: fold a model, check the result, and write it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.documents import Documents
from ..calibration.text import Windows
from ..checkpoint.folded import is_folded, save_folded
from ..checkpoint.loading import check_weights, load_config, load_dense, load_tokenizer, window_length
from ..checkpoint.record import read_report
from ..checkpoint.saving import check_savable
from ..config import FoldConfig, Policy, Precision, Rounding
from ..errors import InvalidInputError
from ..evaluation.generation import generate
from ..evaluation.self_check import SelfCheck, Verdict
from ..families.table import family_of
from ..pipeline.fold import changes, check_fold, is_left_over
from ..pipeline.fold import fold as fold_model
from ..pipeline.workspace import FOLDER, discard, only_one
from ..report import FoldReport
from . import output as show
from .options import AsJson, Dtype, ModelName, TextField, Texts
from .place import check_output, check_space
from .stopping import stoppable
from .texts import calibration_windows, read

_REFUSED = 2  # exit code
#: bits per weight; None is the model's dtype
BITS: dict[Precision | None, int | None] = {None: None, "bf16": None, "int8": 8, "int4": 4}
_PROMPT, _ANSWER = 24, 32  # tokens of the greedy sample
_DEFAULT = FoldConfig()

Output = Annotated[Path, typer.Option("-o", "--output", help="Directory of the folded checkpoint.")]
Layers = Annotated[str | None, typer.Option(help="Blocks to fold, such as 0,1,5; all without.", show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on behind the last finished layer of an interrupted fold.")]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Write to a directory in use, where a model is replaced whole and other files stay; and write even if the "
        "self-check fails.",
    ),
]


def fold(
    model: ModelName,
    directory: Output,
    reduction: Annotated[float, typer.Option(help="Share of the FFN bytes that a token no longer reads.")] = 0.8,
    text: Texts = None,
    text_field: TextField = None,
    policy: Annotated[Policy, typer.Option(help="How hot ranges are chosen.")] = "error",
    predictor_bits: Annotated[
        int | None, typer.Option(help="1, 2, 3, 4 or 8; the best for each layer without.", show_default=False)
    ] = None,
    group_size: Annotated[int, typer.Option(help="Predictor weights per scale.")] = _DEFAULT.group_size,
    rounding: Annotated[Rounding, typer.Option(help="Of the predictor, and of what else is rounded.")] = "gptq",
    fold_dtype: Annotated[
        Precision | None, typer.Option(help="Of the stored fold; as the model without.", show_default=False)
    ] = None,
    fallback: Annotated[
        Precision | None,
        typer.Option(help="Of what fixing reads; as the model without.", show_default=False),
    ] = None,
    linears: Annotated[
        Precision | None,
        typer.Option(
            help="Of the linear layers outside the FFNs, and of lm_head; as the model without.", show_default=False
        ),
    ] = None,
    refit: Annotated[bool, typer.Option(help="Solve the fold anew for what fixing leaves.")] = True,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = _DEFAULT.tokens,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens per window; what the model allows without.", show_default=False)
    ] = None,
    probe_tokens: Annotated[
        int, typer.Option(help="Tokens on which each layer's effect on the loss is measured.")
    ] = _DEFAULT.probe_tokens,
    layers: Layers = None,
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(help="Picks the calibration windows.")] = 0,
    resume: Resume = False,
    force: Force = False,
    max_shard_size: Annotated[str, typer.Option(help="Of one weight file, such as 5GB or 5GiB.")] = "5GB",
    memory_limit: Annotated[
        float, typer.Option(help="GiB of hidden states beyond which they go to disk.")
    ] = _DEFAULT.memory_limit_gib,
    as_json: AsJson = False,
) -> None:
    """Fold a model's feed-forward networks and write a checkpoint that transformers loads."""
    clock = show.Clock()
    config = FoldConfig(
        reduction=reduction,
        policy=policy,
        predictor_bits=predictor_bits,
        group_size=group_size,
        rounding=rounding,
        fold_bits=BITS[fold_dtype],
        fallback_bits=BITS[fallback],
        linear_bits=BITS[linears],
        refit=refit,
        tokens=tokens,
        sequence_length=sequence_length,
        probe_tokens=probe_tokens,
        memory_limit_gib=memory_limit,
        layers=parse_layers(layers),
        seed=seed,
    )
    check_output(directory, model, force, resume)
    loaded, tokenizer, windows = _load(model, text, text_field, config, dtype)
    check_precision(loaded.dtype, fold_dtype, fallback, linears)
    done = _finished(directory, loaded, windows, config) if resume else None
    if done:
        _clear_left_over(directory, done)
        _print_finished(done, directory, as_json)
        return
    check_fold(loaded, windows, config)
    check_savable(loaded, tokenizer, max_shard_size)
    check_space(directory, loaded, windows, config)
    with stoppable(lambda: _hint(directory)), only_one(directory):
        check_output(directory, model, force, resume)  # another fold may have ended there meanwhile
        report, verdict = _fold_and_check(loaded, windows, config, directory, resume)
        written = verdict.passed or force
        if written:
            save_folded(loaded, report, directory, tokenizer, max_shard_size)
            discard(directory / FOLDER)
    sample = _sample(loaded, tokenizer, windows.heldout)
    figures = {
        "output": str(directory) if written else None,
        "report": report.as_dict(),
        "self_check": verdict.as_dict(),
        "sample": sample,
        **clock.as_dict(),
    }
    if as_json:
        show.print_json(figures)
    else:
        _print(report, verdict, sample)
    _conclude(verdict, directory, written, clock)


def parse_layers(layers: str | None) -> tuple[int, ...] | None:
    """Block numbers out of "0,1,5".

    Raises:
        InvalidInputError: it is something else.
    """
    if layers is None:
        return None
    try:
        return tuple(int(part) for part in layers.split(","))
    except ValueError as error:
        raise InvalidInputError(f"--layers is {layers!r}; give block numbers such as 0,1,5.") from error


def _load(
    model: str, text: list[str] | None, field: str | None, config: FoldConfig, dtype: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Windows]:
    """The dense model, its tokenizer and the calibration windows; what is quickest to check comes first."""
    load_config(model)
    if not text:
        raise InvalidInputError(
            "folding needs text of the kind that the model will see: give --text FILE (repeatable), about 300 kB or "
            "more. For English prose, the text bundled with TARDIS will do to try it: "
            "tardis_llm/sample/calibration.txt."
        )
    tokenizer = load_tokenizer(model)
    documents = read(text, field)
    loaded = load_dense(model, dtype)
    return loaded, tokenizer, _windows(documents, loaded, tokenizer, config)


def _windows(
    documents: Sequence[Documents], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: FoldConfig
) -> Windows:
    """Calibration windows, and words on how many there are."""
    length = window_length(model, tokenizer, config.sequence_length)
    windows = calibration_windows(documents, model, tokenizer, config, length)
    found = windows.fit.numel() + windows.heldout.numel()
    show.say(f"calibration: {found:,} tokens in windows of {length}; {type(model).__name__} in {model.dtype}")
    if found < config.tokens - length:
        show.warn(f"the text has {found:,} tokens, fewer than the {config.tokens:,} asked for.")
    return windows


def _finished(directory: Path, model: PreTrainedModel, windows: Windows, config: FoldConfig) -> FoldReport | None:
    """The report of this very fold, if it has been finished in `directory`.

    Raises:
        InvalidInputError: another one has been, and there is none to go on with.
        CheckpointError: it is there, and its files are damaged.
    """
    if not is_folded(directory):
        return None
    report = read_report(directory)
    changed = changes(report, model, windows, config)
    if not changed:
        check_weights(directory)
        return report
    if not (directory / FOLDER).is_dir():
        raise InvalidInputError(
            f"there is nothing to resume: {directory} holds a finished fold, and a different one. "
            f"{'; '.join(changed)}. Choose another -o, or replace it with --force and without --resume."
        )
    return None


def _clear_left_over(directory: Path, report: FoldReport) -> None:
    """Delete the layers of the finished fold, where it was killed before it did so itself."""
    work = directory / FOLDER
    if work.is_dir() and is_left_over(work, report):
        with only_one(directory):
            discard(work)


def _print_finished(report: FoldReport, directory: Path, as_json: bool) -> None:
    if as_json:
        show.print_json({"output": str(directory), "report": report.as_dict(), "self_check": None, "sample": None})
    else:
        show.out.print(show.layer_table(report, "Folded layers"))
        show.out.print(show.totals(report))
    show.say(f"[green]{escape(str(directory))} is complete[/]: this fold was finished there, nothing is left to do")


def _hint(directory: Path) -> str:
    if not (directory / FOLDER).is_dir():
        return "Nothing was finished yet; run the same command again."
    return "Finished layers are kept: run the same command with --resume to go on behind them."


def check_precision(dtype: torch.dtype, *wanted: Precision | None) -> None:
    """Raise InvalidInputError where bf16 is asked for and the model's dtype is another."""
    if "bf16" in wanted and dtype != torch.bfloat16:
        raise InvalidInputError(
            f"parts in bf16 are asked for, but the model is in {str(dtype).removeprefix('torch.')}; add --dtype "
            "bfloat16."
        )


def _fold_and_check(
    model: PreTrainedModel, windows: Windows, config: FoldConfig, directory: Path, resume: bool
) -> tuple[FoldReport, Verdict]:
    work = directory / FOLDER
    if resume and not work.is_dir():
        show.say(f"nothing to resume in {directory}: starting from the beginning")
    with show.progress_bars("dense model: ") as progress:
        check = SelfCheck(model, windows.heldout, progress)
    with show.progress_bars() as progress:
        report = fold_model(model, windows, config, work, resume, progress)
    with show.progress_bars("folded model: ") as progress:
        check.progress = progress
        return report, check.verdict()


def _sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, heldout: Tensor) -> dict[str, str] | None:
    """A held-out beginning and how the folded model goes on, greedily; None for an encoder, or if it fails."""
    if not family_of(model.config).causal:
        return None
    ids = heldout[:1, : min(_PROMPT, heldout.shape[1] // 2)]
    try:
        return {"prompt": tokenizer.decode(ids[0]), "text": generate(model, tokenizer, ids, _ANSWER)}
    except Exception as error:  # of any kind: the fold is written, and a sample is only for show
        show.warn(f"no sample of text could be generated ({type(error).__name__}: {error}).")
        return None


def _print(report: FoldReport, verdict: Verdict, sample: dict[str, Any] | None) -> None:
    show.out.print(show.layer_table(report, "Folded layers"))
    show.out.print(show.legend())
    show.out.print(show.totals(report))
    if report.linears:
        show.out.print(show.linears(report.linears))
    if sample:
        show.out.print(f"sample: [dim]{escape(sample['prompt'])}[/]{escape(sample['text'])}")
    show.out.print(f"self-check: {verdict.sentence()}")


def _conclude(verdict: Verdict, directory: Path, written: bool, clock: show.Clock) -> None:
    if not written:
        show.fail(
            f"the self-check failed, so nothing was written: {verdict.sentence()}. Lower --reduction, or give more "
            "--text of the model's kind. To write it all the same, run again with --resume --force (finished layers "
            f"are in {directory / FOLDER})."
        )
        raise typer.Exit(_REFUSED)
    if not verdict.passed:
        show.warn("the self-check failed; written all the same because of --force.")
    show.say(f"[green]written to {escape(str(directory))}[/] in {clock.sentence()}")
    show.say(f"next: tardis eval {escape(str(directory))} --text FILE")
