"""Aligned multilingual text from translation catalogues: the `.po` files inside installed packages.

Django's wheel, for one, carries about 99 languages of the same messages. Each message becomes one document in each
language, the English original included; the same `metadata.msgid_hash` marks what says the same thing, and is the
group, so that no message is trained on in one language and tested in another.

The parser is ours (40 lines) because provenance needs each translation's byte span, which polib and Babel do not keep.
It reads what GNU gettext defines as the format; fuzzy, obsolete, untranslated and plural entries are left out, for in
a plural entry original and translation are not sentence against sentence.
"""

import ast
import hashlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from headspring.artifacts.errors import UserError
from headspring.text.documents import Document
from headspring.text.sources.base import Profile, Reading, SourceConfig

KEYWORD = re.compile(rb'(msgctxt|msgid_plural|msgid|msgstr(?:\[\d+\])?)\s+(".*")\s*$')


class Entry(NamedTuple):
    """One translated message: the original, its translation, and the bytes [start, end) the translation stands in."""

    msgid: str
    msgstr: str
    context: str
    start: int
    end: int


class Pair(NamedTuple):
    """A sentence in English and in `language`."""

    english: str
    translation: str
    language: str
    msgid_hash: str


class Translations(SourceConfig):
    """Messages of the installed packages' catalogues in all their languages.

    `languages`: only these codes (as the folders write them: de, pt_BR), English is always there. `min_characters`:
    shorter originals (labels, mostly) are left out. Raises `UserError` for a package without catalogues.
    """

    kind: Literal["translations"] = "translations"
    packages: list[str] = Field(default=["django"], min_length=1)
    languages: list[str] | None = None
    min_characters: int = Field(default=20, ge=1)

    def read(self, name: str, reading: Reading) -> Iterator[Document]:
        seen: set[str] = set()
        for where, language, entry in self._entries(reading, name):
            key = msgid_hash(entry)
            place = f"{where}#{key}"
            metadata = {"msgid_hash": key, "msgid": entry.msgid}
            if key not in seen:
                seen.add(key)
                yield Document(entry.msgid, name, "prose", place, language="en", group=key, metadata=metadata)
            if not language.startswith("en"):
                span = (entry.start, entry.end)
                text = entry.msgstr
                yield Document(text, name, "prose", where, *span, language=language, group=key, metadata=metadata)

    def default_profile(self, document: Document) -> Profile:
        return "none"  # a message is one sentence in any language: no published rule applies

    def pairs(self, reading: Reading | None = None) -> Iterator[Pair]:
        """The same messages as pairs of sentences, for tasks and for measures of parity between languages."""
        for _, language, entry in self._entries(reading or Reading(), "translations"):
            if not language.startswith("en"):
                yield Pair(entry.msgid, entry.msgstr, language, msgid_hash(entry))

    def _entries(self, reading: Reading, name: str) -> Iterator[tuple[str, str, Entry]]:
        for package in self.packages:
            catalogues = self._catalogues(package)
            if not catalogues:
                wanted = f" in {', '.join(self.languages)}" if self.languages else ""
                raise UserError(f"translations: no .po catalogue{wanted} in package {package!r}; name another package")
            for file, where, language in catalogues:
                reading.opened(name, where)
                for entry in parse_catalogue(file.read_bytes(), where):
                    if len(entry.msgid) >= self.min_characters:
                        yield where, language, entry

    def _catalogues(self, package: str) -> list[tuple[Path, str, str]]:
        """(file, recorded path, language) of every catalogue, sorted."""
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"translations: package {package!r} is not installed here; pip install {package}")
        root = Path(next(iter(spec.submodule_search_locations)))
        files = sorted(root.rglob("LC_MESSAGES/*.po"), key=lambda file: file.relative_to(root).as_posix())
        found = [(file, f"{package}:{file.relative_to(root).as_posix()}", file.parent.parent.name) for file in files]
        return [item for item in found if self.languages is None or item[2] in self.languages]


def msgid_hash(entry: Entry) -> str:
    """16 hexadecimal digits of the original and its context: the alignment key."""
    return hashlib.blake2b(f"{entry.context}\0{entry.msgid}".encode(), digest_size=8).hexdigest()


def parse_catalogue(content: bytes, name: str) -> Iterator[Entry]:
    """The translated, singular, non-fuzzy entries of a `.po` file in UTF-8. Raises `UserError` with the line."""
    fields: dict[bytes, list[bytes]] = {}
    current, fuzzy, start, end, position = b"", False, 0, 0, 0
    for number, line in enumerate([*content.splitlines(keepends=True), b"\n"], 1):
        stripped = line.strip()
        match = KEYWORD.match(stripped)
        starts_entry = match is not None and match[1] in (b"msgctxt", b"msgid") and b"msgstr" in b" ".join(fields)
        if fields and (not stripped or stripped.startswith(b"#") or starts_entry):
            yield from _entry(fields, fuzzy, start, end, name)
            fields, fuzzy = {}, False
        if match:
            current, fields[match[1]] = match[1], [match[2]]
            start = position if current == b"msgstr" else start
        elif stripped.startswith(b'"') and fields:
            fields[current].append(stripped)
        elif stripped.startswith(b"#,") and b"fuzzy" in stripped:
            fuzzy = True
        elif stripped and not stripped.startswith(b"#"):
            raise UserError(f"{name}: line {number} is not part of a .po catalogue; remove the package from `packages`")
        position += len(line)
        end = position if current == b"msgstr" and stripped else end


def _entry(fields: dict[bytes, list[bytes]], fuzzy: bool, start: int, end: int, name: str) -> Iterator[Entry]:
    if fuzzy or b"msgid_plural" in fields or b"msgid" not in fields or b"msgstr" not in fields:
        return
    try:
        texts = {key: "".join(ast.literal_eval(part.decode()) for part in parts) for key, parts in fields.items()}
    except (UnicodeDecodeError, SyntaxError, ValueError):
        raise UserError(f"{name}: the entry at byte {start} is not valid; remove the package from `packages`") from None
    if texts[b"msgid"] and texts[b"msgstr"]:  # the entry with an empty msgid is the catalogue's header
        yield Entry(texts[b"msgid"], texts[b"msgstr"], texts.get(b"msgctxt", ""), start, end)
