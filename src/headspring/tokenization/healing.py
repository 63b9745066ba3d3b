"""The seam between a prompt and its continuation.

A prompt's last token was chosen without knowing what follows. "The answer is " ends in a token for the space alone,
yet in training almost every word came with its space in front; so the model has hardly ever seen what it is asked to
do. *Token healing* backs up over the last token and lets the model choose again among all tokens that begin with the
bytes taken back. (Idea: the `guidance` project.) Heal only where the text's end is arbitrary: a prompt that was cut
inside a word is healed into any word that begins so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headspring.artifacts import UserError
from headspring.tokenization.tokenizer import Tokenizer


def heal(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> tuple[list[int], bytes]:
    """(ids without the last token, its bytes), or (all ids, b"") where healing could change nothing.

    The first token generated must then be one of `tokenizer.ids_with_prefix(prefix)`, the old last token among them.
    Nothing is taken back where the last token is a control token, the only token, or begins no longer one; nor for a
    vocabulary that does not store spaces (WordPiece).
    """
    ids = [int(i) for i in prompt_ids]
    if len(ids) < 2 or ids[-1] in tokenizer.control_ids or not tokenizer.spells_bytes:
        return ids, b""
    prefix = tokenizer.token_bytes(ids[-1])
    if len(tokenizer.ids_with_prefix(prefix)) < 2:
        return ids, b""
    return ids[:-1], prefix


@dataclass(frozen=True)
class TrailingSpace:
    """Natural log-probabilities of right continuations, means over `pairs` prompts."""

    pairs: int
    clean: float  # " word" after "prompt"
    spaced: float  # "word" after "prompt "
    drop: float  # clean − spaced, what the space costs; nats a continuation
    hurt: float  # share of prompts where it costs something
    healable: float  # share where healing takes the space back; the healed score is at least `clean`


def trailing_space_sensitivity(lm: Any, pairs: Sequence[tuple[str, str]]) -> TrailingSpace:
    """How much a language model loses when a prompt ends with a space.

    `lm` has `tokenizer`, `prompt_ids(text)` and `logprobs(rows of ids)` (`inference.LanguageModel`).
    `pairs`: (prompt without a space at its end, the word that follows it). Raises `UserError` where there are none.
    """
    if not pairs:
        raise UserError("no prompts to measure the sensitivity to a trailing space on")
    tokenizer = lm.tokenizer
    rows, lengths, healable = [], [], []
    for prompt, word in pairs:
        for before, after in ((prompt, " " + word), (prompt + " ", word)):
            continuation = tokenizer.encode(after)
            rows.append(lm.prompt_ids(before) + continuation)
            lengths.append(len(continuation))
        prefix = heal(tokenizer, lm.prompt_ids(prompt + " "))[1]
        healable.append(prefix.endswith(b" "))
    totals = np.array([float(row[-n:].sum()) for row, n in zip(lm.logprobs(rows), lengths)])
    clean, spaced = totals[0::2], totals[1::2]
    drop = clean - spaced
    return TrailingSpace(
        pairs=len(pairs),
        clean=float(clean.mean()),
        spaced=float(spaced.mean()),
        drop=float(drop.mean()),
        hurt=float((drop > 0).mean()),
        healable=float(np.mean(healable)),
    )
