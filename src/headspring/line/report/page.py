"""Puts the sections together and writes `report.html`."""

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from headspring.artifacts.errors import HeadspringError
from headspring.artifacts.files import write_atomic
from headspring.line.report import formats
from headspring.line.report.charts import Bar, bars
from headspring.line.report.comparisons import Verdict, matrix, verdicts
from headspring.line.report.funnel import funnel
from headspring.line.report.pipeline import picture
from headspring.line.report.reading import TRAINED_KINDS, RunView, StageView, lookup, number, read_run
from headspring.line.report.tokens import TokenizerView, tokenizer_view
from headspring.line.report.training_curves import curves
from headspring.tokenization.tokenizer import Tokenizer

REPORT = "report.html"
SAMPLE_CHARACTERS = 1200
BASELINES = (
    ("kneser_ney_5gram", "5-gram, modified Kneser–Ney, same tokens"),
    ("xz", "xz −9"),
    ("zstd", "zstd −19"),
    ("xz_primed", "xz −9 that has read the training text"),
    ("zstd_primed", "zstd −19 that has read the training text"),
)


def write_report(run_folder: Path) -> Path:
    """Render `run_folder` into `run_folder/report.html` and return that path.

    Raises `UserError` where the folder is no run folder, `CorruptArtifact` where a manifest does not parse."""
    run = read_run(Path(run_folder))
    path = run.folder / REPORT
    write_atomic(path, render(run))
    return path


def render(run: RunView) -> str:
    """The page as a string."""
    environment = Environment(
        loader=PackageLoader("headspring.line.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = formats.visible
    return environment.get_template("report.html").render(**context(run))


def context(run: RunView) -> dict[str, Any]:
    """Everything the template shows."""
    judged = verdicts(run)
    failed = {verdict.stage for verdict in judged if verdict.state == "failed"}
    tokenizer, tokenizer_error = _tokenizer(run)
    made = max((stage.manifest.created for stage in run.stages if stage.manifest), default=0.0)
    return {
        "formats": formats,
        "run": run,
        "made": datetime.fromtimestamp(made, timezone.utc).strftime("%Y-%m-%d %H:%M UTC") if made else "",
        "seconds": sum(stage.cost.get("seconds", 0.0) for stage in run.stages),
        "environment": next((stage.manifest.environment for stage in reversed(run.stages) if stage.manifest), {}),
        "tiles": tiles(run, judged),
        "picture": picture(run, failed),
        "verdicts": judged,
        "matrix": matrix(run),
        "compression": compression(run),
        "curves": [found for stage in run.of_kind(*TRAINED_KINDS) if (found := curves(stage))],
        "samples": samples(run),
        "funnel": funnel(run.data_report),
        "tokenizer": tokenizer,
        "tokenizer_error": tokenizer_error,
        "recipe": yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, width=100),
        "missing": [stage.name for stage in run.stages if not stage.manifest],
    }


def tiles(run: RunView, judged: list[Verdict]) -> list[tuple[str, str, str, str]]:
    """(label, value, note, state) of the figures a reader wants first."""
    found = [(verdict.metric, verdict.after.partition(" (")[0], f"{verdict.stage}, before: {verdict.before}", verdict.state)
             for verdict in judged]  # fmt: skip
    models = run.of_kind("pretrain")
    parameters = number(lookup(models[0].metrics, "parameters")) if models else None
    if parameters is not None:
        found.append(("parameters", formats.count(parameters), "", ""))
    finished = [stage for stage in run.stages if stage.manifest]
    total = sum(stage.cost.get("seconds", 0.0) for stage in finished)
    found.append(("whole line", formats.seconds(total), f"{len(finished)} of {len(run.stages)} stages", ""))
    return found


def compression(run: RunView) -> dict[str, Any] | None:
    """The models and the compressors as bars of bits per byte, and the sentence that says who won."""
    baselines: dict[str, Any] = next((stage.metrics for stage in run.of_kind("baselines")), {})
    models = [(stage.measures or stage.name, number(lookup(stage.metrics, "bits_per_byte.all")))
              for stage in run.of_kind("evaluate") if stage.measures != "initial"]  # fmt: skip
    ours = [(name, value) for name, value in models if value is not None]
    peers = [(key, label, value) for key, label in BASELINES if (value := _bits(baselines.get(key))) is not None]
    if not ours or not peers:
        return None
    rows = [(name, value, f"{value:.3f}", True, "this run") for name, value in ours]
    rows += [(label, value, f"{value:.3f}", False, "") for _, label, value in peers]
    name, best = ours[0]
    fair = [(label, value) for key, label, value in peers if not key.endswith("_primed")]
    lost = [f"{label} ({value:.3f})" for label, value in fair if value <= best]
    drawn: list[Bar] = bars(sorted(rows, key=lambda row: row[1]))
    return {"bars": drawn, "model": name, "bits": best, "lost": lost, "beaten": len(fair) - len(lost)}


def _bits(value: Any) -> float | None:
    """A baseline's bits per byte: a number, or {"all": number, source: number}."""
    return number(value.get("all", value.get("bits_per_byte"))) if isinstance(value, dict) else number(value)


def samples(run: RunView) -> list[tuple[str, list[tuple[str, str]]]]:
    """For every prompt, what each evaluated model wrote."""
    grouped: dict[str, list[tuple[str, str]]] = {}
    for stage in run.of_kind("evaluate"):
        for sample in stage.metrics.get("samples") or []:
            text = str(sample.get("text", ""))
            cut = text[:SAMPLE_CHARACTERS] + ("…" if len(text) > SAMPLE_CHARACTERS else "")
            grouped.setdefault(str(sample.get("prompt", "")), []).append((stage.measures or stage.name, cut))
    return list(grouped.items())


def _tokenizer(run: RunView) -> tuple[TokenizerView | None, str]:
    """The tokenizer's view, or why there is none. A damaged artifact must not cost the reader the other sections."""
    stages = run.of_kind("tokenizer")
    data: list[StageView] = run.of_kind("data")
    if not stages:
        return None, ""
    try:
        return tokenizer_view(Tokenizer.load(stages[-1].folder), data[0].folder if data else None), ""
    except HeadspringError as error:
        return None, str(error)
