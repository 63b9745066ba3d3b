"""The data stage's report as a funnel: what was read, what each rule took away, what was kept, where it went."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from headspring.line.report.reading import number

EXAMPLES = 3
EXAMPLE_CHARACTERS = 300
CLUSTERS = 8


@dataclass(frozen=True)
class Amount:
    """A number of documents and of bytes, and the share of all bytes read."""

    documents: int
    bytes: int
    share: float = 0.0


@dataclass(frozen=True)
class Removal:
    rule: str
    amount: Amount
    examples: list[str]


@dataclass(frozen=True)
class Source:
    name: str
    read: Amount
    kept: Amount


@dataclass(frozen=True)
class Cluster:
    size: int
    members: list[str]
    text: str


@dataclass(frozen=True)
class Funnel:
    read: Amount
    removed: list[Removal]
    kept: Amount
    sources: list[Source]
    splits: list[tuple[str, Amount]]
    edited_away_bytes: int
    clusters: int
    cluster_examples: list[Cluster]
    contamination: dict[str, int]
    corpus_hash: str


def funnel(report: dict[str, Any]) -> Funnel | None:
    """The view of a data stage's `report.json`, or None where the stage did not run."""
    sources = report.get("sources") or {}
    if not sources:
        return None
    whole = sum(_amount(source.get("read")).bytes for source in sources.values())
    read = _sum([source.get("read") for source in sources.values()], whole)
    kept = _sum([source.get("kept") for source in sources.values()], whole)
    duplicates = report.get("duplicates") or {}
    return Funnel(
        read,
        removals(sources, whole),
        kept,
        [Source(name, _amount(value.get("read"), whole), _amount(value.get("kept"), whole)) for name, value in sources.items()],
        [(split, _amount(value, kept.bytes)) for split, value in (report.get("splits") or {}).items()],
        sum(int(source.get("edited_away_bytes") or 0) for source in sources.values()),
        int(number(duplicates.get("clusters")) or 0),
        [Cluster(**cluster) for cluster in (duplicates.get("largest") or [])[:CLUSTERS]],
        report.get("contamination") or {},
        str(report.get("corpus_hash") or ""),
    )


def removals(sources: dict[str, Any], whole: int) -> list[Removal]:
    """What each rule removed over all sources, the most bytes first."""
    documents: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for source in sources.values():
        for rule, removed in (source.get("removed") or {}).items():
            amount = _amount(removed)
            documents[rule] += amount.documents
            sizes[rule] += amount.bytes
            examples.setdefault(rule, []).extend(_example(each) for each in removed.get("examples") or [])
    share = {rule: size / whole if whole else 0.0 for rule, size in sizes.items()}
    order = sorted(documents, key=lambda rule: (-sizes[rule], rule))
    return [Removal(rule, Amount(documents[rule], sizes[rule], share[rule]), examples[rule][:EXAMPLES]) for rule in order]


def _example(value: Any) -> str:
    """Where an example comes from and why it went, above the start of its text."""
    head = " · ".join(value[key] for key in ("path", "reason") if value.get(key))
    return f"{head}\n{value['text']}"[:EXAMPLE_CHARACTERS]


def _amount(value: Any, whole: int = 0) -> Amount:
    value = value if isinstance(value, dict) else {}
    size = int(number(value.get("bytes")) or 0)
    return Amount(int(number(value.get("documents")) or 0), size, size / whole if whole else 0.0)


def _sum(values: list[Any], whole: int) -> Amount:
    amounts = [_amount(value) for value in values]
    size = sum(amount.bytes for amount in amounts)
    return Amount(sum(amount.documents for amount in amounts), size, size / whole if whole else 0.0)
