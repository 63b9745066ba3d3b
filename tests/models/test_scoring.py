"""The one log-probability path equals the obvious one, without ever holding all logits."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from headspring.data.batch import IGNORE
from headspring.models import scoring
from headspring.models.kernels import native


class Head(torch.nn.Module):
    """Only what scoring asks of a model."""

    def __init__(self, vocab: int, width: int, bias: bool = False, softcap: float | None = None):
        super().__init__()
        self.output_weight = torch.nn.Parameter(torch.randn(vocab, width))
        self.output_bias = torch.nn.Parameter(torch.randn(vocab)) if bias else None
        self.softcap = softcap

    def head_input(self, hidden):
        return hidden

    def logits(self, hidden):
        """By definition."""
        logits = torch.nn.functional.linear(hidden, self.output_weight, self.output_bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@pytest.fixture(params=["native", "plain"])
def kernels_in_use(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(native, "library", lambda: None)


HEADS = {"plain": {}, "bias": {"bias": True}, "softcap": {"softcap": 3.0}, "both": {"bias": True, "softcap": 3.0}}


def problem(rows: int = 37, width: int = 16, vocab: int = 50, **options):
    torch.manual_seed(0)
    head, hidden = Head(vocab, width, **options), torch.randn(rows, width, requires_grad=True)
    targets = torch.randint(0, vocab, (rows,))
    targets[::5] = IGNORE
    return head, hidden, targets


def gradients_of(value, head, hidden) -> dict[str, torch.Tensor]:
    hidden.grad = None
    head.zero_grad()
    value.backward()
    return {"hidden": hidden.grad} | {name: parameter.grad for name, parameter in head.named_parameters()}


@pytest.mark.usefixtures("kernels_in_use")
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_sum_and_gradients_equal_torch(chunk, options, monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK", chunk)
    head, hidden, targets = problem(**options)
    loss = scoring.cross_entropy_sum(head, hidden, targets)
    expected = cross_entropy(head.logits(hidden), targets, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    ours, theirs = gradients_of(3 * loss, head, hidden), gradients_of(3 * expected, head, hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("kernels_in_use")
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_log_probs_with_a_gradient_of_its_own_for_each_token(options, monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK", 8)
    head, hidden, targets = problem(**options)
    weights = torch.randn(len(targets))
    values = scoring.log_probs(head, hidden, targets)
    expected = -cross_entropy(head.logits(hidden), targets, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-4)
    ours = gradients_of((values * weights).sum(), head, hidden)
    torch.testing.assert_close(ours, gradients_of((expected * weights).sum(), head, hidden), rtol=1e-4, atol=1e-4)


def test_the_sum_is_the_sum_of_log_probs():
    head, hidden, targets = problem()
    total = -scoring.log_probs(head, hidden, targets).sum()
    torch.testing.assert_close(scoring.cross_entropy_sum(head, hidden, targets), total)


@pytest.mark.usefixtures("kernels_in_use")
def test_nothing_to_score_is_zero_and_not_nan():
    head, hidden, targets = problem()
    loss = scoring.cross_entropy_sum(head, hidden, torch.full_like(targets, IGNORE))
    loss.backward()
    assert loss.item() == 0.0
    assert not hidden.grad.any() and not head.output_weight.grad.any()


def test_no_full_logits_tensor_is_made():
    """512 rows of a vocabulary of 50,000 are 102 MB as float32; a chunk of 64 rows is 13 MB."""
    head, hidden, targets = problem(rows=512, width=8, vocab=50_000)
    sizes = []
    original = scoring._losses_and_gradient

    def watch(logits, targets):
        sizes.append(logits.numel())
        return original(logits, targets)

    scoring._losses_and_gradient, before = watch, scoring.CHUNK
    scoring.CHUNK = 64
    try:
        scoring.cross_entropy_sum(head, hidden, targets).backward()
    finally:
        scoring._losses_and_gradient, scoring.CHUNK = original, before
    assert max(sizes) == 64 * 50_000


def test_bfloat16_stays_close():
    head, hidden, targets = problem(rows=64, width=32, vocab=200)
    exact = scoring.cross_entropy_sum(head, hidden, targets)
    rough = scoring.cross_entropy_sum(head, hidden.bfloat16(), targets)
    assert abs(rough - exact) / exact < 1e-2
