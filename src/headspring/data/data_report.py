"""The data stage's report: what was read, what each rule took away with examples, and sums that must come out.

The books balance for each source, in documents and in bytes:

    read = kept + removed by each rule + edited away      (`conserved` checks it; a report that does not is a defect)

"Edited away" is what masks and line rules took out of documents that stayed, counted on its own line; it is negative
where placeholders are longer than what they replaced.
"""

from collections import Counter
from hashlib import sha256
from typing import Any

from headspring.data.decontamination import Contamination
from headspring.data.deduplication import Cluster
from headspring.data.ledger import Ledger
from headspring.data.staging import Decisions, Staging
from headspring.data.store import KEEP, SPLITS
from headspring.text.sources import Reading

REPORT = "report.json"
EXAMPLES = 3
EXAMPLE_CHARACTERS = 240
LARGEST_CLUSTERS = 8
CLUSTER_MEMBERS = 6

Amount = dict[str, int]


def make_report(
    ledger: Ledger,
    decisions: Decisions,
    clusters: list[Cluster],
    contamination: Contamination,
    reading: Reading,
    staging: Staging,
    names: list[str],
) -> dict[str, Any]:
    """The report as a JSON value; see the keys below."""
    sources = {name: _source(name, ledger, reading) for name in names}
    for index, decision in enumerate(ledger.decision):
        source = sources[ledger.source[index]]
        _add(source["read"], ledger.bytes_read[index])
        if decision == KEEP:
            _add(source["kept"], ledger.bytes[index])
            source["edited_away_bytes"] += ledger.bytes_read[index] - ledger.bytes[index]
        else:
            removed = source["removed"].setdefault(decision, {"documents": 0, "bytes": 0, "examples": []})
            _add(removed, ledger.bytes_read[index])
            if len(removed["examples"]) < EXAMPLES:
                removed["examples"].append(_example(index, ledger, staging))
    splits = _splits(ledger, decisions)
    identity = corpus_hash(ledger, decisions)
    report = {
        "corpus_hash": identity,
        "totals": _totals(sources, splits, ledger) | {"corpus_hash": identity},
        "sources": sources,
        "splits": splits,
        "duplicates": _duplicates(clusters, ledger, staging),
        "contamination": _contamination(contamination, ledger),
        "conservation": conservation(sources),
        "mixture": _mixture(ledger, decisions, names),
    }
    assert conserved(report), "the report's books do not balance"
    return report


def conservation(sources: dict[str, Any]) -> list[dict[str, Any]]:
    """One line for each source: documents and bytes in, and where each of them went."""
    lines = []
    for name, source in sources.items():
        for unit in ("documents", "bytes"):
            line = {"source": name, "unit": unit, "read": source["read"][unit], "kept": source["kept"][unit]}
            line["removed"] = {rule: amount[unit] for rule, amount in source["removed"].items()}
            line["edited_away"] = source["edited_away_bytes"] if unit == "bytes" else 0
            lines.append(line)
    return lines


def conserved(report: dict[str, Any]) -> bool:
    """Whether every line of the conservation table sums exactly, and the splits sum to what was kept."""
    lines = report["conservation"]
    balanced = all(line["read"] == line["kept"] + sum(line["removed"].values()) + line["edited_away"] for line in lines)
    for unit in ("documents", "bytes"):
        kept = sum(line["kept"] for line in lines if line["unit"] == unit)
        balanced &= kept == sum(amount[unit] for amount in report["splits"].values())
    return balanced


def corpus_hash(ledger: Ledger, decisions: Decisions) -> str:
    """SHA-256 of the kept documents' ids and splits in order: equal corpora have equal hashes on any machine."""
    digest = sha256()
    for identity, split in zip(ledger.id, decisions.split, strict=True):
        if split is not None:
            digest.update(f"{identity} {split}\n".encode())
    return digest.hexdigest()


def _source(name: str, ledger: Ledger, reading: Reading) -> dict[str, Any]:
    return {
        "read": {"documents": 0, "bytes": 0},
        "kept": {"documents": 0, "bytes": 0},
        "removed": {},
        "edited_away_bytes": 0,
        "files": len(reading.files.get(name, ())),
        "notes": dict(sorted(reading.counts.get(name, Counter()).items())),
    }


def _splits(ledger: Ledger, decisions: Decisions) -> dict[str, Amount]:
    splits: dict[str, Amount] = {split: {"documents": 0, "bytes": 0} for split in SPLITS}
    for split, size in zip(decisions.split, ledger.bytes, strict=True):
        if split is not None:
            _add(splits[split], size)
    return splits


def _totals(sources: dict[str, Any], splits: dict[str, Amount], ledger: Ledger) -> dict[str, Any]:
    """The stage's metrics: what went in, what came out."""
    totals: dict[str, Any] = {}
    for word in ("read", "kept"):
        for unit in ("documents", "bytes"):
            totals[f"{unit}_{word}"] = sum(source[word][unit] for source in sources.values())
    counts = Counter(ledger.decision)
    totals["removed_duplicates"] = counts["exact_duplicate"] + counts["near_duplicate"]
    totals["removed_contaminated"] = counts["contaminated"]
    rules = totals["documents_read"] - totals["documents_kept"] - totals["removed_duplicates"]
    totals["removed_by_rules"] = rules - totals["removed_contaminated"]
    return totals | {f"{split}_{unit}": amount[unit] for split, amount in splits.items() for unit in amount}


def _duplicates(clusters: list[Cluster], ledger: Ledger, staging: Staging) -> dict[str, Any]:
    largest = sorted(clusters, key=lambda cluster: (-len(cluster.members), cluster.survivor))[:LARGEST_CLUSTERS]
    counts = Counter(ledger.decision)
    return {
        "clusters": len(clusters),
        "exact_removed": counts["exact_duplicate"],
        "near_removed": counts["near_duplicate"],
        "largest": [
            {
                "size": len(cluster.members),
                "members": [staging.value("path", index) for index in cluster.members[:CLUSTER_MEMBERS]],
                "text": staging.text(cluster.survivor)[:EXAMPLE_CHARACTERS],
            }
            for cluster in largest
        ],
    }


def _contamination(contamination: Contamination, ledger: Ledger) -> dict[str, int]:
    index = contamination.index
    return {
        "evaluation_texts": index.texts,
        "evaluation_texts_too_short": index.too_short,
        "ngram_words": index.config.ngram_words,
        "ngrams": sum(len(grams) for grams in index.grams.values()),
        "boilerplate_ngrams_ignored": contamination.boilerplate,
        "documents_removed": ledger.decision.count("contaminated"),
    }


def _mixture(ledger: Ledger, decisions: Decisions, names: list[str]) -> dict[str, Any]:
    """Training bytes by source as a tree: the mixture in which the corpus itself stands, before any weights."""
    sizes = dict.fromkeys(names, 0)
    for source, split, size in zip(ledger.source, decisions.split, ledger.bytes, strict=True):
        sizes[source] += size if split == "train" else 0
    total = sum(sizes.values())
    children = [{"name": name, "bytes": size, "share": size / total if total else 0.0} for name, size in sizes.items()]
    return {"name": "corpus", "bytes": total, "share": 1.0, "children": children}


def _example(index: int, ledger: Ledger, staging: Staging) -> dict[str, str]:
    return {
        "id": ledger.id[index],
        "path": staging.value("path", index),
        "reason": ledger.reason[index],
        "text": staging.text(index)[:EXAMPLE_CHARACTERS],
    }


def _add(amount: dict[str, Any], size: int) -> None:
    amount["documents"] += 1
    amount["bytes"] += size
