"""Peak memory of folding a large model: a random one of OPT-1.3B's shape, in bf16, on 64 windows of 1024 tokens.

python benchmarks/fold_memory.py                     all 24 layers
python benchmarks/fold_memory.py --layers 0,1        as much memory, a fraction of the time
"""

import resource
import time
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, OPTConfig

from tardis_llm import FoldConfig, fold
from tardis_llm.allocator import keep_freed_memory

GIB = 2**30
ALLOWED = 2.5  # GiB beyond the model's own size
VOCABULARY = 50_272


def random_model(layers: int) -> torch.nn.Module:
    """OPT-1.3B's shape with random weights in bf16; built in bf16, so that building it is not what peaks."""
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        ffn_dim=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        word_embed_proj_dim=2048,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def peak() -> float:
    """Largest resident size of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def main(
    layers: Annotated[str, typer.Option(help="blocks to fold, such as 0,1; empty for all")] = "",
    windows: int = 64,
    length: int = 1024,
    reduction: float = 0.75,
    probe_tokens: Annotated[int, typer.Option(help="tokens the loss of single layers is measured on")] = 2048,
    memory_limit: Annotated[float, typer.Option(help="GiB of hidden states kept in memory")] = 1.0,
) -> None:
    """Fold and print the peak."""
    keep_freed_memory()
    console = Console()
    torch.manual_seed(0)
    model = random_model(24)
    size = sum(p.nbytes for p in model.parameters()) / GIB
    console.print(f"model {size:.2f} GiB, peak after building it {peak():.2f} GiB")
    ids = torch.randint(4, VOCABULARY, (windows, length))
    config = FoldConfig(
        reduction=reduction,
        predictor_bits=2,
        probe_tokens=probe_tokens,
        memory_limit_gib=memory_limit,
        layers=tuple(int(i) for i in layers.split(",")) if layers else None,
    )
    start = time.perf_counter()

    def progress(stage: str, done: int, total: int) -> None:
        console.print(f"{time.perf_counter() - start:7.1f} s  {stage} {done}/{total}, peak {peak():.2f} GiB")

    report = fold(model, ids, config, progress=progress)
    over = peak() - size
    console.print(f"folded {len(report.layers)} layers, reduction {report.reduction:.4f}, fix {report.fix_rate:.4f}")
    verdict = "met" if over <= ALLOWED else "MISSED"
    console.print(f"peak {peak():.2f} GiB = model + {over:.2f} GiB; allowed + {ALLOWED} GiB: {verdict}")
    raise typer.Exit(over > ALLOWED)


if __name__ == "__main__":
    typer.run(main)
