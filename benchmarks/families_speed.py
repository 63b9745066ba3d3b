"""Training speed of each family against its reference in transformers: the same weights, tokens and loss, in turns, in one run.

    python benchmarks/families_speed.py                                  every pair, eager and compiled
    python benchmarks/families_speed.py --pairs bert t5 --modes eager    some of them

A pair is a function that gives the reference's config (`pair` registers it); our model is the reference's folder, read by its
dialect, so that both compute one function, which is checked on the loss. Beside a compiled reference ours runs compiled and
as it is, and the faster counts: so does the training loop, which measures what compiling gains (`compile: auto`). A step is
forward and backward. Turns alternate, each measured by the clock and by the processor, which counts no neighbour's work;
reported are medians in tokens/s and the median ratio of neighbouring turns with its range. A contender that is slower than
`--patience` seconds a step gets as many turns as fit, at least one.

Every pair and mode runs in a process of its own, under a time limit: what does not compile in that time is reported so. The
results are one file, written after every pair: a run goes on where the last one was stopped, and skips what is there
(`--again` measures it anew). One thread, unless OMP_NUM_THREADS says otherwise.
"""

import argparse
import copy
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

HERE = Path(__file__).parent
PAIRS: dict[str, Callable[[argparse.Namespace], Any]] = {}


def pair(make: Callable[[argparse.Namespace], Any]) -> Callable[[argparse.Namespace], Any]:
    """Register a function from the sizes asked for to the config of the model in transformers."""
    PAIRS[make.__name__] = make
    return make


@pair
def mamba(sizes: argparse.Namespace) -> Any:
    from transformers import MambaConfig

    return MambaConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.width, num_hidden_layers=sizes.layers, state_size=16, tie_word_embeddings=True
    )


@pair
def mamba2(sizes: argparse.Namespace) -> Any:
    from transformers import Mamba2Config

    return Mamba2Config(
        vocab_size=sizes.vocab, hidden_size=sizes.width, num_hidden_layers=sizes.layers, state_size=64, head_dim=64,
        num_heads=2 * sizes.width // 64, n_groups=1, chunk_size=64, tie_word_embeddings=True,
    )  # fmt: skip


def common(sizes: argparse.Namespace, hidden: float = 8 / 3) -> dict[str, Any]:
    """What the Llama line calls its sizes."""
    heads = sizes.width // 64
    return {
        "vocab_size": sizes.vocab, "hidden_size": sizes.width, "num_hidden_layers": sizes.layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "intermediate_size": 32 * round(hidden * sizes.width / 32), "head_dim": 64,
        "max_position_embeddings": 2 * sizes.length,
    }  # fmt: skip


@pair
def gpt2(sizes: argparse.Namespace) -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=sizes.vocab, n_embd=sizes.width, n_layer=sizes.layers, n_head=sizes.width // 64,
        n_positions=2 * sizes.length, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip


@pair
def llama(sizes: argparse.Namespace) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**common(sizes))


@pair
def qwen3(sizes: argparse.Namespace) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**common(sizes))


@pair
def gemma2(sizes: argparse.Namespace) -> Any:
    from transformers import Gemma2Config

    return Gemma2Config(**common(sizes), query_pre_attn_scalar=64, sliding_window=sizes.length // 4)


@pair
def mixtral(sizes: argparse.Namespace) -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(**common(sizes, 4 / 3), num_local_experts=8, num_experts_per_tok=2)


@pair
def mistral(sizes: argparse.Namespace) -> Any:
    from transformers import MistralConfig

    return MistralConfig(**common(sizes), sliding_window=sizes.length // 4)


@pair
def qwen2(sizes: argparse.Namespace) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**{key: value for key, value in common(sizes).items() if key != "head_dim"})


@pair
def phi3(sizes: argparse.Namespace) -> Any:
    from transformers import Phi3Config

    settings = {key: value for key, value in common(sizes).items() if key != "head_dim"}
    return Phi3Config(**settings, pad_token_id=0, original_max_position_embeddings=2 * sizes.length)


@pair
def gemma3(sizes: argparse.Namespace) -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(**common(sizes), query_pre_attn_scalar=64, sliding_window=sizes.length // 4)


@pair
def gpt_neox(sizes: argparse.Namespace) -> Any:
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.width, num_hidden_layers=sizes.layers, intermediate_size=4 * sizes.width,
        num_attention_heads=sizes.width // 64, max_position_embeddings=2 * sizes.length,
    )  # fmt: skip


@pair
def opt(sizes: argparse.Namespace) -> Any:
    from transformers import OPTConfig

    return OPTConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.width, num_hidden_layers=sizes.layers, ffn_dim=4 * sizes.width,
        num_attention_heads=sizes.width // 64, max_position_embeddings=2 * sizes.length, word_embed_proj_dim=sizes.width,
        dropout=0.0,
    )  # fmt: skip


@pair
def bloom(sizes: argparse.Namespace) -> Any:
    from transformers import BloomConfig

    return BloomConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.width, n_layer=sizes.layers, n_head=sizes.width // 64,
        seq_length=2 * sizes.length,
    )  # fmt: skip


@pair
def falcon(sizes: argparse.Namespace) -> Any:
    from transformers import FalconConfig

    return FalconConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.width, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.width // 64, max_position_embeddings=2 * sizes.length,
    )  # fmt: skip


@pair
def qwen3_moe(sizes: argparse.Namespace) -> Any:
    from transformers import Qwen3MoeConfig

    hidden = 32 * round(sizes.width / 24)
    return Qwen3MoeConfig(**common(sizes), num_experts=8, num_experts_per_tok=2, moe_intermediate_size=hidden)


@pair
def gpt_oss(sizes: argparse.Namespace) -> Any:
    from transformers import GptOssConfig

    settings = common(sizes, 4 / 3) | {"sliding_window": sizes.length // 4}
    return GptOssConfig(**settings, num_local_experts=8, num_experts_per_tok=2)


@pair
def deepseek_v3(sizes: argparse.Namespace) -> Any:
    from transformers import DeepseekV3Config

    settings = {key: value for key, value in common(sizes).items() if key != "head_dim"}
    return DeepseekV3Config(
        **settings, q_lora_rank=sizes.width // 2, kv_lora_rank=sizes.width // 4, qk_nope_head_dim=64, qk_rope_head_dim=32,
        v_head_dim=64, n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1,
        moe_intermediate_size=32 * round(sizes.width / 32), first_k_dense_replace=1,
    )  # fmt: skip


def two_sided(sizes: argparse.Namespace) -> dict[str, Any]:
    """What BERT and RoBERTa call their sizes."""
    return {
        "vocab_size": sizes.vocab, "hidden_size": sizes.width, "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.width // 64, "intermediate_size": 4 * sizes.width,
        "max_position_embeddings": 2 * sizes.length, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip


@pair
def bert(sizes: argparse.Namespace) -> Any:
    from transformers import BertConfig

    return BertConfig(**two_sided(sizes))


@pair
def roberta(sizes: argparse.Namespace) -> Any:
    from transformers import RobertaConfig

    return RobertaConfig(**two_sided(sizes), type_vocab_size=1, pad_token_id=0)


@pair
def modernbert(sizes: argparse.Namespace) -> Any:
    from transformers import ModernBertConfig

    return ModernBertConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.width, num_hidden_layers=sizes.layers, intermediate_size=2 * sizes.width,
        num_attention_heads=sizes.width // 64, max_position_embeddings=2 * sizes.length, global_attn_every_n_layers=2,
        local_attention=sizes.length // 4, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip


@pair
def t5(sizes: argparse.Namespace) -> Any:
    from transformers import T5Config

    return T5Config(
        vocab_size=sizes.vocab, d_model=sizes.width, num_layers=sizes.layers, d_kv=64, num_heads=sizes.width // 64,
        d_ff=4 * sizes.width, dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip


@pair
def bart(sizes: argparse.Namespace) -> Any:
    from transformers import BartConfig

    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", sizes.layers), ("attention_heads", sizes.width // 64), ("ffn_dim", 4 * sizes.width))
    }
    return BartConfig(
        vocab_size=sizes.vocab, d_model=sizes.width, max_position_embeddings=2 * sizes.length, dropout=0.0, **sides,
    )  # fmt: skip


# The others take scaled_dot_product_attention, their fastest.
NEEDS_EAGER = ("gemma2", "mamba", "mamba2", "gpt_oss", "bloom")
GUESSES_HIDDEN = ("bert", "roberta", "modernbert")
READS_A_SOURCE = ("t5", "bart")


def build(name: str, sizes: argparse.Namespace) -> tuple[Any, Any]:
    """Ours and theirs, with the same weights."""
    import transformers

    from headspring.models import kernels
    from headspring.models.dialects import import_huggingface

    kernels.library()  # built once for a machine, which is no part of a step
    torch.manual_seed(0)
    attention = "eager" if name in NEEDS_EAGER else "sdpa"
    kind = "MaskedLM" if name in GUESSES_HIDDEN else "Seq2SeqLM" if name in READS_A_SOURCE else "CausalLM"
    made = getattr(transformers, f"AutoModelFor{kind}")
    theirs = made.from_config(PAIRS[name](sizes), attn_implementation=attention).float().train()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = import_huggingface(folder).train()
    return ours, theirs


def losses(name: str, tokens: torch.Tensor) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """The mean loss of a model of ours, and of one of theirs, on the same tokens (B, T + 1): of the next token, of every token
    at its own place (an encoder hides some, which costs no less), or of an answer as long as its source."""
    from headspring.models.scoring import cross_entropy_sum

    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    source = {"source": targets} if name in READS_A_SOURCE else {}
    if name in GUESSES_HIDDEN:
        reference = lambda model: model(inputs, labels=targets).loss
    elif name in READS_A_SOURCE:
        reference = lambda model: model(targets, decoder_input_ids=inputs, labels=targets, use_cache=False).loss
    else:
        reference = lambda model: model(tokens, labels=tokens, use_cache=False).loss
    return lambda model: cross_entropy_sum(model, model(inputs, **source), targets) / targets.numel(), reference


def steps(name: str, ours: Any, theirs: Any, sizes: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """A step of each: forward and backward of the mean loss."""
    if sizes.bf16:
        ours.compute_dtype = torch.bfloat16
    text = {"headspring": ours, "transformers": theirs}
    if sizes.compiled:
        text["headspring compiled"] = copy.deepcopy(ours)
        for block in text["headspring compiled"].blocks():
            block.compile()
        text["transformers"] = torch.compile(theirs)

    own, reference = losses(name, torch.randint(3, sizes.vocab, (sizes.batch, sizes.length + 1)))

    def step(contender: str) -> float:
        model = text[contender]
        model.zero_grad()
        if contender == "transformers":
            with torch.autocast("cpu", torch.bfloat16, enabled=sizes.bf16):
                loss = reference(model)
        else:
            loss = own(model)
        torch.autograd.backward(loss)
        return float(loss.detach())

    return {contender: functools.partial(step, contender) for contender in text}


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


def measure(name: str, sizes: argparse.Namespace) -> dict[str, Any]:
    """Seconds of turns, after one that does not count (in eager mode it does if it took longer than the patience)."""
    ours, theirs = build(name, sizes)
    contenders = steps(name, ours, theirs, sizes)
    turns: dict[str, list[dict[str, float]]] = {contender: [] for contender in contenders}
    found = {}
    for turn in range(sizes.turns + 1):
        for contender, step in contenders.items():
            if any(taken["wall"] > sizes.patience for taken in turns[contender]):
                continue
            started = {clock: now() for clock, now in CLOCKS.items()}
            found[contender] = step()
            taken = {clock: now() - started[clock] for clock, now in CLOCKS.items()}
            if turn or (taken["wall"] > sizes.patience and not sizes.compiled):
                turns[contender].append(taken)
    allowed = 2e-2 if sizes.bf16 else 1e-4
    assert abs(found["headspring"] - found["transformers"]) < allowed * found["transformers"], found
    return {clock: compared(turns, clock, sizes.batch * sizes.length) for clock in CLOCKS}


def compared(turns: dict[str, list[dict[str, float]]], clock: str, tokens: int) -> dict[str, Any]:
    """The turns by one clock: the faster of ours against theirs."""
    seconds = {contender: [taken[clock] for taken in each] for contender, each in turns.items()}
    best = min((name for name in seconds if name != "transformers"), key=lambda name: statistics.median(seconds[name]))
    ratios = [b / a for a, b in zip(seconds[best], seconds["transformers"])]
    return {
        "ours": best,
        "tokens_per_second": {contender: tokens / statistics.median(taken) for contender, taken in seconds.items()},
        "turns": {contender: len(taken) for contender, taken in seconds.items()},
        "times_faster": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
    }


def in_a_process(name: str, mode: str, sizes: argparse.Namespace) -> dict[str, Any]:
    """`measure`, or why not."""
    options = [f"--{key}={getattr(sizes, key)}" for key in ("length", "batch", "width", "layers", "vocab", "turns", "patience")]
    flags = [flag for flag, given in (("--compiled", mode == "compiled"), ("--bf16", sizes.bf16)) if given]
    command = [sys.executable, __file__, "--worker", name, *options, *flags]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=sizes.limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"no result after {sizes.limit} s"}
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 else {"failed": (done.stderr.strip().splitlines() or ["?"])[-1][:200]}


def line(row: dict[str, Any]) -> str:
    """A row of results as it is printed."""
    start = f"{row['family']:<12} {row['mode']:<9}"
    if "failed" in row:
        return f"{start} {row['failed']}"
    parts = []
    for clock in CLOCKS:
        found = row[clock]
        speeds = " ".join(f"{found['tokens_per_second'][contender]:>9,.0f}" for contender in (found["ours"], "transformers"))
        parts.append(f"{speeds} {found['times_faster']:>6.2f}× ({found['range'][0]:.2f} – {found['range'][1]:.2f})")
    return f"{start} {'  '.join(parts)}"


def results(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run with these settings has left, or nothing yet."""
    if not path.exists():
        return about | {"rows": []}
    found = json.loads(path.read_text(encoding="utf-8"))
    differ = [key for key, value in about.items() if found.get(key) != value]
    if differ:
        raise SystemExit(f"{path} was measured with another {' and '.join(differ)}: name another --out, or remove it")
    return found


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=PAIRS)
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--bf16", action="store_true", help="activations in bfloat16 (autocast for transformers)")
    for key, default in (("length", 256), ("batch", 4), ("width", 256), ("layers", 2), ("vocab", 4096), ("turns", 3)):
        parser.add_argument(f"--{key}", type=int, default=default)
    parser.add_argument("--patience", type=float, default=10.0, help="seconds")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for a pair in one mode")
    parser.add_argument("--again", action="store_true", help="measure what the file has already")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "families_speed.json")
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main() -> None:
    sizes = parse()
    if sizes.worker:
        print(json.dumps(measure(sizes.worker, sizes)))
        return
    from headspring.artifacts.environment import environment
    from headspring.artifacts.files import write_json

    shape = {key: getattr(sizes, key) for key in ("length", "batch", "width", "layers", "vocab")}
    precision = "bf16" if sizes.bf16 else "fp32"
    found = results(sizes.out, {"threads": torch.get_num_threads(), "precision": precision, "shape": shape})
    print(f"{'family':<12} {'mode':<9} by the clock: headspring, transformers, ratio, range; by the processor: the same")
    for name in sizes.pairs:
        for mode in sizes.modes:
            known = [row for row in found["rows"] if (row["family"], row["mode"]) == (name, mode)]
            if known and not sizes.again:
                print(line(known[0]), "(known)", flush=True)
                continue
            row = {"family": name, "mode": mode, **in_a_process(name, mode, sizes), "load": os.getloadavg()[0]}
            print(line(row), flush=True)
            found["rows"] = [other for other in found["rows"] if other not in known] + [row]
            write_json(sizes.out, found | {"environment": environment()})


if __name__ == "__main__":
    main()
