"""Cleaning, deduplication and tokenizing against the obvious peers, in turns, in megabytes of text per second and core.

    python benchmarks/data.py [--megabytes 4] [--rounds 3] [--only encoding shards]

The text is prose in documents of about 4 kB: the docstrings of the packages torch brings, joined file by file. Every
contestant gets the same documents in memory and one thread.

- cleaning: profile `web` (C4 line and document rules, Gopher quality and repetition, FineWeb) against datatrove's four
  filters with the same thresholds. We compute every score of every document; datatrove stops at the first failure, which
  is its best mode. Agreement is the share of documents that both keep or both remove.
- near-duplicates: 5-word shingles, 14 bands of 8 rows, against datatrove's four MinHash steps (in a temporary folder,
  64-bit) and datasketch's `MinHashLSH`. We also check the true Jaccard similarity; the peers do not.
- encoding: text to ids in memory, one byte-level BPE vocabulary of 4,096 trained on the same text, against `tokenizers`
  (`encode_batch`, and `encode_batch_fast`, which keeps no offsets) and `tiktoken` with the same tokens as ranks.
- shards: documents to token files. Ours reads the documents' table and writes spans, index and hashes as well; against a
  plain script with `tokenizers`, and datatrove's tokenizing step. Agreement is the share of equal ids in both rows.

A peer that is not installed is named and left out. Results go to benchmarks/results/data.json.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAYON_NUM_THREADS"] = "1"  # of the tokenizers

import numpy as np
from tokenizing_contenders import ENCODING, SHARDS, World

from headspring.artifacts.environment import environment
from headspring.artifacts.files import read_json, write_json
from headspring.data.cleaning import PROFILES, clean
from headspring.data.deduplication import DeduplicationConfig, band_keys, near_duplicates
from headspring.data.word_hashes import batches
from headspring.text.documents import Document
from headspring.text.sources import Docstrings, Reading

RESULTS = Path(__file__).parent / "results" / "data.json"
Contestant = Callable[[list[str]], set[int]]  # texts → numbers of the documents that stay
Timed = Callable[[], Callable[[], Any]]  # the work; and afterwards, outside the clock, what came out


def texts_of(megabytes: float) -> list[str]:
    documents = Docstrings(max_bytes=None).read("docstrings", Reading())
    texts, size = [], 0
    for _, group in groupby(documents, key=lambda document: document.path):
        texts.append("\n\n".join(document.text for document in group))
        size += len(texts[-1].encode())
        if size >= megabytes * 1e6:
            break
    return texts + texts[::10]  # every tenth document twice, so that there is something to find


def headspring_cleaning(texts: list[str]) -> set[int]:
    bounds = PROFILES["web"]
    verdicts = (clean(Document(text, "b", "prose", str(n)), "web", bounds) for n, text in enumerate(texts))
    return {number for number, verdict in enumerate(verdicts) if verdict.decision is None}


def datatrove_cleaning() -> Contestant:
    import spacy  # noqa: F401 - datatrove splits English with it and says so only when the first document comes
    from datatrove.data import Document as Page
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    filters = [
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
    ]

    def run(texts: list[str]) -> set[int]:
        pages = [Page(text=text, id=str(number)) for number, text in enumerate(texts)]
        return {number for number, page in enumerate(pages) if all(each.filter(page) is True for each in filters)}

    return run


def headspring_near(texts: list[str]) -> set[int]:
    config = DeduplicationConfig()
    keys = [band_keys([texts[i] for i in batch], config)[0] for batch in batches([len(text) for text in texts])]
    clusters = near_duplicates(np.concatenate(keys), texts.__getitem__, config)
    return set(range(len(texts))) - {member for cluster in clusters for member in cluster.members[1:]}


def datatrove_near() -> Contestant:
    import spacy  # noqa: F401
    from datatrove.data import Document as Page
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    config = MinhashConfig(hash_config=HashConfig(precision=64, hash_fc="sha1"), num_buckets=14, hashes_per_bucket=8, n_grams=5)

    def run(texts: list[str]) -> set[int]:
        pages = [Page(text=text, id=str(number)) for number, text in enumerate(texts)]
        with tempfile.TemporaryDirectory() as folder:
            MinhashDedupSignature(f"{folder}/signatures", config=config).run(iter(pages), 0, 1)
            for bucket in range(config.num_buckets):
                step = MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config)
                step.run(None, bucket, config.num_buckets)
            MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove", config=config).run(None, 0, 1)
            return {int(page.id) for page in MinhashDedupFilter(f"{folder}/remove").run(iter(pages), 0, 1)}

    return run


def datasketch_near() -> Contestant:
    from datasketch import MinHash, MinHashLSH

    def run(texts: list[str]) -> set[int]:
        index = MinHashLSH(num_perm=112, params=(14, 8))
        kept = set()
        for number, text in enumerate(texts):
            words = text.lower().split()
            sketch = MinHash(num_perm=112)
            sketch.update_batch([" ".join(words[i : i + 5]).encode() for i in range(max(len(words) - 4, 1))])
            if not index.query(sketch):
                index.insert(number, sketch)
                kept.add(number)
        return kept

    return run


def contestants(texts: list[str], folder: Path) -> dict[str, dict[str, Timed]]:
    """Task → name → contestant; the peers that are here."""
    world = World(texts, folder)
    cleaning = {"headspring": lambda: headspring_cleaning, "datatrove": datatrove_cleaning}
    near = {"headspring": lambda: headspring_near, "datatrove": datatrove_near, "datasketch": datasketch_near}
    makers: dict[str, dict[str, Callable[[], Timed]]] = {
        "cleaning": {name: partial(keeping, make, texts) for name, make in cleaning.items()},
        "near-duplicates": {name: partial(keeping, make, texts) for name, make in near.items()},
        "encoding": {name: partial(make, world) for name, make in ENCODING.items()},
        "shards": {name: partial(make, world) for name, make in SHARDS.items()},
    }
    found: dict[str, dict[str, Timed]] = {task: {} for task in makers}
    for task, each in makers.items():
        for name, make in each.items():
            try:
                found[task][name] = make()
            except ImportError as error:
                reason = str(error).splitlines()[0]
                print(f"{task}: {name} is left out, for it is not complete here ({reason})", file=sys.stderr)
    return found


def keeping(make: Callable[[], Contestant], texts: list[str]) -> Timed:
    """A contestant that says which documents stay, over all `texts`."""
    runner = make()
    runner(texts[:20])  # imports and caches

    def run() -> Callable[[], set[int]]:
        kept = runner(texts)
        return lambda: kept

    return run


def agreement(one: Any, other: Any, num_texts: int) -> float:
    """Share of documents that both keep or both remove; or of ids that are equal, place by place."""
    if isinstance(one, set):
        return 1 - len(one ^ other) / num_texts
    return float(np.mean(one == other)) if len(one) == len(other) else 0.0


def compare(runners: dict[str, Timed], texts: list[str], rounds: int) -> dict[str, Any]:
    """Every contestant once a round, in turns; speeds in MB/s with median and spread, ratio to the best peer.

    Beside the clock on the wall, the processor's own seconds: all work here is one thread, and they count no neighbours."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    speeds: dict[str, list[float]] = {name: [] for name in runners}
    processor: dict[str, list[float]] = {name: [] for name in runners}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, runner in runners.items():
            start, busy = time.perf_counter(), time.process_time()
            finish = runner()
            speeds[name].append(megabytes / (time.perf_counter() - start))
            processor[name].append(megabytes / (time.process_time() - busy))
            results[name] = finish()
    what = "documents_kept" if isinstance(results["headspring"], set) else "tokens"
    table = {
        name: {
            "megabytes_per_second": statistics.median(values),
            "lowest": min(values),
            "highest": max(values),
            "megabytes_per_processor_second": statistics.median(processor[name]),
            what: len(results[name]),
            "agreement": agreement(results[name], results["headspring"], len(texts)),
        }
        for name, values in speeds.items()
    }
    peers = [row["megabytes_per_second"] for name, row in table.items() if name != "headspring"]
    ratio = table["headspring"]["megabytes_per_second"] / max(peers) if peers else None
    return {"megabytes": megabytes, "documents": len(texts), "contestants": table, "ratio_to_best_peer": ratio}


def show(task: str, result: dict[str, Any]) -> None:
    print(f"{task}: {result['documents']} documents, {result['megabytes']:.1f} MB, one thread")
    for name, row in result["contestants"].items():
        spread = f"{row['lowest']:.2f}-{row['highest']:.2f}"
        what = f"keeps {row['documents_kept']}" if "documents_kept" in row else f"{row['tokens']:,} tokens"
        speed = f"{row['megabytes_per_second']:7.2f} MB/s ({spread}), {row['megabytes_per_processor_second']:.2f} a CPU second"
        print(f"  {name:<16} {speed}, {what}, agrees with us on {row['agreement']:.1%}")
    if result["ratio_to_best_peer"]:
        print(f"  ratio to the best peer: {result['ratio_to_best_peer']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="TASK", help="the other tasks keep the results they have")
    arguments = parser.parse_args()
    texts = texts_of(arguments.megabytes)
    with tempfile.TemporaryDirectory() as folder:
        found = contestants(texts, Path(folder))
        chosen = {task: runners for task, runners in found.items() if task in (arguments.only or found)}
        results = {task: compare(runners, texts, arguments.rounds) for task, runners in chosen.items()}
    for task, result in results.items():
        show(task, result)
    about = {"machine": environment(), "rounds": arguments.rounds}
    old = read_json(RESULTS)["results"] if arguments.only and RESULTS.exists() else {}
    names = {"datatrove", "datasketch", "tokenizers", "tiktoken"} & {name for runners in found.values() for name in runners}
    versions = {name: version(name) for name in sorted(names)}
    measured = {task: {**about, **result} for task, result in results.items()}
    write_json(RESULTS, {"peers": versions, "results": {**old, **measured}})


if __name__ == "__main__":
    main()
