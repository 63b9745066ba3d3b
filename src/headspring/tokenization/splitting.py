"""Where a text is cut before any merge: the split pattern, and the places where a huge text may be cut in two.

A pattern decides what can ever be one token. Ours is of the GPT-4 (cl100k) family with two changes for small
vocabularies and code. Digits come in groups of at most two by default, since a thousand three-digit groups do not fit
into a vocabulary of a few thousand. And a line break takes the next line's indentation with it, so that `\\n        `
is one token and the word after it is spelled the same at every depth.
"""

import re
from collections.abc import Iterator
from typing import Any, Literal

DigitPolicy = Literal["single", "pairs", "triples", "runs"]
DIGITS: dict[str, str] = {"single": r"\p{N}", "pairs": r"\p{N}{1,2}", "triples": r"\p{N}{1,3}", "runs": r"\p{N}+"}

_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)"  # English contractions
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"  # a word, with the space or sign before it
    r"|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+"  # punctuation, with the space before it
    r"|\s*[\r\n][ \t]*"  # line breaks and the indentation that follows
    r"|\s+(?!\S)"  # spaces, except the last, which belongs to the next word
    r"|\s+"
)


def split_pattern(digits: DigitPolicy) -> str:
    """The regular expression (Oniguruma's dialect) of a digit policy."""
    return _PATTERN.replace("DIGITS", DIGITS[digits])


def is_own(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether a parsed `pre_tokenizer` begins with a pattern of ours, so that `chunks` may be used."""
    parts = (pre_tokenizer or {}).get("pretokenizers") or [{}]
    patterns = {split_pattern(digits) for digits in DIGITS}  # type: ignore[arg-type]
    return parts[0].get("type") == "Split" and parts[0]["pattern"].get("Regex") in patterns


CHUNK = 1 << 20
# No alternative of the pattern crosses these: a line break before an unindented word, a letter before space and letter.
_SAFE = re.compile(r"(?<=\n)(?=[A-Za-z])|(?<=[A-Za-z])(?= [A-Za-z])")


def chunks(text: str, size: int = CHUNK) -> Iterator[str]:
    """`text` in parts of about `size` characters, cut only where encoding the parts equals encoding the whole.

    Bounds the library's memory (about 100 bytes a token) on a file that is one huge text. A text without such a place
    stays whole.
    """
    start = 0
    while len(text) - start > size:
        found = _SAFE.search(text, start + size)
        if found is None:
            break
        yield text[start : found.start()]
        start = found.start()
    yield text[start:] if start else text
