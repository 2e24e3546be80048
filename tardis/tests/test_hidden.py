"""Hidden states beyond the memory limit are kept in a file that nobody has to clean up."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from synthetic import normal

from tardis_llm.calibration.hidden import hidden_buffer

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
SHAPE = (5, 100, 30)  # 60 kB in fp32
BYTES = 5 * 100 * 30 * 4


def mapped(scratch: Path) -> int:
    """How many files in `scratch`, nameless ones too, this process has mapped, so that writing goes to the file."""
    folder = f"{scratch.resolve()}/"
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if folder in line]
    assert all("s" in permissions for _, permissions, *_ in lines), "a private mapping is in memory"
    return len({inode for _, _, _, _, inode, *_ in lines})


def opened(scratch: Path) -> int:
    """How many files in `scratch`, nameless ones too, this process has open."""
    links = [os.path.join("/proc/self/fd", handle) for handle in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith(str(scratch.resolve())) for link in links if os.path.lexists(link))


@pytest.mark.parametrize("limit", [BYTES, BYTES + 1, float("inf")])
def test_up_to_the_limit_nothing_is_on_disk(limit: float, tmp_path: Path) -> None:
    buffer = hidden_buffer(SHAPE, torch.float32, tmp_path, limit)
    assert buffer.shape == SHAPE
    assert buffer.dtype == torch.float32
    assert mapped(tmp_path) == 0


@pytest.mark.parametrize("limit", [BYTES - 1, 0])
def test_above_the_limit_the_tensor_is_a_file_in_the_scratch_folder(limit: float, tmp_path: Path) -> None:
    buffer = hidden_buffer(SHAPE, torch.float32, tmp_path, limit)
    assert buffer.shape == SHAPE
    assert mapped(tmp_path) == 1


def test_the_limit_counts_bytes_not_elements(tmp_path: Path) -> None:
    buffers = [hidden_buffer(SHAPE, dtype, tmp_path, BYTES // 2) for dtype in (torch.bfloat16, torch.float32)]
    assert mapped(tmp_path) == 1
    assert [buffer.dtype for buffer in buffers] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_read_back(dtype: torch.dtype, tmp_path: Path) -> None:
    first, second = (hidden_buffer(SHAPE, dtype, tmp_path, 0) for _ in range(2))
    values = normal(*SHAPE).to(dtype)
    for row in range(len(values)):
        first[row], second[row] = values[row], -values[row]
    gc.collect()
    assert torch.equal(first, values)
    assert torch.equal(second, -values)
    assert torch.equal(first.flatten(0, 1)[137], values[1, 37])


def test_the_file_has_no_name_and_goes_with_the_tensor(tmp_path: Path) -> None:
    buffer = hidden_buffer(SHAPE, torch.float32, tmp_path, 0)
    part = buffer[2]
    assert list(tmp_path.iterdir()) == []
    assert opened(tmp_path) <= 1  # torch may keep the handle of its mapping
    del buffer
    gc.collect()
    assert mapped(tmp_path) == 1
    del part
    gc.collect()
    assert mapped(tmp_path) == opened(tmp_path) == 0


@pytest.fixture
def full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with less than 1 MB free: a file system of its own where that is allowed, or one that says so."""
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)]
    try:
        real = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        real = False
    if not real:

        def refuse(handle: int, offset: int, size: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", refuse)
    yield tmp_path
    if real:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_is_an_error_at_once_and_leaves_nothing(full_disk: Path) -> None:
    with pytest.raises(OSError) as raised:
        hidden_buffer((1 << 20,), torch.float32, full_disk, 0)
    assert raised.value.errno == errno.ENOSPC
    assert list(full_disk.iterdir()) == []
    assert mapped(full_disk) == opened(full_disk) == 0


def test_the_space_is_reserved_and_not_left_sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved: list[int] = []
    allocate = os.posix_fallocate

    def note(handle: int, offset: int, size: int) -> None:
        allocate(handle, offset, size)
        reserved.append(os.fstat(handle).st_blocks * 512)

    monkeypatch.setattr(os, "posix_fallocate", note)
    hidden_buffer(SHAPE, torch.float32, tmp_path, 0)
    assert reserved[0] >= BYTES


def test_a_scratch_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        hidden_buffer(SHAPE, torch.float32, tmp_path / "missing", 0)
