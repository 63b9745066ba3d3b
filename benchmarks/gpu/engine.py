"""The engine on CUDA: tokens/s at 1, 16 and 64 requests, with graphs and without; the share of the memory's bandwidth that
decoding alone reaches; its certificate.

    python benchmarks/gpu/engine.py [--model FOLDER] [--width 2048 --layers 16 --prompt 512 --answer 128]

Without a model it takes a random one of Llama's form (2048 × 16 is about a billion parameters): speed does not depend on what
weights say. Beside it `transformers` generates as many tokens from the same weights. The bytes of a step alone are those of all
weights that a token uses, read once; the aim is 70 % of what a copy reaches, and 20 times `transformers` at 64 requests.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from common import bandwidth, parse, parser, synchronize, write

CONCURRENT = (1, 16, 64)
TEXT = ["def add(a, b):\n    return a + b\n", "the quick brown fox jumps over the lazy dog " * 4]


def language_model(torch: Any, options: argparse.Namespace) -> Any:
    """The model in bfloat16 on the device."""
    import headspring
    from headspring.inference import LanguageModel
    from headspring.models import Attention, Block, Decoder, RMSNorm, SwiGLU, repeat
    from headspring.tokenization.train import TokenizerConfig, train_tokenizer

    if options.model is not None:
        return headspring.load(options.model, device=options.device, dtype="bfloat16")
    mixer = Attention(heads=options.width // 64, kv_heads=max(1, options.width // 256), qk_norm=None)
    block = Block(mixer=mixer, feedforward=SwiGLU(hidden=3 * options.width), pre=None)
    sizes = {"vocab": options.vocab, "width": options.width, "context": options.prompt + options.answer}
    model = Decoder(layers=repeat(options.layers, block), norm=RMSNorm(), tied=False, **sizes).build()
    model = model.to(options.device, torch.bfloat16).requires_grad_(False)
    model.compute_dtype = torch.bfloat16
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.02)
    return LanguageModel(model, train_tokenizer(TEXT, TokenizerConfig(vocab_size=290)))


def ours(lm: Any, count: int, options: argparse.Namespace, graphs: bool | None) -> float:
    """New tokens/s of `count` requests that arrive at once."""
    from headspring.inference import SamplingParams

    draw = random.Random(0)
    params = SamplingParams(max_tokens=options.answer, temperature=0, ignore_eos=True)
    engine = lm.engine(max_sequences=count, prefix_sharing=False, context=options.prompt + options.answer, cuda_graphs=graphs)
    rates = []
    for _ in range(2):  # the first time captures
        for _ in range(count):
            engine.submit([draw.randrange(lm.tokenizer.vocab_size) for _ in range(options.prompt)], params)
        synchronize(options.device)
        start = time.perf_counter()
        engine.run()
        synchronize(options.device)
        rates.append(count * options.answer / (time.perf_counter() - start))
    return max(rates)


def theirs(torch: Any, folder: Path, count: int, options: argparse.Namespace) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(options.device).eval()
    tokens = torch.randint(0, model.config.vocab_size, (count, options.prompt), device=options.device)
    limits = {"max_new_tokens": options.answer, "min_new_tokens": options.answer, "do_sample": False}
    rates = []
    for _ in range(2):
        synchronize(options.device)
        start = time.perf_counter()
        model.generate(tokens, **limits)
        synchronize(options.device)
        rates.append(count * options.answer / (time.perf_counter() - start))
    return max(rates)


def main() -> None:
    made = parser(__doc__, width=(2048, 64), layers=(16, 1), vocab=(32768, 320), prompt=(512, 8), answer=(128, 4))
    made.add_argument("--model", type=Path, help="a folder, in place of a random model")
    torch, options = parse(made)
    from headspring.inference.engine.certificate import certify
    from headspring.models.dialects import export_huggingface

    lm = language_model(torch, options)
    found: dict[str, Any] = {"bandwidth_bytes_per_second": bandwidth(options), "tokens_per_second": {}}
    on_gpu = options.device == "cuda"
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model
        if folder is None:
            folder = Path(temporary) / "model"
            export_huggingface(lm.model, folder)
        for count in CONCURRENT[: 1 if options.tiny else None]:
            one = {"headspring": ours(lm, count, options, None)}
            if on_gpu:
                one["headspring without graphs"] = ours(lm, count, options, False)
            if (folder / "config.json").is_file():
                one["transformers"] = theirs(torch, folder, count, options)
            found["tokens_per_second"][str(count)] = one
    ledger = lm.model.ledger(options.prompt)
    read = 2 * (ledger.parameters - ledger.idle_parameters - (0 if lm.model.config.tied else lm.model.embed.rows.numel()))
    found["share_of_bandwidth_alone"] = (
        found["tokens_per_second"]["1"]["headspring"] * read / found["bandwidth_bytes_per_second"]
    )
    found["certificate"] = certify(lm, fresh=True).text().splitlines()
    write("engine", options, found)


if __name__ == "__main__":
    main()
