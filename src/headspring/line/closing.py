"""What a run says at its end: every stage in a table, a sample of each model's text, the report, what to do next."""

import shlex
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from headspring.line.report import formats
from headspring.line.report.comparisons import Verdict, model_label, verdicts
from headspring.line.report.outcomes import outcome
from headspring.line.report.reading import RunView, StageView, read_run
from headspring.line.run import Run

SAMPLE_CHARACTERS = 280
WIDTH = 110  # columns, where the output is no terminal or a narrower one
_COLOURS = {"improved": "green", "unclear": "yellow", "failed": "bold red"}


def print_closing(run: Run) -> None:
    """Print the end of `run` on standard output."""
    view = read_run(run.folder)
    console = Console(highlight=False)
    if not console.is_terminal or console.width < WIDTH:
        console = Console(highlight=False, width=WIDTH)
    judged = {verdict.stage: verdict for verdict in verdicts(view)}
    console.print()
    console.print(stage_table(view, judged, run))
    for verdict in judged.values():
        if verdict.state != "improved":
            console.print(Text(verdict.sentence, _COLOURS[verdict.state]))
    for line in samples(view):
        console.print(line)
    if run.report:
        console.print(f"\nreport: {run.report}", soft_wrap=True)
    console.print("\nnext:")
    for command in next_commands(run):
        console.print(f"  {command}", markup=False, soft_wrap=True)


def stage_table(view: RunView, judged: dict[str, Verdict], run: Run) -> Table:
    """One row a stage: what went in, what came out, its metric before → after, seconds."""
    title = f"{view.name} · {view.folder}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("stage", "in", "out", "before → after", "seconds"):
        table.add_column(name, justify="right" if name == "seconds" else "left", header_style="bold", overflow="fold")
    for stage in view.stages:
        if stage.manifest is None:
            table.add_row(stage.name, "", "not run", "", "", style="dim")
            continue
        when = "" if stage.name in run.made else " (outdated)" if stage.name in run.outdated else " (earlier)"
        taken = f"{stage.cost.get('seconds', 0.0):,.1f}{when}"
        came_in = ", ".join(dict.fromkeys(stage.inputs.values())) or "sources"
        table.add_row(stage.name, came_in, " · ".join(outcome(stage)), _change(judged.get(stage.name)), taken)
    total = sum(stage.cost.get("seconds", 0.0) for stage in view.stages)
    table.add_section()
    table.add_row("all", "", "", "", f"{total:,.1f}", style="bold")
    return table


def _change(verdict: Verdict | None) -> Text:
    if verdict is None:
        return Text("")
    before, after = (side.partition(" (")[0] for side in (verdict.before, verdict.after))
    return Text(f"{verdict.metric}\n{before} → {after}", _COLOURS[verdict.state])


def samples(view: RunView) -> list[Text]:
    """What each evaluated model writes: after the first prompt that all were given, and to the last one's last question."""
    told = [stage for stage in view.of_kind("evaluate") if stage.metrics.get("samples")]
    if not told:
        return []
    prompts = [[sample["prompt"] for sample in stage.metrics["samples"]] for stage in told]
    common = [one for one in prompts[-1] if all(one in others for others in prompts)] or prompts[-1][:1]
    lines = []
    for prompt in dict.fromkeys((common[0], prompts[-1][-1])):
        lines.append(Text(f"\nafter {_shortened(prompt)!r}, the model writes", "bold"))
        for stage in told:
            lines += [_sample(stage, sample["text"]) for sample in stage.metrics["samples"] if sample["prompt"] == prompt]
    return lines


def _sample(stage: StageView, text: str) -> Text:
    shown = formats.visible(_shortened(text)).rstrip().replace("\n", "\n    ")
    return Text(f"  {model_label(stage)}\n", "bold").append(f"    {shown}", "not bold")


def _shortened(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARACTERS else f"{text[:SAMPLE_CHARACTERS]}…"


def next_commands(run: Run) -> list[str]:
    """Commands that make sense now; only verbs that exist."""
    folder, recipe = shlex.quote(str(run.folder)), shlex.quote(str(run.recipe.path))
    if run.recipe.steps and any((run.folder / name / "manifest.json").is_file() for name in run.recipe.models):
        return [
            *_asking(run, folder),
            f"headspring run {recipe} data.sources=~/my/folder --run-dir runs/mine",
        ]
    return [f"headspring run {recipe} --run-dir {folder}"]


def _asking(run: Run, folder: str) -> list[str]:
    """How to ask the run's model: one that sees both ways writes nothing."""
    masked = any(getattr(step.config, "objective", None) == "masked" for step in run.recipe.steps)
    if masked:
        return [f"python -c \"import headspring as hs; print(hs.load('{run.folder}').embed(['a text', 'another']))\""]
    return [
        f"headspring chat {folder}",
        f"headspring generate {folder} --prompt 'def '",
        f"headspring serve {folder}",
    ]


def as_json(run: Run) -> dict[str, Any]:
    """The stages of a run with their metrics and costs, for `--json`."""
    view = read_run(run.folder)
    return {
        "run": str(run.folder),
        "recipe": view.name,
        "report": str(run.report) if run.report else None,
        "stages": {
            stage.name: {
                "kind": stage.kind,
                "made": stage.name in run.made,
                "inputs": stage.inputs,
                "metrics": stage.metrics,
                "cost": stage.cost,
            }
            for stage in view.stages
            if stage.manifest
        },
        "verdicts": [vars(verdict) for verdict in verdicts(view)],
    }
