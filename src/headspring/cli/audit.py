"""`headspring audit`: the first place where two models differ, and why; or whether one computes the same everywhere."""

import json
from typing import Annotated, Any

import typer

from headspring.artifacts.errors import UserError


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("audit", epilog="Example: headspring audit my-export --compare original --reference transformers")(audit)


def audit(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, a folder, a .gguf file or a hub name.")],
    compare: Annotated[
        str | None, typer.Option(metavar="OTHER", help="The model to compare it with. Default: certify MODEL itself.")
    ] = None,
    reference: Annotated[
        str, typer.Option(help="What loads OTHER: headspring, or transformers (a Hugging Face folder).")
    ] = "headspring",
    tokens: Annotated[int | None, typer.Option(help="How many tokens to run. Default: enough to see beyond a window.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub name.")] = None,
    dtype: Annotated[str, typer.Option(help="Of a certificate: float32, bfloat16, or auto (as stored).")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="Of a certificate: quantize the weights first, such as int8.")] = None,
    long: Annotated[bool, typer.Option(help="A certificate over many more requests and schedules.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the finding as JSON.")] = False,
) -> None:
    """Run the same tokens through two models, and find the first part that differs and the mistake that explains it. Without
    --compare: prove, on this machine, that training, evaluation and the engine give the same log-probabilities, bit for bit.

    Exit codes: 0 they are equal, 1 they differ, 2 they cannot be compared.
    """
    if compare is None:
        if tokens is not None or reference != "headspring":
            raise UserError("--tokens and --reference are about two models: give --compare OTHER as well")
        return _certify(model, revision, dtype, quantize, long, as_json)
    if long or dtype != "auto" or quantize is not None:
        raise UserError("--dtype, --quantize and --long are about the certificate of one model: leave out --compare")
    from headspring.inference.audit import audit as audit_models

    found = audit_models(model, compare, reference=reference, length=tokens, revision=revision)
    typer.echo(json.dumps(found, indent=2) if as_json else _text(found))
    if not found["equal"]:
        raise typer.Exit(1)


def _certify(model: str, revision: str | None, dtype: str, quantize: str | None, long: bool, as_json: bool) -> None:
    from headspring.inference import LanguageModel
    from headspring.inference.engine.certificate import certify

    certificate = certify(LanguageModel.load(model, dtype=dtype, quantize=quantize, revision=revision), quick=not long)
    typer.echo(certificate.model_dump_json(indent=2) if as_json else certificate.text())
    if not certificate.holds:
        raise typer.Exit(1)


def _text(found: dict[str, Any]) -> str:
    if found["equal"]:
        lines = [f"equal at all {found['equal_places']} places, to {found['error']:.1e} of the largest value"]
    else:
        error = "is of another size" if found["error"] is None else f"differs by {found['error']:.1e} of its largest value"
        lines = [f"{found['place']} {error}; the {found['equal_places']} places before it are equal"]
        lines += [f"  in {found['other']}, {cause}" for cause in found["causes"]]
        if not found["causes"]:
            lines.append(f"  none of {found['tried']} usual mistakes explains it")
        if found["logits_error"] is not None:
            lines.append(f"  at the logits the difference is {found['logits_error']:.1e}")
    if found["windows_not_reached"]:
        windows = ", ".join(map(str, found["windows_not_reached"]))
        lines.append(f"  {found['tokens']} tokens do not reach beyond windows of {windows}: give --tokens to see them")
    return "\n".join(lines)
