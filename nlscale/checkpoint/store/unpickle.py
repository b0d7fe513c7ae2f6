"""The metadata of a checkpoint out of its pickle, by a machine that knows nothing but data.

A pickle is a program. Python's own machine, told which classes it may look up, still lets the
program set attributes on those classes (BUILD), for the whole process, call them with what it
likes, ask for any amount of memory in a few bytes, and make keys that take for ever to hash. This
one has the instructions that such metadata are written with and no others, calls what is in two
small tables, and makes an object only once, of the fields that its class has, by type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

_NONE = type(None)
_LARGEST = (1 << 63) - 1  # what a size can be
_DIMENSIONS = 64
_SHOWN = 100  # characters of a name out of the file

_NUMBERS = {"u1": (1, False), "u2": (2, False), "u4": (4, False), "i4": (4, True)}

_Form = dict[str, tuple[type, ...]]
# Fields whose types matter here, because they are hashed; what else a class has is looked at by
# whoever uses it. A class that is pickled as a tuple has the types of its items.
_FORMS: dict[type, _Form | tuple[type, ...]] = {
    Metadata: {"state_dict_metadata": (dict,), "storage_data": (dict, _NONE)},
    MetadataIndex: {"fqn": (str,), "offset": (torch.Size, _NONE), "index": (int, _NONE)},
    TensorStorageMetadata: {"properties": (TensorProperties,), "size": (torch.Size,)},
    TensorProperties: (torch.dtype, torch.layout, bool, dcp._MEM_FORMAT_ENCODING, bool),
    ChunkStorageMetadata: {"offsets": (torch.Size,), "sizes": (torch.Size,)},
    _StorageInfo: {"relative_path": (str,), "offset": (int,), "length": (int,)},
}
_FIELDS = {kind: {field.name for field in dataclasses.fields(kind)} for kind in _FORMS}


class RefusedError(Exception):
    """Something that metadata do not hold: its name. Nothing of it was run."""


class _Global(NamedTuple):
    """What the program has named, and may make or call."""

    module: str
    name: str


def load(data: bytes) -> Any:
    """What is in a pickle of metadata.

    Raises:
        RefusedError: it names something that metadata do not hold.
        Exception: it is broken, in one of many ways.
    """
    return _Machine(data).run()


def _size(argument: Any) -> torch.Size:
    if type(argument) is not tuple or len(argument) > _DIMENSIONS:
        raise ValueError("a shape that is none")
    if not all(type(n) is int and 0 <= n <= _LARGEST for n in argument):
        raise ValueError("a shape that is none")
    return torch.Size(argument)


def _layout(argument: Any) -> torch.layout:
    found = [v for v in vars(torch).values() if isinstance(v, torch.layout) and str(v) == argument]
    if type(argument) is not str or not found:
        raise ValueError("a layout that is none")
    return found[0]


def _memory_format(argument: Any) -> dcp._MEM_FORMAT_ENCODING:
    if type(argument) is not int:
        raise ValueError("a memory format that is none")
    return dcp._MEM_FORMAT_ENCODING(argument)


_MAKES: dict[_Global, type] = {_Global(kind.__module__, kind.__name__): kind for kind in _FORMS}
_CALLS: dict[_Global, Callable[[Any], Any]] = {
    _Global(torch.Size.__module__, torch.Size.__name__): _size,
    # how torch pickles a layout: the function looks it up by its name
    _Global("torch.serialization", "_get_layout"): _layout,
    _Global(dcp.__name__, dcp._MEM_FORMAT_ENCODING.__name__): _memory_format,
}


class _Machine:
    """Runs one program; whatever is wrong with it is some exception."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        while (code := self._data[self._at]) != _STOP:
            instruction = _BY_CODE[code]
            if instruction is None:
                raise ValueError(f"the instruction {bytes([code])!r} at {self._at}")
            self._at += 1
            instruction(self)
        return self._stack.pop()

    def _take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise ValueError("it ends early")
        self._at += count
        return taken

    def _number(self, form: str) -> int:
        size, signed = _NUMBERS[form]
        return int.from_bytes(self._take(size), "little", signed=signed)

    def _marked(self) -> list[Any]:
        """What was pushed since the last mark."""
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _protocol(self) -> None:
        if not 2 <= self._number("u1") <= 5:
            raise ValueError("a protocol that is not known")

    def _frame(self) -> None:
        self._take(8)

    def _integer(self) -> None:
        self._push(int.from_bytes(self._take(self._number("u1")), "little", signed=True))

    def _text(self, form: str) -> None:
        self._push(self._take(self._number(form)).decode("utf-8", "surrogatepass"))

    def _tuple(self, count: int) -> None:
        start = len(self._stack) - count
        if start < 0:
            raise ValueError("nothing to take")
        items = tuple(self._stack[start:])
        del self._stack[start:]
        self._push(items)

    def _remember(self, number: int) -> None:
        self._memo[number] = self._stack[-1]

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise ValueError("something is appended to what is no list")
        target.extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("something is put into what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, MetadataIndex):  # a tuple may take for ever to hash
                raise ValueError(f"a key that is a {type(key).__name__}")
            target[key] = value

    def _line(self) -> str:
        end = self._data.index(b"\n", self._at)
        return self._take(end + 1 - self._at)[:-1].decode("utf-8")

    def _global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name that is none")
        wanted = _Global(module, name)
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            self._push(dtype)
        elif wanted in _MAKES or wanted in _CALLS:
            self._push(wanted)
        else:
            raise RefusedError(f"{module}.{name}"[:_SHOWN])

    def _named(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._global(module, name)

    def _new(self) -> None:
        arguments, wanted = self._stack.pop(), self._stack.pop()
        if type(wanted) is not _Global or arguments != () or wanted not in _MAKES:
            raise ValueError("an object is made of what is none")
        kind = _MAKES[wanted]
        self._push(object.__new__(kind))

    def _call(self) -> None:
        arguments, wanted = self._stack.pop(), self._stack.pop()
        if type(wanted) is not _Global or wanted not in _CALLS or type(arguments) is not tuple:
            raise ValueError("a call of what is not to be called")
        (argument,) = arguments
        self._push(_CALLS[wanted](argument))

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        form = _FORMS.get(type(target))
        if form is None or vars(target):  # never twice: what was hashed stays as it is
            raise ValueError(f"a {type(target).__name__} is altered")
        (_set_items if isinstance(form, tuple) else _set_fields)(target, form, state)


def _set_items(target: Any, types: Any, state: Any) -> None:
    if type(state) is not tuple or [type(item) for item in state] != list(types):
        raise ValueError(f"a {type(target).__name__} of other types")
    target.__setstate__(state)


def _set_fields(target: Any, form: Any, state: Any) -> None:
    if type(state) is not dict or not state.keys() <= _FIELDS[type(target)]:
        raise ValueError(f"a {type(target).__name__} of other fields")
    for name, types in form.items():
        value = state.get(name, getattr(type(target), name, None))
        if type(value) not in types:
            raise ValueError(f"a {type(target).__name__} whose {name} is a {type(value).__name__}")
    for name, value in state.items():
        object.__setattr__(target, name, value)


_Action = Callable[[_Machine], None]
_INSTRUCTIONS: dict[bytes, _Action] = {
    b"\x80": lambda m: m._protocol(),
    b"\x95": lambda m: m._frame(),  # how much to read ahead
    b"(": lambda m: m._marks.append(len(m._stack)),
    b"}": lambda m: m._push({}),
    b"]": lambda m: m._push([]),
    b")": lambda m: m._push(()),
    b"N": lambda m: m._push(None),
    b"\x88": lambda m: m._push(True),
    b"\x89": lambda m: m._push(False),
    b"J": lambda m: m._push(m._number("i4")),
    b"K": lambda m: m._push(m._number("u1")),
    b"M": lambda m: m._push(m._number("u2")),
    b"\x8a": lambda m: m._integer(),
    b"\x8c": lambda m: m._text("u1"),
    b"X": lambda m: m._text("u4"),
    b"t": lambda m: m._push(tuple(m._marked())),
    b"\x85": lambda m: m._tuple(1),
    b"\x86": lambda m: m._tuple(2),
    b"\x87": lambda m: m._tuple(3),
    b"\x94": lambda m: m._remember(len(m._memo)),
    b"q": lambda m: m._remember(m._number("u1")),
    b"r": lambda m: m._remember(m._number("u4")),
    b"h": lambda m: m._push(m._memo[m._number("u1")]),
    b"j": lambda m: m._push(m._memo[m._number("u4")]),
    b"a": lambda m: m._append([m._stack.pop()]),
    b"e": lambda m: m._append(m._marked()),
    b"s": lambda m: m._set([m._stack.pop(-2), m._stack.pop()]),
    b"u": lambda m: m._set(m._marked()),
    b"c": lambda m: m._global(m._line(), m._line()),
    b"\x93": lambda m: m._named(),
    b"\x81": lambda m: m._new(),
    b"R": lambda m: m._call(),
    b"b": lambda m: m._build(),
}
_BY_CODE = [_INSTRUCTIONS.get(bytes([code])) for code in range(256)]
_STOP = ord(".")
