"""A few items of every task in the files' own format, and the same items as lm-eval's stock tasks have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Items = list[dict[str, Any]]

ITEMS: dict[str, Items] = {
    "hellaswag": [
        {"ctx": "Cooking: A man cuts an onion. he", "choices": ["cries.", "flies to Rome at last.", "is."], "label": 0},
        {"ctx": "Home: How to sleep. Lie down.", "choices": ["Rest.", "Run as fast as you can."], "label": 1},
        {"ctx": "Sport: Two girls run! then they", "choices": ["stop", "turn into stone"], "label": 0},
        {"ctx": "Art: A woman paints. the woman", "choices": ["sells it", "eats"], "label": 1},
    ],
    "arc_easy": [
        {"ctx": "What is wet?", "choices": ["water", "sand", "a stone in the sun", "air"], "label": 0},
        {"ctx": "Which one burns?", "choices": ["wood and paper", "iron", "ice"], "label": 2},
        {"ctx": "What do cows eat?", "choices": ["grass", "milk", "wool", "meat"], "label": 1},
    ],
    "piqa": [
        {"ctx": "open a jar", "choices": ["turn the lid", "eat the lid with a spoon"], "label": 0},
        {"ctx": "dry a towel", "choices": ["hang it in the sun", "wet it"], "label": 1},
        {"ctx": "boil an egg", "choices": ["in hot water", "in a drawer"], "label": 0},
    ],
    "winogrande": [
        {"ctx": "Ann lost to Bo because _ was slow.", "choices": ["Ann", "Bo"], "label": 0},
        {"ctx": "The cup is not in the box as the _ is too big.", "choices": ["cup", "box"], "label": 0},
        {"ctx": "Bo asked Ann, and _ said yes.", "choices": ["Bo", "Ann"], "label": 1},
    ],
    "lambada": [{"text": "ta to b"}, {"text": "ta to c"}, {"text": "ta ta b"}],
    "blimp": [
        {"uid": uid, "field": "syntax", "good": f"The {noun} sleeps.", "bad": f"The {noun} sleep."}
        for uid, nouns in (("agreement", "dog cat cow"), ("another", "bird fish horse"))
        for noun in nouns.split()
    ],
}  # fmt: skip

PAGES = [" = One = \n\n A @-@ b , c . ", " = Two = \n\n It 's ( so ) said . \n = = Part = = \n\n Three : four ; five"]


def write_items(folder: Path) -> Path:
    """Write the items of all tasks as the files that `--task-data` takes."""
    from tardis_llm.evaluation.tasks import TASKS

    for name, items in ITEMS.items():
        write_lines(folder / TASKS[name].file, items)
    (folder / TASKS["wikitext"].file).write_text("\n".join(PAGES), encoding="utf-8")
    return folder


def write_lines(path: Path, items: Items) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def stock_items(name: str) -> tuple[str, str, Items]:
    """The stock task of a name, its folder in lm-eval, and the items as its dataset has them."""
    items = ITEMS.get(name, [])
    if name == "hellaswag":
        return "hellaswag", "hellaswag", [_hellaswag(item) for item in items]
    if name == "arc_easy":
        return "arc_easy", "arc", [
            {
                "question": item["ctx"],
                "choices": {"text": item["choices"], "label": list("ABCD")[: len(item["choices"])]},
                "answerKey": "ABCD"[item["label"]],
            }
            for item in items
        ]  # fmt: skip
    if name == "piqa":
        pairs = [item["choices"] for item in items]
        return "piqa", "piqa", [
            {"goal": item["ctx"], "sol1": first, "sol2": second, "label": item["label"]}
            for item, (first, second) in zip(items, pairs, strict=True)
        ]  # fmt: skip
    if name == "winogrande":
        pairs = [item["choices"] for item in items]
        return "winogrande", "winogrande", [
            {"sentence": item["ctx"], "option1": first, "option2": second, "answer": str(item["label"] + 1)}
            for item, (first, second) in zip(items, pairs, strict=True)
        ]  # fmt: skip
    if name == "lambada":
        return "lambada_openai", "lambada", items
    if name == "blimp":
        pairs = [{"sentence_good": item["good"], "sentence_bad": item["bad"]} for item in items]
        return "blimp_adjunct_island", "blimp", pairs
    return "wikitext", "wikitext", [{"page": page} for page in PAGES]


def _hellaswag(item: dict[str, Any]) -> dict[str, Any]:
    """The stock dataset has the activity, the finished sentences and the unfinished one apart."""
    activity, _, context = item["ctx"].partition(": ")
    end = max(context.rfind(". "), context.rfind("! ")) + 1
    finished, rest = (context, "") if context.endswith(".") else (context[:end], context[end + 1 :])
    return {
        "activity_label": activity,
        "ctx_a": finished,
        "ctx_b": rest,
        "endings": item["choices"],
        "label": str(item["label"]),
    }
