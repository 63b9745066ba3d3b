"""`headspring run`: the line, or a part of it."""

from typing import Annotated

import typer

HELP = """Run a recipe: raw text to a model that answers.

What is finished and unchanged is skipped; what was interrupted goes on.

Example: headspring run recipes/quickstart.yaml pretrain.steps=200 --until sft
"""


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("run", help=HELP, no_args_is_help=True)(run)


def run(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of one in recipes/.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Such as pretrain.steps=200 or data.sources=~/notes."),
    ] = None,
    run_dir: Annotated[str | None, typer.Option(help="The run's folder; runs/<recipe> where not given.")] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(metavar="STAGE", help="Make this stage, and what follows from it, again. Repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its cost; run nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan, or the stages and their metrics, as JSON.")]
    = False,
) -> None:  # fmt: skip
    import json

    if dry_run:
        from headspring.line.plan import plan

        planned = plan(recipe, overrides or (), run_dir, until, force or ())
        if as_json:
            print(json.dumps(planned.as_json(), indent=2))
        else:
            planned.print()
        return
    from headspring.line import closing
    from headspring.line.run import run as run_line

    finished = run_line(recipe, overrides or (), run_dir, until, force or (), quiet=as_json)
    if finished.leader and as_json:
        print(json.dumps(closing.as_json(finished), indent=2))
    elif finished.leader:
        closing.print_closing(finished)
