"""The kernels on pages (`models/kernels/triton_paged.py`) on CUDA: how near to the plain definition, whether company changes a
bit, and bytes/s.

    python benchmarks/gpu/kernels.py [--heads 32 --kv_heads 8 --channels 128 --length 4096 --batch 64]

Decoding reads every key and value once: bytes/s are those over the time of attention alone; a share is of what a copy reaches.
"""

import argparse
from typing import Any
from unittest.mock import patch

from common import bandwidth, device_milliseconds, parse, parser, write

PAGE, WINDOW = 32, 1024


class Step:
    """One new token for each of `batch` sequences of `length` tokens, in pages of random numbers."""

    def __init__(self, torch: Any, options: argparse.Namespace, kind: Any, window: int | None):
        from headspring.models import Attention, Causal

        heads, kv_heads, channels, count = options.heads, options.kv_heads, options.channels, options.batch
        value = Attention(heads=heads, kv_heads=kv_heads, head_dim=channels, qk_norm=None, mask=Causal(window=window))
        self.mixer = value.build(heads * channels).to(options.device, torch.bfloat16).requires_grad_(False)
        self.window, self.length, self.device, each = window, options.length, options.device, -(-options.length // PAGE)
        self.tables = torch.randperm(count * each).int().view(count, each).to(self.device)
        self.pages = kind(count * each, kv_heads, channels, torch.bfloat16, torch.device(self.device), window)
        for pool in self.pages.tensors:
            pool.copy_(torch.randint_like(pool, -99, 99) if pool.dtype == torch.int8 else torch.rand_like(pool))
        sizes = (heads, kv_heads, kv_heads)
        self.rows = [torch.randn(1, count, size, channels, device=self.device, dtype=torch.bfloat16) for size in sizes]

    def run(self, only: slice = slice(None)) -> Any:
        """The answers (1, N, H, C) to the sequences of `only`."""
        from headspring.models.ragged import Ragged

        tables = self.tables[only]
        ragged = Ragged([self.length - 1] * len(tables), [1] * len(tables), {self.window: tables}, self.device)
        context = ragged.context()
        self.mixer.prepare(context)
        return self.mixer._attend_pages(*(part[:, only] for part in self.rows), self.pages, context)


def main() -> None:
    sizes = {"heads": (32, 3), "kv_heads": (8, 1), "channels": (128, 32), "length": (4096, 40), "batch": (64, 2)}
    torch, options = parse(parser(__doc__, **sizes))
    from headspring.models import kernels
    from headspring.models.paged import Int8Pages, Pages

    roof = bandwidth(options)
    found: dict[str, Any] = {"bandwidth_bytes_per_second": roof}
    for name, kind, window in (("bf16", Pages, None), ("int8", Int8Pages, None), ("window", Pages, WINDOW)):
        step = Step(torch, options, kind, window)
        with torch.inference_mode():
            whole = step.run()
            alone = torch.cat([step.run(slice(row, row + 1)) for row in range(options.batch)], dim=1)
            timed = device_milliseconds(step.run, options)
            with patch.object(kernels, "pages_on_gpu", lambda x: None):
                plain = step.run()
        seen = min(options.length, window or options.length)
        read = 2 * options.batch * seen * options.kv_heads * options.channels * step.pages.keys.element_size()
        rate = read / (timed["median_ms"] / 1000)
        found[name] = timed | {
            "kernel": "plain" if kernels.pages_on_gpu(whole) is None else "triton",
            "largest_error": float((whole.float() - plain.float()).abs().max()),
            "equal_alone": bool(torch.equal(whole, alone)),
            "bytes_per_second": rate,
            "share_of_bandwidth": rate / roof,
        }
    write("kernels", options, found)


if __name__ == "__main__":
    main()
