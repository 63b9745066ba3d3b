"""What a client wrote → the ids that a model reads, in a worker's thread. Text stays typed: no message forges a control token.

A conversation becomes ids through `text.chat` or, for a tokenizer that came with another template, through that template in the
sandbox of `tokenization.rendering`, with a mark in place of every message. What stands at the marks is encoded here, part by
part: text as plain text, a picture or sound as its tower's placeholders.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from headspring.inference import LanguageModel
from headspring.inference.inspection import Inspection
from headspring.inference.sampling import SamplingParams
from headspring.inference.structured import compile_structured
from headspring.models import EncoderDecoder
from headspring.serving import media, tools
from headspring.serving.config import Limits
from headspring.serving.errors import ApiError, refuse
from headspring.serving.requests import ChatMessage, ChatRequest, CompletionRequest, TextPart, TokenizeRequest
from headspring.serving.sampling import inspection_of, params_of
from headspring.serving.served import Served
from headspring.text import chat
from headspring.tokenization import rendering
from headspring.tokenization.tokenizer import Tokenizer

Items = Mapping[str, torch.Tensor]  # (1, N, …) float32 by tower


@dataclass(frozen=True)
class Prepared:
    """One prompt, ready for the engine. `source` is what an encoder reads; `items` what towers look at."""

    prompt: list[int]
    params: SamplingParams
    source: list[int] = field(default_factory=list)
    items: Items = field(default_factory=dict)
    inspection: Inspection | None = None

    @property
    def read(self) -> list[int]:
        """What the client's words became."""
        return self.source or self.prompt


def prepare_completion(served: Served, body: CompletionRequest) -> list[Prepared]:
    """A `Prepared` for each prompt. Raises `ApiError` or `UserError`."""
    lm, limits = served.lm, served.limits
    prompts = _prompts(body.prompt)
    if len(prompts) > limits.prompts:
        raise ApiError(400, f"prompt: {len(prompts)} prompts, and this server allows {limits.prompts}", "limit", "prompt")
    made = []
    for prompt in prompts:
        ids = list(prompt) if not isinstance(prompt, str) else lm.prompt_ids(bounded(lm, prompt))
        made.append(_prepared(served, body, ids))
    if sum(one.params.answers for one in made) > limits.all_answers:
        raise ApiError(400, f"prompt and n ask for more than {limits.all_answers} answers together", "limit", "n")
    return made


def prepare_chat(served: Served, body: ChatRequest) -> list[Prepared]:
    """One `Prepared`. Raises `ApiError` or `UserError`."""
    lm, limits = served.lm, served.limits
    if len(body.messages) > limits.messages:
        raise ApiError(400, f"messages: {len(body.messages)}, and this server allows {limits.messages}", "limit", "messages")
    ids, items = chat_ids(lm, body.messages, limits, tools.offered(lm.tokenizer, body, limits))
    return [_prepared(served, tools.constrained(body), ids, items)]


def tokenize(served: Served, body: TokenizeRequest) -> list[int]:
    """The ids of a text or a conversation."""
    if (body.text is None) == (body.messages is None):
        raise refuse("give either text or messages", "text")
    if body.messages is not None:
        if body.add_bos:
            raise refuse("a conversation begins as its template says; leave add_bos out", "add_bos")
        return chat_ids(served.lm, body.messages, served.limits)[0]
    text, tokenizer = bounded(served.lm, body.text or ""), served.lm.tokenizer
    bos = [tokenizer.bos_id] if body.add_bos and tokenizer.bos_id is not None else []
    return bos + tokenizer.encode(text)


def count_tokens(served: Served, texts: Sequence[str]) -> list[int]:
    """How many tokens of each text an embedding reads."""
    return [min(len(served.lm.tokenizer.encode(text)), served.lm.context) for text in texts]


def _prepared(served: Served, body: CompletionRequest | ChatRequest, ids: list[int], items: Items | None = None) -> Prepared:
    lm, limits = served.lm, served.limits
    source: list[int] = []
    if isinstance(value := lm.model.config, EncoderDecoder):
        source, ids = ids, [value.start]
    if not ids:
        raise refuse("the prompt is empty, and the tokenizer has nothing to begin with; give a token", "prompt")
    params = params_of(body, limits, served.context - len(ids))
    if params.structured is not None:
        compile_structured(params.structured, lm.tokenizer)  # here and not in the engine's thread; it remembers
    return Prepared(ids, params, source, items or {}, inspection_of(body, limits))


def _prompts(prompt: Any) -> Sequence[str | Sequence[int]]:
    """One text or one row of ids is one prompt."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise refuse("prompt is an empty list", "prompt")
    return prompt


def bounded(lm: LanguageModel, text: str) -> str:
    """`text`, if it can fit the context at all: no token has more bytes than the longest, so that this needs no tokenizing."""
    if lm.tokenizer.scheme.exact and len(text) > lm.context * longest_token(lm.tokenizer):
        raise refuse(f"a text of {len(text)} characters is longer than the context of {lm.context} tokens; shorten it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise refuse("a text has half a surrogate pair, which is no character") from None
    return text


def longest_token(tokenizer: Tokenizer) -> int:
    """Bytes of the longest token."""
    return max(1, int(tokenizer._lengths.max(initial=1)))


def chat_ids(
    lm: LanguageModel, messages: Sequence[ChatMessage], limits: Limits, offered: tools.Offered | None = None
) -> tuple[list[int], Items]:
    """The conversation up to where the assistant's next turn begins, and the items that its placeholders stand for."""
    sink = media.Sink(lm.model.config, limits)
    ids: list[int] = []
    for piece in _pieces(lm.tokenizer, messages, offered):
        if isinstance(piece, int):
            ids += _content(lm, messages[piece], sink)
        else:
            ids += piece
    return ids, sink.items()


def _content(lm: LanguageModel, message: ChatMessage, sink: media.Sink) -> list[int]:
    if not isinstance(message.content, tuple):
        return _encoded(lm, message.content or "")
    ids: list[int] = []
    for part in message.content:
        ids += _encoded(lm, part.text) if isinstance(part, TextPart) else sink.add(part)
    return ids


def _encoded(lm: LanguageModel, text: str) -> list[int]:
    return lm.tokenizer.encode_with_spans(bounded(lm, text))[0].tolist()


def _pieces(tokenizer: Tokenizer, messages: Sequence[ChatMessage], offered: tools.Offered | None) -> Iterator[list[int] | int]:
    """Ids that the layout writes, and the number of the message whose content stands between them."""
    if all(token in tokenizer.control for token in (chat.BOS, chat.END, *chat.ROLE_TOKENS.values())):
        yield from _own_pieces(tokenizer, messages)
        return
    if tokenizer.chat_template is None:
        raise refuse("this model has no chat template: it cannot chat; use /v1/completions", "messages")
    turns = [tools.turn(tokenizer, message) for message in messages]
    for fragment, index in rendering.fragments(tokenizer, turns, True, offered.described if offered else None):
        yield tokenizer.library.encode(fragment, add_special_tokens=False).ids if fragment else []
        if index >= 0:
            yield index


def _own_pieces(tokenizer: Tokenizer, messages: Sequence[ChatMessage]) -> Iterator[list[int] | int]:
    plain = []
    for message in messages:
        if message.role == "tool" or message.tool_calls:
            raise refuse("this model's chat layout has no tools", "messages")
        if message.name is not None or message.tool_call_id is not None:
            raise refuse("this model's chat layout has neither names nor tools", "messages")
        if message.content is None:
            raise refuse(f"a message of role {message.role} needs content", "messages")
        plain.append(chat.Message(role="system" if message.role == "developer" else message.role, content=""))
    index = 0
    for piece in chat.render(plain, add_generation_prompt=True):
        if isinstance(piece, chat.Control):
            yield [tokenizer.control[piece.token]]
        else:
            yield index
            index += 1
