"""What bytes a token stands for, and where in a text's bytes it lies.

A vocabulary stores strings, and each family writes bytes into them in its own way:

    byte-level      every byte has a printable stand-in (GPT-2's table): `Ġthe` is b" the"
    sentencepiece   a space is `▁`, and a lone byte is `<0x0A>`:        `▁the` is b" the"
    wordpiece       `##` marks a continuation and spaces are not stored: `##ing` is b"ing"
    plain           the string itself

`Scheme` reads from a `tokenizer.json` which of them holds. For a byte-level vocabulary without a normaliser the bytes
of the tokens are exactly the bytes of the text, so that spans are a running sum of lengths. For the others the library
gives character offsets into the original text, which are converted here.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

Family = Literal["byte-level", "sentencepiece", "wordpiece", "plain"]
META = "▁"
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


@cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's table, inverted: printable Latin-1 stands for itself, the other 68 bytes for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(0x100 + i): byte for i, byte in enumerate(hidden)})
    return table


@cache
def _to_latin_1() -> dict[int, int]:
    """For `str.translate`, as a vocabulary has a hundred thousand tokens: a stand-in becomes the character numbered as its
    byte, and a Latin-1 character that is no stand-in becomes one that Latin-1 cannot say."""
    return dict.fromkeys(range(256), 65535) | {ord(character): byte for character, byte in byte_of_character().items()}


@dataclass(frozen=True)
class Scheme:
    """How a tokenizer's strings map to bytes. `exact`: the tokens' bytes, joined, are the text's bytes."""

    family: Family
    exact: bool
    drops_leading_space: bool = False
    continuation: str = "##"

    def bytes_of(self, token: str) -> bytes:
        """The bytes of an ordinary (neither control nor added) token."""
        if self.family == "byte-level":
            try:
                return token.translate(_to_latin_1()).encode("latin-1")
            except UnicodeEncodeError:  # a character that stands for no byte
                return token.encode()
        if self.family == "sentencepiece":
            byte = BYTE_PIECE.fullmatch(token)
            return bytes.fromhex(byte[1]) if byte else token.replace(META, " ").encode()
        if self.family == "wordpiece":
            return token.removeprefix(self.continuation).encode()
        return token.encode()


def scheme_of(description: dict[str, Any]) -> Scheme:
    """The scheme of a parsed `tokenizer.json`."""
    decoders = flatten(description.get("decoder"), "decoders")
    before = flatten(description.get("pre_tokenizer"), "pretokenizers")
    types = {part["type"] for part in decoders}
    if "ByteLevel" in types:
        prefix = any(part["type"] == "ByteLevel" and part.get("add_prefix_space") for part in before)
        byte_level_in = any(part["type"] == "ByteLevel" for part in before)
        exact = description.get("normalizer") is None and byte_level_in and not prefix
        return Scheme("byte-level", exact)
    if types & {"Metaspace", "ByteFallback"} or any(part.get("pattern") == {"String": META} for part in decoders):
        drops = any(
            (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
            or (part["type"] == "Strip" and part.get("start", 0) > 0)
            for part in decoders
        )
        return Scheme("sentencepiece", exact=False, drops_leading_space=drops)
    if "WordPiece" in types or description["model"].get("type") == "WordPiece":
        prefix_text = description["model"].get("continuing_subword_prefix") or "##"
        return Scheme("wordpiece", exact=False, continuation=prefix_text)
    return Scheme("plain", exact=False)


def flatten(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [leaf for child in part[key] for leaf in flatten(child, key)]
    return [part]


def spans_from_lengths(lengths: np.ndarray) -> np.ndarray:
    """Byte lengths (n,) of consecutive tokens → byte spans (n, 2) int64."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.stack([ends - lengths, ends], axis=1)


def spans_from_offsets(text: str, offsets: list[tuple[int, int]], is_byte: np.ndarray) -> np.ndarray:
    """Character offsets (n pairs) into `text` → byte spans (n, 2) int64 in `text.encode()`.

    Byte-fallback tokens (`is_byte`, (n,) bool) share the offsets of the characters they spell together; where their
    number is the span's number of bytes, each gets its own byte.
    """
    if not offsets:
        return np.zeros((0, 2), np.int64)
    spans = _byte_positions(text)[np.asarray(offsets, np.int64)]
    start = 0
    while is_byte.any() and start < len(spans):
        end = start + 1
        if is_byte[start]:
            while end < len(spans) and is_byte[end] and (spans[end] == spans[start]).all():
                end += 1
            first, last = spans[start]
            if last - first == end - start:
                spans[start:end, 0] = np.arange(first, last)
                spans[start:end, 1] = spans[start:end, 0] + 1
        start = end
    return spans


def _byte_positions(text: str) -> np.ndarray:
    """(characters + 1,) int64: the byte at which each character begins, and the total."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    lengths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(lengths)])
