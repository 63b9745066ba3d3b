"""What evaluation files ask, as plain texts, so that the data stage can remove it from the training text."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from headspring.artifacts.errors import UserError
from headspring.line.fingerprint import strings


def evaluation_texts(files: Iterable[Path]) -> list[str]:
    """One text for each row of the JSONL files: all its strings, joined by newlines."""
    return [text for file in files for text in _rows(file)]


def _rows(file: Path) -> Iterator[str]:
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as UTF-8 text ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{number}: not a line of JSON ({error.msg})") from error
        yield "\n".join(strings(row))
