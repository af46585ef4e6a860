"""Reads the pickles inside PyTorch files as data: it builds records and can call nothing.

What it is: a loop over the opcodes torch.save writes (protocols 2 to 5), which knows a handful of names (tensors,
parameters, ordered dictionaries, storage types) and turns each into an inert record. Python's pickletools defines the
opcodes.
What it is not: `pickle`. Nothing is imported, looked up or executed; a file that asks for anything else is refused, and
the error says what it asked for.
What is surprising: values are only ever ints, floats, words, lists, dictionaries and the records below, but they may be
nested or shared so that printing or comparing one never ends: callers look at the parts they need, never at the whole.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from puna.errors import CheckpointError
from puna.weights.files import shown

LARGEST_PICKLE = 16 << 20
"""Bytes. A training checkpoint of the 405B (three tensors a parameter) takes under one megabyte."""

MOST_OPCODES = 2_000_000
"""About two seconds of reading. The same checkpoint takes some 140,000."""

MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class Global:
    """A name the pickle refers to. It stands for itself and is never looked up."""

    module: str
    name: str


@dataclass(frozen=True)
class Storage:
    """A run of numbers outside the pickle: `key` says where, `dtype` is torch's word (`bfloat16`), `count` how many."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor over a storage: `offset` and `stride` count numbers, and lie inside the storage (checked)."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Opaque:
    """A file of bytes in memory (`io.BytesIO`), which Meta's files of Llama 4 hold beside tensors; dropped."""


STORAGE_DTYPES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip

ITEM_SIZES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint8": 1, "bool": 1,
}  # fmt: skip

_REBUILD_TENSOR = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_ORDERED_DICT = Global("collections", "OrderedDict")
_SIZE = Global("torch", "Size")
_BYTES_IO = Global("_io", "BytesIO")
_ENCODE = Global("_codecs", "encode")  # protocol 2 says bytes as a text and this
_NO_BYTES = Global("__builtin__", "bytes")
_KNOWN = (
    {_REBUILD_TENSOR, _REBUILD_PARAMETER, _ORDERED_DICT, _SIZE, _BYTES_IO, _ENCODE, _NO_BYTES}
    | {Global("torch", name) for name in STORAGE_DTYPES}
    | {Global("torch", name) for name in ITEM_SIZES}
)


def read_pickle(data: bytes, source: str) -> tuple[Any, dict[str, Storage], int]:
    """The value of the pickle at the start of `data`, the storages it refers to by key, and where it ends.

    Raises CheckpointError, naming `source`, for anything but the plain records above.
    """
    machine = _Machine(data, source)
    value = machine.run()
    return value, machine.storages, machine.at


class _Machine:
    """The pickle virtual machine without a way out: a stack, marks, a memo."""

    def __init__(self, data: bytes, source: str) -> None:
        self.data, self.source, self.at = data, source, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def fault(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.source}: {what}.",
            remedy="Puna reads tensors from such files and runs nothing. Fetch the file again from its publisher, or "
            "save it anew with torch.save(model.state_dict()).",
        )

    def run(self) -> Any:
        for _ in range(MOST_OPCODES):
            code = self.take(1)[0]
            if code == 0x2E:  # STOP
                value = self.pop()
                if self.stack or self.marks:
                    raise self.fault("its pickle ends with values left over")
                return value
            action = _ACTIONS.get(code)
            if action is None:
                raise self.fault(f"its pickle uses opcode 0x{code:02x} at byte {self.at - 1}, which no tensor needs")
            action(self)
        raise self.fault(f"its pickle has more than {MOST_OPCODES} opcodes")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise self.fault("its pickle is cut short")
        self.at += count
        return self.data[self.at - count : self.at]

    def unsigned(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def text(self, width: int) -> str:
        raw = self.take(self.unsigned(width))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fault("its pickle holds a word that is not UTF-8") from error

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 256)
        if end < 0:
            raise self.fault("its pickle has a name without an end")
        raw = self.take(end + 1 - self.at)[:-1]
        return raw.decode("ascii", "replace")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.fault("its pickle takes a value that is not there")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise self.fault("its pickle takes a mark that is not there")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def remember(self, index: int) -> None:
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise self.fault("its pickle recalls a value it never stored")
        self.push(self.memo[index])

    def set_items(self, pairs: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(pairs) % 2:
            raise self.fault("its pickle sets items of something that is no dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            self.set_item(target, key, value)

    def set_item(self, target: dict[Any, Any], key: Any, value: Any) -> None:
        # Only plain keys: hashing a nested tuple could take for ever, and so could a dictionary of large whole numbers
        # that were chosen to have one hash (Python's of an int is its remainder modulo 2^61 - 1).
        if type(key) not in (str, int, float, bool):
            raise self.fault(f"its pickle has a dictionary key of type {type(key).__name__}")
        if type(key) is int and abs(key) >= 1 << 48:
            raise self.fault("its pickle has a dictionary key of more than 48 bits")
        if key in target:
            raise self.fault(f"its pickle has the key {shown(key)} twice in one dictionary")
        target[key] = value

    def append_all(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise self.fault("its pickle appends to something that is no list")
        target.extend(values)

    def refer(self, module: str, name: str) -> None:
        found = Global(module, name)
        if found not in _KNOWN:
            raise self.fault(f"its pickle asks for {shown(module)}.{shown(name)}, which is code and not a tensor")
        self.push(found)

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise self.fault("its pickle asks for a name that is no word")
        self.refer(module, name)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(arguments, tuple) or not isinstance(function, Global):
            raise self.fault("its pickle calls something that is no function")
        if function == _REBUILD_TENSOR:
            self.push(self.tensor(arguments))
        elif function == _REBUILD_PARAMETER and len(arguments) == 3 and isinstance(arguments[0], StoredTensor):
            self.push(arguments[0])
        elif function == _ORDERED_DICT and arguments == ():
            self.push({})  # torch fills it by SETITEMS
        elif function == _SIZE and len(arguments) == 1 and isinstance(arguments[0], tuple):
            self.push(arguments[0])
        elif (function == _ENCODE and arguments[1:] == ("latin1",)) or (function == _NO_BYTES and arguments == ()):
            self.push(Opaque())
        else:
            raise self.fault(f"its pickle calls {function.module}.{function.name} as torch never does")

    def tensor(self, arguments: tuple[Any, ...]) -> StoredTensor:
        if not 6 <= len(arguments) <= 7 or not isinstance(arguments[0], Storage):
            raise self.fault("its pickle describes a tensor that has no storage")
        storage, offset, shape, stride = arguments[:4]
        if not _natural(offset) or not _naturals(shape) or not _naturals(stride) or len(shape) != len(stride):
            raise self.fault(f"its pickle describes a tensor in storage {storage.key!r} by odd sizes or strides")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if offset > storage.count or (0 not in shape and last >= storage.count):
            raise self.fault(
                f"its pickle describes a tensor of shape {list(shape)} that reaches past the {storage.count} numbers "
                f"of storage {storage.key!r}"
            )
        return StoredTensor(storage, offset, tuple(shape), tuple(stride))

    def persistent(self) -> None:
        """torch's only use of persistent ids: ('storage', type, key, device, count[, view])."""
        value = self.pop()
        fits = isinstance(value, tuple) and 5 <= len(value) <= 6 and value[0] == "storage"
        if not fits or not isinstance(value[1], Global) or not isinstance(value[2], str) or not _natural(value[4]):
            raise self.fault("its pickle refers to something outside that is no storage")
        if len(value) == 6 and value[5] is not None:
            raise self.fault("its pickle describes a view of a storage, which torch has not written since 2017")
        dtype = STORAGE_DTYPES.get(value[1].name)
        if dtype is None or len(value[2]) > 40:
            raise self.fault(f"its pickle has a storage of unknown type {value[1].name!r}")
        storage = Storage(value[2], dtype, value[4])
        if self.storages.setdefault(storage.key, storage) != storage:
            raise self.fault(f"its pickle describes storage {storage.key!r} in two ways")
        self.push(storage)

    def new(self) -> None:
        """An object made by its class: only a file of bytes in memory."""
        arguments, kind = self.pop(), self.pop()
        if kind != _BYTES_IO or arguments != ():
            raise self.fault("its pickle makes an object that is no tensor")
        self.push(Opaque())

    def build(self) -> None:
        """State set on an object: torch sets `_metadata` (versions of modules) on a state dict. Dropped."""
        state, target = self.pop(), self.top()
        if isinstance(target, Opaque) and isinstance(state, tuple):
            return
        if not isinstance(target, dict | StoredTensor) or not isinstance(state, dict):
            raise self.fault("its pickle sets the state of something that is no dictionary")

    def long(self, width: int) -> None:
        size = self.unsigned(width)
        if size > 64:
            raise self.fault(f"its pickle has a whole number of {size} bytes")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def frame(self) -> None:
        if self.unsigned(8) > len(self.data) - self.at:
            raise self.fault("its pickle is cut short")

    def protocol(self) -> None:
        if not 2 <= (version := self.take(1)[0]) <= 5:
            raise self.fault(f"its pickle is of protocol {version}, not 2 to 5")

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def set_one(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def drop(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop()

    def drop_mark(self) -> None:
        self.pop_mark()


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _naturals(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= MOST_DIMENSIONS and all(_natural(v) for v in value)


_ACTIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: _Machine.protocol,  # PROTO
    0x95: _Machine.frame,  # FRAME
    0x28: lambda m: m.marks.append(len(m.stack)),  # MARK
    0x30: _Machine.drop,  # POP
    0x31: _Machine.drop_mark,  # POP_MARK
    0x4E: lambda m: m.push(None),  # NONE
    0x88: lambda m: m.push(True),  # NEWTRUE
    0x89: lambda m: m.push(False),  # NEWFALSE
    0x4A: lambda m: m.push(int.from_bytes(m.take(4), "little", signed=True)),  # BININT
    0x4B: lambda m: m.push(m.unsigned(1)),  # BININT1
    0x4D: lambda m: m.push(m.unsigned(2)),  # BININT2
    0x8A: lambda m: m.long(1),  # LONG1
    0x47: lambda m: m.push(struct.unpack(">d", m.take(8))[0]),  # BINFLOAT
    0x58: lambda m: m.push(m.text(4)),  # BINUNICODE
    0x8C: lambda m: m.push(m.text(1)),  # SHORT_BINUNICODE
    0x42: lambda m: m.push(m.take(m.unsigned(4))),  # BINBYTES
    0x43: lambda m: m.push(m.take(m.unsigned(1))),  # SHORT_BINBYTES
    0x7D: lambda m: m.push({}),  # EMPTY_DICT
    0x5D: lambda m: m.push([]),  # EMPTY_LIST
    0x29: lambda m: m.push(()),  # EMPTY_TUPLE
    0x74: lambda m: m.push(tuple(m.pop_mark())),  # TUPLE
    0x85: lambda m: m.tuple_of(1),  # TUPLE1
    0x86: lambda m: m.tuple_of(2),  # TUPLE2
    0x87: lambda m: m.tuple_of(3),  # TUPLE3
    0x61: lambda m: m.append_all([m.pop()]),  # APPEND
    0x65: lambda m: m.append_all(m.pop_mark()),  # APPENDS
    0x73: _Machine.set_one,  # SETITEM
    0x75: lambda m: m.set_items(m.pop_mark()),  # SETITEMS
    0x71: lambda m: m.remember(m.unsigned(1)),  # BINPUT
    0x72: lambda m: m.remember(m.unsigned(4)),  # LONG_BINPUT
    0x94: lambda m: m.remember(len(m.memo)),  # MEMOIZE
    0x68: lambda m: m.recall(m.unsigned(1)),  # BINGET
    0x6A: lambda m: m.recall(m.unsigned(4)),  # LONG_BINGET
    0x63: lambda m: m.refer(m.line(), m.line()),  # GLOBAL
    0x93: _Machine.stack_global,  # STACK_GLOBAL
    0x52: _Machine.reduce,  # REDUCE
    0x81: _Machine.new,  # NEWOBJ
    0x62: _Machine.build,  # BUILD
    0x51: _Machine.persistent,  # BINPERSID
}
