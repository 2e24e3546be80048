"""The allocator's settings reach the C library; weights that move keep what they are."""

import platform
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tardis_llm.allocator import contiguous_in_huge_pages, keep_freed_memory, use_huge_pages

MIB = 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_glibc_takes_the_settings():
    assert keep_freed_memory()


class Weights(nn.Module):
    """A large matrix, its transpose's layout, a large buffer, one tied to the first, and a small one."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.randn(1025, 2048))
        self.turned = nn.Parameter(torch.randn(2048, 1024).T)
        self.tied = self.large
        self.small = nn.Parameter(torch.randn(3))
        self.register_buffer("planes", torch.randint(256, (1024, 4, 1030), dtype=torch.uint8))


def test_weights_that_move_keep_values_strides_and_ties():
    model = Weights()
    before = {name: (tensor.clone(), tensor.stride()) for name, tensor in model.state_dict().items()}
    small = model.small.data_ptr()
    held, at = [model.large, model.planes], [model.large.data_ptr(), model.planes.data_ptr()]
    assert use_huge_pages(model.modules()) == model.large.nbytes + model.turned.nbytes + model.planes.nbytes
    assert [tensor.data_ptr() for tensor in held] == at, "a call that runs has these"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name][0]) and tensor.stride() == before[name][1], name
    assert model.tied is model.large and model.small.data_ptr() == small
    assert isinstance(model.large, nn.Parameter) and model.large.requires_grad
    assert use_huge_pages(model.modules()) == 0, "all lie there already"


def thp() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return sys.platform.startswith("linux") and setting.exists() and "[never]" not in setting.read_text()


def huge_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("AnonHugePages")).split()[1])


@pytest.mark.skipif(not thp(), reason="this system has no transparent huge pages")
def test_large_copies_lie_in_huge_pages():
    keep_freed_memory()  # so that malloc has memory in small pages at hand
    tensor = torch.ones(24 * MIB, dtype=torch.uint8)
    del tensor
    tensor, before = torch.randint(256, (24 * MIB,), dtype=torch.uint8), huge_bytes()
    copy = contiguous_in_huge_pages(tensor)
    assert torch.equal(copy, tensor) and copy.data_ptr() % (2 * MIB) == 0
    assert huge_bytes() - before >= 12 * MIB


def test_weights_in_huge_pages_live_as_long_as_what_is_made_of_them():
    tensor = torch.arange(3 * MIB, dtype=torch.int32).view(MIB, 3)
    part = contiguous_in_huge_pages(tensor).T[1:]
    for _ in range(3):  # what takes their place, if they are gone
        contiguous_in_huge_pages(torch.zeros_like(tensor))
    assert torch.equal(part, tensor.T[1:])
    part += 1
    assert torch.equal(part, tensor.T[1:] + 1)


def test_small_weights_share_huge_pages_and_nothing_else(tmp_path):
    wanted = [torch.randn(64, 300) + number for number in range(900)]  # more than one lot of pages
    copies = [contiguous_in_huge_pages(tensor) for tensor in wanted]
    assert all(map(torch.equal, copies, wanted))
    assert all(copy.data_ptr() % 4096 == 0 and copy.untyped_storage().nbytes() == copy.nbytes for copy in copies)
    spans = sorted((copy.data_ptr(), copy.data_ptr() + copy.nbytes) for copy in copies)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    save_file({str(number): copy for number, copy in enumerate(copies)}, tmp_path / "weights.safetensors")
    found = load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(found[str(number)], tensor) for number, tensor in enumerate(wanted))
