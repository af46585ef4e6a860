"""The containers of torch.save, zip and legacy, as torch writes them and as an attacker would."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import bits, mapped

from puna.errors import CheckpointError
from puna.weights.torch_file import open_torch, state_tensors


def state() -> dict[str, torch.Tensor]:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {
        "plain": base,
        "transposed": base.T,
        "window": base[1:3, 2:5],
        "strided": base[:, ::2],
        "bf16": torch.tensor([1.5, -3.25], dtype=torch.bfloat16),
        "fp16": torch.tensor([[0.5]], dtype=torch.float16),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "one": torch.ones(1, 1, 5),
    }


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.save(state(), tmp_path / "x.pt", _use_new_zipfile_serialization=request.param)
    return tmp_path / "x.pt"


def test_every_tensor_has_torchs_bits(saved: Path) -> None:
    file = open_torch(saved)
    tensors = state_tensors(file, file.value)
    assert list(tensors) == list(state())
    for name, expected in state().items():
        assert tensors[name].shape == tuple(expected.shape)
        assert np.array_equal(bits(tensors[name].read()), bits(expected)), name
        tensors[name].check()
    assert tensors["plain"].at == tensors["transposed"].at != tensors["window"].at


def test_contiguous_tensors_of_a_zip_are_views(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "x.pt")
    file = open_torch(tmp_path / "x.pt")
    tensors = state_tensors(file, file.value)
    plain, transposed = tensors["plain"].read(), tensors["transposed"].read()
    assert isinstance(plain, np.ndarray)
    assert isinstance(transposed, np.ndarray)
    assert mapped(plain)
    assert not mapped(transposed)
    assert not plain.flags.writeable
    assert transposed.flags.c_contiguous


def test_files_written_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    file = open_torch(tmp_path / "x.pt")
    (tensor,) = state_tensors(file, file.value).values()
    tensor.check()
    assert np.array_equal(bits(tensor.read()), bits(torch.ones(3)))


def test_checksums_are_verified(tmp_path: Path) -> None:
    torch.save({"a": torch.full((64,), 1.0)}, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    at = data.index(struct.pack("<f", 1.0) * 8)
    data[at] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    file = open_torch(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="storage '0' is damaged: its checksum differs"):
        state_tensors(file, file.value)["a"].check()
    torch.save({"name": torch.ones(3)}, tmp_path / "y.pt")
    data = bytearray((tmp_path / "y.pt").read_bytes())
    data[data.index(b"name")] = ord("g")
    (tmp_path / "y.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"y/data\.pkl is damaged: its checksum differs"):
        open_torch(tmp_path / "y.pt")


def test_repeated_numbers_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(1000, 1000)}, tmp_path / "x.pt")
    file = open_torch(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"shape \[1000, 1000\] stands on 1 numbers"):
        state_tensors(file, file.value)["a"].read()


@pytest.mark.parametrize("value", [[], 5, {"a": 5}, {1: torch.ones(1)}, {"a": {"b": torch.ones(1)}}, {}])
def test_what_is_no_state_dict(value: Any, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "x.pt")
    file = open_torch(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        state_tensors(file, file.value)


# --- archives nobody's torch wrote -----------------------------------------------------------------------------------


def pickled(folder: Path) -> bytes:
    torch.save({"a": torch.ones(4)}, folder / "good.pt")
    with zipfile.ZipFile(folder / "good.pt") as archive:
        return archive.read("good/data.pkl")


def write_zip(path: Path, entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


def test_pythons_zip_of_the_same_entries_is_read(tmp_path: Path) -> None:
    numbers = np.arange(4, dtype="<f4")
    path = write_zip(tmp_path / "x.pt", [("r/data.pkl", pickled(tmp_path)), ("r/data/0", numbers.tobytes())])
    file = open_torch(path)
    assert np.array_equal(bits(state_tensors(file, file.value)["a"].read()), bits(numbers))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([("r/data.pkl", None)], "storage '0' should be 16 bytes, not missing"),
        ([("r/data.pkl", None), ("r/data/0", b"0" * 15)], "should be 16 bytes, not 15"),
        ([("r/data.pkl", None), ("r/data/0", b"0" * 17)], "should be 16 bytes, not 17"),
        ([("r/other.pkl", None)], "0 entries data.pkl"),
        ([("r/data.pkl", None), ("s/data.pkl", None)], "2 entries data.pkl"),
        ([("r/data.pkl", None), ("r/data/0", b"0" * 16), ("r/byteorder", b"big")], "big-endian"),
        ([("r/data.pkl", None), ("r/data/0", b"0" * 16), ("r/code/x.py", b"x")], "TorchScript"),
        ([("r/data.pkl", None), ("r/data/0", b"0" * 16), ("r/constants.pkl", b"x")], "TorchScript"),
        ([("r/data.pkl", b"cposix\nsystem\n(X\x04\0\0\0truetR.")], "posix.system"),
        ([("r/data.pkl", b"N" * (17 << 20))], "claims 17825792 bytes"),
    ],
)
def test_archives_that_are_no_checkpoint(entries: list[tuple[str, bytes | None]], words: str, tmp_path: Path) -> None:
    body = pickled(tmp_path)
    path = write_zip(tmp_path / "x.pt", [(name, body if data is None else data) for name, data in entries])
    with pytest.raises(CheckpointError, match=words) as caught:
        open_torch(path)
    assert str(path) in str(caught.value)
    assert caught.value.remedy


def test_compressed_entries_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    bomb = [("r/data.pkl", pickled(tmp_path)), ("r/data/0", b"\0" * 50_000_000)]
    path = write_zip(tmp_path / "x.pt", bomb, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match="is compressed, encrypted or split"):
        open_torch(path)


def directory(path: Path) -> tuple[bytearray, int, list[int]]:
    """The bytes of an archive of Python's, where its directory begins, and where each entry of it does."""
    data = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", data, len(data) - 6)
    entries = [i for i in range(start, len(data) - 4) if data[i : i + 4] == b"PK\1\2"]
    return data, start, entries


@pytest.mark.parametrize(
    ("field", "layout", "value", "words"),
    [
        (42, "<I", 0, "lies where it does not"),  # offset of the local header: another entry's
        (42, "<I", 1 << 31, "has no entry"),
        (42, "<I", 0xFFFFFFFF, "has no entry"),
        (20, "<I", 1 << 30, "compressed"),
        (8, "<H", 1, "compressed, encrypted"),
        (10, "<H", 8, "compressed, encrypted"),
        (28, "<H", 60000, "ends too early"),
        (32, "<H", 60000, "ends too early"),
        (0, "<I", 7, "has no entry"),
    ],
)
def test_directories_that_lie(field: int, layout: str, value: int, words: str, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.pt", [("r/data.pkl", pickled(tmp_path)), ("r/data/0", b"0" * 16)])
    data, _, entries = directory(path)
    struct.pack_into(layout, data, entries[1] + field, value)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=words):
        open_torch(path)


def test_sizes_past_the_end_overlaps_and_doubles(tmp_path: Path) -> None:
    body = pickled(tmp_path)
    path = write_zip(tmp_path / "x.pt", [("r/data.pkl", body), ("r/data/0", b"0" * 16)])
    data, start, entries = directory(path)
    grown = bytearray(data)
    struct.pack_into("<II", grown, entries[1] + 20, start, start)
    path.write_bytes(grown)
    with pytest.raises(CheckpointError, match="lies where it does not"):
        open_torch(path)
    grown = bytearray(data)
    struct.pack_into("<II", grown, entries[0] + 20, len(body) + 1, len(body) + 1)
    path.write_bytes(grown)
    with pytest.raises(CheckpointError, match="overlap"):
        open_torch(path)
    with pytest.warns(UserWarning, match="Duplicate"):
        write_zip(path, [("r/data.pkl", body), ("r/data/0", b"0" * 16), ("r/data/0", b"1" * 16)])
    with pytest.raises(CheckpointError, match="twice"):
        open_torch(path)


def test_an_end_of_directory_with_absurd_numbers(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.pt", [("r/data.pkl", pickled(tmp_path)), ("r/data/0", b"0" * 16)])
    data, *_ = directory(path)
    for at, layout, value in (
        (-12, "<H", 60000),
        (-10, "<I", 1 << 31),
        (-6, "<I", 1 << 31),
        (-2, "<H", 9),
        (-22, "<I", 0),
    ):
        broken = bytearray(data)
        struct.pack_into(layout, broken, len(data) + at, value)
        path.write_bytes(broken)
        with pytest.raises(CheckpointError):
            open_torch(path)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damage_is_the_same_tensors_or_a_typed_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damage")
    torch.save(state(), folder / "x.pt", _use_new_zipfile_serialization=data.draw(st.booleans()))
    content = bytearray((folder / "x.pt").read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "x.pt").write_bytes(content)
    try:
        file = open_torch(folder / "x.pt")
        tensors = state_tensors(file, file.value)
        for tensor in tensors.values():
            assert tensor.read().shape == tensor.shape
    except CheckpointError as error:
        assert "x.pt" in str(error)  # noqa: PT017
