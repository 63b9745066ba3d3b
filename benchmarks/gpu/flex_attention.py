"""FlexAttention with block masks against scaled dot-product attention on CUDA: causal, windows, packed documents.

    python benchmarks/gpu/flex_attention.py [--batch 4 --heads 16 --length 8192 --channels 64]

Both get the same mask, forward and backward. That of scaled dot-product attention is a dense tensor, and a flag in the causal
case; the block mask skips what is hidden (arXiv 2412.05496). This decides whether `models/attend.py` should lower
masks to FlexAttention on a GPU.
"""

import argparse
from typing import Any

from common import milliseconds, require_gpu, write

WINDOW, DOCUMENT = 512, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--channels", type=int, default=64)
    options = parser.parse_args()
    torch = require_gpu()
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    shape = options.batch, options.heads, options.length, options.channels
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    masks = {
        "causal": lambda b, h, q, k: k <= q,
        "window": lambda b, h, q, k: (k <= q) & (q - k < WINDOW),
        "documents": lambda b, h, q, k: (k <= q) & (q // DOCUMENT == k // DOCUMENT),
    }
    compiled, place = torch.compile(flex_attention), torch.arange(options.length, device="cuda")
    found: dict[str, Any] = {}
    for name, mask in masks.items():
        blocks = create_block_mask(mask, None, None, options.length, options.length, device="cuda")
        dense = None if name == "causal" else mask(0, 0, place[:, None], place)

        def flex(blocks: Any = blocks) -> Any:
            return compiled(q, k, v, block_mask=blocks)

        def dot_product(dense: Any = dense) -> Any:
            return scaled_dot_product_attention(q, k, v, attn_mask=dense, is_causal=dense is None)

        error = (flex().float() - dot_product().float()).abs().max()
        found[name] = {"largest_error": float(error)}
        for kind, attend in (("flex", flex), ("sdpa", dot_product)):
            found[name][f"{kind} forward"] = milliseconds(attend)
            found[name][f"{kind} both"] = milliseconds(lambda attend=attend: attend().sum().backward())
    write("flex_attention", vars(options), found)


if __name__ == "__main__":
    main()
