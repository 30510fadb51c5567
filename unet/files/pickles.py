"""Reading pickles without executing them.

A pickle is a program for a small stack machine. This machine has plain values, tuples and dictionaries, and calls only the
functions that its caller gives it by name. What no file of weights is read for (lists, sets, bytes, objects' states, very large
integers, and what is found under keys that are neither text nor integers) is replaced by `IGNORED`. Every step takes constant
time, or time in proportion to the bytes that it consumes, and so does memory: a pickle takes at most `MEMORY` times its size.
Nothing is hashed but text and integers, and no value is walked through, so the depth of what is nested does not matter.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from unet.files.errors import shown

MEMORY = 150
"""A pickle takes at most so many times its own size in memory."""

Arguments = tuple[object, ...]
Names = Mapping[tuple[str, str], Callable[[Arguments], object] | object]
"""What a pickle may name, by module and name: functions that it may call, and markers."""


class PickleError(Exception):
    """What is wrong with a pickle, to be read after "it is refused:"."""


class Ignored:
    """Stands for every value that is not needed."""


IGNORED: Final = Ignored()

_CONSTANTS: Mapping[str, object] = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "EMPTY_LIST", "EMPTY_SET"), IGNORED),
}
"""Opcodes that push the same value each time."""

_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING"),
}
"""Opcodes that push their own argument."""

_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(content: bytes, names: Names, persistent: Callable[[object], object]) -> object:
    """The value that a pickle makes. `persistent` gives what its persistent identifiers stand for.

    Raises `PickleError` for a damaged pickle, for one that names anything but `names`, and for opcodes that no file of weights
    has.
    """
    machine = _Machine(names, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except (ValueError, IndexError, OverflowError) as error:
        raise PickleError(f"its pickle is damaged ({shown(error)})") from None
    raise PickleError("its pickle has no end")


class _Machine:
    """The stack, where its marks are, and the values that were numbered for later."""

    def __init__(self, names: Names, persistent: Callable[[object], object]):
        self._names = names
        self._persistent = persistent
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}

    def pop(self) -> object:
        return self._stack.pop()

    def _pop_to_mark(self) -> list[object]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def step(self, name: str, argument: object) -> None:
        """Execute one opcode."""
        if name in _LITERALS:
            large = isinstance(argument, int) and not -(1 << 63) <= argument < 1 << 63
            self._stack.append(IGNORED if large else argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else _number(argument)] = self._stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self._stack.append(self._remembered(_number(argument)))
        elif name == "MARK":
            self._marks.append(len(self._stack))
        elif name in _SHORT_TUPLES or name == "TUPLE":
            self._make_tuple(name)
        elif name in ("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"):
            self._fill_dict(name)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._stack.append(self._named(name, argument))
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            self._call(name)
        elif name == "BINPERSID":
            self._stack.append(self._persistent(self.pop()))
        else:
            self._leave_out(name)

    def _leave_out(self, name: str) -> None:
        """The opcodes for what is ignored, and for taking values off the stack."""
        if name in ("LIST", "FROZENSET"):
            self._pop_to_mark()
            self._stack.append(IGNORED)
        elif name in ("APPENDS", "ADDITEMS", "POP_MARK"):
            self._pop_to_mark()
        # BUILD would change an object that was checked already. Only its argument is dropped.
        elif name in ("APPEND", "BUILD", "POP"):
            self.pop()
        elif name == "DUP":
            self._stack.append(self._stack[-1])
        elif name not in ("PROTO", "FRAME"):
            raise PickleError(f"its pickle has the opcode {name}, which no file of weights needs")

    def _remembered(self, number: int) -> object:
        if number not in self._memo:
            raise PickleError("its pickle is damaged (it refers to what it does not have)")
        return self._memo[number]

    def _make_tuple(self, name: str) -> None:
        if name == "TUPLE":
            self._stack.append(tuple(self._pop_to_mark()))
            return
        start = len(self._stack) - _SHORT_TUPLES[name]
        if start < 0:
            raise PickleError("its pickle is damaged (a tuple lacks parts)")
        self._stack[start:] = [tuple(self._stack[start:])]

    def _fill_dict(self, name: str) -> None:
        if name == "EMPTY_DICT":
            self._stack.append({})
            return
        if name == "SETITEM":
            value, key = self.pop(), self.pop()
            items = [key, value]
        else:
            items = self._pop_to_mark()
        if name == "DICT":
            self._stack.append({})
        target = self._stack[-1]
        if isinstance(target, dict):
            _put(target, items)

    def _named(self, name: str, argument: object) -> object:
        if name == "GLOBAL":
            module, _, attribute = str(argument).partition(" ")
        else:
            attribute, module = self.pop(), self.pop()
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise PickleError("its pickle is damaged (a name is no text)")
        if (module, attribute) not in self._names:
            raise PickleError(f"it names {shown(f'{module}.{attribute}')}, which is neither a tensor nor a plain value")
        return self._names[module, attribute]

    def _call(self, name: str) -> None:
        if name == "NEWOBJ_EX":
            self.pop()
        arguments, function = self.pop(), self.pop()
        if not callable(function) or not isinstance(arguments, tuple):
            raise PickleError("it calls what is no function")
        self._stack.append(function(arguments))


def _number(argument: object) -> int:
    if not isinstance(argument, int):
        raise PickleError("its pickle is damaged (an index is no number)")
    return argument


def _put(target: dict[object, object], items: Iterable[object]) -> None:
    pairs = iter(items)
    for key, value in zip(pairs, pairs, strict=False):
        # Tuples may take for ever to hash.
        target[key if type(key) in (str, int) else IGNORED] = value
