"""Puts the sections together and writes `report.html`."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from headspring.artifacts.errors import HeadspringError
from headspring.artifacts.files import write_atomic
from headspring.line.report import formats
from headspring.line.report.comparisons import Verdict, matrix, model_label, verdicts
from headspring.line.report.compression import compression
from headspring.line.report.funnel import funnel
from headspring.line.report.pipeline import picture
from headspring.line.report.reading import TRAINED_KINDS, RunView, StageView, lookup, number, read_run
from headspring.line.report.tokens import TokenizerView, tokenizer_view
from headspring.line.report.training_curves import curves
from headspring.tokenization.tokenizer import Tokenizer

REPORT = "report.html"
SAMPLE_CHARACTERS = 1200


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
        "made": datetime.fromtimestamp(made, UTC).strftime("%Y-%m-%d %H:%M UTC") if made else "",
        "seconds": sum(stage.cost.get("seconds", 0.0) for stage in run.stages),
        "environment": next((stage.manifest.environment for stage in reversed(run.stages) if stage.manifest), {}),
        "tiles": tiles(run, judged),
        "picture": picture(run, failed),
        "verdicts": judged,
        "matrix": matrix(run),
        "compression": compression(run),
        "curves": [found for stage in run.of_kind(*TRAINED_KINDS) if (found := curves(stage))],
        "mixture": "\n\n".join(text for stage in run.of_kind("pretrain") if (text := stage.metrics.get("mixture"))),
        "samples": samples(run),
        "funnel": funnel(run.data_report),
        "tokenizer": tokenizer,
        "tokenizer_error": tokenizer_error,
        "recipe": yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, width=100),
        "missing": [stage.name for stage in run.stages if not stage.manifest],
    }


def tiles(run: RunView, judged: list[Verdict]) -> list[tuple[str, str, str, str]]:
    """(label, value, note, state) of the figures a reader wants first."""
    found = []
    for verdict in judged:
        before, after = (text.partition(" (")[0] for text in (verdict.before, verdict.after))
        found.append((verdict.metric, after, f"after {verdict.stage}; before: {before}", verdict.state))
    models = run.of_kind("pretrain")
    parameters = number(lookup(models[0].metrics, "parameters")) if models else None
    if parameters is not None:
        found.append(("parameters", formats.count(parameters), "", ""))
    finished = [stage for stage in run.stages if stage.manifest]
    total = sum(stage.cost.get("seconds", 0.0) for stage in finished)
    found.append(("whole line", formats.seconds(total), f"{len(finished)} of {len(run.stages)} stages", ""))
    return found


def samples(run: RunView) -> list[tuple[str, list[tuple[str, str]]]]:
    """For every prompt, what each evaluated model wrote."""
    grouped: dict[str, list[tuple[str, str]]] = {}
    for stage in run.of_kind("evaluate"):
        for sample in stage.metrics.get("samples") or []:
            text = str(sample.get("text", ""))
            cut = text[:SAMPLE_CHARACTERS] + ("…" if len(text) > SAMPLE_CHARACTERS else "")
            grouped.setdefault(str(sample.get("prompt", "")), []).append((model_label(stage), cut))
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
