"""Fused kernels of other projects (`models/kernels/installed.py`) on CUDA against the plain text: how near, how much faster.

    pip install mamba-ssm causal-conv1d flash-linear-attention
    python benchmarks/gpu/fused.py [--batch 8 --length 2048 --width 1024]

Each mixer runs forward and backward twice: with the kernels that are installed, and with none. What is missing is named in the
result.
"""

import argparse
from typing import Any

from common import milliseconds, require_gpu, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    options = parser.parse_args()
    torch = require_gpu()
    from headspring.models import Block, Decoder, GatedDelta, LinearAttention, Mamba, Mamba2
    from headspring.models.kernels import installed

    mixers = {"mamba": Mamba(), "mamba2": Mamba2(), "linear_attention": LinearAttention(), "delta": GatedDelta()}
    found: dict[str, Any] = {"missing": [name for name in installed.PLACES if installed.kernel(name) is None]}
    real = installed.applies
    for name, mixer in mixers.items():
        value = Decoder(vocab=1024, width=options.width, layers=(Block(mixer=mixer),), context=options.length)
        model = value.build().to("cuda").train()
        tokens = torch.randint(0, value.vocab, (options.batch, options.length), device="cuda")

        def step(model: Any = model, tokens: Any = tokens) -> Any:
            model.zero_grad(set_to_none=True)
            with model.computing_in(torch.bfloat16):
                hidden = model(tokens)
                hidden.float().square().mean().backward()
            return hidden.detach().float()

        hidden = {}
        for kind, applies in (("fused", real), ("plain", lambda *_: False)):
            installed.applies = applies
            hidden[kind] = step()
            found[f"{name} {kind}"] = milliseconds(step)
        installed.applies = real
        found[f"{name} error"] = float((hidden["fused"] - hidden["plain"]).norm() / hidden["plain"].norm())
    write("fused", vars(options), found)


if __name__ == "__main__":
    main()
