"""Texts to train and compare tokenizers on, without a network: files, or what lies on every machine with Python."""

from collections.abc import Iterable, Iterator

from headspring.artifacts.errors import UserError
from headspring.text.sources import Files, Reading, StandardLibrary, Topics

STANDARD_LIBRARY = "stdlib"
# Modules that `built_in` compares on, and that `read_texts(["stdlib"])` therefore leaves out.
HELD_OUT_MODULES = [
    "argparse",
    "calendar",
    "csv",
    "dataclasses",
    "fractions",
    "json",
    "statistics",
    "textwrap",
    "zipfile",
]
HELD_OUT_TOPICS = 5  # every fifth topic


def read_texts(paths: Iterable[str]) -> Iterator[str]:
    """Texts of files, folders, globs and URLs; the name `stdlib` stands for this Python's own source and topics."""
    names = list(paths)
    if not names:
        raise UserError("no texts: name files or folders, or stdlib for this Python's own source")
    if STANDARD_LIBRARY in names:
        held_out = {f"stdlib:{module}" for module in HELD_OUT_MODULES}
        for document in StandardLibrary().read("code", Reading()):
            if document.path.removesuffix(".py").split("/")[0] not in held_out:
                yield document.text
        yield from (text for i, text in enumerate(_topics()) if i % HELD_OUT_TOPICS)
    files = [name for name in names if name != STANDARD_LIBRARY]
    if files:
        yield from (document.text for document in Files(paths=files).read("files", Reading()))


def built_in() -> dict[str, list[str]]:
    """English, code, numbers, and ten parallel sentences in twelve languages (under the languages' names)."""
    from headspring.tokenization.parallel import PARALLEL

    code = [d.text for d in StandardLibrary(modules=HELD_OUT_MODULES).read("code", Reading())]
    prose = _topics()[::HELD_OUT_TOPICS]
    corpora = {"prose": prose, "code": code, "numbers": numbers()}
    return {name: texts for name, texts in {**corpora, **PARALLEL}.items() if texts}


def numbers() -> list[str]:
    """Integers, decimals, dates, times, versions and hexadecimal, 50 lines of each."""
    lines = []
    for i in range(1, 51):
        n = i * i * 7919
        lines += [
            f"{n}",
            f"{n / 1000:.3f}",
            f"{1950 + i}-{i % 12 + 1:02d}-{i % 28 + 1:02d}",
            f"{i % 24:02d}:{(7 * i) % 60:02d}",
            f"{i % 4}.{i % 13}.{i % 7}",
            f"0x{n:x}",
        ]
    return lines


def continuations(limit: int, count: int = 200) -> list[tuple[str, str]]:
    """(prompt, the word that follows after one space) from held-out English; prompts of at most `limit` characters."""
    pairs = []
    for text in _topics()[::HELD_OUT_TOPICS]:
        words = " ".join(text.split()).split(" ")
        for end in range(20, len(words), 40):
            prompt = " ".join(words[end - 20 : end])[-limit:]
            if words[end].isalpha():
                pairs.append((prompt, words[end]))
    return pairs[:: max(len(pairs) // count, 1)][:count]


def _topics() -> list[str]:
    texts = (document.text for document in Topics().read("prose", Reading()))
    return list(dict.fromkeys(texts))  # some topics have two names
