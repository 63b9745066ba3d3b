"""Text from a byte stream in pieces of bounded size, each with its exact byte span.

A file of any size, even one with a single line of 100 MB, becomes documents of at most `limit` bytes: cut behind the
last line end in the second half of the piece, or between two characters where there is none. At most two pieces are in
memory. The spans tile the file, so that joining the pieces gives the file back.
"""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from headspring.artifacts.errors import UserError

UTF8_BOM = b"\xef\xbb\xbf"
SNIFFED_BYTES = 8192


class Piece(NamedTuple):
    """`text` was read from bytes [start, end); `exact` means that these bytes are the text in UTF-8."""

    text: str
    start: int
    end: int
    exact: bool


class BinaryFile(Exception):
    """The stream has NUL bytes at its beginning and so is not text."""


def read_pieces(file: BinaryIO, name: str, limit: int, errors: str = "strict") -> Iterator[Piece]:
    """Decode `file` as UTF-8 (a byte-order mark is skipped) in pieces of at most `limit` bytes.

    Raises `BinaryFile` for NUL bytes among the first 8,192, and `UserError` with file and byte offset for invalid UTF-8
    unless `errors` is "replace" (U+FFFD, and the piece is not `exact`)."""
    buffer, offset = _fill(file, b"", max(limit + 1, SNIFFED_BYTES)), 0
    if b"\0" in buffer[:SNIFFED_BYTES]:
        raise BinaryFile(name)
    if buffer.startswith(UTF8_BOM):
        buffer, offset = buffer[len(UTF8_BOM) :], len(UTF8_BOM)
    while buffer:
        if len(buffer) <= limit:
            buffer = _fill(file, buffer, limit + 1)
        cut = cut_position(buffer, limit)
        yield decode_piece(buffer[:cut], name, offset, errors)
        buffer, offset = buffer[cut:], offset + cut


def cut_position(content: bytes, limit: int) -> int:
    """Where to end a piece of `content`: all of it, or at most `limit` bytes at a line end or between characters."""
    if len(content) <= limit:
        return len(content)
    line = content.rfind(b"\n", limit // 2, limit)
    if line >= 0:
        return line + 1
    cut = limit
    while cut > max(limit - 4, 1) and content[cut] & 0xC0 == 0x80:  # 10xxxxxx continues a character
        cut -= 1
    return cut


def decode_piece(content: bytes, name: str, offset: int, errors: str) -> Piece:
    """One piece of file `name` that starts at byte `offset`."""
    end = offset + len(content)
    try:
        return Piece(content.decode("utf-8"), offset, end, True)
    except UnicodeDecodeError as error:
        if errors == "replace":
            return Piece(content.decode("utf-8", "replace"), offset, end, False)
        place = f"{name}: invalid UTF-8 at byte {offset + error.start}"
        raise UserError(f"{place}; convert the file or set `errors: replace`") from None


def split_string(text: str, limit: int) -> list[str]:
    """`text` in parts of at most `limit` UTF-8 bytes, cut like a file's pieces."""
    content = text.encode("utf-8", "replace")
    parts, position = [], 0
    while position < len(content):
        window = content[position : position + limit + 1]
        cut = cut_position(window, limit)
        parts.append(window[:cut].decode("utf-8"))
        position += cut
    return parts


def _fill(file: BinaryIO, buffer: bytes, size: int) -> bytes:
    """Read until `buffer` has `size` bytes or the stream ends; remote files may return less than asked."""
    parts, missing = [buffer], size - len(buffer)
    while missing > 0 and (chunk := file.read(missing)):
        parts.append(chunk)
        missing -= len(chunk)
    return b"".join(parts)
