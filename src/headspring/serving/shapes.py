"""What answers look like, for the OpenAPI description: `replies` makes them, and the tests hold the two together."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Shape(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class ErrorBody(Shape):
    message: str
    type: str
    param: str | None
    code: str


class Error(Shape):
    error: ErrorBody


class State(Shape):
    status: str


class Model(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context: int
    answers: bool
    parent: str | None  # the model that it is an adapter of


class Models(Shape):
    object: Literal["list"]
    data: list[Model]


class Usage(Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(Shape):
    text: str
    index: int
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"] | None


class Completions(Shape):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatAnswer(Shape):
    role: Literal["assistant"]
    content: str | None


class ChatChoice(Shape):
    index: int
    message: ChatAnswer
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class Chat(Shape):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Embedding(Shape):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Shape):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Shape):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokens(Shape):
    tokens: list[int]
    pieces: list[str]
    count: int
    context: int


class Text(Shape):
    text: str
