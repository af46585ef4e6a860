"""The bytes under every reader: views checked against the file, words fit to print."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from tiny_models import mapped

from puna.errors import CheckpointError
from puna.kernels.layouts import BF16
from puna.weights.files import MappedFile, listed, parse_json, read_json, release, same_bits, shown


@pytest.fixture
def file(tmp_path: Path) -> MappedFile:
    (tmp_path / "x").write_bytes(bytes(range(64)))
    return MappedFile(tmp_path / "x")


def test_weights_are_little_endian_views_aligned_or_not(file: MappedFile) -> None:
    aligned, odd = file.weight("fp32", (2, 3), 8), file.weight("fp32", (2, 3), 9)
    assert isinstance(aligned, np.ndarray)
    assert isinstance(odd, np.ndarray)
    assert aligned.tobytes() == bytes(range(8, 32))
    assert odd.tobytes() == bytes(range(9, 33))
    assert mapped(aligned)
    assert mapped(odd)
    half = file.weight("bf16", (2,), 62 - 2)
    assert isinstance(half, BF16)
    assert half.bits.tolist() == [0x3D3C, 0x3F3E]
    assert file.weight("fp16", (0, 5), 64).shape == (0, 5)


@pytest.mark.parametrize(("shape", "offset"), [((17,), 0), ((1,), 61), ((1,), -4), ((1 << 61, 1 << 61), 0), ((-1,), 0)])
def test_nothing_outside_the_file_can_be_viewed(shape: tuple[int, ...], offset: int, file: MappedFile) -> None:
    with pytest.raises(CheckpointError, match="reaches past the end"):
        file.weight("fp32", shape, offset)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads resident memory from Linux's /proc")
def test_what_was_touched_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(16 << 20))
    large = MappedFile(path)

    def resident() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if line.endswith(str(path)))
        return next(int(line.split()[1]) for line in lines[at:] if line.startswith("Rss:"))

    assert resident() == 0
    large.touch(4 << 20, 8 << 20)
    assert 4 * 64 <= resident() <= 12 << 10  # in kB: a page each 64 KiB at least, and it may be a large one
    large.touch(1 << 40, 1 << 41)  # beyond the end there is nothing to do


def test_files_that_cannot_be_mapped(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    for path, words in ((tmp_path / "empty", "is empty"), (tmp_path / "absent", "cannot be read"), (tmp_path, "read")):
        with pytest.raises(CheckpointError, match=words) as caught:
            MappedFile(path)
        assert caught.value.remedy
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(CheckpointError, match="not a regular file"):
            MappedFile(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        read_json(tmp_path / "absent")
    assert "Check that it is there" in caught.value.remedy


def test_same_bits_is_about_bits_types_and_shapes() -> None:
    words = np.array([1, 2, 0x7FC1], dtype=np.uint16)
    assert same_bits(BF16(words), BF16(words.copy()))
    assert not same_bits(BF16(words), words.view(np.float16))
    assert not same_bits(BF16(words), BF16(words.reshape(3, 1)))
    nan, zero = np.array([np.nan], dtype=np.float32), np.array([0.0], dtype=np.float32)
    assert same_bits(nan, nan.copy())
    assert not same_bits(zero, -zero)
    long = np.zeros(200_000, dtype=np.float32)
    other = long.copy()
    other[-1] = 1
    assert not same_bits(long, other)


def test_words_of_a_file_are_safe_to_print() -> None:
    assert shown("layers.0") == "layers.0"
    assert shown("\x1b[2J") == "'\\x1b[2J'"
    assert shown("\ud800").isascii()
    assert len(shown("a" * 1000)) == 120
    assert listed(str(i) for i in range(10)) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


def test_json_of_strangers() -> None:
    assert parse_json(b'{"a": {"b": 1}}', "x") == {"a": {"b": 1}}
    for text in (b'{"a": 1, "a": 1}', b'{"b": {"a": 1, "a": 2}}', b"[1]", b"", b"\xff", b'{"a": Infinity}', b"{}{}"):
        with pytest.raises(CheckpointError, match="x: ") as caught:
            parse_json(text, "x")
        assert "fetch it again" in caught.value.remedy


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads resident memory from Linux's /proc")
def test_a_released_weight_takes_no_memory_and_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    values = np.arange(1 << 20, dtype=np.float32)
    path.write_bytes(b"head" + values.tobytes())
    weight = MappedFile(path).weight("fp32", (1024, 1024), 4)

    def resident_kb() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if line.endswith(str(path)))
        return next(int(line.split()[1]) for line in lines[at:] if line.startswith("Rss:"))

    assert float(weight.sum()) == float(values.sum())
    assert resident_kb() > 4000
    release(weight)
    assert resident_kb() < 200
    np.testing.assert_array_equal(weight.reshape(-1), values)
    release(values)  # no mapped file: nothing happens
    np.testing.assert_array_equal(values[:3], [0, 1, 2])
