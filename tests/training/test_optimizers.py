"""Muon against torch's own, orthogonality, and the completeness of the groups."""

import pytest
import torch

from headspring.models.kernels import native
from headspring.training.optimizers import AdamW, Muon, MuonOptimizer, build_optimizers, orthogonalise
from headspring.training.schedule import Cosine, WarmupStableDecay


def test_every_parameter_is_in_exactly_one_group(build):
    model = build()
    for config in (AdamW(), Muon()):
        groups = [group for optimizer in build_optimizers(model, config) for group in optimizer.param_groups]
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    matrices = build_optimizers(model, Muon())[1]
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)].rsplit(".", 2)[-2] for group in matrices.param_groups for p in group["params"]}
    assert found == {"q", "k", "v", "out", "gate", "up"}


def test_a_forgotten_parameter_is_noticed(build):
    model = build()
    model.rules_by_name["norm.weight"] = model.rules_by_name["norm.weight"].__class__(lambda t, g: None, "nowhere")
    with pytest.raises(AssertionError, match="not the model's"):
        build_optimizers(model, Muon())


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 48), (2, 48, 16)])
def test_orthogonalise_brings_singular_values_near_one(shape):
    """Whatever they were (here 0.05 … 1), as long as they are not tiny beside the largest."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrices = u @ torch.linspace(1, 0.05, u.shape[-1]).diag() @ v
    values = torch.linalg.svdvals(orthogonalise(matrices, steps=5).float())
    assert values.min() > 0.5 and values.max() < 1.4
    assert torch.linalg.svdvals(orthogonalise(matrices, steps=1).float()).min() < 0.5  # the control


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="GPU only images may carry an older torch")
def test_muon_equals_torch_muon():
    """torch.optim.Muon works matrix by matrix and scales by sqrt(max(1, m/n)) with adjust_lr_fn='original'."""
    torch.manual_seed(0)
    shapes = [(16, 16), (16, 16), (32, 16), (16, 48)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    first = MuonOptimizer(ours, Muon(learning_rate=0.05, weight_decay=0.1))
    second = torch.optim.Muon(
        theirs, lr=0.05, weight_decay=0.1, momentum=0.95, nesterov=True, ns_steps=5, adjust_lr_fn="original"
    )
    for _ in range(5):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        first.step()
        second.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)  # both orthogonalise in bfloat16, in another order


@pytest.mark.skipif(native.library() is None or not native.library().has_products, reason="no bfloat16 products here")
@pytest.mark.parametrize("shape", [(32, 32), (96, 64), (64, 160), (96, 320)])
def test_the_native_step_is_the_plain_one(monkeypatch, shape):
    """Value and momentum after three steps, of several matrices; the control is a plain step with another momentum."""

    def after(kernel_set: str, momentum: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        monkeypatch.setenv("HEADSPRING_KERNELS", kernel_set)
        torch.manual_seed(0)
        matrices = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
        optimizer = MuonOptimizer(matrices, Muon(learning_rate=0.1, weight_decay=0.1, momentum=momentum))
        for _ in range(3):
            for matrix in matrices:
                matrix.grad = torch.randn(shape)
            optimizer.step()
        return [m.detach() for m in matrices], [optimizer.state[m]["momentum"] for m in matrices]

    ours, theirs, others = after("native", 0.95), after("plain", 0.95), after("plain", 0.5)
    for a, b, c in zip(ours[0], theirs[0], others[0]):
        assert (a - b).norm() < 0.1 * (b - c).norm()
    for a, b in zip(ours[1], theirs[1]):
        torch.testing.assert_close(a, b)


def test_schedules():
    cosine = Cosine(warmup_steps=10, final=0.1)
    assert cosine.factor(0, 100) == 0.1 and cosine.factor(9, 100) == 1.0
    assert cosine.factor(55, 100) == pytest.approx(0.55) and cosine.factor(100, 100) == pytest.approx(0.1)
    stable = WarmupStableDecay(warmup_steps=10, decay=0.5, final=0.0)
    assert stable.factor(4, 100) == 0.5
    assert stable.factor(10, 100) == stable.factor(50, 100) == 1.0
    assert stable.factor(75, 100) == 0.5 and stable.factor(99, 100) == pytest.approx(0.02)
    assert WarmupStableDecay(warmup_steps=0, decay=0.0).factor(99, 100) == 1.0
