"""A fused step of the engine gives what the modules give op by op, bit for bit."""

import pytest
import torch

from headspring.models import Attention, Block, Decoder, NoPE, RMSNorm, RoPE, SwiGLU, kernels
from headspring.models.block import Branch
from headspring.models.fused_block import FusedBlock, FusedStack
from headspring.models.kernels.packed import PackedMatrix, pack_groups
from headspring.models.kernels.packing import pack_model, unpack_model
from headspring.models.mask import Causal
from headspring.models.paged import BatchState
from headspring.models.part import Linear
from headspring.models.ragged import Ragged

pytestmark = pytest.mark.skipif(
    kernels.library() is None or not kernels.library().has_packed_products,  # type: ignore[union-attr]
    reason="no native products here",
)
PAGES = 40
SHARED: dict = {"heads": 6, "kv_heads": 2, "head_dim": 32}
LAYERS = {
    "llama": Block(mixer=Attention(**SHARED, qk_norm=None), feedforward=SwiGLU(hidden=224)),
    "normed": Block(mixer=Attention(**SHARED), feedforward=SwiGLU(hidden=192)),
    "window": Block(mixer=Attention(**SHARED, mask=Causal(window=37), scale=0.3), feedforward=SwiGLU(hidden=160)),
    "biased": Block(
        mixer=Attention(heads=2, head_dim=64, position=NoPE(), bias=True, out_bias=True),
        feedforward=SwiGLU(hidden=96, bias=True),
    ),
    "other angles": Block(mixer=Attention(**SHARED, position=RoPE(theta=500.0)), feedforward=SwiGLU(hidden=64)),
}


def built(*layers: Block, packing: str = "bf16") -> torch.nn.Module:
    torch.manual_seed(7)
    model = Decoder(vocab=64, width=96, context=1024, layers=layers or tuple(LAYERS.values())).build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1)
    model.compute_dtype = torch.bfloat16
    if packing in ("int4", "minimums"):
        for part in model.modules():
            if isinstance(part, Linear):
                part.packed = four_bits(part.weight.shape, packing == "minimums")
        packing = "bf16"  # of the head
    pack_model(model, packing)
    return model.eval()


def four_bits(shape: torch.Size, minimums: bool) -> PackedMatrix:
    """Some matrix in groups of 32 inputs."""
    groups = shape[0], shape[1] // 32
    values = torch.randint(0, 16, tuple(shape), dtype=torch.int8) - (0 if minimums else 8)
    return pack_groups(values, torch.rand(groups) * 0.05, -torch.rand(groups) * 0.1 if minimums else None)


class Server:
    """Pages of a model, and steps over them."""

    def __init__(self, model, stored: torch.dtype | None = None):
        self.model, self.layers = model, model.new_pages(PAGES, stored)
        self.groups = {pages.group for pages in self.layers}

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, past: list[int], counts: list[int]) -> torch.Tensor:
        tables = torch.arange(PAGES - 1).int().view(len(counts), -1) if len(counts) == 3 else torch.arange(PAGES).int()[None]
        ragged = Ragged(past, counts, {group: tables.contiguous() for group in self.groups})
        return self.model(tokens[None], state=BatchState(ragged, self.layers))[0]


def both_ways(model, steps, monkeypatch, stored=None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each step gives fused and op by op, with pages of their own."""
    fused, plain, pairs = Server(model, stored), Server(model, stored), []
    for tokens, past, counts in steps:
        ours = fused.step(tokens, past, counts)
        with monkeypatch.context() as patch:
            patch.setattr(FusedStack, "of", lambda *given: None)
            pairs.append((ours, plain.step(tokens, past, counts)))
    return pairs


def steps(*shapes: tuple[list[int], list[int]]):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randint(0, 64, (sum(counts),), generator=generator), past, counts) for past, counts in shapes]


MIXED = steps(
    ([0, 0, 0], [5, 1, 33]),
    ([5, 1, 33], [1, 1, 1]),
    ([6, 2, 34], [64, 1, 3]),
    ([70, 3, 37], [1, 0, 90]),
    ([71, 3, 127], [1, 1, 1]),
)
ALONE = steps(([0], [1]), ([1], [1]), ([2], [64]), ([66], [2]), ([68], [200]), ([268], [1]), ([269], [7]))


@pytest.mark.parametrize("packing", ["bf16", "int8", "int4", "minimums"])
@pytest.mark.parametrize("work", [MIXED, ALONE], ids=["mixed", "alone"])
def test_fused_is_op_by_op(packing, work, monkeypatch):
    model = built(packing=packing)
    assert FusedStack(model.layers, Server(model).layers).reach(0) == len(LAYERS)
    for fused, plain in both_ways(model, work, monkeypatch):
        assert torch.isfinite(plain).all() and torch.equal(fused, plain)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_do_not_matter(threads, monkeypatch):
    model, before = built(), torch.get_num_threads()
    expected = [plain for _, plain in both_ways(model, MIXED, monkeypatch)]
    try:
        torch.set_num_threads(threads)
        answers = [fused for fused, _ in both_ways(model, MIXED, monkeypatch)]
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, answers, expected))


def test_sizes_that_fill_no_panel(monkeypatch):
    model = built(Block(mixer=Attention(heads=3, kv_heads=1, head_dim=32), feedforward=SwiGLU(hidden=75)), packing="int8")
    assert FusedStack(model.layers, Server(model).layers).reach(0) == 1
    for fused, plain in both_ways(model, MIXED, monkeypatch):
        assert torch.equal(fused, plain)


def test_int8_pages(monkeypatch):
    for fused, plain in both_ways(built(), MIXED, monkeypatch, torch.int8):
        assert torch.equal(fused, plain)


def test_company_does_not_matter():
    """The rows of a sequence among others are those that it has alone."""
    model = built(packing="int8")
    together, alone = Server(model), Server(model)
    for tokens, past, counts in MIXED:
        mixed = together.step(tokens, past, counts)
        own = tokens[counts[0] + counts[1] :]
        assert torch.equal(mixed[counts[0] + counts[1] :], alone.step(own, past[2:], counts[2:]))


def test_a_change_is_noticed(monkeypatch):
    """The control: one weight of one norm, changed by its last bit, gives other rows."""
    model = built()
    before = Server(model).step(*MIXED[0])
    unpack_model(model)
    with torch.no_grad():
        model.layers[2].feedforward.pre.weight[3] *= 1 + 2**-6
    pack_model(model)
    assert not torch.equal(Server(model).step(*MIXED[0]), before)


def test_packing_anew_is_seen():
    model = built()
    server = Server(model)
    server.step(*MIXED[0])
    unpack_model(model)
    with torch.no_grad():
        model.layers[0].mixes.out.weight *= 2
    pack_model(model)
    assert torch.equal(server.step(*MIXED[0]), Server(model).step(*MIXED[0]))


def test_watched_blocks_take_their_own_path(monkeypatch):
    model = built()
    expected = Server(model).step(*MIXED[0])
    sites = [f"layers.{layer}.{name}" for layer, name in enumerate(("residual.pre", "mixer.q", "residual.post", "mlp.act"))]
    sites += ["layers.3.residual.mid", "layers.4.residual.pre", "layers.4.residual.post"]
    with model.sites.capture(sites) as seen:
        watched = Server(model).step(*MIXED[0])
        with monkeypatch.context() as patch:
            patch.setattr(FusedStack, "of", lambda *given: None)
            with model.sites.capture(sites) as plainly:
                Server(model).step(*MIXED[0])
    assert torch.equal(watched, expected) and set(seen) == set(sites)
    assert all(torch.equal(seen[site], plainly[site]) for site in sites)
    assert torch.equal(seen["layers.4.residual.post"], model.layers[4].site("residual.post", seen["layers.4.residual.post"]))
    with model.sites.edit({"layers.2.residual.post": lambda x: x * 0}):
        assert not torch.equal(Server(model).step(*MIXED[0]), expected)


@pytest.mark.parametrize(
    "layer",
    [
        Block(mixer=Branch(f=Attention(**SHARED), post=RMSNorm()), feedforward=SwiGLU(hidden=64)),
        Block(mixer=Attention(**SHARED, softcap=5.0), feedforward=SwiGLU(hidden=64)),
        Block(mixer=Attention(**SHARED, sink=True), feedforward=SwiGLU(hidden=64)),
        Block(mixer=Attention(**SHARED, position=RoPE(fraction=0.5)), feedforward=SwiGLU(hidden=64)),
        Block(mixer=Attention(heads=2, head_dim=16), feedforward=SwiGLU(hidden=64)),
        Block(mixer=Attention(**SHARED), feedforward=SwiGLU(hidden=64), parallel=True),
        Block(mixer=Attention(**SHARED)),
    ],
)
def test_other_forms_are_left_to_the_module(layer, monkeypatch):
    model = built(LAYERS["normed"], layer, LAYERS["window"])
    assert FusedBlock.of(model.layers[1]) is None and FusedBlock.of(model.layers[2]) is not None
    for fused, plain in both_ways(model, MIXED, monkeypatch):
        assert torch.equal(fused, plain)
