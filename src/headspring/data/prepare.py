"""The data stage: from sources to one table of documents in which everything that was decided is written down.

    sources ─ read ─ mask ─ language ─ clean ─┬─ exact ─ MinHash + Jaccard ─ split ─ decontaminate ─ documents.parquet
                     (asked)  (asked)  scores │            clusters           hash     train only        report.json
                                              └─ staged on disk, with every removed document

One pass reads and scores; the later steps work on hashes and look single texts up again. The order is FineWeb's, with
the split before decontamination because only training text is compared with the tests. Everything is deterministic:
same files, same config, same seed, same table.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from headspring.artifacts.errors import UserError
from headspring.artifacts.files import write_json
from headspring.artifacts.progress import task, track
from headspring.artifacts.value import Value
from headspring.data.cleaning import bounds_of, clean, score_columns
from headspring.data.data_report import REPORT, make_report
from headspring.data.decontamination import Contamination, DecontaminationConfig, EvaluationIndex, quote
from headspring.data.deduplication import (
    Cluster,
    DeduplicationConfig,
    UnionFind,
    band_keys,
    content_hash,
    near_duplicates,
    similarity,
)
from headspring.data.language import RULE as LANGUAGE
from headspring.data.language import LanguageConfig, check_languages, declared, identify
from headspring.data.ledger import Ledger
from headspring.data.privacy import Mask, mask
from headspring.data.splitting import SplitConfig, assign_splits, smallest_working_fraction
from headspring.data.staging import Decisions, Staging
from headspring.data.store import KEEP, Row
from headspring.data.word_hashes import BATCH_BYTES, batches
from headspring.text.documents import Document
from headspring.text.sources import Docstrings, Reading, Source, SourceConfig, StandardLibrary, Topics
from headspring.text.sources.base import Generate, Profile

CONTAMINATED = "contaminated"
EMBEDDED: dict[str, Source] = {"stdlib": StandardLibrary(), "topics": Topics(), "docstrings": Docstrings()}


class DataConfig(Value):
    """Where text comes from and what is done to it.

    `sources` maps a name to a source. A path or a list of paths, in place of the mapping or of one source, stands for
    `files` of that name. The default is the embedded corpus: the standard library, its topics, and docstrings.
    `mask` names what to replace by placeholders: email, ip, key.
    """

    sources: dict[str, Source] = Field(default_factory=lambda: dict(EMBEDDED), min_length=1)
    mask: list[Mask] = Field(default_factory=list)
    languages: LanguageConfig = LanguageConfig()
    deduplication: DeduplicationConfig = DeduplicationConfig()
    decontamination: DecontaminationConfig = DecontaminationConfig()
    split: SplitConfig = SplitConfig()

    @model_validator(mode="before")
    @classmethod
    def _paths_are_files(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "sources" not in value:
            return value
        sources = value["sources"]
        if _is_paths(sources):
            sources = {"files": sources}
        if isinstance(sources, dict):
            sources = {name: _as_files(source) if _is_paths(source) else source for name, source in sources.items()}
        return value | {"sources": sources}


def prepare(
    config: DataConfig,
    folder: Path,
    evaluation_texts: Iterable[str] = (),
    generate: Generate | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Read, clean, deduplicate, split and decontaminate; writes `documents.parquet` and `report.json` into `folder`.

    `evaluation_texts`: everything that later evaluations ask, to be kept out of training. `generate` (prompts → texts)
    serves synthetic sources that want a model. Returns the report's totals. Raises `UserError` for missing or
    unreadable input, for an empty corpus, when the rules leave nothing, and for a split that comes out empty."""
    folder = Path(folder)
    reading = Reading(seed=seed, generate=generate)
    with Staging(folder, [*score_columns(config.sources), *([LANGUAGE] if config.languages.keep else [])]) as staging:
        kept = _read(config, reading, staging)
        _check_not_empty(kept.ledger, config)
        clusters = _deduplicate(kept, staging, config.deduplication)
        splits = _split(kept, clusters, config.split, seed)
        contamination = _decontaminate(kept, splits, staging, config.decontamination, evaluation_texts)
        decisions = _decisions(kept.ledger, splits)
        staging.write(folder, decisions)
        report = make_report(kept.ledger, decisions, clusters, contamination, reading, staging, list(config.sources))
    write_json(folder / REPORT, report)
    return report["totals"]


@dataclass
class _Kept:
    """What reading leaves in memory: the ledger, and hashes of the documents that passed the rules."""

    ledger: Ledger = field(default_factory=Ledger)
    first: dict[bytes, int] = field(default_factory=dict)  # content hash → first document that has it
    copies: list[tuple[int, int]] = field(default_factory=list)  # (document, the first one equal to it)
    distinct: list[int] = field(default_factory=list)  # documents with band keys
    keys: list[np.ndarray] = field(default_factory=list)  # of `distinct`, in blocks of rows


def _read(config: DataConfig, reading: Reading, staging: Staging) -> _Kept:
    check_languages(config.languages)
    bounds = {
        (name, profile): bounds_of(source, profile, name)
        for name, source in config.sources.items()
        for profile in ("prose", "web", "docstring", "code", "none")
    }
    kept, waiting = _Kept(), _Waiting(config.deduplication)
    with task("read and clean documents") as progress:
        for name, source in config.sources.items():
            for document in _documents(name, source, reading):
                bytes_read = len(document.text.encode("utf-8", "surrogatepass"))
                profile: Profile = source.profile or source.default_profile(document)
                row = _judge(document, profile, bounds[name, profile], config, reading)
                index = kept.ledger.add(row, bytes_read)
                staging.append(row)
                if row.kept:
                    _remember(kept, waiting, index, row.document.text)
                progress.advance()
    waiting.flush(kept)
    staging.seal()
    return kept


def _documents(name: str, source: SourceConfig, reading: Reading) -> Iterable[Document]:
    for number, document in enumerate(source.read(name, reading)):
        if source.max_documents is not None and number >= source.max_documents:
            return
        yield document


def _judge(document: Document, profile: Profile, bounds: dict[str, Any], config: DataConfig, reading: Reading) -> Row:
    """The document's row after masking, language identification and the rules of its profile."""
    if config.mask:
        text, counts = mask(document.text, config.mask)
        for kind, count in counts.items():
            reading.count(document.source, f"masked_{kind}", count)
        document = replace(document, text=text, verbatim=False) if counts else document
    scores: dict[str, float] = {}
    foreign = ""
    if config.languages.keep and document.kind == "prose":
        language, scores[LANGUAGE] = declared(document.language) or identify(document.text)
        document = replace(document, language=document.language or language)
        if language not in config.languages.keep:
            foreign = f"language {language}, kept are {', '.join(config.languages.keep)}"
        elif scores[LANGUAGE] < config.languages.threshold:
            foreign = f"language {language} {scores[LANGUAGE]:.3g} < {config.languages.threshold:g}"
    verdict = clean(document, profile, bounds)
    if verdict.text != document.text:
        document = replace(document, text=verdict.text, verbatim=False)
    decision = LANGUAGE if foreign else verdict.decision
    return Row(document, None, decision or KEEP, foreign or verdict.reason, scores=scores | verdict.scores)


class _Waiting:
    """Distinct documents whose band keys are computed together, once there is enough text."""

    def __init__(self, config: DeduplicationConfig):
        self.config = config
        self.documents: list[int] = []
        self.texts: list[str] = []
        self.characters = 0

    def add(self, index: int, text: str) -> None:
        self.documents.append(index)
        self.texts.append(text)
        self.characters += len(text)

    def flush(self, kept: _Kept) -> None:
        keys, has_words = band_keys(self.texts, self.config)
        kept.keys.append(keys[has_words])
        kept.distinct += [index for index, any_word in zip(self.documents, has_words.tolist(), strict=True) if any_word]
        self.documents, self.texts, self.characters = [], [], 0


def _remember(kept: _Kept, waiting: _Waiting, index: int, text: str) -> None:
    first = kept.first.setdefault(content_hash(text), index)
    if first != index:
        kept.copies.append((index, first))
        return
    waiting.add(index, text)
    if waiting.characters >= BATCH_BYTES:
        waiting.flush(kept)


def _deduplicate(kept: _Kept, staging: Staging, config: DeduplicationConfig) -> list[Cluster]:
    """All clusters of equal and nearly equal documents; marks the removed ones in the ledger."""
    keys = np.concatenate(kept.keys)
    with task("compare near-duplicates", config.bands) as progress:
        near = near_duplicates(keys, lambda i: staging.text(kept.distinct[i]), config, progress.advance)
    groups = UnionFind(len(kept.ledger))
    for document, first in kept.copies:
        groups.union(document, first)
    for cluster in near:
        for member in cluster.members[1:]:
            groups.union(kept.distinct[member], kept.distinct[cluster.survivor])
    clusters = [Cluster(members) for members in groups.sets()]
    first_of = dict(kept.copies)
    for cluster in clusters:
        _remove_copies(cluster, first_of, kept.ledger, staging, config)
    return clusters


def _remove_copies(
    cluster: Cluster, first_of: dict[int, int], ledger: Ledger, staging: Staging, config: DeduplicationConfig
) -> None:
    survivor = cluster.survivor
    for member in cluster.members:
        ledger.cluster[member] = ledger.id[survivor]
        original = first_of.get(member, member)
        if config.near and original != survivor:
            share = similarity(staging.text(member), staging.text(survivor), config)
            reason = f"Jaccard {share:.2f} with {staging.value('path', survivor)}"
            ledger.remove(member, "near_duplicate", reason, ledger.id[survivor])
        elif config.exact and original != member:
            ledger.remove(member, "exact_duplicate", f"same as {staging.value('path', original)}", ledger.id[original])


def _split(kept: _Kept, clusters: list[Cluster], config: SplitConfig, seed: int) -> list[str]:
    """The split of every document, kept or not. Raises `UserError` for a split that nothing fell into."""
    groups = kept.ledger.group
    splits = assign_splits(groups, clusters, seed, config)
    filled = {split for split, decision in zip(splits, kept.ledger.decision, strict=True) if decision == KEEP}
    for name, fraction in (("validation", config.validation), ("test", config.test), ("train", 1.0)):
        if fraction and name not in filled:
            survivors = [i for i, decision in enumerate(kept.ledger.decision) if decision == KEEP]
            number = len({groups[i] for i in survivors})
            better = smallest_working_fraction(groups, clusters, survivors, seed)
            advice = f"set data.split.validation={better} data.split.test={better}" if better else "add documents"
            raise UserError(f"the {name} split came out empty: {number} files or groups are too few for it; {advice}")
    return splits


def _decontaminate(
    kept: _Kept, splits: list[str], staging: Staging, config: DecontaminationConfig, texts: Iterable[str]
) -> Contamination:
    """Remove what quotes the evaluation texts from training."""
    contamination = Contamination(EvaluationIndex.build(texts if config.enabled else (), config))
    if not contamination.index.grams:
        return contamination
    ledger = kept.ledger
    train = [i for i in range(len(ledger)) if ledger.decision[i] == KEEP and splits[i] == "train"]
    for batch in track(list(batches([ledger.bytes[i] for i in train])), "decontaminate"):
        documents = [train[position] for position in batch]
        contamination.add(documents, [staging.text(i) for i in documents])
    for document, (n, gram) in contamination.contaminated().items():
        ledger.remove(document, CONTAMINATED, f"shares {n} words: {quote(staging.text(document), n, gram)}")
    if not any(ledger.decision[i] == KEEP for i in train):
        raise UserError("every training document quotes the evaluation texts; choose other sources or evaluations")
    return contamination


def _decisions(ledger: Ledger, splits: list[str]) -> Decisions:
    kept = [decision == KEEP for decision in ledger.decision]
    final = [split if is_kept else None for split, is_kept in zip(splits, kept, strict=True)]
    return Decisions(final, ledger.decision, ledger.reason, ledger.cluster, ledger.survivor)


def _check_not_empty(ledger: Ledger, config: DataConfig) -> None:
    if not len(ledger):
        raise UserError(f"the corpus is empty: no documents in {', '.join(config.sources)}; check data.sources")
    if KEEP not in ledger.decision:
        rule, count = ledger.most_frequent_decision()
        advice = "give files with text in them" if rule == "empty" else "set `profile: none` on the source to keep all"
        raise UserError(f"the cleaning rules removed all {len(ledger)} documents, {count} of them by {rule}; {advice}")


def _is_paths(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(item, str | Path) for item in values)


def _as_files(paths: Any) -> dict[str, Any]:
    return {"kind": "files", "paths": [str(path) for path in (paths if isinstance(paths, list) else [paths])]}
