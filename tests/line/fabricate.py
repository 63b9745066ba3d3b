"""A run folder with made-up figures, for tests of the report: real manifests, documents and tokenizer, no training."""

import inspect
import json
import math
import random
from pathlib import Path

from headspring.artifacts.files import write_json
from headspring.artifacts.manifest import Manifest, read_manifest, write_manifest
from headspring.data.store import Row, write_documents
from headspring.text.documents import Document
from headspring.tokenization.train import TokenizerConfig, train_tokenizer

KINDS = {
    "data": "data", "tokenizer": "tokenizer", "tokens": "tokens", "baselines": "baselines", "pretrain": "pretrain",
    "sft": "sft", "dpo": "preference", "evaluate-initial": "evaluate", "evaluate-pretrain": "evaluate",
    "evaluate-sft": "evaluate", "evaluate-dpo": "evaluate",
}  # fmt: skip
INPUTS = {
    "data": {}, "tokenizer": {"data": "data"}, "tokens": {"data": "data", "tokenizer": "tokenizer"},
    "baselines": {"data": "data", "tokens": "tokens"}, "pretrain": {"tokens": "tokens", "tokenizer": "tokenizer"},
    "sft": {"model": "pretrain", "data": "data", "tokens": "tokens"}, "dpo": {"model": "sft", "data": "data"},
    "evaluate-initial": {"model": "pretrain/initial", "data": "data"},
} | {f"evaluate-{name}": {"model": name, "data": "data"} for name in ("pretrain", "sft", "dpo")}  # fmt: skip
SECONDS = {"data": 31, "tokenizer": 9.4, "tokens": 6.2, "baselines": 48, "pretrain": 312, "sft": 84, "dpo": 93}
ENVIRONMENT = {
    "python": "3.11.7", "platform": "Linux-test", "versions": {"headspring": "0.1.0", "torch": "2.13.0"},
    "commit": "0123456789ab", "processor": "A processor of the fixture", "cores": 2, "threads": 2, "device": "cpu",
}  # fmt: skip
BASELINES = {"xz": 1.79, "zstd": 1.83, "kneser_ney_5gram": 1.51, "xz_primed": 1.43, "zstd_primed": 1.46}
SAMPLES = {
    "pretrain/initial": "vert$ zq self self(\x00 the the",
    "pretrain": "def area(radius):\n    return radius * radius\n\n\ndef length(self):\n    return self",
    "sft": "self, radius",
    "dpo": "radius",
}


def rate(right: int, total: int) -> dict[str, float]:
    """{"rate", "low", "high", "n"} with Wilson's interval."""
    share, spread = right / total, 1.96**2 / total
    centre = (share + spread / 2) / (1 + spread)
    half = 1.96 * math.sqrt(share * (1 - share) / total + spread / 4 / total) / (1 + spread)
    return {"rate": share, "low": centre - half, "high": centre + half, "n": total}


def fabricate_run(folder: Path, until: str = "evaluate-dpo", sft_right: int = 171, text: str = "") -> Path:
    """Fill `folder` with a run whose stages up to `until` are done.

    `sft_right` of 300 tasks are right after SFT, 36 before. `text` is planted wherever a model or a document speaks."""
    names = list(KINDS)
    done = names[: names.index(until) + 1]
    write_json(folder / "run.json", record(names, done))
    for name in done:
        (folder / name).mkdir(parents=True)
        if name in MAKERS:
            MAKERS[name](folder / name, text)
        if name in ("pretrain", "sft", "dpo"):
            write_log(folder / name / "logs" / "metrics.jsonl", name)
        cost = {"seconds": float(SECONDS.get(name, 17)), "peak_memory_bytes": 1.31e9}
        inputs = {role: {"stage": source, "sha256": content_hash(folder, source)} for role, source in INPUTS[name].items()}
        manifest = Manifest(
            name=name, kind=KINDS[name], revision=1, config={"steps": 1200}, inputs=inputs, environment=ENVIRONMENT,
            metrics=metrics(name, sft_right, text), cost=cost, created=1_790_000_000.0,
        )  # fmt: skip
        write_manifest(folder / name, manifest)
    return folder


def record(names: list[str], done: list[str]) -> dict:
    return {
        "schema_version": 1, "recipe": "fixture", "description": "Figures made up for a test.",
        "recipe_file": "fixture.yaml", "seed": 0, "stages": names, "kinds": KINDS, "inputs": INPUTS,
        "configs": {name: {"steps": 1200} for name in names},
        "states": {name: "done" if name in done else "pending" for name in names},
        "state": "done" if done == names else "partial", "updated": 1_790_000_000.0,
    }  # fmt: skip


def content_hash(folder: Path, source: str) -> str:
    return read_manifest(folder / source.partition("/")[0]).content_hash


def documents(text: str) -> list[Document]:
    code, prose = inspect.getsource(inspect), inspect.getdoc(json) * 3
    return [
        Document(text + code, "stdlib", "code", "stdlib:inspect.py"),
        Document(text + prose, "docstrings", "prose", "stdlib:json/__init__.py"),
    ]


def make_data(folder: Path, text: str) -> None:
    write_documents([Row(document, split="validation") for document in documents(text)], folder)
    write_json(folder / "report.json", data_report(text))


def make_tokenizer(folder: Path, text: str) -> None:
    texts = [document.text for document in documents("")]
    train_tokenizer(texts, TokenizerConfig(vocab_size=700)).save(folder)


MAKERS = {"data": make_data, "tokenizer": make_tokenizer}


def data_report(text: str) -> dict:
    def amount(documents: int, size: int, *examples: str) -> dict:
        origin = {"id": "0", "path": "stdlib:encodings/big5.py", "reason": "line_length 1204 > 1000"}
        shown = {"examples": [origin | {"text": text + example} for example in examples]}
        return {"documents": documents, "bytes": size} | (shown if examples else {})

    code = {
        "read": amount(690, 11_600_000), "kept": amount(611, 10_700_000), "edited_away_bytes": 0,
        "removed": {"code.line_length": amount(41, 610_000, "table = ("),
                    "near_duplicate": amount(38, 290_000, "import")},
    }  # fmt: skip
    prose = {
        "read": amount(9100, 4_900_000), "kept": amount(8207, 4_350_000), "edited_away_bytes": 0,
        "removed": {"exact_duplicate": amount(702, 310_000), "near_duplicate": amount(160, 200_000),
                    "docstring.words": amount(31, 40_000, "TODO")},
    }  # fmt: skip
    return {
        "sources": {"stdlib": code, "docstrings": prose},
        "corpus_hash": "ab" * 32,
        "splits": {"train": amount(8465, 14_450_000), "validation": amount(175, 300_000), "test": amount(178, 300_000)},
        "duplicates": {"clusters": 412, "largest": [{"size": 31, "members": ["a.py", text], "text": text + "import"}]},
        "contamination": {"evaluation_texts": 12, "ngram_words": 13, "documents_removed": 2},
    }


def metrics(name: str, sft_right: int, text: str) -> dict:
    if KINDS[name] == "evaluate":
        model = INPUTS[name]["model"]
        bits = {"pretrain/initial": 12.03, "pretrain": 1.482, "sft": 1.497, "dpo": 1.499}[model]
        right = {"pretrain/initial": 0, "pretrain": 36, "sft": sft_right, "dpo": 189}[model]
        found = {"held_out": {"fingerprint": "f0"},
                 "bits_per_byte": {"all": bits, "stdlib": bits - 0.1, "docstrings": bits + 0.4},
                 "samples": [{"prompt": text + "def area(", "text": text + SAMPLES[model]}]}  # fmt: skip
        if name == "evaluate-initial":
            return found
        tasks = {
            "parameters": rate(right // 3, 100),
            "returns": rate(right // 3, 100),
            "summary": rate(right // 3, 100),
        }
        return found | {"task_accuracy": rate(right, 300), "tasks": tasks, "parse_rate": rate(41, 60),
                        "doctest_pass_rate": rate(4, 60)}  # fmt: skip
    return {
        "data": {"documents": 8818, "bytes": 15_050_000},
        "tokenizer": {"vocab_size": 4096, "bytes_per_token": 3.61},
        "tokens": {"tokens": {"train": 4_010_000}, "bytes_per_token": 3.59},
        "baselines": {key: {"all": bits} for key, bits in BASELINES.items()} | {"held_out": {"fingerprint": "f0"}},
        "pretrain": {"parameters": 2_620_000, "tokens": 2_457_600},
        "sft": {"parameters": 2_620_000, "steps": 240},
        "dpo": {"parameters": 2_620_000, "pairs": 801},
    }[name]


def write_log(path: Path, name: str, steps: int = 600) -> None:
    random_numbers = random.Random(name)
    start, end = {"pretrain": (3.7, 1.45), "sft": (1.3, 0.4), "dpo": (0.69, 0.42)}[name]
    lines = []
    for step in range(1, steps + 1):
        loss = end + (start - end) * math.exp(-9 * step / steps) + random_numbers.gauss(0, 0.04)
        lines.append({
            "step": step, "loss": loss, "bits_per_byte": loss, "gradient_norm": 0.5 + random_numbers.random(),
            "learning_rate": 1e-3 * min(1, step / 60, (steps - step) / 120), "flops_utilization": 0.55,
            "tokens_per_second": 7800 + random_numbers.gauss(0, 300), "tokens": step * 2048, "seconds": step * 0.26,
        })  # fmt: skip
        if step % 100 == 0:
            lines[-1]["validation"] = {"loss": loss + 0.06, "bits_per_byte": loss + 0.06}
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 601, "lo', encoding="utf-8")
