"""The tokenizer's view of the run's own held-out text: which bytes each token covers."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from headspring.data.store import read_documents
from headspring.line.report.formats import visible
from headspring.tokenization.tokenizer import Tokenizer

EXCERPT = 700  # characters of each example
LONGEST = 16
COLOURS = 6


@dataclass(frozen=True)
class Piece:
    """One token: what it shows, a colour that differs from its neighbours', and what a pointer resting on it says."""

    text: str
    colour: int
    title: str


@dataclass(frozen=True)
class Excerpt:
    label: str
    bytes_per_token: float
    pieces: list[Piece]


@dataclass(frozen=True)
class TokenizerView:
    vocab_size: int
    control: list[str]
    excerpts: list[Excerpt]
    longest: list[tuple[str, int, int]]  # text, id, bytes


def tokenizer_view(tokenizer: Tokenizer, data_folder: Path | None) -> TokenizerView:
    """Coloured excerpts of one held-out document of each kind, and the longest tokens that are not mere space."""
    excerpts = [excerpt(tokenizer, label, text) for label, text in held_out_texts(data_folder)]
    return TokenizerView(tokenizer.vocab_size, sorted(tokenizer.control), excerpts, longest_tokens(tokenizer))


def held_out_texts(data_folder: Path | None) -> Iterator[tuple[str, str]]:
    """The start of the first validation document of each kind that is long enough to fill an excerpt."""
    seen: set[str] = set()
    for document in read_documents(data_folder, split="validation") if data_folder else ():
        if document.kind not in seen and len(document.text) >= EXCERPT // 2:
            seen.add(document.kind)
            yield f"{document.kind} · {document.path}", document.text[:EXCERPT]
        if len(seen) == 2:
            return


def excerpt(tokenizer: Tokenizer, label: str, text: str) -> Excerpt:
    ids = tokenizer.encode(text)
    pieces = [_piece(tokenizer.token_bytes(token), token, index) for index, token in enumerate(ids)]
    return Excerpt(label, len(text.encode("utf-8", "replace")) / max(len(ids), 1), pieces)


def _piece(content: bytes, token: int, index: int) -> Piece:
    title = f"token {token} · {len(content)} byte{'s' if len(content) != 1 else ''}"
    return Piece(token_text(content).replace("\n", "⏎\n"), index % COLOURS, title)


def token_text(content: bytes) -> str:
    """The token's text; bytes that are part of a character are shown in hexadecimal."""
    try:
        return visible(content.decode("utf-8"))
    except UnicodeDecodeError:
        return "".join(f"‹{byte:02x}›" for byte in content)


def longest_tokens(tokenizer: Tokenizer) -> list[tuple[str, int, int]]:
    control = set(tokenizer.control.values())
    contents = [(tokenizer.token_bytes(token), token) for token in range(tokenizer.vocab_size) if token not in control]
    worded = sorted((pair for pair in contents if pair[0].strip()), key=lambda pair: (-len(pair[0]), pair[1]))
    return [(token_text(content), token, len(content)) for content, token in worded[:LONGEST]]
