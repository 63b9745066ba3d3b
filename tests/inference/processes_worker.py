"""One of two processes that hold an engine together: asks it for much, or is lost in the middle. See test_processes.py."""

import json
import os
import sys
import time
from pathlib import Path

import torch

from headspring.artifacts import HeadspringError
from headspring.inference import LanguageModel, SamplingParams, parallel
from headspring.inference.engine import processes
from headspring.inference.inspection import Inspection
from headspring.tokenization.train import TokenizerConfig, train_tokenizer

from .tiny import TEXT, tiny_model

STEER = {"site": "layers.0.residual.post", "vector": [0.5] * 32, "scale": 3.0, "start": -1}


def model() -> LanguageModel:
    tokenizer = train_tokenizer(TEXT, TokenizerConfig(vocab_size=300))
    return LanguageModel(tiny_model(tokenizer.vocab_size), tokenizer)


def everything(engine) -> dict:
    """Requests of all kinds that come and go while others run; what each of them got."""
    jobs, told, heard = {}, [], []

    def ask(name, prompt, notify=None, **options):
        asked = {key: options.pop(key) for key in ("priority", "timeout", "edits") if key in options}
        jobs[name] = engine.submit(prompt, SamplingParams(**{"max_tokens": 6, **options}), notify=notify, **asked)

    def interrupts(update):
        told.append(update.token_ids)
        if len(told) == 2:
            ask("from inside", [9, 9], temperature=0)
            engine.cancel(jobs["cancelled from inside"])

    def raises(update):
        heard.append(update)
        if len(heard) == 2:
            raise ValueError("gone")

    ask("greedy", [5, 6, 7], temperature=0, logprobs=2)
    ask("drawn", list(range(3, 60)), seed=3, max_tokens=9, notify=interrupts)
    ask("without seed", [4], ignore_eos=True)
    ask("cancelled from inside", [8, 9], temperature=0, max_tokens=12, ignore_eos=True)
    ask("raises", [11], temperature=0, max_tokens=12, ignore_eos=True, notify=raises)
    for _ in range(3):
        engine.step()
    ask("several", [12, 13], n=3, seed=5)
    ask("beams", [5, 7], beam_width=3, n=2)
    ask("cancelled", [14], max_tokens=12, ignore_eos=True)
    ask("too late", [15], timeout=0.0, max_tokens=12)
    ask("first", list(range(20, 55)), temperature=0, priority=3)
    ask("like first", list(range(20, 58)), temperature=0)
    engine.step()
    engine.cancel(jobs["cancelled"])
    ask("steered", [5, 6, 7], temperature=0, edits=Inspection(steer=[STEER], capture=["layers.1.residual.post"]))
    ask("regex", [16], structured={"regex": "[a-c]{4,8}"}, seed=1)
    ask("penalties", [17, 18], temperature=0, repetition_penalty=1.5, stop=["zz"], logit_bias={20: 2.0})
    engine.run()
    return {name: [job.outcome, [one.token_ids for one in job.generations]] for name, job in jobs.items()}


CONFIGS = {
    "plain": {},
    "small": {"chunk": 16, "max_sequences": 4, "memory": 100_000, "speculation": {"kind": "prompt_lookup"}},
}


def agree(folder: Path) -> None:
    mesh = parallel.join()
    lm = model()
    parallel.split(lm.model, mesh)
    found = {}
    for name, options in CONFIGS.items():
        engine = parallel.engine(lm, debug=True, **options)
        if engine.leads:
            with engine:
                found[name] = everything(engine)
            found[name]["stats"] = engine.stats().steps
        else:
            engine.follow()
            found[name] = {"left": len(engine.jobs), "stats": engine.stats().steps}
    (folder / f"rank{mesh.get_rank()}.json").write_text(json.dumps(found))
    parallel.leave()


def part(folder: Path, how: str) -> None:
    """Process 1 is lost after some steps, or computes something else; process 0 says what it was told."""
    mesh = parallel.join(timeout=15.0 if how == "hangs" else 60.0)
    lm, rank = model(), mesh.get_rank()
    parallel.split(lm.model, mesh)
    engine = parallel.engine(lm)
    start = time.monotonic()
    try:
        if rank == 0:
            engine.submit([5], SamplingParams(max_tokens=60, ignore_eos=True))
            engine.run()
            engine.close()
        else:
            real, steps = processes.Engine.step, []

            def step(self):
                steps.append(None)
                if len(steps) == 5:
                    leave(how, self)
                return real(self)

            processes.Engine.step = step
            engine.follow()
    except HeadspringError as error:
        (folder / f"rank{rank}.json").write_text(json.dumps([type(error).__name__, str(error), time.monotonic() - start]))
        os._exit(3)
    os._exit(0)


def leave(how: str, engine) -> None:
    if how == "dies":
        os._exit(1)
    if how == "hangs":
        time.sleep(60)
    if how == "disagrees":
        (job,) = engine.jobs.values()
        job.sequences[0].tokens[-1] += 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, how = Path(sys.argv[1]), sys.argv[2]
    agree(folder) if how == "agree" else part(folder, how)
