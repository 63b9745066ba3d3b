"""Byte-level BPE by ranks: the same ids from `tiktoken`, about five times as fast, where it is installed.

The two libraries state BPE differently. `tokenizers` has a list of merges (left, right) and applies the earliest first;
`tiktoken` has tokens with ranks and joins the two neighbours whose *joined bytes* have the lowest rank, whichever the
parts. The ids are equal when the vocabulary came from training and was not edited:

- one merge a token, merges in order of the tokens' ids, and the parts of a merge made before it. Merges then happen in
  order of rank;
- every token, encoded alone, is itself.

Why that suffices: let neighbours a·b spell a token t without being its merge, with all merges up to t's rank done. What
lies between two borders that were never merged across is encoded as if it stood alone. So a·b was encoded as t alone is,
which is [t]: not two neighbours. All of this is checked when a tokenizer is loaded; one that fails it, or splits text by
a pattern other than ours (`splitting`, on whose classes the two regex engines agree for every code point), stays with
`tokenizers`.

What it gives up: memory for a second table of the vocabulary. Texts with white space by the ten thousands, on which the
regex engine's stack would overflow, are left to `tokenizers`.
"""

import os
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer as LibraryTokenizer

from headspring.tokenization import splitting
from headspring.tokenization.pieces import byte_of_character

LONG_SPACE = 10_000  # characters of white space in a row; ten times as many are still safe
_LONG_SPACE = re.compile(rf"\s{{{LONG_SPACE}}}")
_OPTIONS = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")


class RankEncoder:
    """Encodes texts as ids with `tiktoken`. Made by `rank_encoder`, which knows when that is right."""

    def __init__(self, pattern: str, ranks: dict[bytes, int]):
        import tiktoken

        self._encoding = tiktoken.Encoding("headspring", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode_batch(self, texts: Sequence[str], otherwise: Callable[[Sequence[str]], list[list[int]]]) -> list[list[int]]:
        """The ids of each text; those that are not for this engine go to `otherwise`, together."""
        left = [index for index, text in enumerate(texts) if not _suits(text)]
        rest = dict(zip(left, otherwise([texts[index] for index in left]) if left else ()))
        mine = iter(self._encode([text for index, text in enumerate(texts) if index not in rest]))
        return [rest[index] if index in rest else next(mine) for index in range(len(texts))]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        threads = min(_threads(), len(texts))
        if threads > 1:
            return self._encoding.encode_ordinary_batch(texts, num_threads=threads)
        return [self._encoding.encode_ordinary(text) for text in texts]


def rank_encoder(description: dict[str, Any], library: LibraryTokenizer, control: dict[str, int]) -> RankEncoder | None:
    """The encoder for a parsed `tokenizer.json` (`library` is the same, loaded); None where it might give other ids."""
    if not (_is_own_byte_level(description, control) and _is_as_trained(description["model"], library, control)):
        return None
    table = byte_of_character()
    vocab = {token: i for token, i in description["model"]["vocab"].items() if token not in control}
    ranks = {bytes(table[character] for character in token): i for token, i in vocab.items()}
    pattern = description["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    try:
        return RankEncoder(pattern, ranks)
    except ImportError:
        return None


def _is_own_byte_level(description: dict[str, Any], control: dict[str, int]) -> bool:
    """Our split pattern, then bytes; nothing that would change text before or tokens after."""
    model, before = description["model"], description.get("pre_tokenizer") or {}
    if model["type"] != "BPE" or description.get("normalizer") is not None or not splitting.is_own(before):
        return False
    split, *others = before["pretokenizers"]
    plain_bytes = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return (
        (split["behavior"], split["invert"]) == ("Isolated", False)
        and len(others) == 1
        and plain_bytes.items() <= others[0].items()
        and not any(model.get(name) for name in (*_OPTIONS, "ignore_merges"))
        and all(token["content"] in control for token in description.get("added_tokens", []))
    )


def _is_as_trained(model: dict[str, Any], library: LibraryTokenizer, control: dict[str, int]) -> bool:
    """The conditions of this module's docstring."""
    vocab, table = model["vocab"], byte_of_character()
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    made = [vocab[left + right] for left, right in merges]
    if not all(first < second for first, second in pairwise(made)):
        return False
    whole = set(table)  # every byte, and what has been merged so far
    for left, right in merges:
        if not {left, right} <= whole:
            return False
        whole.add(left + right)
    plain = vocab.keys() - control.keys()
    return plain == whole and all(len(library.model.tokenize(token)) == 1 for token in plain)


def _suits(text: str) -> bool:
    """Whether the text is Unicode (lone surrogates would silently be replaced) and its white space has bounds."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    probes = text[:: LONG_SPACE // 2]  # a run so long covers two of these in a row; most texts need no further search
    spaces = any(first.isspace() and second.isspace() for first, second in pairwise(probes))
    return not spaces or _LONG_SPACE.search(text) is None


def _threads() -> int:
    """As many as `tokenizers` would use, which obeys these two variables."""
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("false", "off", "no", "n", "f", "0"):
        return 1
    return int(os.environ.get("RAYON_NUM_THREADS") or 0) or os.cpu_count() or 1
