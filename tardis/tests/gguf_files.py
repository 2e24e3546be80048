"""Small GGUF files of a random GPT-2, by the writer of the package `gguf`, as llama.cpp's converter would make them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
from models import END, HEADS, HIDDEN, INTERMEDIATE, LAYERS, POSITIONS, VOCAB, tiny_model, tiny_tokenizer

_KINDS = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
_FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
_MERGES = ["Ġ t", "i n"]
#: GPT-2's layers that transformers keeps transposed
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def write_gguf(
    path: Path, kind: str = "q8_0", change: Callable[[gguf.GGUFWriter], object] = id, architecture: str = "gpt2"
) -> Path:
    """Write `tiny_model("gpt2")` as a GGUF file.

    Args:
        path: of the file.
        kind: "f16" or "q8_0": how matrices are stored.
        change: adds metadata.
        architecture: what the file says that it is.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("model")
    writer.add_name("Tiny")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(_FILE_TYPES[kind])
    _add_tokenizer(writer)
    _add_tensors(writer, _KINDS[kind])
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """The byte tokenizer with two merges, because the writer takes no empty list, and transformers 5.16 none of one."""
    known = {index: token for token, index in tiny_tokenizer().get_vocab().items()}
    known |= {END + 1 + number: merge.replace(" ", "") for number, merge in enumerate(_MERGES)}
    normal, control, unused = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.UNUSED
    kinds = [control if index == END else normal if index in known else unused for index in range(VOCAB)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([known.get(index, f"[PAD{index}]") for index in range(VOCAB)])
    writer.add_token_types(kinds)
    writer.add_token_merges(_MERGES)
    writer.add_bos_token_id(END)
    writer.add_eos_token_id(END)


def _add_tensors(writer: gguf.GGUFWriter, kind: gguf.GGMLQuantizationType) -> None:
    """Matrices in `kind`, everything else in fp32."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, LAYERS)
    for name, weight in tiny_model("gpt2").state_dict().items():
        if name == "lm_head.weight":  # the embedding's
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        values = (weight.T if name.endswith(_TRANSPOSED) else weight).contiguous().numpy()
        matrix = values.ndim == 2 and not name.endswith("wpe.weight")
        if matrix:
            writer.add_tensor(stored, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, values)
