"""GGUF files of the shapes of `tardis bench`: random weights in Q4_0, head and all. They need `pip install gguf`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from tardis_llm.evaluation.shapes import SHAPES

_BLOCK = 32  # weights of Q4_0 that share a scale
Array = NDArray[Any]


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


def in_q4_0(shape: str, layers: int, path: Path) -> None:
    """Write a GGUF file of a shape of the families of `ARCHITECTURES`; in memory is one matrix of each size.

    Args:
        shape: key of `SHAPES`.
        layers: of the model.
        path: file to write.
    """
    model_type, fields = SHAPES[shape]
    own, sizes = ARCHITECTURES[model_type], _Sizes.of(fields)
    writer = gguf.GGUFWriter(path, model_type)
    _describe(writer, own, sizes, layers)
    tensors = list(_tensors(own, sizes, layers))
    for name, tensor in tensors:
        kind = gguf.GGMLQuantizationType.Q4_0 if tensor.dtype == np.uint8 else None
        writer.add_tensor_info(name, tensor.shape, tensor.dtype, tensor.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in tensors:
        writer.write_tensor_data(tensor)
    writer.close()


@dataclass(frozen=True)
class _Sizes:
    width: int
    vocabulary: int
    heads: int
    groups: int
    neurons: int

    @classmethod
    def of(cls, fields: dict[str, Any]) -> _Sizes:
        width = fields["hidden_size"]
        return cls(
            width,
            fields["vocab_size"],
            fields["num_attention_heads"],
            fields.get("num_key_value_heads", 1),
            fields.get("intermediate_size", 4 * width),
        )


def _describe(writer: gguf.GGUFWriter, own: Architecture, sizes: _Sizes, layers: int) -> None:
    writer.add_context_length(2048)
    writer.add_embedding_length(sizes.width)
    writer.add_feed_forward_length(sizes.neurons)
    writer.add_block_count(layers)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.groups)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{number}>" for number in range(sizes.vocabulary)])
    writer.add_token_types([gguf.TokenType.NORMAL] * sizes.vocabulary)
    writer.add_token_merges(["< 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    own.describe(writer, sizes.width // sizes.heads)


def _tensors(own: Architecture, sizes: _Sizes, layers: int) -> Iterator[tuple[str, Array]]:
    width, shared = sizes.width, sizes.groups * sizes.width // sizes.heads
    yield "token_embd.weight", _matrix(sizes.vocabulary, width)
    yield from _norm("output_norm", width, own.norm_bias)
    yield "output.weight", _matrix(sizes.vocabulary, width)
    for block in (f"blk.{number}" for number in range(layers)):
        for name, (rows, columns) in own.matrices(width, shared, sizes.neurons).items():
            yield f"{block}.{name}.weight", _matrix(rows, columns)
        for name in own.norms:
            yield from _norm(f"{block}.{name}", width, own.norm_bias)
        for name in own.biases:
            yield f"{block}.{name}.bias", np.zeros(width if name == "attn_q" else shared, np.float32)


@cache  # all layers have the same content
def _matrix(rows: int, columns: int) -> Array:
    """Bytes [rows, bytes of a row] of a random matrix."""
    random = np.random.default_rng(rows * columns)
    blocks = random.integers(0, 256, (rows * columns // _BLOCK, 2 + _BLOCK // 2), dtype=np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(0.002).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def _norm(name: str, width: int, bias: bool) -> Iterator[tuple[str, Array]]:
    yield f"{name}.weight", np.ones(width, np.float32)
    if bias:
        yield f"{name}.bias", np.zeros(width, np.float32)


def _falcon(writer: gguf.GGUFWriter, head: int) -> None:
    writer.add_layer_norm_eps(1e-5)
    writer.add_tensor_data_layout("jploski")


def _llama(writer: gguf.GGUFWriter, head: int) -> None:
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head)


def _qwen(writer: gguf.GGUFWriter, head: int) -> None:
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


ARCHITECTURES = {
    "falcon": Architecture(_falcon, ("attn_norm",), True, _matrices_of_falcon),
    "llama": Architecture(_llama, ("attn_norm", "ffn_norm"), False, _matrices_of_llama),
    "qwen2": Architecture(_qwen, ("attn_norm", "ffn_norm"), False, _matrices_of_llama, ("attn_q", "attn_k", "attn_v")),
}
