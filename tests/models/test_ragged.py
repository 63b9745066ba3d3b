"""Sequences side by side in one row, in chunks and pages, give what each gives alone."""

import pytest
import torch

from headspring.models.families import FAMILIES
from headspring.models.paged import BatchState
from headspring.models.ragged import PAGE, Ragged
from headspring.models.stack import StackModule

NUM_PAGES = 16
TABLES = torch.tensor([[3, 9], [1, 4], [12, 0]], dtype=torch.int32)  # pages of three sequences, in no order
STEPS = ((5, 17, 0), (1, 20, 3), (1, 1, 30), (9, 0, 1))  # tokens of each sequence in each step
LENGTHS = [sum(column) for column in zip(*STEPS)]


def side_by_side(name: str) -> bool:
    value = FAMILIES[name]()
    return not value.counted and isinstance(model := value.build(), StackModule) and model.side_by_side


def in_steps(model, sequences, tables=TABLES, dtype=None) -> list[torch.Tensor]:
    """The hidden states of every sequence (T, D), read together by `STEPS`."""
    pools = model.new_pages(NUM_PAGES, dtype)
    own = [model.new_state(1, max(LENGTHS)).layers for _ in sequences]
    past, seen = [0] * len(sequences), [[] for _ in sequences]
    for step in STEPS:
        rows = [row for row, count in enumerate(step) if count]
        groups = {pool.group: tables[rows] for pool in pools if pool is not None}
        ragged = Ragged([past[row] for row in rows], [step[row] for row in rows], groups)
        layers = [pool or [own[row][at] for row in rows] for at, pool in enumerate(pools)]
        tokens = torch.cat([sequences[row][past[row] : past[row] + step[row]] for row in rows])
        hidden = model(tokens[None], state=BatchState(ragged, layers))[0]
        for row, span in zip(rows, ragged.spans):
            seen[row].append(hidden[span])
            past[row] += step[row]
    return [torch.cat(parts) for parts in seen]


def alone(model, sequences) -> list[torch.Tensor]:
    return [model(tokens[None])[0] for tokens in sequences]


def prepared(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().build(seed=1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval(), [torch.randint(0, model.config.vocab, (length,)) for length in LENGTHS]


@pytest.mark.parametrize("family", [name for name in FAMILIES if side_by_side(name)])
@torch.inference_mode()
def test_side_by_side_is_alone(family):
    model, sequences = prepared(family)
    for got, expected in zip(in_steps(model, sequences), alone(model, sequences)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_shared_page_is_noticed():
    """The planted bug: two sequences write to one page."""
    model, sequences = prepared("llama")
    wrong = torch.tensor([[3, 9], [3, 4], [12, 0]], dtype=torch.int32)
    worst = max((a - b).abs().max() for a, b in zip(in_steps(model, sequences, wrong), alone(model, sequences)))
    assert worst > 1e-2


@torch.inference_mode()
def test_int8_pages_are_near():
    model, sequences = prepared("llama")
    for got, expected in zip(in_steps(model, sequences, dtype=torch.int8), alone(model, sequences)):
        error = (got - expected).norm() / expected.norm()
        assert 0 < error < 0.03


def test_positions_and_slots():
    ragged = Ragged([7, 0, 31], [1, 4, 2], {None: torch.tensor([[5, 0], [2, 0], [1, 6]], dtype=torch.int32)})
    assert ragged.positions.tolist() == [[7, 0, 1, 2, 3, 31, 32]]
    places = [5 * PAGE + 7, *(2 * PAGE + place for place in range(4)), PAGE + 31, 6 * PAGE]
    assert ragged.slots(None).tolist() == places
    assert ragged.offsets.tolist() == [0, 1, 5, 7]
