"""Pickles read as data: numbers and plain containers are built, everything else stays a name.

A pickle is a program for a small machine; all it can do to the outside is to call what `find_class` hands it. Ours hands out
makers of plain things, which a pickle can neither alter nor look into, and nothing that it names is ever imported.
"""

import math
import pickle
import pickletools
from typing import ClassVar

import numpy as np

MAX_REPEATED = 2**20  # elements of a tensor that repeats its storage
MAX_PARTS = 64  # of a key, or dimensions of a tensor
MAX_DEPTH = 100  # of modules within modules
MAX_MODULES = 10_000  # in one network, each counted as often as it is in it


class Record:
    """A pickled object as data: the name of its class, the arguments it was made with, its state and its items.

    It has no behaviour. A pickle may make one, give it a state and fill it with items, and nothing else.
    """

    __slots__ = ("args", "class_name", "items", "state")
    pickled_name = "object"

    def __new__(cls, *args, **kwargs):
        self = object.__new__(cls)
        self.class_name, self.args, self.state, self.items = (
            cls.pickled_name,
            args,
            dict(kwargs),
            [],
        )
        return self

    @classmethod
    def named(cls, class_name, state):
        """A record of this class name and state; `pickle.UnpicklingError` when they are not text and a dictionary."""
        if type(class_name) is not str or not isinstance(state, dict):
            raise pickle.UnpicklingError("malformed object")
        self = cls()
        self.class_name, self.state = class_name, dict(state)
        return self

    def __setstate__(self, state):
        parts = (
            state if isinstance(state, tuple) and len(state) == 2 else (state,)
        )  # (dictionary, slots)
        for part in parts:
            self.state |= part if isinstance(part, dict) else {} if part is None else {"": part}

    def __setitem__(self, key, value):
        self.items.append((key, value))

    def append(self, value):
        self.items.append(value)

    add = append

    def extend(self, values):
        self.items.extend(values)

    def __repr__(self):
        return f"<{self.class_name}, as data>"


class Maker:
    """A function that a pickle may call and cannot alter."""

    __slots__ = ("_function",)

    def __init__(self, function):
        object.__setattr__(self, "_function", function)

    def __call__(self, *args):
        return self._function(*args)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError("a pickle may not alter its reader")

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a pickle may not alter its reader")


class PlainDict(dict):
    """What stands for the dictionaries of other classes: their items, in order, and nothing more."""

    __slots__ = ()

    def __init__(self, items=()):
        pairs = items.items() if isinstance(items, dict) else items
        super().__init__((check_key(key), value) for key, value in pairs)

    def __setstate__(self, state):
        """Attributes of a dictionary, such as a state dict's `_metadata`, are left out."""


class _DType:
    """The name and byte order of a numpy type; numbers and truth values only."""

    __slots__ = ("byte_order", "name")

    def __init__(self, name):
        if type(name) is not str:
            raise pickle.UnpicklingError("malformed array")
        self.name, self.byte_order = name, "="

    def __setstate__(self, state):
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError("malformed array")
        self.byte_order = state[1]

    def numpy(self):
        dtype = np.dtype(self.name)
        if dtype.kind not in "fiubc" or dtype.names is not None:
            raise pickle.UnpicklingError(f"an array of type {self.name!r} holds no numbers")
        return dtype.newbyteorder(self.byte_order if self.byte_order in "<>" else "=")


class StoredArray:
    """A numpy array, once read in `array`; numpy's own `__setstate__` would believe any sizes it is told."""

    __slots__ = ("array",)

    def __init__(self, *_):
        self.array = None

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, data = state
        self.array = _read_array(data, dtype, shape, "F" if is_fortran else "C")


def _read_array(data, dtype, shape, order="C", *_):
    if not isinstance(dtype, _DType) or order not in ("C", "F"):
        raise pickle.UnpicklingError("malformed array")
    return (
        np.frombuffer(_read_bytes(data), dtype=dtype.numpy())
        .reshape(tuple(map(int, shape)), order=order)
        .copy()
    )


def _read_scalar(dtype, data):
    if not isinstance(dtype, _DType):
        raise pickle.UnpicklingError("malformed number")
    return np.frombuffer(_read_bytes(data), dtype=dtype.numpy(), count=1)[0].item()


def _read_bytes(data=b""):
    if not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("malformed bytes")  # bytes(10**12) would fill the memory
    return bytes(data)


def _encode(text, _="latin1"):
    if type(text) is not str:
        raise pickle.UnpicklingError("malformed bytes")
    return text.encode("latin1")  # how protocol 2 writes bytes


def check_key(key):
    """`key`, where it may be a dictionary's or a set's: text, bytes, None, a number of up to 64 bits, a class, an object that is
    hashed by its identity, or a short tuple of such; `pickle.UnpicklingError` otherwise.

    Python hashes a tuple by hashing its parts anew each time: sixty tuples, each twice in the next, would never end.
    """
    parts = key if type(key) is tuple else (key,)
    if len(parts) > MAX_PARTS:
        raise pickle.UnpicklingError(f"it has a dictionary or set with a key of {len(parts)} parts")
    for part in parts:
        is_scalar = type(part) in SCALARS and not (type(part) is int and part.bit_length() > 64)
        if not is_scalar and type(part).__hash__ is not object.__hash__:
            what = "a long number" if type(part) is int else f"a {type(part).__name__}"
            raise pickle.UnpicklingError(
                f"it has a dictionary or set with {what} as a key, or within one"
            )
    return key


SCALARS = (str, bytes, int, bool, float, complex, type(None))


def _make_empty_record(cls, *_):
    if not (isinstance(cls, type) and issubclass(cls, Record)):
        raise pickle.UnpicklingError("malformed object")
    return cls()


PLAIN = {
    ("collections", "OrderedDict"): PlainDict,
    ("collections", "defaultdict"): Maker(lambda *_: PlainDict()),
    ("collections", "Counter"): PlainDict,
    ("_codecs", "encode"): Maker(_encode),
    ("numpy", "dtype"): Maker(lambda name, *_: _DType(name)),
    ("numpy", "ndarray"): Maker(lambda *_: None),  # only ever an argument of `_reconstruct`
}
for _module in ("builtins", "__builtin__"):
    PLAIN[_module, "set"] = Maker(lambda items=(): set(map(check_key, items)))
    PLAIN[_module, "frozenset"] = Maker(lambda items=(): frozenset(map(check_key, items)))
    PLAIN[_module, "bytearray"] = PLAIN[_module, "bytes"] = Maker(_read_bytes)
    PLAIN[_module, "complex"] = Maker(lambda *args: complex(*args))
    PLAIN[_module, "slice"] = Maker(lambda *args: slice(*args))
for _module in ("copyreg", "copy_reg"):
    PLAIN[_module, "_reconstructor"] = Maker(_make_empty_record)
for _module in ("numpy.core", "numpy._core"):
    PLAIN[f"{_module}.multiarray", "scalar"] = Maker(_read_scalar)
    PLAIN[f"{_module}.multiarray", "_reconstruct"] = Maker(StoredArray)
    PLAIN[f"{_module}.numeric", "_frombuffer"] = Maker(_read_array)
"""What every reader builds: containers, and numpy's numbers and arrays (`StoredArray`)."""


class SafeUnpickler(pickle._Unpickler):
    """An unpickler that builds what is in `allowed`, (module, name) -> what stands for it, and refuses every other name.

    It is Python's unpickler in Python: the one in C cannot be asked to look at a key before it hashes it, nor at an object before it
    fills it or sets its attributes. Only lists, dictionaries, sets and `Record`s are filled, and only classes that say how, by a
    `__setstate__` of their own, take a state.
    """

    allowed = PLAIN
    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)  # instruction -> method

    def _fill(self, kinds):
        """The object that the next items go into."""
        if not isinstance(self.stack[-1], kinds):
            raise pickle.UnpicklingError(f"it puts items into a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def _load_items(self, items):
        target = self._fill((dict, Record))
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if isinstance(target, Record) else check_key(key)] = value

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._load_items([key, value])

    def load_setitems(self):
        self._load_items(self.pop_mark())

    def load_dict(self):
        items = self.pop_mark()
        self.append({})
        self._load_items(items)

    def load_append(self):
        value = self.stack.pop()
        self._fill((list, Record)).append(value)

    def load_appends(self):
        values = self.pop_mark()
        self._fill((list, Record)).extend(values)

    def load_additems(self):
        items = self.pop_mark()
        target = self._fill((set, Record))
        for item in items:
            target.add(item if isinstance(target, Record) else check_key(item))

    def load_frozenset(self):
        items = self.pop_mark()  # which changes what `append` is
        self.append(frozenset(map(check_key, items)))

    def load_build(self):
        state, target = self.stack.pop(), self.stack[-1]
        if not hasattr(type(target), "__setstate__"):
            raise pickle.UnpicklingError(
                f"it gives a state to a {type(target).__name__}, which takes none"
            )
        target.__setstate__(state)

    dispatch |= {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.BUILD[0]: load_build,
    }

    def find_class(self, module, name):
        try:
            return self.allowed[module, name]
        except KeyError:
            return self.find_other(module, name)

    def find_other(self, module, name):
        """What stands for a name that is not in `allowed`."""
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to objects outside the file")


def check_opcodes(file):
    """Go through the instructions of the pickle that begins at `file`'s position, and put the position back; return its length.

    Raises `pickle.UnpicklingError` where they are damaged, or number their objects higher than there can be objects, for which
    Python would reserve memory.
    """
    start, count = file.tell(), 0
    try:
        for opcode, argument, _ in pickletools.genops(file):
            count += 1
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
                raise pickle.UnpicklingError(f"it numbers its {count}th object {argument}")
    except ValueError as error:
        raise pickle.UnpicklingError(f"it is cut short or damaged ({error})") from error
    length = file.tell() - start
    file.seek(start)
    return length


def check_extent(num_elements, offset, size, stride):
    """The number of elements that a tensor spans in its storage of `num_elements`, counted from `offset`.

    Raises `pickle.UnpicklingError` when it reaches beyond the storage, or repeats it to an absurd size.
    """
    numbers = (offset, *size, *stride)
    is_malformed = len(size) != len(stride) or len(size) > MAX_PARTS
    if is_malformed or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
        raise pickle.UnpicklingError("malformed tensor")
    if not math.prod(size):
        return 0
    span = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if offset + span > num_elements:
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    if math.prod(size) > max(num_elements, MAX_REPEATED):
        raise pickle.UnpicklingError(
            f"a tensor repeats its storage to {math.prod(size):.3g} elements"
        )
    return span


def walk_modules(module):
    """(path, `Record`) of a pickled `torch.nn.Module` and of all within it, from the outside in.

    Raises `ValueError` when they lie too deep (a module within itself) or are too many (modules that share their parts, level by level).
    """
    waiting, count = [((), module)], 0
    while waiting:
        path, module = waiting.pop()
        yield ".".join(path), module
        children = [
            (name, child)
            for name, child in module.state.get("_modules", {}).items()
            if child is not None
        ]
        count += len(children)
        if len(path) == MAX_DEPTH or count > MAX_MODULES:
            raise ValueError("its modules lie in each other without an end")
        if not all(type(name) is str and isinstance(child, Record) for name, child in children):
            raise ValueError("its modules are not modules, or have no names")
        waiting += [((*path, name), child) for name, child in reversed(children)]


def flatten_module(module):
    """All parameters and buffers of a `torch.nn.Module` that was pickled whole, a `Record`, as {dotted name: tensor}; errors as in
    `walk_modules`."""
    tensors = {}
    for path, part in walk_modules(module):
        for kind in ("_parameters", "_buffers"):
            stored = part.state.get(kind, {})
            tensors |= {
                f"{path}.{name}" if path else name: value
                for name, value in stored.items()
                if value is not None
            }
    return tensors
