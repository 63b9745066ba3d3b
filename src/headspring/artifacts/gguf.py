"""The container of GGUF files: typed metadata, a table of tensors, and their bytes. What they mean is read elsewhere.

    magic · version · counts │ key, type, value … │ name, sizes, type, offset … │ padding │ tensor │ padding │ tensor …

A file is mapped, not loaded, and nothing in it is believed: every length, count, offset and size is compared with the
bytes that are left before anything is allocated for it, products are Python integers and cannot overflow, and no two
tensors may share bytes (a small file could name one large tensor a thousand times). So a file can make us allocate a
small multiple of its own size at most: eight bytes of it may become one Python string, four bits one float.

Why not the reader of the `gguf` package, whose constants and block formats are used: it believes counts (a claimed 2⁶⁰
values is a loop without end) and clips slices at the end of the file in silence. What this gives up: files of the other
byte order, version 1, and arrays of arrays.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from headspring.artifacts.errors import CorruptArtifact, UserError
from headspring.artifacts.files import open_atomic

MAGIC = b"GGUF"
VERSION, READABLE = 3, (2, 3)
ALIGNMENT_KEY, ALIGNMENT = "general.alignment", 32
MAX_DIMENSIONS = 4
NUMBERS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True)
class TensorInfo:
    """`shape` is in row-major order, the last dimension contiguous (the file has it the other way round)."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int  # bytes, from the beginning of the file

    @property
    def bytes(self) -> int:
        return size_of(self.shape, self.type)


def size_of(shape: Sequence[int], type: GGMLQuantizationType) -> int:
    """Bytes of a tensor, whose rows must be whole blocks of its type."""
    block, size = GGML_QUANT_SIZES[type]
    return math.prod(shape) // block * size


class GgufFile:
    """A file, opened for reading: `metadata` by key, `tensors` by name. Arrays of numbers are numpy arrays.

    Raises `UserError` where it cannot be opened, `CorruptArtifact` where it is not what it says.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._data = _map(self.path)
        cursor = _Cursor(self._data, self.path)
        tensors, values = cursor.header()
        self.metadata: dict[str, Any] = {}
        for _ in range(values):
            key = cursor.string()
            if key in self.metadata:
                cursor.fail(f"has the key {key!r} twice")
            self.metadata[key] = cursor.value(cursor.value_type())
        infos = [cursor.tensor() for _ in range(tensors)]
        self.tensors = {info.name: info for info in self._placed(infos, cursor)}

    def _placed(self, infos: list[TensorInfo], cursor: "_Cursor") -> list[TensorInfo]:
        """The tensors with offsets from the beginning of the file: inside it, aligned, each name and byte used once."""
        alignment = self.metadata.get(ALIGNMENT_KEY, ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            cursor.fail(f"has {ALIGNMENT_KEY} = {alignment!r}, which is no power of two")
        start = end = _aligned(cursor.at, alignment)
        names: set[str] = set()
        placed = []
        for info in sorted(infos, key=lambda info: info.offset):
            here = start + info.offset
            if info.name in names:
                cursor.fail(f"has the tensor {info.name!r} twice")
            if info.offset % alignment or here < end:
                cursor.fail(f"has the tensor {info.name!r} at byte {here}, over another one or unaligned")
            end = here + info.bytes
            if end > len(self._data):
                cursor.fail(f"ends at byte {len(self._data)}, and its tensor {info.name!r} at {end}: it is cut off")
            names.add(info.name)
            placed.append(TensorInfo(info.name, info.type, info.shape, here))
        return placed

    def content(self, name: str) -> np.ndarray:
        """The bytes of a tensor, (n,) uint8, read-only, straight from the file."""
        info = self.tensors[name]
        return np.frombuffer(self._data, np.uint8, info.bytes, info.offset)


def _map(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror})") from error
    except ValueError as error:  # there is nothing to map
        raise CorruptArtifact(f"{path}: is empty; get it again") from error


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


class _Cursor:
    """A place in the file that moves forward, and never past the end."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at = data, path, 0

    def fail(self, what: str) -> NoReturn:
        raise CorruptArtifact(f"{self.path}: {what}; the file is damaged, get it again")

    def take(self, count: int) -> int:
        """Where the next `count` bytes begin."""
        start = self.at
        if count > len(self.data) - start:
            self.fail(f"ends at byte {len(self.data)}, inside a part that would need {count} more from byte {start}")
        self.at += count
        return start

    def number(self, form: str) -> int:
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        count = self.number("<Q")
        start = self.take(count)
        try:
            return self.data[start : start + count].decode()
        except UnicodeDecodeError:
            self.fail(f"holds a string at byte {start} that is not UTF-8")

    def header(self) -> tuple[int, int]:
        """Numbers of tensors and of metadata values. Each of either takes at least the bytes named here."""
        if self.data[:4] != MAGIC:
            raise CorruptArtifact(f"{self.path}: is no GGUF file (it begins with {self.data[:4]!r}, not {MAGIC!r})")
        self.take(len(MAGIC))
        version = self.number("<I")
        if version not in READABLE:
            order = "of the other byte order" if version & 0xFFFF == 0 else f"of version {version}"
            raise UserError(f"{self.path}: a GGUF file {order}; versions {READABLE} in little-endian order can be read")
        tensors, values = self.number("<Q"), self.number("<Q")
        if tensors * 32 + values * 13 > len(self.data) - self.at:
            self.fail(f"claims {tensors} tensors and {values} values, more than its {len(self.data)} bytes can hold")
        return tensors, values

    def value_type(self) -> GGUFValueType:
        number = self.number("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            self.fail(f"has a value of the unknown type {number} at byte {self.at}")

    def value(self, type: GGUFValueType) -> Any:
        if type is GGUFValueType.STRING:
            return self.string()
        if type is GGUFValueType.ARRAY:
            return self._array()
        return _plain(self._numbers(type, 1)[0])

    def _array(self) -> Any:
        type, count = self.value_type(), self.number("<Q")
        if type is GGUFValueType.ARRAY:
            self.fail(f"has an array of arrays at byte {self.at}, which cannot be read")
        if type is not GGUFValueType.STRING:
            return self._numbers(type, count)
        if count * 8 > len(self.data) - self.at:
            self.fail(f"claims {count} strings at byte {self.at}, more than its {len(self.data)} bytes can hold")
        return self._strings(count)

    def _strings(self, count: int) -> list[str]:
        """`string`, count times, in one loop: a vocabulary has a hundred thousand of them."""
        strings, data, size, at = [], self.data, len(self.data), self.at
        length_of = struct.Struct("<Q").unpack_from
        for _ in range(count):
            end = at + 8 + (length_of(data, at)[0] if at + 8 <= size else size)
            if end > size:
                break
            content, at = data[at + 8 : end], end
            try:
                strings.append(content.decode())
            except UnicodeDecodeError:
                self.fail(f"holds a string at byte {at - len(content)} that is not UTF-8")
        self.at = at
        return strings if len(strings) == count else [*strings, self.string()]  # which says what is wrong

    def _numbers(self, type: GGUFValueType, count: int) -> np.ndarray:
        dtype = np.dtype(NUMBERS[type])
        start = self.take(count * dtype.itemsize)
        return np.frombuffer(self.data, dtype, count, start).copy()

    def tensor(self) -> TensorInfo:
        """One line of the table, its offset counted from the first tensor."""
        name, count = self.string(), self.number("<I")
        if not 1 <= count <= MAX_DIMENSIONS:
            self.fail(f"gives the tensor {name!r} {count} dimensions")
        shape = tuple(self.number("<Q") for _ in range(count))[::-1]
        number = self.number("<I")
        try:
            type = GGMLQuantizationType(number)
        except ValueError:
            raise UserError(f"{self.path}: the tensor {name!r} is of the unknown type {number}") from None
        block = GGML_QUANT_SIZES[type][0]
        if 0 in shape or shape[-1] % block:
            self.fail(f"gives the tensor {name!r} the sizes {shape}, whose rows are no whole blocks of {block}")
        return TensorInfo(name, type, shape, self.number("<Q"))


def _plain(number: Any) -> int | float | bool:
    """A Python number; a float32 becomes the shortest decimal that means it (1e-06, not 9.999999974752427e-07)."""
    return float(str(number)) if number.dtype == np.float32 else number.item()


# ---- writing


@dataclass(frozen=True)
class Entry:
    """A tensor to write: `content` gives its bytes when it is its turn, so that one at a time is in memory."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    content: Callable[[], np.ndarray]


def write_gguf(path: str | Path, metadata: Mapping[str, Any], tensors: Iterable[Entry]) -> None:
    """Write a file, atomically. A list holds strings, an array numbers; an integer becomes uint32, a float float32."""
    tensors = list(tensors)
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    head += [_string(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for entry in tensors:
        sizes = struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *entry.shape[::-1])
        head.append(_string(entry.name) + sizes + struct.pack("<IQ", entry.type, offset))
        offset = _aligned(offset + size_of(entry.shape, entry.type), ALIGNMENT)
    with open_atomic(Path(path)) as file:
        _padded(file, b"".join(head))
        for entry in tensors:
            content = entry.content().tobytes()
            assert len(content) == size_of(entry.shape, entry.type), entry.name
            _padded(file, content)


def _padded(file: Any, content: bytes) -> None:
    file.write(content)
    file.write(b"\0" * (-len(content) % ALIGNMENT))


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _value(value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        types = {np.dtype(form): type for type, form in NUMBERS.items()}
        return _array(types[value.dtype], len(value), value.tobytes())
    if isinstance(value, list):
        return _array(GGUFValueType.STRING, len(value), b"".join(map(_string, value)))
    type, content = _scalar(value)
    return struct.pack("<I", type) + content


def _array(type: GGUFValueType, count: int, content: bytes) -> bytes:
    return struct.pack("<IIQ", GGUFValueType.ARRAY, type, count) + content


def _scalar(value: Any) -> tuple[GGUFValueType, bytes]:
    if isinstance(value, bool):
        return GGUFValueType.BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return GGUFValueType.UINT32, struct.pack("<I", value)
    if isinstance(value, float):
        return GGUFValueType.FLOAT32, struct.pack("<f", value)
    assert isinstance(value, str), type(value)
    return GGUFValueType.STRING, _string(value)
