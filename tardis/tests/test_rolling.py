"""Word perplexity over documents, its standard error, and that lm-eval finds the same, for the token recipe too."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_data import PAGES
from models import ENCODER_NAMES, begun_tokenizer, tiny_model, tiny_tokenizer

from tardis_llm import sample
from tardis_llm.checkpoint.loading import load_dense, load_tokenizer
from tardis_llm.errors import InvalidInputError
from tardis_llm.evaluation import rolling
from tardis_llm.evaluation.perplexity import token_perplexity, windows_of
from tardis_llm.evaluation.rolling import Document, WordPerplexity, detokenise, documents_of, word_perplexity
from tardis_llm.evaluation.tasks import TASKS, run_tasks
from tardis_llm.integrations.lm_eval import quiet

SHORT, LONG = Document.of("A cat sat."), Document.of("The quick brown fox jumps over it.")  # 10 and 34 bytes


@torch.no_grad()
def loss_by_hand(model: Any, text: str, length: int) -> float:
    """Each token from the ones before it in its window, or in the last `length` ones at the end of the text."""
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text)]
    last = (len(ids) - 2) // length * length  # where the last window's predictions start
    total = 0.0
    for position in range(1, len(ids)):
        first = max(0, len(ids) - 1 - length) if position > last else (position - 1) // length * length
        logits = model(torch.tensor([ids[first:position]])).logits[0, -1].double()
        total -= float(logits.log_softmax(-1)[ids[position]])
    return total


def test_it_is_exp_of_the_loss_of_all_tokens_per_word():
    model = tiny_model("gpt2")
    losses = [loss_by_hand(model, document.text, 16) for document in (SHORT, LONG)]
    found = word_perplexity(model, tiny_tokenizer(), [SHORT, LONG], 16)
    assert found.losses.tolist() == pytest.approx(losses, rel=1e-5)
    assert found.value == pytest.approx(math.exp(sum(losses) / 10), rel=1e-4)
    assert found.byte_perplexity == pytest.approx(math.exp(sum(losses) / 44), rel=1e-5)
    assert (found.words, found.bytes, found.tokens, found.documents, found.length) == (10, 44, 44, 2, 16)
    assert found.as_dict()["kind"] == "word perplexity"
    assert json.dumps(found.as_dict())


def test_windows_follow_each_other_and_the_last_is_filled_up_with_context():
    found = [(window.tokens, window.following) for window in rolling._windows(0, list(range(11)), 4)]
    assert found == [
        ([0, 1, 2, 3], [1, 2, 3, 4]),
        ([4, 5, 6, 7], [5, 6, 7, 8]),
        ([6, 7, 8, 9], [9, 10]),
    ]
    assert [window.tokens for window in rolling._windows(0, [0, 1, 2], 4)] == [[0, 1]]


def test_the_token_that_begins_texts_begins_every_window_and_is_never_predicted():
    found = [(window.tokens, window.following) for window in rolling._windows(0, list(range(11)), 4, begun=True)]
    assert found == [([0, 1, 2, 3], [1, 2, 3, 4]), ([0, 5, 6, 7], [5, 6, 7, 8]), ([0, 7, 8, 9], [9, 10])]


def test_it_counts_the_same_tokens_where_the_tokenizer_begins_texts():
    documents = rolling.documents_of("One text, of six words only.\n\nAnother one.")
    plain, begun = (
        word_perplexity(tiny_model("gpt2"), tokenizer(), documents, length=64)
        for tokenizer in (tiny_tokenizer, begun_tokenizer)
    )
    assert begun == plain  # the documents are shorter than a window, and <|endoftext|> is before each in both


def test_small_batches_change_nothing_and_progress_ends_at_the_windows(monkeypatch: pytest.MonkeyPatch):
    model, steps = tiny_model("gpt2"), []
    whole = word_perplexity(model, tiny_tokenizer(), [SHORT, LONG], 8)
    monkeypatch.setattr(rolling, "LOGITS_AT_ONCE", 2 * 8 * 320)
    parts = word_perplexity(model, tiny_tokenizer(), [SHORT, LONG], 8, lambda *step: steps.append(step))
    assert parts.value == pytest.approx(whole.value, rel=1e-5)
    assert steps[-1][1:] == (7, 7)  # 2 windows and 5


def test_the_standard_error_is_that_of_resampled_documents():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(50, 150, (300,), generator=generator).double()
    losses = counts * (3 + 0.5 * torch.randn(300, generator=generator, dtype=torch.float64))
    documents = [Document("", int(count), 1) for count in counts]
    draws = torch.randint(300, (4000, 300), generator=generator)
    resampled = (losses[draws].sum(1) / counts[draws].sum(1)).exp()
    assert WordPerplexity.of(documents, losses, 1, 1).standard_error == pytest.approx(float(resampled.std()), rel=0.05)


def test_the_ratio_of_two_models_is_paired_by_document():
    counts = torch.tensor([90.0, 110, 100], dtype=torch.float64)
    hard = counts * torch.tensor([3.0, 5, 4], dtype=torch.float64)
    documents = [Document("", int(count), 1) for count in counts]
    dense, folded = (WordPerplexity.of(documents, losses, 1, 1) for losses in (hard, hard + 0.1 * counts))
    ratio, error = folded.ratio(dense)
    assert ratio == pytest.approx(folded.value / dense.value) == pytest.approx(math.exp(0.1))
    assert error < 1e-9 < folded.standard_error


def test_documents_start_at_headings_of_the_first_level():
    found = documents_of("\n".join(PAGES))
    assert [document.text.split()[1] for document in found] == ["One", "Two"]
    assert found[0].text == " = One =\n\nA-b, c. "
    assert found[0].words == 11  # before detokenising, and the empty ends count
    assert [document.text for document in documents_of("= A =\nx\n= B =\ny")] == ["= A =\nx", "= B =\ny"]


def test_without_headings_documents_start_behind_blank_lines_and_titles_stay_with_them():
    text = "A title\n\nA text. Of two lines.\nThis is one.\n\nAnother one, but short.\n\nThe end"
    found = [document.text for document in documents_of(text)]
    assert found == ["A title\n\nA text. Of two lines.\nThis is one.", "Another one, but short.", "The end"]
    assert len(documents_of(sample.evaluation_text().read_text(encoding="utf-8"))) == 22


def test_natural_text_is_left_alone():
    text = "It 's ( so ) said : no"
    assert [document.text for document in documents_of(text)] == [text]


def test_the_detokeniser_is_that_of_lm_eval():
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    raw = (
        " = A = \n = = B = = \n = = = C = = = \n The cats ' ten @-@ year , 1 @,@ 000 @.@ 5 ; ( so ) : [ x ] { y } . \n "
        "He said \" no \" ! Why ? ' Yes ' it 's 5 ° C and N or M . \n"
    )
    assert detokenise(raw) == wikitext_detokenizer({"page": raw})


@pytest.fixture(scope="module")
def dense() -> tuple[Any, Any]:
    """The bundled sample in fp32, and its tokenizer."""
    name = str(sample.model_dir())
    return load_dense(name, "float32"), load_tokenizer(name)


@pytest.fixture(scope="module")
def text() -> str:
    """The beginning of the bundled text: 4 documents, the longest of 6 windows."""
    return sample.evaluation_text().read_text(encoding="utf-8")[:16_000]


def plain_harness(model: Any, tokenizer: Any, length: int) -> Any:
    """lm-eval's model without anything of ours."""
    from lm_eval.models.huggingface import HFLM

    with quiet():
        return HFLM(pretrained=model, tokenizer=tokenizer, max_length=length, batch_size=4)


def test_lm_eval_finds_the_same_word_perplexity(dense: tuple[Any, Any], text: str):
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import weighted_perplexity

    documents = documents_of(text)
    requests = [Instance("loglikelihood_rolling", {}, (document.text,), 0) for document in documents]
    with quiet():
        found = plain_harness(*dense, 256).loglikelihood_rolling(requests)
    theirs = weighted_perplexity([(value, len(d.text.split())) for value, d in zip(found, documents, strict=True)])
    ours = word_perplexity(*dense, documents, 256)
    assert len(documents) > 2
    assert ours.tokens > 3000
    assert ours.value == pytest.approx(theirs, rel=1e-3)


def test_lm_eval_finds_the_same_token_perplexity(dense: tuple[Any, Any], text: str):
    windows = windows_of(text, dense[1], 256)[:8]
    requests = [(None, [first], rest) for first, *rest in windows.tolist()]  # a window's first token is context
    with quiet():
        found = plain_harness(*dense, 256)._loglikelihood_tokens(requests)
    theirs = math.exp(-sum(value for value, _ in found) / (8 * 255))
    assert token_perplexity(dense[0], windows).value == pytest.approx(theirs, rel=1e-3)


def test_the_task_wikitext_finds_the_same_on_raw_text(tmp_path: Path):
    model, tokenizer, content = tiny_model("gpt2"), tiny_tokenizer(), "\n".join(PAGES)
    (tmp_path / TASKS["wikitext"].file).write_text(content, encoding="utf-8")
    [found] = run_tasks(model, tokenizer, ["wikitext"], tmp_path, None, 32)
    ours = word_perplexity(model, tokenizer, documents_of(content), 32)
    assert (found.metric, found.items, found.correct) == ("word_perplexity", 2, ())
    assert (found.value, found.standard_error) == pytest.approx((ours.value, ours.standard_error), rel=1e-4)
    assert found.also["byte_perplexity"].value == pytest.approx(ours.byte_perplexity, rel=1e-4)


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_encoders_have_none(name: str):
    with pytest.raises(InvalidInputError, match=r"is an encoder.*give a causal language model"):
        word_perplexity(tiny_model(name), tiny_tokenizer(), [SHORT, LONG], 16)


def test_one_document_or_no_prefix_token_is_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(InvalidInputError, match="two documents at least"):
        word_perplexity(tiny_model("gpt2"), tokenizer, [SHORT], 16)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(InvalidInputError, match="measure token perplexity"):
        word_perplexity(tiny_model("gpt2"), tokenizer, [SHORT, LONG], 16)


def test_an_output_without_sense_gives_no_number_that_has_one():
    model = tiny_model("gpt2")
    model.transformer.ln_f.weight.data[0] = torch.nan
    assert math.isnan(word_perplexity(model, tiny_tokenizer(), [SHORT, LONG], 16).value)
