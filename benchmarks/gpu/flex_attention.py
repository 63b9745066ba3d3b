"""Attention layers by FlexAttention (`models/flex.py`) against the same layers read densely, on CUDA.

    python benchmarks/gpu/flex_attention.py [--batch 4 --heads 16 --length 8192 --channels 64] [--only window routed]

A layer of the library in bfloat16, forward and backward, as a model would call it: `flex` as it chooses itself, `dense` with
FlexAttention refused, where a mask is a tensor of queries by keys for scaled dot-product attention. Reported are
milliseconds, the largest difference of their answers, the share of tiles that flex reads, and peak bytes of each.
"""

import argparse
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

from common import milliseconds, require_gpu, write

from headspring.models import ALiBi, Attention, Causal, Hashed, LocalGlobal, Routed, Strided, T5Bias, flex
from headspring.models.context import Context

DOCUMENT = 1024
LAYERS: dict[str, dict[str, Any]] = {
    "causal": {},
    "documents": {},
    "window": {"mask": Causal(window=512)},
    "window and sinks": {"mask": Causal(window=512, sinks=4), "sink": True},
    "local and global": {"mask": LocalGlobal(window=256, globals=4, every=512)},
    "strided": {"mask": Strided(stride=128, local=128)},
    "routed": {"mask": Routed(block=64, top=8)},
    "hashed": {"mask": Hashed(block=64, top=8, buckets=16)},
    "alibi": {"position": ALiBi()},
    "t5 bias": {"position": T5Bias()},
    "soft-cap": {"softcap": 50.0},
}


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--only", nargs="+", choices=LAYERS, default=list(LAYERS))
    return parser.parse_args(given)


def measure(torch: Any, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both ways of one layer."""
    width = options.heads * options.channels
    layer = Attention(heads=options.heads, **LAYERS[name]).build(width).to("cuda", torch.bfloat16)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, width**-0.5)
    x = torch.randn(options.batch, options.length, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    place = torch.arange(options.length, device="cuda").expand(options.batch, -1)
    segments = place // DOCUMENT if name == "documents" else None

    def answer() -> Any:
        context = Context.of(options.length, 0, segments, None, x.device)
        layer.prepare(context)
        return layer(x, context)

    found: dict[str, Any] = {"flex is chosen": layer._flexes(Context.of(options.length, 0, segments, None, x.device))}
    answers, serves = {}, flex.serves
    for kind, chosen in (("flex", serves), ("dense", lambda *_: False)):
        torch.cuda.reset_peak_memory_stats()
        try:
            with patch.object(flex, "serves", chosen):
                answers[kind] = answer().detach().float()
                found[f"{kind} forward"] = milliseconds(answer)
                found[f"{kind} both"] = milliseconds(lambda: answer().sum().backward())
        except torch.OutOfMemoryError:
            found[kind] = "out of memory"
            torch.cuda.empty_cache()
        found[f"{kind} peak bytes"] = torch.cuda.max_memory_allocated()
    if len(answers) == 2:
        found["largest difference"] = float((answers["flex"] - answers["dense"]).abs().max())
    if layer.chosen is None:
        context = Context.of(options.length, 0, segments, None, x.device)
        found["tiles read"] = 1 - flex.block_mask(layer.value.mask, context).sparsity() / 100
    return found


def main() -> None:
    options = parse()
    torch = require_gpu()
    write("flex_attention", vars(options), {name: measure(torch, name, options) for name in options.only})


if __name__ == "__main__":
    main()
