"""What a server may be asked for, and how much of it: every bound that stands between a client and this machine.

The defaults are those of a server that strangers can reach. A request beyond one of them is refused with a line that names
the bound; none is cut down in silence.
"""

from typing import Literal

from pydantic import Field

from headspring.artifacts import UserError
from headspring.artifacts.value import Value

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Limits(Value):
    """The most that one request may hold, take or wait for. Bytes, counts and seconds."""

    header_bytes: int = Field(16 << 10, gt=0, description="of all request headers together")
    body_bytes: int = Field(4 << 20, gt=0)
    body_seconds: float = Field(30.0, gt=0, description="until a whole body has come")
    json_depth: int = Field(32, gt=0, description="arrays and objects inside each other")
    json_brackets: int = Field(100_000, gt=0, description="arrays and objects in all")
    messages: int = Field(1024, gt=0)
    tools: int = Field(64, gt=0)
    media: int = Field(8, ge=0, description="pictures and sounds")
    pixels: int = Field(16 << 20, gt=0, description="of one picture, before it is decoded")
    prompts: int = Field(16, gt=0, description="prompts of one completion request")
    texts: int = Field(256, gt=0, description="texts of one embedding request")
    answers: int = Field(16, gt=0, description="n, best_of and beam_width, for each prompt")
    all_answers: int = Field(64, gt=0, description="prompts × answers")
    max_tokens: int = Field(1 << 20, gt=0, description="new tokens; the model's context bounds them too")
    logprobs: int = Field(20, ge=0)
    stop: int = Field(16, ge=0, description="stop strings and stop ids, each")
    stop_bytes: int = Field(256, gt=0, description="of one stop string")
    logit_bias: int = Field(1024, ge=0, description="entries")
    schema_bytes: int = Field(64 << 10, gt=0, description="of a schema, regex, grammar or list of choices")
    edits: int = Field(64, ge=0, description="sites that one request reads or changes")
    edit_numbers: int = Field(1 << 18, gt=0, description="numbers in the vectors of a request's edits")
    capture_bytes: int = Field(8 << 20, gt=0, description="of all activations that one answer returns")
    seconds: float = Field(600.0, gt=0, description="a request's whole time, and the default of `timeout`")
    worker_seconds: float = Field(10.0, gt=0, description="tokenizing, templates, grammars, pictures")
    lag: int = Field(4096, gt=0, description="tokens that a reader of a stream may be behind")
    reader_seconds: float = Field(30.0, gt=0, description="one write to a reader who does not read")


class ServerConfig(Value):
    """Where a server listens, whom it lets in, and how much it takes on."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free one")
    keys: tuple[str, ...] = Field((), repr=False, description="bearer keys; none lets everybody on this machine in")
    allowed_hosts: tuple[str, ...] = Field((), description="names under which clients may reach it, beside addresses")
    allowed_origins: tuple[str, ...] = Field((), description="web pages of other origins that may ask; none by default")
    isolate: Literal["key", "none"] = Field("key", description="who shares cached prefixes: one key's requests, or all")
    max_queue: int = Field(256, ge=1, description="requests that wait, of each model; then 429")
    max_open: int = Field(1024, gt=0, description="HTTP requests under way; then 429")
    workers: int = Field(2, gt=0, description="threads for tokenizing, templates and grammars")
    worker_queue: int = Field(64, gt=0, description="requests that wait for such a thread; then 429")
    drain_seconds: float = Field(30.0, ge=0, description="what runs may still finish for this long after SIGTERM")
    limits: Limits = Limits()

    def check(self) -> None:
        """Raise `UserError` where the server would be open to a network without a key."""
        if self.host not in LOOPBACK and not self.keys:
            raise UserError(
                f"host {self.host} can be reached from other machines: give a key (--key-file FILE, or HEADSPRING_API_KEY)"
            )
        if any(len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key for key in self.keys):
            raise UserError("a key must be at least 16 characters of ASCII without spaces; `openssl rand -hex 32` makes one")
