"""Pretraining on a CPU: this project against a plain reference loop and Hugging Face Trainer, in turns, in one run.

    python benchmarks/pretraining.py [--steps 200 --turn 20 --width 256 --depth 6 ...]

Every contender is a process of its own that trains for `--turn` steps when it is told to and then waits, so that they
alternate (A B C D A B C D …) on the same machine in the same minutes. All see the same batches of the same tokens in the
same order, in bf16 with the same threads. After every turn each measures its loss on the same held-out tokens (that time does
not count). Reported: tokens/s as the median over turns with the spread, and the time each needs to reach the best peer's
final loss.

Contenders: `headspring` (Muon, as in its recipes); `headspring-adamw` (the same with the peers' optimizer, so that a step is
the same work); `reference` (GPT-2 block, AdamW, autocast, in the style of nanoGPT) and `reference-compiled` (the same under
torch.compile); `trainer` (transformers.Trainer on the same architecture as ours, Qwen3) and `trainer-compiled`. Each peer
may take its learning rate from a list: the best final loss counts.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
OURS = ("headspring", "headspring-adamw")
CONTENDERS = (*OURS, "reference", "reference-compiled", "trainer", "trainer-compiled")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--turn", type=int, default=20)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--peer-rate", type=float, default=2e-3, help="AdamW's learning rate of the peers")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "pretraining.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(folder: Path, vocab: int) -> None:
    """The embedded default corpus as token shards."""
    from headspring.data.prepare import DataConfig, prepare
    from headspring.data.shards import TokensConfig, write_tokens
    from headspring.data.store import read_documents
    from headspring.tokenization.train import TokenizerConfig, train_tokenizer

    prepare(DataConfig.model_validate({"sources": {"stdlib": {"kind": "stdlib"}}}), folder / "data")
    texts = (document.text for document in read_documents(folder / "data", split="train"))
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=vocab))
    tokenizer.save(folder / "tokenizer")
    write_tokens(TokensConfig(), folder / "data", tokenizer, folder / "tokens")


class Worker:
    """The driver's end of a contender's process."""

    def __init__(self, name: str, data: Path):
        self.name = name
        command = [sys.executable, __file__, "--worker", name, "--data", str(data), *sys.argv[1:]]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.turns: list[dict] = []
        self.ready = self._read()

    def _read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith('{"turn"'):
                return json.loads(line)
        raise SystemExit(f"{self.name} ended early with code {self.process.wait()}")

    def turn(self) -> dict:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.turns.append(self._read())
        return self.turns[-1]


def summarise(worker: Worker, tokens_per_turn: int) -> dict:
    """Median and spread of tokens/s over the turns after the first, and the loss against training seconds."""
    rates = sorted(tokens_per_turn / turn["seconds"] for turn in worker.turns[1:])
    curve, elapsed = [], 0.0
    for turn in worker.turns:
        elapsed += turn["seconds"]
        curve.append((round(elapsed, 2), turn["loss"]))
    return {
        "parameters": worker.ready["parameters"],
        "tokens_per_second": {"median": statistics.median(rates), "min": rates[0], "max": rates[-1]},
        "first_turn_seconds": worker.turns[0]["seconds"],
        "seconds_and_loss": curve,
        "final_loss": curve[-1][1],
        "seconds": curve[-1][0],
    }


def seconds_to(curve: list[tuple[float, float]], loss: float) -> float | None:
    """Training seconds until `loss` was reached, interpolated between turns; None where it never was."""
    before = (0.0, float("inf"))
    for seconds, value in curve:
        if value <= loss:
            if before[1] == float("inf") or before[1] == value:
                return seconds
            return before[0] + (seconds - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (seconds, value)
    return None


def against(ours: dict, fastest: dict, best: dict) -> dict[str, float | None]:
    """Our speed over the fastest peer's, and our time to the loss that the best peer ends at, over its time."""
    needed = seconds_to(ours["seconds_and_loss"], best["final_loss"])
    return {
        "speed_over_fastest": ours["tokens_per_second"]["median"] / fastest["tokens_per_second"]["median"],
        "seconds_to_best_loss": needed,
        "time_over_best": None if needed is None else needed / best["seconds"],
    }


def main() -> None:
    arguments = parse()
    if arguments.worker:
        sys.path.insert(0, str(HERE))
        import pretraining_contenders

        pretraining_contenders.work(arguments)
        return
    from headspring.artifacts.environment import environment
    from headspring.artifacts.files import write_json

    with tempfile.TemporaryDirectory() as temporary:
        prepare(Path(temporary), arguments.vocab)
        workers = [Worker(name, Path(temporary)) for name in arguments.contenders]
        for turn in range(arguments.steps // arguments.turn):
            for worker in workers:
                seen = worker.turn()
                rate = arguments.turn * arguments.batch * arguments.length / seen["seconds"]
                print(f"turn {turn}  {worker.name:20} {rate:9,.0f} tokens/s  held-out loss {seen['loss']:.4f}", flush=True)
        for worker in workers:
            worker.process.stdin.close()
            worker.process.wait(60)
    tokens_per_turn = arguments.turn * arguments.batch * arguments.length
    rows = {worker.name: summarise(worker, tokens_per_turn) for worker in workers}
    result = {"settings": vars(arguments) | {"out": None}, "environment": environment(), "contenders": rows}
    peers = {name: row for name, row in rows.items() if name not in OURS}
    if peers:
        fastest = max(peers, key=lambda name: peers[name]["tokens_per_second"]["median"])
        best = min(peers, key=lambda name: peers[name]["final_loss"])
        result |= {"fastest_peer": fastest, "best_peer": best}
        result["against_peers"] = {name: against(rows[name], peers[fastest], peers[best]) for name in OURS if name in rows}
        for name, found in result["against_peers"].items():
            print(f"{name}: {found['speed_over_fastest']:.2f} × the tokens/s of {fastest}")
            print(f"{best}'s loss in {found['seconds_to_best_loss']} s of its {peers[best]['seconds']} s")
    write_json(arguments.out, json.loads(json.dumps(result, default=str)))
    print(arguments.out)


if __name__ == "__main__":
    main()
