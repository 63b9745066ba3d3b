"""A conversation becomes ids: control tokens by name, what people wrote as plain text.

With Headspring's own control tokens the layout is `text.chat.render`. A tokenizer that came with another chat template
is rendered through that template with a placeholder in place of every message: what the template itself wrote may
hold control tokens, what stood at a placeholder may not. (Encoding the pieces one by one can differ from encoding the
whole string where a message begins or ends with a space; that is the price of typed text.)
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headspring.artifacts import UserError
from headspring.text import chat
from headspring.tokenization.templates import run_template

if TYPE_CHECKING:
    from headspring.tokenization.tokenizer import Tokenizer

Messages = Sequence[chat.Message | Mapping[str, str]]


@dataclass(frozen=True)
class Rendered:
    """A conversation of n tokens."""

    ids: np.ndarray  # (n,) int64
    trained: np.ndarray  # (n,) bool: what an assistant wrote, and the control token that ends its turn
    message: np.ndarray  # (n,) int64: index of the message, −1 for what belongs to none
    spans: np.ndarray  # (n, 2) int64: bytes of the message's content; empty for the template's tokens

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class _Part:
    ids: np.ndarray
    spans: np.ndarray
    message: int
    trained: np.ndarray


def as_messages(messages: Messages) -> list[chat.Message]:
    """Messages or mappings with `role` and `content` → messages."""
    try:
        return [m if isinstance(m, chat.Message) else chat.Message.model_validate(dict(m)) for m in messages]
    except ValueError as error:
        raise UserError("a message needs a role (system, user or assistant) and a content that is text") from error


def render(tokenizer: "Tokenizer", messages: Messages, add_generation_prompt: bool = False) -> Rendered:
    """The ids of a conversation; `add_generation_prompt` asks for the assistant's next turn."""
    conversation = as_messages(messages)
    if all(token in tokenizer.control for token in (chat.BOS, chat.END, *chat.ROLE_TOKENS.values())):
        return _join(_own_layout(tokenizer, conversation, add_generation_prompt))
    if tokenizer.chat_template is None:
        raise UserError("this tokenizer has neither a chat template nor Headspring's control tokens: it cannot chat")
    return _join(_foreign_layout(tokenizer, conversation, add_generation_prompt))


def _own_layout(tokenizer: "Tokenizer", messages: list[chat.Message], ask: bool) -> list[_Part]:
    parts, index, position = [], -1, 0
    starts = set(chat.ROLE_TOKENS.values())
    for piece in chat.render(messages, ask):
        if isinstance(piece, chat.Control):
            index += piece.token in starts
            position = 0 if piece.token in starts else position
            owner = index if index < len(messages) else -1
            parts.append(_controls([tokenizer.control[piece.token]], owner, position, piece.trained))
        else:
            ids, spans = tokenizer.encode_with_spans(piece.text)
            position = len(piece.text.encode())
            parts.append(_Part(ids, spans, index, np.full(len(ids), piece.trained)))
    return parts


def _foreign_layout(tokenizer: "Tokenizer", messages: list[chat.Message], ask: bool) -> list[_Part]:
    parts: list[_Part] = []
    previous = -1
    for fragment, index in fragments(tokenizer, messages, ask):
        if fragment:
            ids = tokenizer.library.encode(fragment, add_special_tokens=False).ids
            trained = np.zeros(len(ids), bool)
            if previous >= 0 and messages[previous].role == "assistant":
                ends = [i for i, token in enumerate(ids) if token in tokenizer.control_ids]
                trained[: ends[0] + 1 if ends else 0] = True
            parts.append(_Part(np.asarray(ids, np.int64), np.zeros((len(ids), 2), np.int64), -1, trained))
        if index >= 0:
            ids_array, spans = tokenizer.encode_with_spans(messages[index].content)
            assistant = messages[index].role == "assistant"
            parts.append(_Part(ids_array, spans, index, np.full(len(ids_array), assistant)))
        previous = index
    return parts


def fragments(
    tokenizer: "Tokenizer", messages: Sequence[Any], ask: bool, tools: Sequence[Any] | None = None
) -> list[tuple[str, int]]:
    """What the tokenizer's own template writes, as (text before, index of the message that follows or −1).

    Messages have `role` and `content`, and perhaps `more`: a mapping with what else the template reads. A message that is
    empty but for that has no place of its own. `tools` are for templates that know any."""
    mark = secrets.token_hex(8)
    marked = [
        {"role": m.role, "content": "" if _is_bare(m) else f"{mark}:{i}:{mark}", **getattr(m, "more", {})}
        for i, m in enumerate(messages)
    ]
    rest = _apply_template(tokenizer, marked, ask, tools)
    found = []
    while f"{mark}:" in rest:
        before, _, rest = rest.partition(f"{mark}:")
        number, _, rest = rest.partition(f":{mark}")
        found.append((before, int(number)))
    missing = {i for i, m in enumerate(messages) if not _is_bare(m)} - {index for _, index in found}
    if missing:
        first = min(missing)
        raise UserError(f"the tokenizer's chat template leaves out message {first} ({messages[first].role})")
    return [*found, (rest, -1)]


def _is_bare(message: Any) -> bool:
    return not message.content and bool(getattr(message, "more", None))


def _apply_template(
    tokenizer: "Tokenizer", messages: list[dict[str, Any]], ask: bool, tools: Sequence[Any] | None = None
) -> str:
    names: dict[str, Any] = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token or ""}
    if tools is not None:
        names["tools"] = list(tools)
    return run_template(tokenizer.chat_template or "", {"messages": messages, "add_generation_prompt": ask, **names})


def _controls(ids: list[int], message: int, position: int, trained: bool) -> _Part:
    spans = np.full((len(ids), 2), position, np.int64)
    return _Part(np.asarray(ids, np.int64), spans, message, np.full(len(ids), trained))


def _join(parts: list[_Part]) -> Rendered:
    return Rendered(
        ids=np.concatenate([part.ids for part in parts]),
        trained=np.concatenate([part.trained for part in parts]),
        message=np.concatenate([np.full(len(part.ids), part.message, np.int64) for part in parts]),
        spans=np.concatenate([part.spans for part in parts]),
    )
