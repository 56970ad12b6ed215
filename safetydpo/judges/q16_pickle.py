"""Read the one pickle of this project's world: Q16's two learned prompts, without running any of it.

Q16 is published with `prompts.p`, a pickle of an array [2, 768]. A pickle is a program, and Python's reader would run
it. Here its opcodes are walked over plain values instead: no name in it is ever imported or called. The few names that
an array or a tensor needs are symbols with a meaning of their own; any other name, and any other opcode, is refused
before anything is built. Used once, by hand, by `safetydpo judges convert-q16`.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32

from safetydpo.errors import SafetyDPOError

SHAPE = (2, 768)
MOST_BYTES = 1_000_000
"""Of the file, and of what a zip archive unpacks to: two prompts are 12 KB in the widest type."""
TYPES: Mapping[str, str] = {"f2": "<f2", "f4": "<f4", "f8": "<f8"}
STORAGES: Mapping[str, str] = {
    "torch HalfStorage": "<f2",
    "torch FloatStorage": "<f4",
    "torch DoubleStorage": "<f8",
}


@dataclass(frozen=True)
class _Name:
    """A name that the pickle would import: here a symbol."""

    text: str


@dataclass
class _Type:
    """A numpy type on its way to being complete."""

    code: str
    order: str = "<"


@dataclass
class _Array:
    """An array on its way to being complete: its type, shape and bytes."""

    code: str = ""
    shape: tuple[int, ...] = ()
    data: bytes = b""


@dataclass
class _Machine:
    """Stack and memo of the walk; `storages` are the raw parts of a zip archive, by key."""

    storages: Mapping[str, bytes]
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)


_MARK = _Name("mark")


def read_prompts(data: bytes) -> Float32[np.ndarray, "2 768"]:
    """Return the two prompts (first: not inappropriate, second: inappropriate) of the bytes of `prompts.p`.

    The pickle may hold a numpy array, nested lists of numbers, or, in a zip archive as torch writes it, a tensor.

    Raises:
        SafetyDPOError: naming the first thing in it that two prompts do not need, or what is wrong with them.
    """
    if len(data) > MOST_BYTES:
        raise _refused(f"{len(data):,} bytes, more than the {MOST_BYTES:,} that two prompts could take")
    storages: Mapping[str, bytes] = {}
    if data.startswith(b"PK"):
        data, storages = _unzip(data)
    try:
        found = _walk(data, _Machine(storages))
        prompts = _to_numbers(found)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError) as error:
        raise _refused(f"a pickle that does not fit together ({' '.join(str(error).split())[:100]})") from None
    if prompts.shape != SHAPE:
        raise _refused(f"an array of shape {list(prompts.shape)}")
    if not np.isfinite(prompts).all() or not prompts.any(axis=1).all():
        raise _refused("prompts that are zero or not finite")
    return prompts.astype(np.float32)


def _refused(found: str) -> SafetyDPOError:
    return SafetyDPOError(
        f"expected a pickle of two prompts of 768 numbers (Q16's prompts.p), found {found}: nothing of it was run; get "
        "the file from the authors of Q16 again"
    )


def _unzip(data: bytes) -> tuple[bytes, Mapping[str, bytes]]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > MOST_BYTES:
                raise _refused(f"a zip archive that unpacks to more than {MOST_BYTES:,} bytes")
            parts = {member.filename: archive.read(member) for member in members}
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
        raise _refused(f"a zip archive that cannot be read ({error})") from None
    programs = [name for name in parts if name.endswith("/data.pkl")]
    if len(programs) != 1:
        raise _refused(f"a zip archive with {len(programs)} files data.pkl")
    prefix = programs[0].removesuffix("data.pkl") + "data/"
    raw = {name.removeprefix(prefix): value for name, value in parts.items() if name.startswith(prefix)}
    return parts[programs[0]], raw


def _walk(data: bytes, machine: _Machine) -> Any:
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "STOP":
            break
        step = _OPCODES.get(opcode.name)
        if step is None:
            raise _refused(f"the opcode {opcode.name}")
        step(machine, argument)
    if len(machine.stack) != 1:
        raise ValueError(f"{len(machine.stack)} values at its end")
    return machine.stack[0]


def _push(machine: _Machine, argument: Any) -> None:
    machine.stack.append(argument)


def _push_value(value: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(value())


def _name(machine: _Machine, argument: Any) -> None:
    if argument is None:
        attribute, module = machine.stack.pop(), machine.stack.pop()
        argument = f"{module} {attribute}"
    if argument not in _NAMES:
        raise _refused(f"the name {str(argument)[:80].replace(' ', '.')!r}")
    machine.stack.append(_Name(argument))


def _memoize(machine: _Machine, argument: Any) -> None:
    machine.memo[len(machine.memo) if argument is None else argument] = machine.stack[-1]


def _recall(machine: _Machine, argument: Any) -> None:
    machine.stack.append(machine.memo[argument])


def _pop_to_mark(machine: _Machine) -> list[Any]:
    for place in reversed(range(len(machine.stack))):
        if machine.stack[place] is _MARK:
            values = machine.stack[place + 1 :]
            del machine.stack[place:]
            return values
    raise ValueError("no mark")


def _tuple(machine: _Machine, _: Any) -> None:
    machine.stack.append(tuple(_pop_to_mark(machine)))


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    def step(machine: _Machine, _: Any) -> None:
        values = [machine.stack.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(values)))

    return step


def _append(machine: _Machine, _: Any) -> None:
    value = machine.stack.pop()
    _listed(machine).append(value)


def _appends(machine: _Machine, _: Any) -> None:
    values = _pop_to_mark(machine)
    _listed(machine).extend(values)


def _listed(machine: _Machine) -> list[Any]:
    target = machine.stack[-1]
    if not isinstance(target, list):
        raise ValueError("numbers added to what is no list")
    return target


def _storage(machine: _Machine, _: Any) -> None:
    kind, name, key, _, count = machine.stack.pop()
    if kind != "storage" or not isinstance(name, _Name) or name.text not in STORAGES:
        raise ValueError("a reference that is no storage of numbers")
    machine.stack.append(_Array(STORAGES[name.text], (int(count),), machine.storages[key]))


def _reduce(machine: _Machine, _: Any) -> None:
    arguments, called = machine.stack.pop(), machine.stack.pop()
    if not isinstance(called, _Name) or called.text not in _CALLS:
        raise _refused("a call of something that builds no array")
    machine.stack.append(_CALLS[called.text](arguments))


def _build(machine: _Machine, _: Any) -> None:
    state, target = machine.stack.pop(), machine.stack[-1]
    if isinstance(target, _Type):
        target.order = str(state[1])
    elif isinstance(target, _Array):
        _, shape, kind, is_fortran, data = state
        target.code, target.shape, target.data = _code_of(kind), _shape_of(shape), _bytes_of(data)
        if is_fortran:
            raise ValueError("an array that is stored by columns")
    else:
        raise _refused("a state of something that is no array")


def _code_of(kind: Any) -> str:
    if not isinstance(kind, _Type) or kind.order not in ("<", "|", "="):
        raise ValueError("an array of another type than little-endian floating point")
    return TYPES[kind.code]


def _shape_of(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or not all(isinstance(size, int) for size in shape):
        raise ValueError("a shape that is none")
    return shape


def _bytes_of(data: Any) -> bytes:
    # Of a number, bytes() would make that many zeros.
    if not isinstance(data, bytes | bytearray):
        raise ValueError("an array whose content is no bytes")
    return bytes(data)


def _from_buffer(arguments: Any) -> _Array:
    data, kind, shape, order = arguments
    if order != "C":
        raise ValueError("an array that is stored by columns")
    return _Array(_code_of(kind), _shape_of(shape), _bytes_of(data))


def _tensor(arguments: Any) -> _Array:
    storage, offset, size, stride = arguments[:4]
    shape = _shape_of(size)
    if not isinstance(storage, _Array) or offset != 0 or tuple(stride) != (shape[1], 1):
        raise ValueError("a tensor that is only part of its storage")
    return _Array(storage.code, shape, storage.data)


def _to_numbers(found: Any) -> np.ndarray[Any, np.dtype[np.floating[Any]]]:
    if isinstance(found, _Array):
        count = int(np.prod(found.shape)) if found.shape == SHAPE else -1
        if count < 0:
            raise _refused(f"an array of shape {list(found.shape)[:8]}")
        if len(found.data) != count * np.dtype(found.code).itemsize:
            raise ValueError(f"{len(found.data)} bytes for an array of {count} numbers")
        return np.frombuffer(found.data, dtype=found.code).reshape(found.shape)
    if isinstance(found, list) and len(found) == SHAPE[0] and all(_is_row(row) for row in found):
        return np.array(found, dtype=np.float64)
    raise _refused(f"a {type(found).__name__.lstrip('_').lower()}")


def _is_row(row: Any) -> bool:
    return isinstance(row, Sequence) and len(row) == SHAPE[1] and all(isinstance(value, float | int) for value in row)


_CALLS: Mapping[str, Callable[[Any], Any]] = {
    "_codecs encode": lambda arguments: arguments[0].encode({"latin1": "latin1"}[arguments[1]]),
    "numpy dtype": lambda arguments: _Type(str(arguments[0])),
    **{f"numpy.{core}.multiarray _reconstruct": lambda _: _Array() for core in ("core", "_core")},
    **{f"numpy.{core}.numeric _frombuffer": _from_buffer for core in ("core", "_core")},
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": lambda arguments: arguments[0],
    "collections OrderedDict": lambda _: None,
}
_NAMES = {*_CALLS, *STORAGES, "numpy ndarray"}
_OPCODES: Mapping[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda _, __: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE"), _push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _push),
    "NONE": _push_value(lambda: None),
    "NEWTRUE": _push_value(lambda: True),
    "NEWFALSE": _push_value(lambda: False),
    "EMPTY_TUPLE": _push_value(tuple),
    "EMPTY_LIST": _push_value(list),
    "MARK": _push_value(lambda: _MARK),
    **dict.fromkeys(("GLOBAL", "STACK_GLOBAL"), _name),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _memoize),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _recall),
    "TUPLE": _tuple,
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "APPEND": _append,
    "APPENDS": _appends,
    "BINPERSID": _storage,
    "REDUCE": _reduce,
    "BUILD": _build,
}
