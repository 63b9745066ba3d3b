"""Tools, for models whose chat template has them as Hermes and Qwen do: `<tool_call>{"name", "arguments"}</tool_call>`.

    tools → into the template · the answer's text → tool calls · tool_choice → a structure that the answer must have

What a tool's definition says goes through the template as JSON, so it must not spell a control token; one that does is refused.
Calls are found by plain search and read with `json.loads`: no regular expression meets a model's output. With `tool_choice:
"required"` or a named tool the answer is constrained to calls by a JSON schema, so that it always parses; with "auto" what
does not parse stays text. Other layouts of tool calls (Llama's, Mistral's) are refused rather than guessed.
"""

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

from headspring.inference.structured import Structured
from headspring.serving.config import Limits
from headspring.serving.errors import ApiError, refuse
from headspring.serving.requests import ChatMessage, ChatRequest, ChosenTool
from headspring.tokenization.tokenizer import Tokenizer

BEGIN, END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Offered:
    """`described`: the tools as the template gets them."""

    described: list[dict[str, Any]]


@dataclass
class Turn:
    """A message for `rendering.fragments`: its role, whether it has content, and what else its template reads."""

    role: str
    content: str
    more: dict[str, Any] = field(default_factory=dict)


def offered(tokenizer: Tokenizer, body: ChatRequest, limits: Limits) -> Offered | None:
    """The tools of a request, where its model can have any. Raises `ApiError`."""
    if not body.tools:
        if body.tools is not None or body.tool_choice not in (None, "none") or body.parallel_tool_calls is not None:
            raise refuse("tool_choice and parallel_tool_calls need tools, and tools must not be empty", "tools")
        return None
    if len(body.tools) > limits.tools:
        raise ApiError(400, f"tools: {len(body.tools)}, and this server allows {limits.tools}", "limit", "tools")
    if not takes_tools(tokenizer):
        raise refuse("this model's chat template has no tools", "tools")
    if any(tool.function.strict for tool in body.tools) and not forced(body):
        raise refuse("strict tools need tool_choice 'required' or a named tool, which constrain the answer", "tools")
    if isinstance(body.tool_choice, ChosenTool) and body.tool_choice.function.name not in names(body):
        raise refuse(f"tool_choice names {body.tool_choice.function.name!r}, which is none of the tools", "tool_choice")
    if body.tool_choice == "none":
        return None
    return Offered(spelled(tokenizer, [tool.model_dump(exclude_none=True) for tool in body.tools]))


def takes_tools(tokenizer: Tokenizer) -> bool:
    template = tokenizer.chat_template or ""
    return "tools" in template and BEGIN in template


def names(body: ChatRequest) -> list[str]:
    return [tool.function.name for tool in body.tools or ()]


def forced(body: ChatRequest) -> bool:
    """Whether the answer must be a call."""
    return body.tool_choice == "required" or isinstance(body.tool_choice, ChosenTool)


def spelled(tokenizer: Tokenizer, value: Any) -> Any:
    """`value`, which a template will write as text. Raises `ApiError` where that would spell a control token."""
    text = json.dumps(value, ensure_ascii=False)
    found = next((token for token in tokenizer.control if token in text), None)
    if found is not None:
        raise refuse(f"tools and tool calls may not hold the control token {found}", "tools")
    return value


def turn(tokenizer: Tokenizer, message: ChatMessage) -> Turn:
    """A message as the template sees it: its content is a mark, the rest is there."""
    more: dict[str, Any] = {}
    if message.tool_calls:
        if message.role != "assistant":
            raise refuse("tool_calls belong to an assistant's message", "messages")
        calls = [{"name": call.function.name, "arguments": _arguments(call.function.arguments)} for call in message.tool_calls]
        more["tool_calls"] = spelled(tokenizer, [{"type": "function", "function": call} for call in calls])
    if (message.role == "tool" or more) and not takes_tools(tokenizer):
        raise refuse("this model's chat template has no tools", "messages")
    if (message.role == "tool") != (message.tool_call_id is not None):
        raise refuse("tool_call_id belongs to a message of role tool, and that needs it", "messages")
    if message.name is not None:
        if message.role != "tool":
            raise refuse("a name of a person is not supported; write it into the content", "messages")
        more["name"] = spelled(tokenizer, message.name)
    if message.content is None and not more.get("tool_calls"):
        raise refuse(f"a message of role {message.role} needs content", "messages")
    return Turn("system" if message.role == "developer" else message.role, "x" if message.content else "", more)


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise refuse("the arguments of a tool call are JSON", "messages") from None


def constrained(body: ChatRequest) -> ChatRequest:
    """The request with the structure that its tool_choice asks for."""
    if not body.tools or not forced(body):
        return body
    if body.structured is not None or (body.response_format is not None and body.response_format.type != "text"):
        raise refuse("an answer that must be a tool call has its structure from the tools; leave the other out", "tool_choice")
    chosen = body.tool_choice.function.name if isinstance(body.tool_choice, ChosenTool) else None
    wanted = [tool.function for tool in body.tools or () if chosen in (None, tool.function.name)]
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": one.name}, "arguments": one.parameters or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for one in wanted
    ]
    return body.model_copy(update={"structured": Structured(json_schema=calls[0] if len(calls) == 1 else {"anyOf": calls})})


class Calls:
    """Reads an answer's text as it comes: what is certainly no call is given on, calls are kept."""

    def __init__(self, body: ChatRequest):
        self.active = bool(body.tools) and body.tool_choice != "none"
        self.forced = self.active and forced(body)
        self.names = names(body)
        self.one = body.parallel_tool_calls is False
        self._text = ""

    def push(self, text: str) -> str:
        """What may be shown now."""
        if not self.active:
            return text
        self._text += text
        if self.forced:
            return ""
        begin = self._text.find(BEGIN)
        end = begin if begin >= 0 else len(self._text) - _open_end(self._text)
        shown, self._text = self._text[:end], self._text[end:]
        return shown

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """The rest of the text, and the calls in it."""
        text, self._text = self._text, ""
        if self.forced:
            call = self._call(text)
            return (text, []) if call is None else ("", [call])
        calls: list[dict[str, Any]] = []
        rest: list[str] = []
        while text:
            before, begin, after = text.partition(BEGIN)
            inside, end, text = after.partition(END)
            call = self._call(inside) if begin and not (self.one and calls) else None
            rest.append(before)
            if call is not None:
                calls.append(call)
            elif begin:
                rest.append(begin + inside + end)
        left = "".join(rest)
        return ("" if calls and not left.strip() else left), calls

    def _call(self, text: str) -> dict[str, Any] | None:
        try:
            said = json.loads(text)
            name, arguments = said["name"], said["arguments"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if name not in self.names:
            return None
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _open_end(text: str) -> int:
    """How many of the last characters could begin a call."""
    return next((n for n in range(min(len(BEGIN) - 1, len(text)), 0, -1) if text.endswith(BEGIN[:n])), 0)
