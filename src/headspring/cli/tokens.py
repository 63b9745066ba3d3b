"""`headspring tokens train | explain | compare`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headspring.artifacts.errors import UserError

if TYPE_CHECKING:
    from headspring.tokenization import Tokenizer
    from headspring.tokenization.cost import ModelShape

app = typer.Typer(help="Train, explain and compare tokenizers.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print figures as JSON.")]


@app.command("train", epilog="Example: headspring tokens train my_texts/ --vocab-size 8000 --out tokenizers/mine")
def train(
    paths: Annotated[list[str], typer.Argument(help="Files, folders, globs or URLs; or stdlib, this Python's own.")],
    out: Annotated[Path, typer.Option(help="Folder for tokenizer.json and tokenizer_config.json.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens, control tokens and bytes included.")] = 4096,
    kind: Annotated[str, typer.Option(help="bpe, wordpiece or unigram.")] = "bpe",
    min_frequency: Annotated[int, typer.Option(help="A pair seen less often is not merged (bpe, wordpiece).")] = 2,
    digits: Annotated[str, typer.Option(help="Longest group: single, pairs, triples or runs.")] = "pairs",
    as_json: Json = False,
) -> None:
    """Train a tokenizer on texts."""
    from headspring.tokenization import train_tokenizer
    from headspring.tokenization.corpora import read_texts

    config = _config(kind=kind, vocab_size=vocab_size, min_frequency=min_frequency, digits=digits)
    seen = _Seen()
    tokenizer = train_tokenizer(seen.count(read_texts(paths)), config)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out)
    figures = {"folder": str(out), "vocab_size": tokenizer.vocab_size, "kind": tokenizer.kind, **vars(seen)}
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
    else:
        size = f"{seen.documents:,} documents, {seen.characters:,} characters"
        typer.echo(f"{out}: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, from {size}")


@app.command("explain", epilog='Example: headspring tokens explain "cryptocurrency" --tokenizer runs/quickstart')
def explain(
    text: Annotated[str, typer.Argument(help="The text to take apart.")],
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer's file or folder, or a run.")] = Path("runs/quickstart"),
    as_json: Json = False,
) -> None:
    """Show how a text becomes tokens: merges step by step, and the bytes of each token."""
    from rich.console import Console

    from headspring.tokenization import Tokenizer
    from headspring.tokenization.explain import explain as explain_text

    explanation = explain_text(Tokenizer.load(tokenizer), text)
    if as_json:
        typer.echo(json.dumps(explanation.to_json(), indent=2, ensure_ascii=False))
    else:
        Console().print(explanation)


@app.command("compare", epilog="Example: headspring tokens compare runs/quickstart --vocab-sizes 1000,4000,16000")
def compare(
    tokenizers: Annotated[list[Path] | None, typer.Argument(help="Tokenizer files or folders, or runs.")] = None,
    vocab_sizes: Annotated[str | None, typer.Option(help="Train BPE of these sizes too, as 1000,4000.")] = None,
    train_on: Annotated[list[str] | None, typer.Option(help="What --vocab-sizes trains on; default: stdlib.")] = None,
    corpus: Annotated[list[str] | None, typer.Option(help="Compare on these files, not the built-in texts.")] = None,
    model: Annotated[Path | None, typer.Option(help="A run: its shape gives the costs, its model is tested.")] = None,
    as_json: Json = False,
) -> None:
    """Tokenizers side by side: compression, fairness, digits, dead tokens, and what each costs the model."""
    from rich.console import Console

    from headspring.tokenization import Tokenizer, corpora
    from headspring.tokenization.compare import compare as compare_tokenizers

    if train_on and not vocab_sizes:
        raise UserError("--train-on belongs to --vocab-sizes: say which sizes to train")
    chosen: dict[str, Tokenizer] = {str(path): Tokenizer.load(path) for path in tokenizers or []}
    training = {}
    if vocab_sizes:
        texts = list(corpora.read_texts(train_on or ["stdlib"]))
        trained = _train_sizes(vocab_sizes, texts)
        training = dict.fromkeys(trained, texts)
        chosen |= trained
    if not chosen:
        raise UserError("nothing to compare: name tokenizers, or give --vocab-sizes 1000,4000")
    texts_by_name = {"corpus": list(corpora.read_texts(corpus))} if corpus else corpora.built_in()
    shape, sensitivity = (None, None) if model is None else _with_model(model)
    comparison = compare_tokenizers(chosen, texts_by_name, shape=shape, training=training, trailing_space=sensitivity)
    if as_json:
        typer.echo(json.dumps(comparison.to_json(), indent=2, ensure_ascii=False))
    else:
        Console().print(comparison)


class _Seen:
    """Counts what training read."""

    def __init__(self) -> None:
        self.documents = self.characters = 0

    def count(self, texts: Any) -> Any:
        for text in texts:
            self.documents += 1
            self.characters += len(text)
            yield text


def _config(**options: Any) -> Any:
    from pydantic import ValidationError

    from headspring.tokenization import TokenizerConfig

    try:
        return TokenizerConfig(**options)
    except ValidationError as error:
        first = error.errors()[0]
        where = "--" + str(first["loc"][0]).replace("_", "-") + ": " if first["loc"] else ""
        raise UserError(where + first["msg"].removeprefix("Value error, ")) from error


def _train_sizes(vocab_sizes: str, texts: list[str]) -> "dict[str, Tokenizer]":
    from headspring.artifacts.progress import track
    from headspring.tokenization import train_tokenizer

    try:
        sizes = [int(size) for size in vocab_sizes.split(",")]
    except ValueError as error:
        raise UserError(f"--vocab-sizes {vocab_sizes!r}: expected whole numbers such as 1000,4000") from error
    configs = [_config(vocab_size=size) for size in sizes]
    return {f"bpe-{c.vocab_size}": train_tokenizer(texts, c) for c in track(configs, "train tokenizers")}


def _with_model(path: Path) -> "tuple[ModelShape, Any]":
    """The shape that prices depend on, and how much a trailing space hurts this model."""
    from headspring.inference import LanguageModel
    from headspring.tokenization.corpora import continuations
    from headspring.tokenization.cost import ModelShape
    from headspring.tokenization.healing import trailing_space_sensitivity

    lm = LanguageModel.load(path)
    config: Any = lm.config
    attention = config.layers[0].mixer.f
    heads = attention.heads
    shape = ModelShape(
        layers=len(config.layers),
        width=config.width,
        heads=heads,
        kv_heads=attention.kv_heads or heads,
        head_dim=attention.head_dim or config.width // heads,
        tied=config.tied,
        context=config.context,
    )
    return shape, trailing_space_sensitivity(lm, continuations(limit=lm.context // 2))
