"""Whole texts as an encoder reads them: between the control tokens of the tokenizer's frame, cut to fit."""

from collections.abc import Sequence

from headspring.artifacts import UserError
from headspring.tokenization.tokenizer import Tokenizer


def framed(tokenizer: Tokenizer, texts: Sequence[str], limit: int) -> list[list[int]]:
    """The ids of each text with `tokenizer.frame` around it, at most `limit` tokens in all. What is cut is the text's end.

    Raises `UserError` where the limit leaves no room for text, and for an empty text without a frame.
    """
    before, after = tokenizer.frame
    room = limit - len(before) - len(after)
    if room < 1:
        raise UserError(f"{limit} tokens leave no room for text between {len(before) + len(after)} control tokens")
    rows = [before + ids[:room] + after for ids in tokenizer.encode_batch(texts)]
    if not all(rows):
        raise UserError("an empty text has no embedding: the tokenizer frames it with nothing")
    return rows
