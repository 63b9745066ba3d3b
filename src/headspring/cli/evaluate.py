"""`headspring eval`: measure a model on held-out documents, on files, or on one's own questions."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headspring.artifacts.errors import UserError

if TYPE_CHECKING:
    from headspring.evaluation.evaluate import EvaluateConfig

DOCUMENTS = "documents.parquet"
RATES = {
    "task_accuracy": "tasks in all",
    "doctest_pass_rate": "outputs right by execution",
    "function_pass_rate": "completed functions that pass",
    "parse_rate": "completed functions that parse",
}

Model = Annotated[str, typer.Argument(help="A run (its last model stage), a stage's or HF folder, a .gguf file or a hub name.")]
Data = Annotated[Path | None, typer.Option(help="A data stage's folder, or a run.  [default: the model's run]")]
Text = Annotated[list[Path] | None, typer.Option(help="Bits per byte of this file instead. Repeatable.")]
Sets = Annotated[list[Path] | None, typer.Option("--set", help="JSONL file of prompts and answers. Repeatable.")]
Split = Annotated[str, typer.Option(help="train, validation or test.")]
MaxBytes = Annotated[int, typer.Option(min=1, help="At most this much text for bits per byte.")]
Tasks = Annotated[int, typer.Option(min=0, help="Tasks of each kind; 0 asks none.")]
Execute = Annotated[bool, typer.Option(help="Judge doctests and completed functions by running them in the sandbox.")]
Unsafe = Annotated[bool, typer.Option("--unsafe-execution", help="Run them even where nothing isolates them.")]
Samples = Annotated[list[str] | None, typer.Option("--sample", help="Continue this text. Repeatable.")]
Compare = Annotated[Path | None, typer.Option(help="An earlier evaluation's folder: how task accuracy changed.")]
Output = Annotated[Path | None, typer.Option(help="Keep evaluation.json and all answers (tasks.jsonl) in this folder.")]


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("eval", epilog="Example: headspring eval runs/quickstart --tasks 20 --json")(evaluate)


def evaluate(
    model: Model,
    data: Data = None,
    text: Text = None,
    sets: Sets = None,
    split: Split = "test",
    max_bytes: MaxBytes = 1_000_000,
    tasks: Tasks = 40,
    execute: Execute = True,
    unsafe_execution: Unsafe = False,
    sample: Samples = None,
    compare: Compare = None,
    output: Output = None,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the tasks.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Bits per byte, tasks, doctests by execution and samples of a model."""
    folder = None if text else find_data(model, data)
    if folder is None and not text and not sets:
        raise UserError(f"{model}: no data stage beside it; give --data RUN/data, --text FILE or --set FILE.jsonl")
    if compare is not None and output is None:
        raise UserError("--compare needs --output: the answers of this evaluation have to be kept to be compared")
    if split not in ("train", "validation", "test"):
        raise UserError(f"--split {split}: it is train, validation or test")
    config = _config(sets or [], sample or [], max_bytes, split, tasks, execute, unsafe_execution)
    from headspring.artifacts.files import write_json
    from headspring.evaluation.evaluate import compression, measure
    from headspring.evaluation.tasks import paired_difference, write_answers
    from headspring.inference import LanguageModel

    documents = [_read(path) for path in text or []]
    lm = LanguageModel.load(model, device=device, dtype=dtype)
    metrics: dict[str, Any] = {"model": model}
    if documents:
        metrics |= compression(lm, documents, config)
    found, answers = measure(lm, config, folder, seed)
    metrics |= found
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_answers(answers, output)
        if compare is not None:
            mean, low, high = paired_difference(compare, output)
            metrics["difference"] = {"from": str(compare), "mean": mean, "low": low, "high": high}
        write_json(output / "evaluation.json", metrics)
    typer.echo(json.dumps(metrics, indent=2, ensure_ascii=False)) if as_json else _show(metrics)


def find_data(model: str, data: Path | None) -> Path | None:
    """The data stage: the one given, or that of the run the model belongs to; None where there is none."""
    if data is not None:
        for folder in (data, data / "data"):
            if (folder / DOCUMENTS).is_file():
                return folder
        raise UserError(f"{data}: no {DOCUMENTS} here; --data is a run's data stage, such as runs/quickstart/data")
    path = Path(model)
    runs = [path, path.parent] if path.is_dir() else []
    return next((run / "data" for run in runs if (run / "data" / DOCUMENTS).is_file()), None)


def _config(
    sets: list[Path], samples: list[str], max_bytes: int, split: Any, tasks: int, execute: bool, unsafe_execution: bool
) -> "EvaluateConfig":
    from headspring.data.tasks import TaskConfig
    from headspring.evaluation.evaluate import EvaluateConfig
    from headspring.evaluation.held_out import HeldOut

    return EvaluateConfig(
        held_out=HeldOut(split=split, max_bytes=max_bytes),
        tasks=TaskConfig(per_kind=tasks) if tasks else None,
        sets=tuple(map(str, sets)),
        samples=tuple(samples),
        questions=(),
        execute=execute,
        precision="auto",
        unsafe_execution=unsafe_execution,
    )


def _read(path: Path) -> Any:
    from headspring.text.documents import Document

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable UTF-8 file ({error})") from error
    if not text:
        raise UserError(f"{path}: is empty")
    return Document(text=text, source=path.name, kind="code" if path.suffix == ".py" else "prose", path=str(path))


def _show(metrics: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=metrics["model"], title_justify="left")
    for column, justify in (("measure", "left"), ("value", "right"), ("95 % interval", "right"), ("n", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for source, value in metrics.get("bits_per_byte", {}).items():
        table.add_row(f"bits per byte · {source}", f"{value:.3f}", "", "")
    if "perplexity" in metrics:
        table.add_row("perplexity (per token)", f"{metrics['perplexity']:.2f}", "", "")
    rates = {f"task · {kind}": value for kind, value in metrics.get("tasks", {}).items()}
    rates |= {label: metrics[name] for name, label in RATES.items() if name in metrics}
    for label, value in rates.items():
        table.add_row(label, f"{value['rate']:.1%}", f"{value['low']:.1%} … {value['high']:.1%}", str(value["n"]))
    if change := metrics.get("difference"):
        interval = f"{change['low']:+.1%} … {change['high']:+.1%}"
        table.add_row(f"tasks, against {change['from']}", f"{change['mean']:+.1%}", interval, "")
    console = Console()
    console.print(table)
    for sample in metrics.get("samples", []):
        console.print(f"\n[bold]{_escape(sample['prompt'])}[/bold]{_escape(sample['text'])}")


def _escape(text: str) -> str:
    """What a model writes must not be read as markup."""
    from rich.markup import escape

    return escape(text)
