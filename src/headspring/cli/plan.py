"""`headspring plan`: what a recipe costs, before anything runs."""

from typing import Annotated

import typer

HELP = """What a recipe would cost: parameters, tokens, FLOPs, memory and time of each stage, before anything runs.

Time comes from a few steps of the model on this machine; nothing is written.

Example: headspring plan recipes/quickstart.yaml pretrain.model.width=384
"""

Recipe = Annotated[str, typer.Argument(help="A YAML file, or the name of one in recipes/.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as pretrain.steps=200 or data.sources=~/notes.")
]
RunDir = Annotated[str | None, typer.Option(help="The run's folder; runs/<recipe> where not given.")]
Until = Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")]
Force = Annotated[
    list[str] | None, typer.Option(metavar="STAGE", help="Make this stage, and what follows from it, again. Repeatable.")
]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("plan", help=HELP, no_args_is_help=True)(plan)


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    until: Until = None,
    force: Force = None,
    parts: Annotated[bool, typer.Option("--parts", help="Draw the model: shape and cost of each part.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    show(recipe, overrides, run_dir, until, force, as_json=as_json, details=True, parts=parts)


def show(
    recipe: str,
    overrides: list[str] | None,
    run_dir: str | None,
    until: str | None,
    force: list[str] | None,
    *,
    as_json: bool,
    details: bool,
    parts: bool = False,
) -> None:
    """Print the plan of `run` with the same arguments: a table, with `details` what memory is made of, or JSON."""
    import json

    from headspring.line.plan import drawings
    from headspring.line.plan import plan as planned_line

    planned = planned_line(recipe, overrides or (), run_dir, until, force or ())
    drawn = drawings(recipe, overrides or ()) if parts else {}
    if as_json:
        print(json.dumps(planned.as_json() | ({"parts": drawn} if parts else {}), indent=2))
        return
    planned.print()
    if details:
        print()
        planned.print_memory()
    for stage, text in drawn.items():
        print(f"\n{stage}\n{text}")
