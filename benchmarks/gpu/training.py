"""A training step on CUDA: tokens/s and the share of the device's peak, eager and compiled.

    python benchmarks/gpu/training.py [--width 1024 --layers 16 --batch 16 --length 2048 --peak 990e12]

`--peak` is the device's dense bfloat16 peak in FLOP/s (H100 and H200: 990e12). FLOPs are the ledger's, times three for forward
and backward. Only the loss and its gradients are timed; an optimizer's step depends on which one it is.
"""

from typing import Any

from common import milliseconds, parse, parser, rounds, write


def main() -> None:
    sizes = {"width": (1024, 64), "layers": (16, 1), "batch": (16, 1), "length": (2048, 16), "vocab": (32768, 320)}
    torch, options = parse(parser(__doc__, **sizes, peak=(990e12, 1e12)))
    from headspring.models import Attention, Block, Decoder, SwiGLU, repeat, scoring

    block = Block(mixer=Attention(heads=options.width // 64), feedforward=SwiGLU(hidden=3 * options.width))
    value = Decoder(vocab=options.vocab, width=options.width, layers=repeat(options.layers, block), context=options.length)
    model = value.build().to(options.device).train()
    tokens = torch.randint(0, value.vocab, (options.batch, options.length + 1), device=options.device)

    def step() -> Any:
        model.zero_grad(set_to_none=True)
        with model.computing_in(torch.bfloat16):
            loss = scoring.cross_entropy_sum(model, model(tokens[:, :-1]), tokens[:, 1:])
            loss.backward()

    found: dict[str, Any] = {}
    for name in ("eager",) if options.tiny else ("eager", "compiled"):
        if name == "compiled":
            for part in model.blocks():
                part.compile()
        timed = milliseconds(step, options.device, *rounds(options))
        rate = options.batch * options.length / (timed["median_ms"] / 1000)
        share = 3 * model.ledger(options.length).flops * rate / options.peak
        found[name] = timed | {"tokens_per_second": rate, "share_of_peak": share}
    write("training", options, found)


if __name__ == "__main__":
    main()
