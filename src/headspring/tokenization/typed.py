"""Typed text: a string never yields a control token.

The library marks control tokens as *added* tokens and, by default, cuts them out of any text it encodes, so that a
user who types `<|end|>` ends a turn. Its switch `encode_special_tokens` stops the cutting but not the model: Unigram
and WordPiece look strings up in the vocabulary, and `</s>` is in there. So text is encoded by a *twin* of the
tokenizer whose vocabulary does not hold the control tokens at all. Control ids are placed by name, by the chat
renderer only.

What it gives up: a second copy of the vocabulary in memory (a few MB for 100,000 tokens).
"""

import copy
import json
from typing import Any

import numpy as np
from tokenizers import Tokenizer as LibraryTokenizer

from headspring.tokenization.pieces import BYTE_PIECE


def control_tokens(description: dict[str, Any]) -> dict[str, int]:
    """Special added tokens of a parsed `tokenizer.json`, by id, without the unknown token, which text may yield."""
    unknown = unknown_token(description)
    added = sorted(description.get("added_tokens", []), key=lambda token: token["id"])
    return {token["content"]: token["id"] for token in added if token["special"] and token["content"] != unknown}


def unknown_token(description: dict[str, Any]) -> str | None:
    """The token that stands for what the vocabulary cannot spell, or None."""
    model = description["model"]
    if model["type"] == "Unigram":
        return None if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def plain_twin(description: dict[str, Any], control: dict[str, int]) -> tuple[LibraryTokenizer, np.ndarray | None]:
    """A library tokenizer that cannot produce `control`, and a table from its ids to the real ones (None: the same)."""
    twin = {**description, "model": copy.copy(description["model"])}
    twin.update(post_processor=None, truncation=None, padding=None)
    twin["added_tokens"] = [token for token in description.get("added_tokens", []) if token["content"] not in control]
    if twin["model"]["type"] == "Unigram":
        twin["model"]["vocab"] = _unigram_without(twin["model"], {*control, unknown_token(description)})
    elif set(control) & set(twin["model"]["vocab"]):
        # An ordinary added token that the model lacks would get the first id after as many as the vocabulary has entries, which
        # is another token's where control tokens leave gaps: so it stands in the vocabulary, under its own id.
        added = {token["content"]: token["id"] for token in twin["added_tokens"]}
        vocab = {token: i for token, i in twin["model"]["vocab"].items() if token not in control}
        twin["model"]["vocab"] = {**added, **vocab}
        if twin["model"]["type"] == "BPE":
            twin["model"]["merges"] = [merge for merge in twin["model"]["merges"] if _allowed(merge, control)]
    tokenizer = LibraryTokenizer.from_str(json.dumps(twin))
    return tokenizer, _renumbering(tokenizer, twin["added_tokens"])


def _allowed(merge: list[str] | str, control: dict[str, int]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return not {left, right, left + right} & set(control)


def _unigram_without(model: dict[str, Any], hidden: set[str | None]) -> list[list[Any]]:
    """A Unigram vocabulary in which no control token, nor a typed `<unk>`, can match.

    Ids are positions in a list, so nothing can simply be taken out. Hidden pieces at the end are cut off; any other
    is overwritten by the last piece of the list: of equal pieces the library keeps the later id.
    Byte pieces get a score that no spelling by characters falls below, so that a typed `<0x41>` stays text.
    """
    vocab = [list(piece) for piece in model["vocab"]]
    while vocab and vocab[-1][0] in hidden:
        vocab.pop()
    ordinary = [score for piece, score in vocab if not BYTE_PIECE.fullmatch(piece)]
    lowest = 8 * min(ordinary, default=0.0) - 8
    for piece in vocab:
        if piece[0] in hidden:
            piece[:] = vocab[-1]
        elif model.get("byte_fallback") and BYTE_PIECE.fullmatch(piece[0]):
            piece[1] = lowest
    return vocab


def _renumbering(tokenizer: LibraryTokenizer, added: list[dict[str, Any]]) -> np.ndarray | None:
    """Added tokens that are ordinary words may have moved up to fill the places of the control tokens."""
    moved = {tokenizer.token_to_id(token["content"]): token["id"] for token in added}
    if all(here == there for here, there in moved.items()):
        return None
    table = np.arange(max(tokenizer.get_vocab().values()) + 1)
    for here, there in moved.items():
        table[here] = there
    return table
