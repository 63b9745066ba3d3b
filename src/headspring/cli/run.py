"""`headspring run`: the line, or a part of it."""

from typing import Annotated

import typer

from headspring.cli.plan import Force, Overrides, Recipe, RunDir, Until, show

HELP = """Run a recipe: raw text to a model that answers.

What is finished and unchanged is skipped; what was interrupted goes on.

Example: headspring run recipes/quickstart.yaml pretrain.steps=200 --until sft
"""


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("run", help=HELP, no_args_is_help=True)(run)


def run(
    recipe: Recipe,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    until: Until = None,
    force: Force = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its cost; run nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan, or the stages and their metrics, as JSON.")]
    = False,
) -> None:  # fmt: skip
    import json

    if dry_run:
        show(recipe, overrides, run_dir, until, force, as_json=as_json, details=False)
        return
    from headspring.line import closing
    from headspring.line.run import run as run_line

    finished = run_line(recipe, overrides or (), run_dir, until, force or (), quiet=as_json)
    if finished.leader and as_json:
        print(json.dumps(closing.as_json(finished), indent=2))
    elif finished.leader:
        closing.print_closing(finished)
