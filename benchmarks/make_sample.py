"""Make the bundled sample, `tardis/tardis_llm/sample/`: model, texts and attribution.

    python benchmarks/make_sample.py [--shared ../shared] [--output tardis/tardis_llm/sample]

The same inputs give the same bytes. The trained model is rounded to bf16 and checked against its fp32
original. The texts are whole Wikipedia articles, spread over the source files by the hash of their text; the
evaluation text leaves out every article that shares 13 words in a row with any of the training corpus.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple
from urllib.parse import quote

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

REPOSITORY = Path(__file__).resolve().parents[1]
CALIBRATION_BYTES = 1_000_000
EVALUATION_BYTES = 200_000
NGRAM = 13  # words; the customary length for telling quotation from coincidence

ATTRIBUTION = """\
# Where this sample comes from

## `model/`
A GPT-2 model of 7 million parameters (6 layers, width 256, GELU), trained from scratch by the TARDIS project
on English Wikipedia prose of 2014, in windows of 256 tokens. Licence: Apache-2.0, as the project. The weights
were fp32 and are rounded to bf16 here. `benchmarks/train_sample.py` trains models of this kind.

## `calibration.txt`, `evaluation.txt`
Text of the English Wikipedia articles listed below, by their contributors, as of 2014. Licence: Creative
Commons Attribution-ShareAlike 3.0 Unported (CC BY-SA 3.0), <https://creativecommons.org/licenses/by-sa/3.0/>;
these files may be passed on under the same licence. The authors of an article are named in its history, at
`https://en.wikipedia.org/w/index.php?title=TITLE&action=history`.

Changes: only the prose of each article was kept, one paragraph per line, without markup, references and
images; a choice of articles was joined, each headed by its title. The evaluation text was held out of the
model's training.
"""


class Article(NamedTuple):
    """One article of a corpus in which blank lines separate titles, bodies and articles alike."""

    title: str
    body: str

    @property
    def text(self) -> str:
        return f"{self.title}\n\n{self.body}\n"


def read_articles(path: Path) -> list[Article]:
    """All articles of one corpus file, in order."""
    blocks = path.read_text(encoding="utf-8").strip("\n").split("\n\n")
    if len(blocks) % 2 or any("\n" in title for title in blocks[::2]):
        raise ValueError(f"{path}: expected titles of one line and bodies in turn, separated by blank lines")
    return [Article(*pair) for pair in zip(blocks[::2], blocks[1::2], strict=True)]


def spread(articles: Iterable[Article], size: int) -> Iterator[Article]:
    """Articles from everywhere in the corpus, at most `size` bytes once joined.

    Sorting by hash is a shuffle that needs no seed and does not move when an article is added elsewhere.
    """
    for article in sorted(articles, key=lambda a: hashlib.sha256(a.text.encode()).digest()):
        size -= len(article.text.encode()) + 1  # the blank line between articles
        if size < 0:
            return
        yield article


def ngrams(text: str) -> set[str]:
    """Runs of `NGRAM` words, whatever their case and punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def join(articles: Iterable[Article]) -> str:
    """One text in the layout of the corpus."""
    return "\n".join(article.text for article in articles)


def shared_ngrams(text: str, articles: Iterable[Article]) -> set[str]:
    """Those runs of words of `text` that also occur in one of the articles; memory is bounded by `text`."""
    wanted = ngrams(text)
    return set().union(*(wanted & ngrams(article.text) for article in articles))


def choose_texts(corpus: list[Path], held_out: Path) -> tuple[list[Article], list[Article]]:
    """Articles to calibrate on, and articles to evaluate on of which the corpus holds no passage."""
    training = [article for path in corpus for article in read_articles(path)]
    candidates = read_articles(held_out)
    seen = shared_ngrams(join(candidates), training)
    unseen = [article for article in candidates if seen.isdisjoint(ngrams(article.text))]
    return list(spread(training, CALIBRATION_BYTES)), list(spread(unseen, EVALUATION_BYTES))


def save_rounded(source: Path, target: Path) -> None:
    """Write the model at `source` to `target` with its weights rounded to bf16, and its tokenizer."""
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    (target / "model.safetensors").chmod(0o644)  # written for its owner alone, but a package is for everybody


@torch.inference_mode()
def check_rounded(source: Path, target: Path, text: str) -> float:
    """Compare with the original in fp32; return the largest change that rounding made to a log-probability.

    Raises:
        ValueError: tokens, or the logits of the original with rounded weights, differ.
    """
    tokens = encode(source, text)
    if encode(target, text) != tokens:
        raise ValueError(f"{target}: the tokenizer does not give the tokens of {source}")
    window = torch.tensor([tokens[:256]])
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    saved = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    exact, rounded = original(window).logits, saved(window).logits
    if not torch.equal(rounded, round_weights(original)(window).logits):
        raise ValueError(f"{target}: is not {source} rounded to bf16")
    return (exact.log_softmax(-1) - rounded.log_softmax(-1)).abs().max().item()


def encode(model: Path, text: str) -> list[int]:
    """Tokens of a text of any length."""
    tokens: list[int] = AutoTokenizer.from_pretrained(model)(text, verbose=False).input_ids
    return tokens


def round_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Round the weights to bf16 in place, but keep them, and the arithmetic, in fp32."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    return model


def attribution(calibration: list[Article], evaluation: list[Article]) -> str:
    """The text of ATTRIBUTION.md: sources, licences, changes, and every article by title."""

    def titles(articles: list[Article]) -> str:
        page = "https://en.wikipedia.org/wiki/"
        return "\n".join(f"- [{a.title}]({page}{quote(a.title.replace(' ', '_'))})" for a in articles)

    return (
        f"{ATTRIBUTION}\n### Articles of `calibration.txt`\n{titles(calibration)}\n"
        f"\n### Articles of `evaluation.txt`\n{titles(evaluation)}\n"
    )


def report(output: Path, calibration: list[Article], evaluation: list[Article], change: float) -> None:
    """Print what was made, and how far apart the two texts are."""
    passages = ngrams(join(evaluation))
    shared = shared_ngrams(join(evaluation), calibration)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    console = Console(highlight=False)
    console.print(f"calibration.txt  {len(calibration)} articles, {len(join(calibration).encode()):,} bytes")
    console.print(f"evaluation.txt   {len(evaluation)} articles, {len(join(evaluation).encode()):,} bytes")
    console.print(f"overlap          {len(shared)} of {len(passages):,} {NGRAM}-grams of the evaluation text")
    console.print(f"bf16             largest change of a log-probability {change:.3f}")
    console.print(f"{output}  {size / 1e6:.1f} MB in total")


def main(
    shared: Annotated[Path, typer.Option(help="Folder with data/text and models.")] = REPOSITORY / "../shared",
    output: Annotated[Path, typer.Option(help="Folder to write.")] = REPOSITORY / "tardis/tardis_llm/sample",
) -> None:
    """Make the bundled sample from the shared corpus and the trained model."""
    corpus = sorted((shared / "data/text").glob("wikipedia_en_2014.00*.txt"))
    held_out = shared / "data/text/wikipedia_en_2014.val.txt"
    model = shared / "models/gpt2-wiki-7m"
    if not corpus or not held_out.exists() or not model.is_dir():
        raise typer.BadParameter(f"{shared} lacks data/text/wikipedia_en_2014.*.txt or models/gpt2-wiki-7m")

    calibration, evaluation = choose_texts(corpus, held_out)
    output.mkdir(parents=True, exist_ok=True)
    (output / "calibration.txt").write_text(join(calibration), encoding="utf-8")
    (output / "evaluation.txt").write_text(join(evaluation), encoding="utf-8")
    (output / "ATTRIBUTION.md").write_text(attribution(calibration, evaluation), encoding="utf-8")
    save_rounded(model, output / "model")
    report(output, calibration, evaluation, check_rounded(model, output / "model", join(evaluation)))


if __name__ == "__main__":
    typer.run(main)
