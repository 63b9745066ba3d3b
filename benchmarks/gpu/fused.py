"""Fused kernels of other projects (`models/kernels/installed.py`) on CUDA against the plain text: how near, how much faster.

    pip install mamba-ssm causal-conv1d flash-linear-attention
    python benchmarks/gpu/fused.py [--batch 8 --length 2048 --width 1024]

Each mixer runs forward and backward twice: with the kernels that are installed, and with none. What is missing is named in the
result.
"""

from typing import Any

from common import milliseconds, parse, parser, rounds, write


def main() -> None:
    torch, options = parse(parser(__doc__, batch=(8, 1), length=(2048, 16), width=(1024, 32)))
    from headspring.models import Block, Decoder, GatedDelta, LinearAttention, Mamba, Mamba2
    from headspring.models.kernels import installed

    mixers = {"mamba": Mamba(), "mamba2": Mamba2(), "linear_attention": LinearAttention(), "delta": GatedDelta()}
    found: dict[str, Any] = {"missing": [name for name in installed.PLACES if installed.kernel(name) is None]}
    real = installed.applies
    for name, mixer in mixers.items():
        value = Decoder(vocab=1024, width=options.width, layers=(Block(mixer=mixer),), context=options.length)
        model = value.build().to(options.device).train()
        tokens = torch.randint(0, value.vocab, (options.batch, options.length), device=options.device)

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
            found[f"{name} {kind}"] = milliseconds(step, options.device, *rounds(options))
        installed.applies = real
        found[f"{name} error"] = float((hidden["fused"] - hidden["plain"]).norm() / hidden["plain"].norm())
    write("fused", options, found)


if __name__ == "__main__":
    main()
