"""The command `headspring`: one verb a file, thin. Nothing heavy is imported before a verb runs.

Exit codes: 0 done, 1 failed, 2 bad usage or bad input.
"""

import os
import sys

import typer

from headspring.artifacts.errors import HeadspringError
from headspring.cli import audit, convert, evaluate, generate, plan, run, serve, tokens

app = typer.Typer(
    name="headspring",
    help="A language-model laboratory: raw text to an assistant that answers, and back to where an answer came from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import headspring

        print(headspring.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
    ),
) -> None:
    pass


run.register(app)
plan.register(app)
generate.register(app)
evaluate.register(app)
serve.register(app)
convert.register(app)
audit.register(app)
app.add_typer(tokens.app, name="tokens")


def main() -> None:
    """The console entry point: errors that a user can act on are one line on stderr, never a traceback."""
    try:
        app()
    except HeadspringError as error:
        print(f"headspring: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("headspring: interrupted", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
