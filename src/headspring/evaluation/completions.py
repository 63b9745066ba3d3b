"""Does generated code parse? A model continues the header of a function it has never seen, and `ast` judges.

The prompt is a held-out module up to the colon of a `def …:` line. It stops before the line break, because a tokenizer
may join that with the indentation below: a prompt that ends in half a token asks for text that no document holds. Of the
continuation, what counts is the function's body: the lines until the first one that is not indented deeper than the
`def` (blank lines and comments do not end it), or the first line where code follows the colon at once.
Where the tokens ran out before such a line, the last statement of the body is unfinished through no fault of the model:
the last line at the body's own indentation, with all below it, is taken off (lines that begin with a closing bracket or
`else`, `elif`, `except`, `finally`, `case` belong to the line above). If nothing is left, the sample is undecided and
does not count. The rest, behind its header, must be accepted by `ast.parse`. An empty body does not parse.
"""

import ast
import random
import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headspring.text.documents import Document

HEADER = re.compile(r"^([ \t]*)(?:async )?def \w+\([^\n]*\)(?: *->[^\n]*)?:(?=[ \t]*\n)", re.MULTILINE)
CONTINUES = re.compile(r"[\])}]|(?:else|elif|except|finally|case)\b")


@dataclass(frozen=True)
class Header:
    """The end of a `def` line in a held-out module."""

    document_id: str
    prompt: str  # the module up to and including the colon
    line: str  # the last line of that, with its indentation


def headers(documents: Sequence[Document], number: int, seed: int = 0) -> list[Header]:
    """At most `number` headers, spread over the documents: no second one of a module before each module gave one."""
    ordered = []
    for document in documents:
        if document.kind == "code":
            found = list(HEADER.finditer(document.text))
            random.Random(f"{seed}:{document.id}").shuffle(found)
            ordered += [(turn, document.id, document, match) for turn, match in enumerate(found)]
    ordered.sort(key=lambda entry: entry[:2])
    return [Header(document.id, document.text[: match.end()], match.group()) for _, _, document, match in ordered[:number]]


def complete(lm: Any, prompts: Sequence[str], max_tokens: int, batch_size: int = 64) -> list[tuple[str, bool]]:
    """(continuation, finished by itself) of each prompt, greedy. The model reads a prompt's last half context."""
    room = max(1, min(lm.context // 2, lm.context - max_tokens))
    rows = [lm.prompt_ids(_last_lines(prompt, 16 * room)) for prompt in prompts]
    first = 0 if lm.tokenizer.bos_id is None else 1
    rows = [row if len(row) <= room else [*row[:first], *row[len(row) - room + first :]] for row in rows]
    generations = (
        lm.generate(rows, max_tokens=max_tokens, temperature=0.0, batch_size=batch_size, progress="completing code")
        if rows
        else []
    )
    return [(generation.text, generation.finish_reason == "stop") for generation in generations]


def _last_lines(text: str, characters: int) -> str:
    """The end of `text` from the beginning of a line: more than the model will read, less than a whole module."""
    return text if len(text) <= characters else text[text.find("\n", len(text) - characters) + 1 :]


def body_of(continuation: str, header: str, finished: bool) -> str | None:
    """The body as the module docstring defines it, from behind the colon on; None where the sample is undecided."""
    same_line, line_break, rest = continuation.partition("\n")
    if _is_code(same_line):  # def f(): return 1
        return same_line if line_break or finished else None
    below = _lines_of_body(rest, _depth(header), finished)
    return None if below is None else f"{same_line}\n{below}"


def _lines_of_body(text: str, depth: int, finished: bool) -> str | None:
    lines = text.split("\n")
    end = next((i for i, line in enumerate(lines) if _is_code(line) and _depth(line) <= depth), None)
    if end is not None or finished:
        return "\n".join(lines[:end]).rstrip("\n")
    inner = next((_depth(line) for line in lines if _is_code(line)), None)
    starts = [
        i for i, line in enumerate(lines) if _is_code(line) and _depth(line) == inner and not CONTINUES.match(line.strip())
    ]
    kept = lines[: starts[-1]] if starts else []
    return "\n".join(kept).rstrip("\n") if any(map(_is_code, kept)) else None


def parses(header: str, body: str) -> bool:
    """Whether header and body together are one Python function."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(textwrap.dedent(header) + _shift(body, header))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return len(tree.body) == 1


def _shift(body: str, header: str) -> str:
    """The body moved left by as much as the header is."""
    margin = header[: len(header) - len(header.lstrip())]
    return "\n".join(line.removeprefix(margin) for line in body.split("\n"))


def _is_code(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _depth(line: str) -> int:
    expanded = line.expandtabs(8)
    return len(expanded) - len(expanded.lstrip())
