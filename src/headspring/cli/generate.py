"""`headspring generate` and `headspring chat`: ask a model from the terminal.

Both are thin: options become `SamplingParams`, text comes from `LanguageModel`. torch is imported only once a command
runs, so that `headspring --help` stays quick.
"""

import json
import sys
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headspring.artifacts.errors import UserError

if TYPE_CHECKING:
    from headspring.inference import LanguageModel

Model = Annotated[str, typer.Argument(help="A run (its last model stage), a stage's or HF folder, a .gguf file or a hub name.")]
MaxTokens = Annotated[int, typer.Option(help="At most this many new tokens.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the most likely token; 1 is the model's own spread.")]
TopK = Annotated[int | None, typer.Option(help="Choose among the k most likely tokens.")]
TopP = Annotated[float, typer.Option(help="Choose among the fewest tokens that hold this much probability.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less than this times as likely as the best.")]
Penalty = Annotated[float, typer.Option(help="Above 1: tokens seen before become less likely.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this string; may be given several times.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Quantize = Annotated[
    str, typer.Option(help="int8, int4, int4-gptq…; keep: a .gguf file's blocks; none: floats; auto: keep where fast.")
]
Adapter = Annotated[str | None, typer.Option(help="Folder of a LoRA adapter for this model.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub name.")]
SAMPLING = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
HIDDEN = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def register(app: typer.Typer) -> None:
    """Add both verbs to the command line."""
    app.command("generate", epilog='Example: headspring generate runs/quickstart --prompt "def add(a, b):"')(generate)
    app.command("chat", epilog="Example: headspring chat runs/quickstart --temperature 0")(chat)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue; - reads it from standard input.")],
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    n: Annotated[int, typer.Option("--n", help="Answers to the same prompt.")] = 1,
    logprobs: Annotated[int | None, typer.Option(help="With --json: this many most likely tokens a step.")] = None,
    stream: Annotated[bool, typer.Option(help="Print the text while it is made.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print text, ids and speed as JSON.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = "auto",
    revision: Revision = None,
    adapter: Adapter = None,
) -> None:
    """Continue a prompt."""
    if logprobs is not None and not as_json:
        raise UserError("--logprobs needs --json to show them")
    options = _sampling(locals())
    text = _read_stdin() if prompt == "-" else prompt
    lm = _load(model, device, dtype, quantize, revision, adapter)
    if as_json:
        report = _report(lm, model, text, n=n, logprobs=logprobs, **options)
        typer.echo(json.dumps(report, ensure_ascii=False, indent=2))
    elif stream and n == 1:
        _show(lm.stream(text, **options))
    else:
        for answer in lm.generate(text, n=n, **options):
            typer.echo(answer.text)


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="A system message that opens the conversation.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.7,
    top_k: TopK = None,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = "auto",
    revision: Revision = None,
    adapter: Adapter = None,
) -> None:
    """Talk with a model, a line a turn. /reset starts again, /quit (or the end of input) leaves."""
    options = _sampling(locals())
    lm = _load(model, device, dtype, quantize, revision, adapter)
    if lm.is_base:
        _note("this is a base model, never trained on conversations: expect a continuation, not an answer")
        warnings.simplefilter("ignore")
    _note("/reset starts again, /quit leaves")
    messages = opening = [{"role": "system", "content": system}] if system else []
    for line in _lines():
        if line == "/quit":
            return
        if line == "/reset":
            messages = opening
            _note("a new conversation")
        elif line.startswith("/"):
            _note(f"{line.split()[0]}: unknown; there are /reset and /quit")
        else:
            messages = _fit(lm, [*messages, {"role": "user", "content": line}], max_tokens)
            answer = _show(lm.chat_stream(messages, **options))
            messages = [*messages, {"role": "assistant", "content": answer}]


def _sampling(given: dict[str, Any]) -> dict[str, Any]:
    """Of a verb's arguments, those of `SamplingParams`; checked before a model is loaded."""
    from headspring.inference.sampling import SamplingParams

    options = {name: given[name] for name in SAMPLING} | {"stop": tuple(given["stop"] or ())}
    SamplingParams.of(**options)
    return options


def _load(model: str, device: str, dtype: str, quantize: str, revision: str | None, adapter: str | None) -> "LanguageModel":
    from headspring.inference import LanguageModel

    how = None if quantize == "none" else quantize
    lm = LanguageModel.load(model, device=device, dtype=dtype, quantize=how, revision=revision)
    return lm if adapter is None else lm.with_adapter(adapter)


def _report(lm: "LanguageModel", model: str, prompt: str, **options: Any) -> dict[str, Any]:
    """What --json prints. Speed counts everything between prompt and answer."""
    start = time.perf_counter()
    answers = lm.generate(prompt, **options)
    seconds = time.perf_counter() - start
    tokens = sum(len(answer.token_ids) for answer in answers)
    return {
        "model": model,
        "prompt": prompt,
        "generations": [
            {
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                "token_ids": answer.token_ids,
                "logprobs": answer.logprobs,
                **({} if answer.top_logprobs is None else {"top_logprobs": answer.top_logprobs}),
            }
            for answer in answers
        ],
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


def _show(pieces: Iterator[str]) -> str:
    """Print pieces as they come; Ctrl-C ends the answer and keeps what there is. Returns the text.

    A terminal obeys control characters, so there a model's are shown as U+FFFD; a pipe gets the exact text."""
    text, terminal = "", sys.stdout.isatty()
    try:
        for piece in pieces:
            text += piece
            print(piece.translate(HIDDEN) if terminal else piece, end="", flush=True)
    except KeyboardInterrupt:
        _note("[interrupted]")
    print()
    return text


def _fit(lm: "LanguageModel", messages: list[dict[str, str]], max_tokens: int) -> list[dict[str, str]]:
    """The conversation without its oldest turns, where it would leave no room for an answer: the smaller of
    `max_tokens` and half the context. A system message and the last question stay."""
    room = min(max_tokens, lm.context // 2)
    dropped = 0
    while len(lm.chat_ids(messages)) + room > lm.context:
        oldest = next(i for i, message in enumerate(messages) if message["role"] != "system")
        if len(messages) - oldest < 3:
            break
        messages = messages[:oldest] + messages[oldest + 2 :]
        dropped += 1
    if dropped:
        _note(f"the context of {lm.context} tokens is full: the oldest {dropped} turns are forgotten")
    return messages


def _lines() -> Iterator[str]:
    """Lines that are not empty, from the terminal or a pipe, until the input ends."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            return
        except UnicodeDecodeError as error:
            raise UserError("standard input is not UTF-8 text") from error
        if line:
            yield line


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text (byte {error.start})") from error


def _note(text: str) -> None:
    """To the person, not into the answer."""
    print(text, file=sys.stderr, flush=True)
