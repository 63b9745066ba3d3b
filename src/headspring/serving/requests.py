"""The bodies that clients send: OpenAI's fields by their names, and ours beside them. An unknown field is refused.

Fields that OpenAI has and we cannot honour are not here, so that they are refused too. What a field means for the tokens is
said once, in `SamplingParams`; bounds that depend on the server are in `Limits` and checked in `sampling.py` of this room.
"""

from typing import Any, Literal

from pydantic import Field

from headspring.artifacts.value import Value
from headspring.inference.inspection import Ablate, Lens, Patch, Steer
from headspring.inference.structured import Structured


class StreamOptions(Value):
    include_usage: bool = Field(False, description="a last chunk with the token counts of the request")


class Asked(Value):
    """What every request for text may say."""

    model: str = Field(max_length=256)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(None, description="token id → added to its logit, −100 … 100")
    seed: int | None = Field(None, ge=0, lt=2**63)
    n: int | None = Field(None, ge=1)
    best_of: int | None = Field(None, ge=1)
    beam_width: int | None = Field(None, ge=1)
    length_penalty: float | None = Field(None, ge=-100, le=100)
    early_stopping: bool | Literal["never"] | None = None
    stop: str | tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool | None = None
    structured: Structured | None = None
    timeout: float | None = Field(None, gt=0, description="seconds for the whole request")
    user: str | None = Field(None, max_length=256, description="requests of different users share no cached prefix")
    capture: tuple[str, ...] | None = Field(None, description="sites whose activations are returned")
    lens: Lens | None = None
    patch: tuple[Patch, ...] | None = None
    ablate: tuple[Ablate, ...] | None = None
    steer: tuple[Steer, ...] | None = None


class CompletionRequest(Asked):
    """`prompt`: a text, token ids, or several of either."""

    prompt: str | tuple[int, ...] | tuple[str, ...] | tuple[tuple[int, ...], ...]
    logprobs: int | None = Field(None, ge=0)
    prompt_logprobs: int | None = Field(None, ge=0)
    echo: bool = False


class TextPart(Value):
    type: Literal["text"]
    text: str


class ImageUrl(Value):
    url: str = Field(description="data:image/png;base64,… or data:image/jpeg;base64,…; nothing is ever fetched")
    detail: Literal["auto"] | None = None


class ImagePart(Value):
    type: Literal["image_url"]
    image_url: ImageUrl


class Audio(Value):
    data: str = Field(description="base64")
    format: Literal["wav"]


class AudioPart(Value):
    type: Literal["input_audio"]
    input_audio: Audio


class Called(Value):
    name: str
    arguments: str = Field(description="JSON")


class ToolCall(Value):
    id: str
    type: Literal["function"] = "function"
    function: Called


class ChatMessage(Value):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | tuple[TextPart | ImagePart | AudioPart, ...] | None = None
    name: str | None = Field(None, max_length=64, description="of the tool that answers; a name for a person is refused")
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_call_id: str | None = Field(None, max_length=64)


class Function(Value):
    name: str = Field(pattern="^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Value):
    type: Literal["function"]
    function: Function


class ChosenFunction(Value):
    name: str


class ChosenTool(Value):
    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(Value):
    name: str = Field(max_length=64)
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = Field(None, description="answers always keep to the schema")


class ResponseFormat(Value):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Asked):
    messages: tuple[ChatMessage, ...] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    response_format: ResponseFormat | None = None
    tools: tuple[Tool, ...] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None


class EmbeddingRequest(Value):
    model: str = Field(max_length=256)
    input: str | tuple[str, ...]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="of the vectors; only the model's own number")
    user: str | None = Field(None, max_length=256, description="embeddings share nothing, so that this changes nothing")


class TokenizeRequest(Value):
    """Either `text` or `messages`."""

    model: str = Field(max_length=256)
    text: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    add_bos: bool = Field(False, description="with the token that a prompt begins with")


class DetokenizeRequest(Value):
    model: str = Field(max_length=256)
    tokens: tuple[int, ...]


def field_names() -> set[str]:
    """The names of all fields that a body may have somewhere in it."""
    values = [one for one in globals().values() if isinstance(one, type) and issubclass(one, Value)]
    return {field.alias or name for value in values for name, field in value.model_fields.items()}
