"""The pickle machine: what torch writes becomes records, what would run code, hang or eat memory an error."""

from __future__ import annotations

import builtins
import collections
import functools
import io
import os
import pickle
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import CheckpointError
from puna.weights.pickle_reader import Global, Opaque, Storage, StoredTensor, read_pickle


class Call:
    """Pickles into a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


class Stateful:
    def __reduce_ex__(self, protocol: Any) -> Any:
        return Stateful, (), {"x": 1}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_is_read(protocol: int) -> None:
    data = {"a": [1, -1, 300, 70000, 2**40, -(2**40)], "b": (1.5, None, True, False, "é"), 3: {"x": [[], {}, ()]}}
    value, storages, end = read_pickle(pickle.dumps(data, protocol) + b"trailing", "x.pt")
    assert value == data
    assert storages == {}
    assert end == len(pickle.dumps(data, protocol))


def test_ordered_dictionaries_and_their_metadata() -> None:
    inner = collections.OrderedDict(a=1, b=2)
    inner._metadata = {"version": 1}  # type: ignore[attr-defined]
    assert read_pickle(pickle.dumps(inner, 2), "x.pt")[0] == {"a": 1, "b": 2}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("attack", "name"),
    [
        (Call(os.system, "true"), ".system"),
        (Call(builtins.eval, "1"), ".eval"),
        (Call(builtins.exec, "1"), ".exec"),
        (Call(builtins.getattr, "", "x"), ".getattr"),
        (Call(open, "/dev/null", "w"), ".open"),
        (Call(functools.partial, print), ".partial"),
        (Call(pickle.loads, b"N."), ".loads"),
        (Stateful(), ".Stateful"),
        (collections.Counter, ".Counter"),
        (Path("x"), "pathlib.PosixPath"),
        ({"model": {"w": [(1, Call(os.system, "true"))]}}, ".system"),
    ],
)
def test_code_is_named_and_not_run(attack: Any, name: str, protocol: int) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_pickle(pickle.dumps(attack, protocol), "evil.pt")
    message = str(caught.value)
    assert "evil.pt" in message
    assert f"{name}, which is code" in message
    assert "runs nothing" in caught.value.remedy


def test_known_names_cannot_be_abused() -> None:
    """The allowed globals are records: calling a storage, or a tensor maker with odd arguments, is an error too."""
    for body in (
        b"ctorch\nFloatStorage\n)R",
        b"ccollections\nOrderedDict\n(]tR",
        b"ccollections\nOrderedDict\nK\x01\x85R",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R",
        b"ctorch._utils\n_rebuild_parameter\nK\x01K\x01K\x01\x87R",
        b"ctorch\nSize\n]\x85R",
        b"K\x01K\x01R",
        b"c_io\nBytesIO\nK\x01\x85\x81",
        b"ctorch\nFloatStorage\n)\x81",
        b"c_io\nBytesIO\n)R",
        b"c_io\nBytesIO\n)\x81}b",
        b"c_codecs\nencode\nX\x01\0\0\0aX\x05\0\0\0utf-8\x86R",
        b"c__builtin__\nbytes\nK\x09\x85R",
    ):
        with pytest.raises(CheckpointError):
            read_pickle(b"\x80\x02" + body + b".", "x.pt")


@pytest.mark.parametrize("content", [b"", b"\x80\x01hello"])
def test_files_of_bytes_are_there_without_their_bytes(content: bytes) -> None:
    value, _, _ = read_pickle(pickle.dumps({"a": io.BytesIO(content), "b": 1}, 2), "x.pt")
    assert isinstance(value["a"], Opaque)
    assert value["b"] == 1


def storage(count: int, key: bytes = b"0", kind: bytes = b"FloatStorage") -> bytes:
    number = b"\x8a\x08" + struct.pack("<q", count)
    return b"(X\x07\0\0\0storagectorch\n" + kind + b"\nX\x01\0\0\0" + key + b"X\x03\0\0\0cpu" + number + b"tQ"


def tensor(count: int, offset: int, shape: list[int], stride: list[int]) -> bytes:
    def numbers(values: list[int]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", v) for v in values) + b"t"

    where = b"\x8a\x08" + struct.pack("<q", offset)
    inner = b"(" + storage(count) + where + numbers(shape) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)Rt"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + inner + b"R."


def test_a_tensor_is_a_record() -> None:
    value, storages, _ = read_pickle(tensor(12, 2, [2, 3], [4, 1]), "x.pt")
    assert isinstance(value, StoredTensor)
    assert (value.storage, value.offset, value.shape, value.stride) == (Storage("0", "float32", 12), 2, (2, 3), (4, 1))
    assert storages == {"0": Storage("0", "float32", 12)}


@pytest.mark.parametrize(
    ("count", "offset", "shape", "stride"),
    [
        (12, 2, [2, 3], [8, 1]),
        (12, 12, [1], [1]),
        (12, 13, [], []),
        (12, -1, [1], [1]),
        (12, 0, [-2], [1]),
        (12, 0, [2], [-1]),
        (12, 0, [2, 3], [1]),
        (12, 0, [1 << 47, 1 << 47], [1 << 47, 1]),
        (12, 0, [1] * 9, [1] * 9),
        (-1, 0, [0], [1]),
    ],
)
def test_tensors_that_reach_outside_are_refused(count: int, offset: int, shape: list[int], stride: list[int]) -> None:
    with pytest.raises(CheckpointError):
        read_pickle(tensor(count, offset, shape, stride), "x.pt")


@pytest.mark.parametrize(
    "body",
    [
        storage(4) + storage(5) + b"\x86",
        storage(4) + storage(4, kind=b"HalfStorage") + b"\x86",
        storage(4, kind=b"UntypedStorage"),
        b"(X\x07\0\0\0storageNX\x01\0\0\x000X\x03\0\0\0cpuK\x01tQ",
        b"K\x01Q",
        b")Q",
    ],
)
def test_storages_that_make_no_sense(body: bytes) -> None:
    with pytest.raises(CheckpointError):
        read_pickle(b"\x80\x02" + body + b".", "x.pt")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x80", b"\x80\x02", b"\x80\x02.", b"\x80\x01N.", b"\x80\x06N.", b"\x80\x02(N.", b"\x80\x02NN.",
        b"\x80\x02t.", b"\x80\x02(t", b"\x80\x02]Na", b"\x80\x02Na.", b"\x80\x02NNs.", b"\x80\x02}Nu.",
        b"\x80\x02}(Nu.", b"\x80\x02}()K\x01u.", b"\x80\x02}X\x01\0\0\0aNsX\x01\0\0\0aNs.", b"\x80\x02h\0.",
        b"\x80\x02j\xff\xff\xff\xff.", b"\x80\x02q\0.", b"\x80\x02X\xff\xff\xff\xffabc.", b"\x80\x02X\x01\0\0\0\xff.",
        b"\x80\x02\x8a\xff" + b"1" * 255 + b".", b"\x80\x02cno newline", b"\x80\x02\x93.", b"\x80\x02K\x01K\x02\x93.",
        b"\x80\x02NNb.", b"\x80\x02i", b"\x80\x02\x82\x01.", b"\x80\x02\x81.", b"I1\n.",
        b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
    ],
)  # fmt: skip
def test_broken_pickles(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        read_pickle(data, "x.pt")


def test_nesting_and_sharing_do_not_explode() -> None:
    """Tuples doubled 10,000 times, and a key made of them: comparing, hashing or printing would never end."""
    doubled = b"\x80\x02N" + b"q\0h\0\x86" * 10_000
    tracemalloc.start()
    began = time.perf_counter()
    value, _, _ = read_pickle(doubled + b".", "x.pt")
    assert isinstance(value, tuple)
    del value
    with pytest.raises(CheckpointError, match="key of type tuple"):
        read_pickle(b"\x80\x02}" + doubled[2:] + b"Ns.", "x.pt")
    with pytest.raises(CheckpointError):
        read_pickle(doubled + b"ccollections\nOrderedDict\nh\0R.", "x.pt")
    assert time.perf_counter() - began < 60
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_too_many_opcodes_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.weights.pickle_reader.MOST_OPCODES", 1000)
    with pytest.raises(CheckpointError, match="more than 1000 opcodes"):
        read_pickle(b"\x80\x02" + b"N0" * 5000 + b"N.", "x.pt")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_value_or_a_typed_error(data: bytes) -> None:
    try:
        read_pickle(b"\x80\x02" + data, "x.pt")
    except CheckpointError as error:
        assert "x.pt" in str(error)  # noqa: PT017


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_change_of_a_tensor_is_a_record_inside_its_storage_or_a_typed_error(data: st.DataObject) -> None:
    good = bytearray(tensor(12, 2, [2, 3], [4, 1]))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        value, _, _ = read_pickle(bytes(good), "x.pt")
    except CheckpointError:
        return
    if isinstance(value, StoredTensor) and 0 not in value.shape:
        last = value.offset + sum((n - 1) * step for n, step in zip(value.shape, value.stride, strict=True))
        assert 0 <= value.offset <= last < value.storage.count


def test_globals_are_records() -> None:
    assert read_pickle(b"\x80\x02ctorch\nbfloat16\n.", "x.pt")[0] == Global("torch", "bfloat16")


def test_keys_chosen_to_have_one_hash_are_refused_at_once() -> None:
    """Python hashes an int to its remainder modulo 2^61 - 1: a megabyte of such keys would take half an hour."""
    keys = (b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(1, 80_000))
    began = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"x\.pt: .*key of more than 48 bits"):
        read_pickle(b"\x80\x02}(" + b"".join(keys) + b"u.", "x.pt")
    assert time.perf_counter() - began < 2
