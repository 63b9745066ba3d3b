"""The long run of the fuzzer: `python -m tests.serving.fuzz --steps 1000000`. Ends with 0 where everything held."""

import argparse
import gc
import logging
import time

import psutil

from headspring.tokenization.train import TokenizerConfig, train_tokenizer
from tests.inference.tiny import TEXT
from tests.serving.fuzzer import World

EACH = 10_000  # steps of a world; then a new one, with another seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable()  # what breaks here was broken on purpose
    tokenizer = train_tokenizer(TEXT, TokenizerConfig(vocab_size=300))
    began, done, ends, memory = time.monotonic(), 0, {}, 0
    for number in range(-(-options.steps // EACH)):
        seed = options.seed + number
        world = World(tokenizer, seed, debug=number % 4 == 0)
        for _ in range(min(EACH, options.steps - done)):
            try:
                world.step()
            except BaseException:
                print(f"seed {seed}, step {world.steps}", flush=True)
                raise
        world.settle()
        done += world.steps
        ends = {end: ends.get(end, 0) + count for end, count in world.ends_seen.items()} | {
            end: count for end, count in ends.items() if end not in world.ends_seen
        }
        if number % 10 == 0:
            del world
            gc.collect()
            resident = psutil.Process().memory_info().rss >> 20
            memory = memory or resident
            rate = done / (time.monotonic() - began)
            print(f"{done} steps, {rate:.0f} a second, {resident} MiB (at first {memory}), {ends}", flush=True)
    seconds = time.monotonic() - began
    print(f"held: {done} steps in {seconds:.0f} s, sessions by end: {ends}")


if __name__ == "__main__":
    main()
