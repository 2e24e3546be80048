"""Put the figures of `vllm_decode.py` into docs/serve.md. No figure is typed by hand.

python benchmarks/vllm_results.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from results import ROOT, SPEEDS
from sections.markdown import table

PAGE = ROOT / "docs/serve.md"
BEGIN, END = "<!-- speed: made by benchmarks/vllm_results.py -->", "<!-- end of speed -->"

#: runs of `decode` by what they measured
DECODED = {
    "vllm_decode_gpt2.json": "GPT-2 layout",
    "vllm_decode_falcon.json": "Falcon layout",
    "vllm_decode_falcon_7b.json": "Falcon-7B",
    "vllm_decode_falcon_few_bits.json": "Falcon layout, the fold all in few bits",
    "vllm_decode_falcon_int4.json": "the same, against vLLM's own int4",
    "vllm_decode_falcon_7b_int4.json": "Falcon-7B, the fold all in few bits",
}
PROMPTS = {
    "vllm_prompt_gpt2.json": "GPT-2 layout",
    "vllm_prompt_falcon.json": "Falcon layout",
    "vllm_prompt_falcon_int4.json": "Falcon layout, the fold all in few bits",
}
SERVED = {"vllm_server_falcon.json": "Falcon layout"}


def speed_part(folder: Path) -> str:
    """The tables, of the files that `vllm_decode.py` wrote into a folder."""
    decoded, prompts, served = (
        {label: json.loads((folder / name).read_text()) for name, label in names.items() if (folder / name).exists()}
        for names in (DECODED, PROMPTS, SERVED)
    )
    return "\n\n".join(
        [
            "Decoding, milliseconds of processor time per step:",
            decode_table(decoded),
            "Prompts, milliseconds of processor time until the first token:",
            prompt_table(prompts),
            "The server under load; milliseconds by the clock:",
            server_table(served),
        ]
    )


def decode_table(runs: dict[str, dict[str, Any]]) -> str:
    """A row per model, rival and batch size."""
    head = ["", "layers", "batch", "rival", "its", "folded", "rival / folded"]
    lines = [
        [label, str(run["settings"]["layers"] or "all"), str(row["batch"]), name, *_cells(row, "", name)]
        for label, run in runs.items()
        for name in run["settings"]["against"].split(",")
        for row in run["rows"]
    ]
    return table(head, lines)


def prompt_table(runs: dict[str, dict[str, Any]]) -> str:
    """A row per model and number of prompts at once."""
    head = ["", "prompts", "tokens of each", "dense", "folded", "dense / folded"]
    lines = [
        [label, str(row["batch"]), str(run["settings"]["prompt"]), *_cells(row, "prompt_", "dense")]
        for label, run in runs.items()
        for row in run["rows"]
    ]
    return table(head, lines)


def server_table(runs: dict[str, dict[str, Any]]) -> str:
    """A row per model, request rate and variant."""
    head = ["", "requests per second", "", "tokens per second", "first token", "99 %", "each further token", "99 %"]
    times = [f"{which}_{what}" for what in ("ttft_ms", "tpot_ms") for which in ("median", "p99")]
    lines = [
        [label, f"{row['rate']:g}", row["variant"], f"{row['output_throughput']:.1f}"]
        + [f"{row[name]:.0f}" for name in times]
        for label, run in runs.items()
        for row in run["rows"]
    ]
    return table(head, lines)


def replaced(text: str, part: str) -> str:
    """The text with what is between `BEGIN` and `END` replaced."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{rest.split(END)[1]}"


def _cells(row: dict[str, Any], prefix: str, rival: str) -> list[str]:
    ratio = row[f"{prefix}{rival}_cpu_ratio"]
    spread = f"{ratio['value']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"
    return [*(f"{row[f'{prefix}{name}_cpu_ms']:.1f}" for name in (rival, "folded")), spread]


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), speed_part(SPEEDS)), encoding="utf-8")
