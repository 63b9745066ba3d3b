"""The engine on CUDA: tokens/s at 1, 16 and 64 requests, and the share of the memory's bandwidth that decoding alone reaches.

    python benchmarks/gpu/engine.py MODEL [--dtype bfloat16 --prompt 512 --answer 128]

Beside it `transformers` generates the same number of tokens from the same folder, where MODEL is a Hugging Face folder. The
bytes of a step alone are those of all weights that a token uses, read once. What it cannot show: the engine has no CUDA graphs
and no paged kernel of its own yet, so that launches are part of what is measured.
"""

import argparse
import random
import time
from pathlib import Path
from typing import Any

from common import bandwidth, require_gpu, write

CONCURRENT = (1, 16, 64)


def ours(torch: Any, lm: Any, count: int, options: argparse.Namespace) -> float:
    """New tokens/s of `count` requests that arrive at once."""
    from headspring.inference import SamplingParams

    draw = random.Random(0)
    params = SamplingParams(max_tokens=options.answer, temperature=0, ignore_eos=True)
    engine = lm.engine(max_sequences=count, prefix_sharing=False, context=options.prompt + options.answer)
    for _ in range(count):
        engine.submit([draw.randrange(lm.tokenizer.vocab_size) for _ in range(options.prompt)], params)
    torch.cuda.synchronize()
    start = time.perf_counter()
    engine.run()
    torch.cuda.synchronize()
    return count * options.answer / (time.perf_counter() - start)


def theirs(torch: Any, folder: Path, count: int, options: argparse.Namespace) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).to("cuda").eval()
    tokens = torch.randint(0, model.config.vocab_size, (count, options.prompt), device="cuda")
    limits = {"max_new_tokens": options.answer, "min_new_tokens": options.answer, "do_sample": False}
    model.generate(tokens, **limits)
    torch.cuda.synchronize()
    start = time.perf_counter()
    model.generate(tokens, **limits)
    torch.cuda.synchronize()
    return count * options.answer / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--answer", type=int, default=128)
    options = parser.parse_args()
    torch = require_gpu()
    import headspring

    lm = headspring.load(options.model, device="cuda", dtype=options.dtype)
    roof = bandwidth()
    found: dict[str, Any] = {"bandwidth_bytes_per_second": roof, "tokens_per_second": {}}
    for count in CONCURRENT:
        ours(torch, lm, count, options)
        one = {"headspring": ours(torch, lm, count, options)}
        if (options.model / "config.json").is_file():
            one["transformers"] = theirs(torch, options.model, count, options)
        found["tokens_per_second"][str(count)] = one
    ledger = lm.model.ledger(options.prompt)
    read = (ledger.parameters - ledger.idle_parameters) * getattr(torch, options.dtype).itemsize
    found["share_of_bandwidth_alone"] = found["tokens_per_second"]["1"]["headspring"] * read / roof
    write("engine", vars(options), found)


if __name__ == "__main__":
    main()
