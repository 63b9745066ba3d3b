"""Chat messages, and the one layout in which a conversation becomes tokens.

The rendering is typed: a conversation becomes a list of pieces, each either the *name of a control token* or a *string
that a user or a model wrote*. The tokenizer encodes strings as plain text, so that no message can forge a turn.
The same layout is also given as a Jinja template, for the ecosystem's `tokenizer_config.json`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from headspring.artifacts.value import Value

Role = Literal["system", "user", "assistant"]

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
CONTROL_TOKENS = (PAD, BOS, EOS, SYSTEM, USER, ASSISTANT, END)
MASK = "<|mask|>"  # stands for a hidden token; only in vocabularies made for encoders
SENTINEL = "<|span_{}|>"  # stands for a span that was taken out; only in vocabularies made for encoder–decoders
ROLE_TOKENS: dict[str, str] = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}


class Message(Value):
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Control:
    """A piece that is exactly one control token."""

    token: str
    trained: bool = False


@dataclass(frozen=True)
class Text:
    """A piece somebody wrote; encoded as plain text whatever it contains."""

    text: str
    trained: bool = False


Piece = Control | Text


def render(messages: Sequence[Message], add_generation_prompt: bool = False) -> list[Piece]:
    """`<|bos|>` then for every message `<|role|> content <|end|>`.

    What an assistant writes, and the `<|end|>` that stops it, is `trained`; the rest is not.
    With `add_generation_prompt` a final `<|assistant|>` asks for the next answer.
    """
    pieces: list[Piece] = [Control(BOS)]
    for message in messages:
        trained = message.role == "assistant"
        pieces += [Control(ROLE_TOKENS[message.role]), Text(message.content, trained), Control(END, trained)]
    if add_generation_prompt:
        pieces.append(Control(ASSISTANT))
    return pieces


JINJA_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
