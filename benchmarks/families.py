"""The history of the field in one table: every family at equal parameters and equal tokens, on the text that Python ships.

    python benchmarks/families.py [--steps 200 --seeds 3 --families lstm mamba --minutes 15]

Each row is the pretrain stage itself (`headspring.training.pretrain`): the same samples in the same order, tokenizer, loop
and optimizer; only `pretrain.model` differs, whose width is searched so that it has about `--parameters` of them. The n-gram
model is counted over the same samples and has as many numbers as it has seen n-grams.

Reported: bits per byte of the same held-out documents (of encoders, nats a hidden token: what they guess is seen from both
sides, which is no compression), tokens/s in training and in generation (one text at a time), the highest memory of the process
above what it had before, and the bytes of state. A row runs in a process of its own, with one thread.

The file of results grows by one row at a time, all families of a seed before the next seed; rows that are there are not made
again, so that the benchmark can be run in pieces. `--draw` makes table and plot of what is there and trains nothing.
"""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
# What rows must share to be comparable.
SHAPE = ("steps", "batch", "length", "vocab", "parameters", "optimizer", "precision")
PICTURE = "![Bits per byte, speed of training and state, from the oldest idea to the newest](images/families.png)"
BEGIN, END = "<!-- results of benchmarks/families.py -->", "<!-- end of results -->"
PROMPT = "def read_file(path):\n    "

Size = Callable[[int], dict[str, Any]]


def stack(depth: int, **settings: Any) -> Size:
    return lambda width: {"width": width, "depth": depth, **settings}


def original(width: int) -> dict[str, Any]:
    """The decoder half of the first Transformer: norms after the sum, sinusoids, ReLU."""
    norm = {"kind": "layer_norm"}
    attention = {"kind": "attention", "heads": 4, "position": {"kind": "nope"}, "qk_norm": None}
    mlp = {"kind": "mlp", "hidden": 4 * width, "activation": "relu", "bias": True}
    layer = {"mixer": {"f": attention, "pre": None, "out": norm}, "feedforward": {"f": mlp, "pre": None, "out": norm}}
    embed = {"scale": width**0.5, "positions": {"kind": "sinusoidal"}}
    return {"kind": "decoder", "width": width, "layers": [layer] * 4, "norm": None, "embed": embed}


def gpt2(width: int) -> dict[str, Any]:
    """Norms before, learned positions, GELU."""
    norm = {"kind": "layer_norm"}
    nope = {"kind": "nope"}
    attention = {"kind": "attention", "heads": 4, "position": nope, "qk_norm": None, "bias": True, "out_bias": True}
    mlp = {"kind": "mlp", "hidden": 4 * width, "activation": "gelu_tanh", "bias": True}
    layer = {"mixer": {"f": attention, "pre": norm}, "feedforward": {"f": mlp, "pre": norm}}
    return {"kind": "decoder", "width": width, "layers": [layer] * 4, "norm": norm, "embed": {"positions": {"kind": "learned"}}}


# name → (year of the idea, model by its width)
FAMILIES: dict[str, tuple[int, Size]] = {
    "5-gram, Kneser–Ney": (1995, lambda width: {"kind": "ngram", "order": 5}),
    "LSTM": (1997, stack(2, kind="lstm")),
    "neural n-gram": (2003, lambda width: {"kind": "neural_ngram", "width": width}),
    "simple RNN": (2010, stack(2, kind="rnn")),
    "GRU": (2014, stack(2, kind="gru")),
    "Transformer (2017)": (2017, original),
    "encoder, masked": (2018, stack(4)),
    "GPT-2": (2019, gpt2),
    "sliding window": (2020, stack(4, window=64)),
    "linear attention": (2020, stack(4, kind="linear_attention")),
    "ALiBi": (2021, stack(4, position={"kind": "alibi"})),
    "no positions": (2022, stack(4, position={"kind": "nope"})),
    "Llama with QK-norm": (2023, stack(4)),
    "grouped queries": (2023, stack(4, kv_heads=1)),
    "Mamba": (2023, stack(5, kind="mamba")),
    "mixture of experts": (2024, stack(4, kind="moe", experts=4, top=2)),
    "latent attention": (2024, stack(4, kind="mla")),
    "Griffin": (2024, lambda width: {"kind": "hybrid", "width": width, "pattern": "RRA", "repeat": 1}),
    "Jamba": (2024, lambda width: {"kind": "hybrid", "width": width, "pattern": "MMA", "repeat": 2}),
    "Mamba-2": (2024, stack(5, kind="mamba2", head_dim=32)),
    "gated delta rule": (2024, stack(4, kind="gated_delta")),
}
MASKED = "encoder, masked"


def sized(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The architecture of a family with the width, a multiple of 16, that comes nearest to the parameters wanted."""
    from headspring.training.architectures import Architecture

    def parameters(width: int) -> int:
        import torch

        with torch.device("meta"):
            return Architecture.choose(FAMILIES[name][1](width)).decoder(options.vocab).module().num_parameters()

    width = min(range(32, 641, 16), key=lambda width: abs(parameters(width) - options.parameters))
    return {**FAMILIES[name][1](width), "context": options.length}


def config_of(name: str, options: argparse.Namespace):
    from headspring.training.pretrain import PretrainConfig

    settings = {"model": sized(name, options), "steps": options.steps, "batch_size": options.batch, "validation_samples": 128}
    if settings["model"]["kind"] == "ngram":
        return PretrainConfig.model_validate(settings)
    settings |= {"optimizer": {"kind": options.optimizer}, "validate_every": 10**6, "compile": "never"}
    settings |= {"precision": options.precision, "checkpoint_every": 10**6, "spike": 1000.0}
    if name == MASKED:
        settings["objective"] = "masked"
    return PretrainConfig.model_validate(settings)


def measure(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    import torch

    from headspring.inference.language_model import LanguageModel
    from headspring.training.loop import training_flops
    from headspring.training.pretrain import pretrain

    torch.set_num_threads(1)
    config, before = config_of(name, options), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        metrics = pretrain(config, options.work / "tokens", options.work / "tokenizer", Path(folder), seed)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        lm = LanguageModel.load(folder)
    cost, after = lm.model.ledger(options.length), metrics["validation_after"]
    row = {
        "family": name, "seed": seed, "year": FAMILIES[name][0], "parameters": metrics["parameters"],
        "active_parameters": metrics["active_parameters"], "width": lm.model.config.width, "loss": after["loss"],
        "training_flops": 0.0 if lm.model.config.counted else metrics["tokens"] * training_flops(lm.model, options.length),
        "training_seconds": metrics["train_seconds"], "training_tokens_per_second": metrics["tokens_per_second"],
        "tokens": metrics["tokens"], "peak_megabytes": peak / 1024,
        "state_bytes_per_token": cost.state_bytes, "fixed_state_bytes": cost.fixed_state_bytes,
    }  # fmt: skip
    if name == MASKED:
        return row | {"masked_accuracy": after["accuracy"]}
    return row | {"bits_per_byte": after["bits_per_byte"], "generated_tokens_per_second": generation_speed(lm, options)}


def generation_speed(lm: Any, options: argparse.Namespace) -> float:
    """Tokens per second after one prompt, the better of two."""
    wanted = {"max_tokens": options.length // 2, "temperature": 0.0, "ignore_eos": True}
    best = 0.0
    for _ in range(2):
        started = time.perf_counter()
        made = lm.generate([PROMPT], **wanted)[0]
        best = max(best, len(made.token_ids) / (time.perf_counter() - started))
    return best


def begin(name: str, seed: int, options: argparse.Namespace) -> tuple[Any, Any]:
    """`measure` in a fork of this process, which has imported everything and computed nothing; and where its row arrives."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)

    def work() -> None:
        ours.close()
        try:
            theirs.send(measure(name, seed, options))
        except Exception as error:
            theirs.send({"family": name, "seed": seed, "failed": f"{type(error).__name__}: {error}"[:300]})

    process = fork.Process(target=work)
    process.start()
    theirs.close()
    return process, ours


def rows_of(wanted: list[tuple[str, int]], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows as they are finished, `--jobs` at a time; none is begun after `--minutes`."""
    started, running, waiting = time.monotonic(), {}, list(wanted)
    while waiting or running:
        late = options.minutes is not None and time.monotonic() - started > 60 * options.minutes
        if late and waiting:
            print("out of time; the same command goes on from here", flush=True)
            waiting.clear()
        while waiting and len(running) < options.jobs:
            process, pipe = begin(*waiting[0], options)
            running[pipe] = process, *waiting.pop(0)
        for pipe in multiprocessing.connection.wait(list(running)):
            process, name, seed = running.pop(pipe)
            try:
                row = pipe.recv()
            except EOFError:
                row = {"family": name, "seed": seed, "failed": "the process ended without a word"}
            process.join()
            yield row


# ---- what is there


def prepare(options: argparse.Namespace) -> None:
    """Documents, tokenizer and tokens, once."""
    from headspring.line.run import run

    recipe = "recipe: families\ndata:\n  sources: {stdlib: {kind: stdlib}, topics: {kind: topics}}\n"
    recipe += f"tokenizer: {{vocab_size: {options.vocab}, mask: true}}\ntokens:\n"
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.work.parent / f"{options.work.name}.yaml"
    path.write_text(recipe)
    run(path, run_dir=options.work, quiet=True)


def read(options: argparse.Namespace) -> dict[str, Any]:
    """The results so far. Rows of other settings end the program: they belong in another file."""
    from headspring.artifacts.environment import environment

    settings = {key: getattr(options, key) for key in SHAPE}
    if not options.out.is_file():
        return {"settings": settings, "environment": environment(), "rows": []}
    found = json.loads(options.out.read_text())
    if found["settings"] != settings and not options.draw:
        raise SystemExit(f"{options.out} has rows of other settings ({found['settings']}); give another --out")
    return found


def mean(rows: Iterable[dict[str, Any]], key: str) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    values = [row[key] for row in rows]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def by_family(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    done = [row for row in results["rows"] if "failed" not in row]
    grouped = {name: [row for row in done if row["family"] == name] for name in FAMILIES}
    return {name: rows for name, rows in grouped.items() if rows}


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| family | year | parameters | bits per byte | seeds | FLOPs | trains, tokens/s | writes, tokens/s | memory, MB "
        "| state a token, B | state, B |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for name, rows in by_family(results).items():
        first = rows[0]
        quality = f"({mean(rows, 'loss')[0]:.2f} nats a hidden token)"
        writes = "–"
        if "bits_per_byte" in first:
            average, spread = mean(rows, "bits_per_byte")
            deviation = f" ± {spread:.3f}" if len(rows) > 1 else ""
            quality, writes = f"{average:.3f}{deviation}", f"{mean(rows, 'generated_tokens_per_second')[0]:,.0f}"
        flops = f"{first['training_flops']:.1e}" if first["training_flops"] else "counts"
        numbers = [f"{mean(rows, key)[0]:,.0f}" for key in ("training_tokens_per_second", "peak_megabytes")]
        state = f"{first['state_bytes_per_token']:,.0f} | {first['fixed_state_bytes']:,.0f}"
        lines.append(
            f"| {name} | {first['year']} | {mean(rows, 'parameters')[0] / 1e6:.2f} M | {quality} | {len(rows)} | {flops} "
            f"| {numbers[0]} | {writes} | {numbers[1]} | {state} |"
        )
    settings = results["settings"]
    tokens = settings["steps"] * settings["batch"] * settings["length"]
    caption = f"{tokens:,} tokens of training, sequences of {settings['length']}, one thread; ± is the deviation over seeds."
    return "\n".join([*lines, "", caption])


def plot(results: dict[str, Any], path: Path) -> None:
    """Families from the oldest idea to the newest; three columns of points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grouped = {name: rows for name, rows in by_family(results).items() if "bits_per_byte" in rows[0]}
    names = list(grouped)[::-1]
    length = results["settings"]["length"]
    columns = {
        "bits per byte": lambda row: row["bits_per_byte"],
        "tokens/s in training": lambda row: row["training_tokens_per_second"],
        f"kilobytes of state after {length} tokens": lambda row: (
            row["state_bytes_per_token"] * length + row["fixed_state_bytes"]
        ) / 1024,
    }  # fmt: skip
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 0.28 * len(names) + 1.2), sharey=True)
    for axes, (title, value) in zip(panels, columns.items(), strict=True):
        for place, name in enumerate(names):
            values = [value(row) for row in grouped[name]]
            axes.plot(values, [place] * len(values), ".", color="lightgrey", zorder=1)
            axes.plot(statistics.fmean(values), place, "o", color="teal", zorder=2)
        axes.set_title(title, fontsize=9)
        axes.grid(axis="x", alpha=0.3)
        if title != "bits per byte":
            axes.set_xscale("log" if "training" in title else "symlog")
    panels[0].set_yticks(range(len(names)), [f"{name}  {grouped[name][0]['year']}" for name in names], fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def publish(results: dict[str, Any], options: argparse.Namespace) -> None:
    """The table into the page, between its marks, and the plot beside it."""
    if not by_family(results):
        return
    text = options.page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    options.page.write_text(f"{before}{BEGIN}\n{table(results)}\n\n{PICTURE}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")
    plot(results, options.plot)
    print(table(results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES, metavar="NAME")
    for key, default in (("seeds", 3), ("steps", 200), ("batch", 4), ("length", 256), ("vocab", 1024), ("parameters", 10**6)):
        parser.add_argument(f"--{key}", type=int, default=default)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon", help="with its default rates")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of activations")
    parser.add_argument("--minutes", type=float, help="begin no row after so many")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time; no more than there are idle cores")
    parser.add_argument("--draw", action="store_true", help="only table and plot")
    parser.add_argument("--work", type=Path, default=Path("runs/families"), help="folder of the corpus and its tokens")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "families.json")
    parser.add_argument("--page", type=Path, default=DOCS / "families.md")
    parser.add_argument("--plot", type=Path, default=DOCS / "images" / "families.png")
    return parser.parse_args()


def main() -> None:
    options, started = parse(), time.monotonic()
    from headspring.artifacts.files import write_json
    from headspring.inference import language_model  # noqa: F401 (forks have it then)
    from headspring.training import pretrain  # noqa: F401

    results = read(options)
    if not options.draw:
        prepare(options)
    wanted = [(name, seed) for seed in range(options.seeds) for name in options.families]
    done = {(row["family"], row["seed"]) for row in results["rows"] if "failed" not in row}
    for row in rows_of([] if options.draw else [pair for pair in wanted if pair not in done], options):
        same = [old for old in results["rows"] if (old["family"], old["seed"]) == (row["family"], row["seed"])]
        results["rows"] = [old for old in results["rows"] if old not in same] + [row]
        write_json(options.out, results)
        shown = row.get("failed") or f"{row.get('bits_per_byte', row['loss']):.3f}"
        speed = f"{row.get('training_tokens_per_second', 0):,.0f} tokens/s"
        print(f"{row['family']:22} seed {row['seed']}  {shown}  {speed}  {time.monotonic() - started:.0f} s", flush=True)
    publish(results, options)


if __name__ == "__main__":
    main()
