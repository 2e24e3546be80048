"""llama.cpp beside TARDIS on the same cores, in turns: decoding and prompts.

    python benchmarks/llama_cpp.py [--shape falcon-7b] [--layers 8] [--fix-rates 0.05,0.2] [--batch 1]
    python benchmarks/llama_cpp.py --folded DIR --gguf FILE [--threads 2]

The first form makes a model of a shape with random weights, and a GGUF file of the same shape in Q4_0 (of Falcon,
Llama or Qwen2; it needs `pip install gguf`). The second takes a folded model and any GGUF file. llama.cpp comes
prebuilt with the npm package node-llama-cpp, which is put into `--cache`. A process of llama.cpp waits while ours
computes, and the other way round; every ratio is one of neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tardis_llm.allocator import keep_freed_memory
from tardis_llm.checkpoint.loading import load_model
from tardis_llm.evaluation.decoder import Decoder
from tardis_llm.evaluation.machine import cpu_name, read_bandwidth
from tardis_llm.evaluation.shapes import SHAPES, RandomFold, shaped_model
from tardis_llm.evaluation.speed import step_bytes
from tardis_llm.evaluation.turns import Ratio, take_turns
from tardis_llm.evaluation.variants import Variant, lay_out_all, loaded_variants, random_rival, random_variant
from tardis_llm.files import write_json
from tardis_llm.runtime.prefill import set_prefill

CACHE = Path.home() / ".cache" / "tardis" / "llama"
PACKAGE = "node-llama-cpp@3.21.1"
SCRIPT = Path(__file__).with_suffix(".mjs")
LLAMA = "llama.cpp"
_BLOCK = 32  # weights of Q4_0 that share a scale


class Llama:
    """A process of llama.cpp that times what it is asked to.

    Args:
        file: GGUF file.
        threads: of its own.
        batch: sequences that it decodes at once.
        cache: folder with the npm package.
    """

    def __init__(self, file: Path, threads: int, batch: int, cache: Path) -> None:
        command = ["node", str(cache / SCRIPT.name), str(file), str(threads), str(batch)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=cache)
        self.about = self._answer()

    def timed(self, steps: int, prompt: int) -> dict[str, float]:
        """Seconds per step of the batch (`step`) and to the first tokens (`first`) behind prompts of so many tokens."""
        assert self._process.stdin is not None, "it is a pipe"
        print(steps, prompt, file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "it is a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended with status {self._process.wait()}; see what it said above.")
        answer: dict[str, Any] = json.loads(line)
        return answer


def install(cache: Path) -> None:
    """Put the npm package into a folder, unless it is there.

    Raises:
        RuntimeError: npm is missing, or cannot install it.
    """
    if not (cache / "node_modules" / "node-llama-cpp").is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        if shutil.which("npm") is None:
            raise RuntimeError("llama.cpp comes as an npm package; install Node.js with npm.")
        (cache / "package.json").write_text("{}")
        subprocess.run(["npm", "install", "--save-exact", "--ignore-scripts", PACKAGE], cwd=cache, check=True)
    shutil.copy(SCRIPT, cache)  # Node looks for packages beside a script


def in_q4_0(shape: str, layers: int, path: Path) -> None:
    """Write a GGUF file of a shape of the families of `_ARCHITECTURES`, random weights in Q4_0, head and all."""
    import gguf
    import numpy as np

    model_type, fields = SHAPES[shape]
    width, vocabulary, heads = (fields[name] for name in ("hidden_size", "vocab_size", "num_attention_heads"))
    groups, neurons = fields.get("num_key_value_heads", 1), fields.get("intermediate_size", 4 * width)
    writer = gguf.GGUFWriter(path, model_type)
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(neurons)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{number}>" for number in range(vocabulary)])
    writer.add_token_types([gguf.TokenType.NORMAL] * vocabulary)
    writer.add_token_merges(["< 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    own = _ARCHITECTURES[model_type]
    own.describe(writer, width // heads)
    shared = groups * width // heads
    _add_matrix(writer, "token_embd", vocabulary, width)
    _add_norm(writer, "output_norm", width, own.norm_bias)
    _add_matrix(writer, "output", vocabulary, width)
    for block in (f"blk.{number}" for number in range(layers)):
        for name, (rows, columns) in own.matrices(width, shared, neurons).items():
            _add_matrix(writer, f"{block}.{name}", rows, columns)
        for name in own.norms:
            _add_norm(writer, f"{block}.{name}", width, own.norm_bias)
        for name in own.biases:
            writer.add_tensor(f"{block}.{name}.bias", np.zeros(width if name == "attn_q" else shared, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_matrix(writer: Any, name: str, rows: int, columns: int) -> None:
    import gguf
    import numpy as np

    random = np.random.default_rng(rows * columns)
    blocks = random.integers(0, 256, (rows * columns // _BLOCK, 2 + _BLOCK // 2), dtype=np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(0.002).tobytes(), np.uint8)
    writer.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)


def _add_norm(writer: Any, name: str, width: int, bias: bool) -> None:
    import numpy as np

    writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    if bias:
        writer.add_tensor(f"{name}.bias", np.zeros(width, np.float32))


def _falcon(writer: Any, head: int) -> None:
    writer.add_layer_norm_eps(1e-5)
    writer.add_tensor_data_layout("jploski")


def _llama(writer: Any, head: int) -> None:
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head)


def _qwen(writer: Any, head: int) -> None:
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)


def _matrices_of_falcon(width: int, shared: int, neurons: int) -> dict[str, tuple[int, int]]:
    return {
        "attn_qkv": (width + 2 * shared, width),
        "attn_output": (width, width),
        "ffn_up": (neurons, width),
        "ffn_down": (width, neurons),
    }


def _matrices_of_llama(width: int, shared: int, neurons: int) -> dict[str, tuple[int, int]]:
    return {
        "attn_q": (width, width),
        "attn_k": (shared, width),
        "attn_v": (shared, width),
        "attn_output": (width, width),
        "ffn_gate": (neurons, width),
        "ffn_up": (neurons, width),
        "ffn_down": (width, neurons),
    }


@dataclass(frozen=True)
class Architecture:
    """What files of a model type have.

    Attributes:
        describe: writes what else they say, given the width of a head.
        norms: of a block.
        norm_bias: whether norms have biases.
        matrices: of a block, with rows and columns, given its width, that of keys and of values, and its neurons.
        biases: of queries, keys and values.
    """

    describe: Callable[[Any, int], None]
    norms: tuple[str, ...]
    norm_bias: bool
    matrices: Callable[[int, int, int], dict[str, tuple[int, int]]]
    biases: tuple[str, ...] = ()


_ARCHITECTURES = {
    "falcon": Architecture(_falcon, ("attn_norm",), True, _matrices_of_falcon),
    "llama": Architecture(_llama, ("attn_norm", "ffn_norm"), False, _matrices_of_llama),
    "qwen2": Architecture(_qwen, ("attn_norm", "ffn_norm"), False, _matrices_of_llama, ("attn_q", "attn_k", "attn_v")),
}


def variants_of_shape(shape: str, layers: int, rates: list[float]) -> Iterator[tuple[str, Variant]]:
    """Ours in int4, dense and folded at each fix rate, by their names in the table."""
    model = shaped_model(shape, layers)
    yield "int4", random_rival("int4", model)
    for rate in rates:
        yield f"folded, {rate:.0%} fixed", random_variant(model, RandomFold(2, 4, 4, 4, rate))


def steps_of(variant: Variant, prompt: int, chosen: argparse.Namespace) -> Callable[[], float]:
    """Seconds per step of the batch, each time that it is called."""
    steps = chosen.steps
    with variant.within():
        decoder = Decoder(variant.model, variant.prompt(chosen.batch, prompt), steps if chosen.compile else None)

    def run() -> float:
        with variant.within():
            return decoder.seconds(steps)

    return run


def firsts_of(variant: Variant, prompt: int, batch: int) -> Callable[[], float]:
    """Seconds from prompts to their first tokens, each time that it is called; as `tardis generate` reads prompts."""

    def run() -> float:
        with variant.within():
            set_prefill(variant.model, "auto")
            try:
                return Decoder(variant.model, variant.prompt(batch, prompt)).prefill
            finally:
                set_prefill(variant.model, "folded")

    return run


def compared(ours: dict[str, Variant], llama: Llama, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Times of every variant and of llama.cpp, with ratios to llama.cpp."""
    lay_out_all(list(ours.values()))
    steps: dict[str, Callable[[], float]] = {LLAMA: lambda: llama.timed(chosen.steps, 8)["step"]}
    firsts: dict[str, Callable[[], float]] = {LLAMA: lambda: llama.timed(1, chosen.prompt)["first"]}
    for name, variant in ours.items():
        steps[name], firsts[name] = (
            steps_of(variant, 8, chosen),
            firsts_of(variant, chosen.prompt, chosen.batch),
        )
    decoded = take_turns(steps, chosen.rounds, lambda *_: None, "decoding")
    prompted = take_turns(firsts, max(2, chosen.rounds // 2), lambda *_: None, "prompts")
    rows = []
    for name in steps:
        size = llama.about["bytes"] if name == LLAMA else _bytes(ours[name])
        rows.append(
            {
                "variant": name,
                "tokens_per_second": chosen.batch / statistics.median(decoded[name]),
                "over_llama": asdict(Ratio.of(decoded[LLAMA], decoded[name])),
                "first_token_seconds": statistics.median(prompted[name]),
                "first_over_llama": asdict(Ratio.of(prompted[LLAMA], prompted[name])),
                "bytes": size,
            }
        )
    return rows


def _bytes(variant: Variant) -> float:
    with variant.within():
        return step_bytes(variant.model)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    decode, first = row["over_llama"], row["first_over_llama"]
    return (
        f"{row['variant']:20} {row['tokens_per_second']:7.2f} tokens/s  {decode['value']:.2f}x "
        f"({decode['low']:.2f}-{decode['high']:.2f})  first token {row['first_token_seconds']:6.3f} s  "
        f"{first['value']:.2f}x ({first['low']:.2f}-{first['high']:.2f})  {row['bytes'] / 2**20:6.0f} MiB"
    )


def main() -> None:
    """Measure, print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="falcon-7b", help="random weights of this shape (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="of the shape (default: %(default)s)")
    parser.add_argument("--fix-rates", default="0.05,0.2", help="of random folds (default: %(default)s)")
    parser.add_argument("--folded", help="a folded model instead of a shape")
    parser.add_argument("--gguf", type=Path, help="what llama.cpp loads; default: made for the shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=24, help="tokens per run (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompts (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences decoded at once (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="run ours as compiled steps")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for llama.cpp (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="where figures go")
    chosen = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(chosen.threads)
    install(chosen.cache)
    if chosen.folded:
        ours = {"folded": loaded_variants(load_model(chosen.folded))[0]}
    else:
        ours = dict(variants_of_shape(chosen.shape, chosen.layers, [float(r) for r in chosen.fix_rates.split(",")]))
    file = chosen.gguf or chosen.cache / f"{chosen.shape}-{chosen.layers}.gguf"
    if not file.exists():
        if chosen.gguf or SHAPES[chosen.shape][0] not in _ARCHITECTURES:
            parser.error(f"there is no {file}; files are made of shapes of {', '.join(_ARCHITECTURES)} only")
        in_q4_0(chosen.shape, chosen.layers, file)
    llama = Llama(file, chosen.threads, chosen.batch, chosen.cache)
    try:
        rows, bandwidth = compared(ours, llama, chosen), read_bandwidth()
    finally:
        llama.close()
    print(f"{cpu_name()}, {chosen.threads} threads, reads memory at {bandwidth / 1e9:.1f} GB/s; {file.name}")
    print("\n".join(map(line, rows)))
    if chosen.output:
        about = {"cpu": cpu_name(), "threads": chosen.threads, "read_bytes_per_second": bandwidth, "file": file.name}
        about |= {"compiled": chosen.compile, "batch": chosen.batch, "prompt": chosen.prompt}
        write_json(chosen.output, {**about, "llama_cpp": PACKAGE, "rows": rows})


if __name__ == "__main__":
    main()
