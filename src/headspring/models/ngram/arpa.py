"""ARPA files, the text format in which n-gram models have been exchanged since the 1990s (SRILM, KenLM).

    \\data\\          ngram 1=…
    \\1-grams:       log10 p <tab> words <tab> log10 weight
    \\end\\

What the file holds is what `backoff.Table` holds, so that writing and reading give the same model to the last digit that a
float64 has in text. A token is written as its text where that is one word without spaces, else as `<n>`, its id; the
reader takes the words back through the same vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from headspring.artifacts.errors import CorruptArtifact, UserError
from headspring.artifacts.files import open_atomic
from headspring.models.ngram.backoff import Table

ZERO = -99.0  # what stands for log10 of 0 in such files


def write_arpa(tables: Sequence[Table], words: Sequence[str], path: Path) -> None:
    """Write tables with `words[id]` for each token. Raises `UserError` for words that the format cannot hold apart."""
    if len(set(words)) != len(words) or any(not word or word.split() != [word] for word in words):
        raise UserError("an ARPA file needs a word without spaces for each token, all different; see `arpa_words`")
    with open_atomic(path) as file:
        file.writelines(line.encode() for line in _file(tables, words))


def arpa_words(token_bytes: Sequence[bytes]) -> list[str]:
    """A word for each token: its text where that is one word and no other token's, else `<id>`."""
    texts = [raw.decode("utf-8", errors="replace") for raw in token_bytes]
    counts: dict[str, int] = {}
    for text in texts:
        counts[text] = counts.get(text, 0) + 1

    def plain(text: str) -> bool:
        return counts[text] == 1 and text.split() == [text] and "\ufffd" not in text and not text.startswith("<")

    return [text if plain(text) else f"<{token}>" for token, text in enumerate(texts)]


def read_arpa(path: Path, words: Sequence[str]) -> list[Table]:
    """The tables of a file, for a vocabulary in which `words[id]` is a token.

    A word of the file that is not in `words` is refused, a token that the file lacks gets the probability of `<unk>`, or 0.
    Raises `CorruptArtifact` for what is not an ARPA file, `UserError` for unknown words."""
    ids = {word: token for token, word in enumerate(words)}
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as an ARPA file ({error})") from error
    sections = _sections(text, path)
    tables: list[Table] = []
    for n, lines in enumerate(sections, start=1):
        tables.append(_table(n, lines, tables, ids, path))
    return tables


def _file(tables: Sequence[Table], words: Sequence[str]) -> Iterator[str]:
    yield "\\data\\\n"
    yield from (f"ngram {n}={len(table.keys)}\n" for n, table in enumerate(tables, start=1))
    names: list[str] = []
    for n, table in enumerate(tables, start=1):
        names = _names(table, names, words)
        yield f"\n\\{n}-grams:\n"
        yield from _lines(table, names, last=n == len(tables))
    yield "\n\\end\\\n"


def _names(table: Table, shorter: list[str], words: Sequence[str]) -> list[str]:
    if not shorter:
        return [words[token] for token in table.keys]
    vocab = len(words)
    return [f"{shorter[key // vocab]} {words[key % vocab]}" for key in table.keys.tolist()]


def _lines(table: Table, names: Sequence[str], last: bool) -> Iterator[str]:
    for name, p, weight in zip(names, table.probabilities.tolist(), table.weights.tolist(), strict=True):
        ending = "" if last or weight == 1.0 else f"\t{math.log10(weight)!r}"
        yield f"{math.log10(p) if p > 0 else ZERO!r}\t{name}{ending}\n"


def _sections(text: str, path: Path) -> list[list[str]]:
    """The lines of each order, whose number is what the header says."""
    lines = [line.strip() for line in text.splitlines()]
    if "\\data\\" not in lines or "\\end\\" not in lines:
        raise CorruptArtifact(f"{path}: not a whole ARPA file (\\data\\ … \\end\\)")
    body = lines[lines.index("\\data\\") + 1 : lines.index("\\end\\")]
    wanted = [int(line.partition("=")[2]) for line in body if line.startswith("ngram ") and line.partition("=")[2].isdigit()]
    sections: list[list[str]] = []
    for line in body:
        if line.startswith("\\") and line.endswith("-grams:"):
            sections.append([])
        elif line and sections:
            sections[-1].append(line)
    found = [len(section) for section in sections]
    if not wanted or found != wanted:
        raise CorruptArtifact(f"{path}: its header promises {wanted} n-grams, the sections hold {found}")
    return sections


def _table(n: int, lines: Sequence[str], below: Sequence[Table], ids: dict[str, int], path: Path) -> Table:
    vocab = len(ids)
    grams, probabilities, weights, unknown = [], [], [], None
    for line in lines:
        fields = line.split()
        try:
            p, weight = float(fields[0]), float(fields[n + 1]) if len(fields) == n + 2 else 0.0
            if len(fields) not in (n + 1, n + 2):
                raise ValueError("wrong number of words")
        except (ValueError, IndexError) as error:
            raise CorruptArtifact(f"{path}: {line[:60]!r} is not a {n}-gram ({error})") from error
        p = 0.0 if p <= ZERO else 10.0**p
        if fields[1 : n + 1] == ["<unk>"] and "<unk>" not in ids:
            unknown = p
            continue
        missing = [word for word in fields[1 : n + 1] if word not in ids]
        if missing:
            raise UserError(f"{path}: the word {missing[0]!r} is not in the vocabulary of {vocab} tokens")
        grams.append([ids[word] for word in fields[1 : n + 1]])
        probabilities.append(p)
        weights.append(10.0**weight)
    if n == 1:
        return _unigrams(grams, probabilities, weights, unknown or 0.0, vocab)
    keys = _keys(np.array(grams, dtype=np.int64).reshape(-1, n), below, vocab, path)
    order = np.argsort(keys, kind="stable")
    return Table(keys[order], np.array(probabilities)[order], np.array(weights)[order])


def _unigrams(grams, probabilities, weights, unknown: float, vocab: int) -> Table:
    table = Table(np.arange(vocab), np.full(vocab, unknown), np.ones(vocab))
    tokens = np.array(grams, dtype=np.int64).reshape(-1)
    table.probabilities[tokens], table.weights[tokens] = probabilities, weights
    return table


def _keys(grams: np.ndarray, below: Sequence[Table], vocab: int, path: Path) -> np.ndarray:
    """Keys of n-grams (N, n), through the tables of the lower orders."""
    number = grams[:, 0]
    for column, table in enumerate(below[1:], start=1):
        wanted = number * vocab + grams[:, column]
        place = np.minimum(np.searchsorted(table.keys, wanted), max(len(table.keys) - 1, 0))
        if len(wanted) and (not len(table.keys) or (table.keys[place] != wanted).any()):
            raise CorruptArtifact(f"{path}: a {grams.shape[1]}-gram whose first words are no {column + 1}-gram of the file")
        number = place
    return number * vocab + grams[:, -1]
