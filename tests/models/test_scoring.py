"""The one log-probability path equals the obvious one, without ever holding all logits."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from headspring.data.batch import IGNORE
from headspring.models import native, scoring


class Head(torch.nn.Module):
    """Only what scoring asks of a model."""

    def __init__(self, vocab: int, width: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(vocab, width))

    @property
    def output_weight(self):
        return self.weight


@pytest.fixture(params=["native", "plain"])
def kernels_in_use(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(native, "library", lambda: None)


def problem(rows: int = 37, width: int = 16, vocab: int = 50):
    torch.manual_seed(0)
    head, hidden = Head(vocab, width), torch.randn(rows, width, requires_grad=True)
    targets = torch.randint(0, vocab, (rows,))
    targets[::5] = IGNORE
    return head, hidden, targets


@pytest.mark.usefixtures("kernels_in_use")
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_sum_and_gradients_equal_torch(chunk, monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK", chunk)
    head, hidden, targets = problem()
    loss = scoring.cross_entropy_sum(head, hidden, targets)
    (3 * loss).backward()
    ours = hidden.grad.clone(), head.weight.grad.clone()
    hidden.grad = head.weight.grad = None
    expected = cross_entropy(hidden @ head.weight.T, targets, ignore_index=IGNORE, reduction="sum")
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours[0], hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1], head.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("kernels_in_use")
def test_log_probs_with_a_gradient_of_its_own_for_each_token(monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK", 8)
    head, hidden, targets = problem()
    weights = torch.randn(len(targets))
    values = scoring.log_probs(head, hidden, targets)
    (values * weights).sum().backward()
    ours = hidden.grad.clone(), head.weight.grad.clone()
    hidden.grad = head.weight.grad = None
    expected = -cross_entropy(hidden @ head.weight.T, targets, ignore_index=IGNORE, reduction="none")
    (expected * weights).sum().backward()
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours[0], hidden.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[1], head.weight.grad, rtol=1e-4, atol=1e-4)


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
    assert not hidden.grad.any() and not head.weight.grad.any()


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
