"""`tardis fold`: fold a model, check the result, and write it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.audio import read_audio
from ..calibration.inputs import Speech, TextOrSpeech, token_count
from ..calibration.limits import window_length
from ..calibration.speech import hear
from ..calibration.text import Windows, calibration_windows
from ..checkpoint.config_file import load_config
from ..checkpoint.folded import holds_fold, save_folded
from ..checkpoint.gguf import find_gguf
from ..checkpoint.loading import check_weights, load_dense, load_extractor, load_tokenizer
from ..checkpoint.manifest import read_report
from ..checkpoint.saving import check_savable
from ..config import FoldConfig
from ..errors import InvalidInputError
from ..evaluation.generation import generate, transcript
from ..evaluation.self_check import SelfCheck, Verdict
from ..families.table import family_of
from ..pipeline.fold import changes, check_fold, is_left_over
from ..pipeline.fold import fold as fold_model
from ..pipeline.space import bytes_on_disk
from ..pipeline.workspace import FOLDER, discard, only_one
from ..report import FoldReport
from ..sample import calibration_text
from . import output as show
from .options import AsJson, Audio, Dtype, ModelName, TextField, Texts, check_precision, from_settings, read_texts
from .place import check_output, check_space
from .stopping import stoppable

_REFUSED = 2  # exit code
_PROMPT, _ANSWER = 24, 32  # tokens of the greedy sample

Output = Annotated[Path, typer.Option("-o", "--output", help="Directory for the folded model.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on behind the last finished layer of an interrupted fold.")]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Write to a directory in use, where a model is replaced whole and other files stay; and write even if the "
        "self-check fails.",
    ),
]
ShardSize = Annotated[str, typer.Option(help="Largest size of one weight file, such as 5GB or 5GiB.")]


@from_settings
def fold(
    context: typer.Context,
    model: ModelName,
    directory: Output,
    text: Texts = None,
    audio: Audio = None,
    text_field: TextField = None,
    *,
    config: FoldConfig,
    dtype: Dtype = None,
    resume: Resume = False,
    force: Force = False,
    max_shard_size: ShardSize = "5GB",
    as_json: AsJson = False,
) -> None:
    """Fold a model's feed-forward networks and write a checkpoint that transformers loads.

    Give --text of the kind that the model will see, or --audio that it will hear. Ends with a self-check: if the folded
    model is far worse than the dense one on what was held out, nothing is written.
    """
    clock = show.Clock()
    check_output(directory, model, force, resume)
    loaded, tokenizer, windows = _load(model, text, audio, text_field, config, dtype)
    check_precision(context, loaded.dtype)
    done = _finished(directory, loaded, windows, config) if resume else None
    if done:
        _clear_left_over(directory, done)
        _print_finished(done, directory, as_json)
        return
    check_fold(loaded, windows, config)
    check_savable(loaded, tokenizer, max_shard_size)
    check_space(directory, bytes_on_disk(directory, loaded, windows, config))
    with stoppable(lambda: _hint(directory)), only_one(directory):
        check_output(directory, model, force, resume)  # another fold may have ended there meanwhile
        report, verdict = _fold_and_check(loaded, windows, config, directory, resume)
        report = replace(report, source=_source(model))
        written = verdict.passed or force
        if written:
            extractor = load_extractor(model) if family_of(loaded.config).speech else None
            save_folded(loaded, report, directory, tokenizer, max_shard_size, extractor)
            discard(directory / FOLDER)
    sample = _sample(loaded, tokenizer, windows.heldout)
    if as_json:
        found = {"report": report.as_dict(), "self_check": verdict.as_dict(), "sample": sample}
        show.print_json({"output": str(directory) if written else None, **found, **clock.as_dict()})
    else:
        _print(report, verdict, sample)
    _conclude(verdict, directory, written, clock)
    if written:
        name = escape(str(directory))
        speech = family_of(loaded.config).speech
        show.say(f"next: tardis generate {name} FILE" if speech else f"next: tardis eval {name} --text FILE")


def _load(
    model: str,
    text: list[str] | None,
    audio: list[str] | None,
    field: str | None,
    config: FoldConfig,
    dtype: str | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Windows]:
    """The dense model, its tokenizer and the calibration windows; what is quickest to check comes first."""
    if family_of(load_config(model)).speech:
        return _load_speech(model, text, audio, config, dtype)
    if audio:
        raise InvalidInputError(f"{model} reads text, and --audio is for models of speech; give --text.")
    if not text:
        raise InvalidInputError(
            "folding needs text of the kind that the model will see: give --text FILE (repeatable), about 300 kB or "
            f"more. For English prose, the text bundled with TARDIS will do to try it: {calibration_text()}."
        )
    file = find_gguf(model)
    if file and file.rounded:
        show.say(
            f"{escape(file.path.name)}: its weights were rounded to {file.quantisation} when it was made, and are the "
            "dense model here"
        )
    tokenizer = load_tokenizer(model)
    documents = read_texts(text, field)
    loaded = load_dense(model, dtype)
    length = window_length(loaded, tokenizer, config.sequence_length)
    windows = calibration_windows(documents, loaded, tokenizer, config, length)
    found = sum(map(token_count, windows))
    show.say(f"calibration: {found:,} tokens in windows of {length}; {type(loaded).__name__} in {loaded.dtype}")
    if found < config.tokens - length:
        show.warn(f"the text has {found:,} tokens, fewer than the {config.tokens:,} asked for.")
    return loaded, tokenizer, windows


def _load_speech(
    model: str, text: list[str] | None, audio: list[str] | None, config: FoldConfig, dtype: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Windows]:
    """The same for a model of speech, which is calibrated on what it hears and then writes down."""
    if text or not audio:
        raise InvalidInputError(
            f"{model} hears speech, and not text: give --audio FILE (repeatable), about 10 minutes or more in all."
        )
    tokenizer, extractor = load_tokenizer(model), load_extractor(model)
    loaded = load_dense(model, dtype)
    features = read_audio(audio, loaded, extractor, config.tokens)
    with show.progress_bars("dense model: ") as progress:
        windows = hear(loaded, features, config.heldout, progress)
    found = sum(map(token_count, windows))
    show.say(
        f"calibration: {len(features)} windows of speech, {found:,} tokens in their transcripts; "
        f"{type(loaded).__name__} in {loaded.dtype}"
    )
    return loaded, tokenizer, windows


def _source(model: str) -> dict[str, str]:
    """What the report says of the file that the dense weights are from, where that is a GGUF file."""
    file = find_gguf(model)
    return file.source() if file else {}


def _finished(directory: Path, model: PreTrainedModel, windows: Windows, config: FoldConfig) -> FoldReport | None:
    """The report of this very fold, if it has been finished in `directory`.

    Raises:
        InvalidInputError: another one has been, and there is none to go on with.
        CheckpointError: it is there, and its files are damaged.
    """
    if not holds_fold(directory):
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
        show.print_fold(report, "Folded layers")
    show.say(f"[green]{escape(str(directory))} is complete[/]: this fold was finished there, nothing is left to do")


def _hint(directory: Path) -> str:
    if not (directory / FOLDER).is_dir():
        return "Nothing was finished yet; run the same command again."
    return "Finished layers are kept: run the same command with --resume to go on behind them."


def _fold_and_check(
    model: PreTrainedModel, windows: Windows, config: FoldConfig, directory: Path, resume: bool
) -> tuple[FoldReport, Verdict]:
    work = directory / FOLDER
    if resume and not work.is_dir():
        show.say(f"nothing to resume in {directory}: starting from the beginning")
    with show.progress_bars("dense model: ") as progress:
        check = SelfCheck(model, windows.heldout, progress, config.torch_device)
    with show.progress_bars() as progress:
        report = fold_model(model, windows, config, work, resume, progress)
    with show.progress_bars("folded model: ") as progress:
        check.progress = progress
        return report, check.verdict()


def _sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, heldout: TextOrSpeech) -> dict[str, str] | None:
    """A held-out beginning and how the folded model goes on, greedily; None for an encoder, or if it fails.

    For a model of speech the beginning is empty, and what follows is the transcript of a held-out window.
    """
    if not family_of(model.config).causal:
        return None
    if isinstance(heldout, Speech):
        return {"prompt": "", "text": transcript(model, tokenizer, heldout.features[:1])}
    ids = heldout[:1, : min(_PROMPT, heldout.shape[1] // 2)]
    try:
        return {"prompt": tokenizer.decode(ids[0]), "text": generate(model, tokenizer, ids, _ANSWER)}
    except Exception as error:  # of any kind: the fold is written, and a sample is only for show
        show.warn(f"no sample of text could be generated ({type(error).__name__}: {error}).")
        return None


def _print(report: FoldReport, verdict: Verdict, sample: dict[str, Any] | None) -> None:
    show.print_fold(report, "Folded layers")
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
