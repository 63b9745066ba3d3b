"""What the matrix shares."""

import pytest
import torch

from headspring.models import block_sparse


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Work this small gains nothing from a second thread, and on a busy machine waiting for it takes twenty times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def sparse_early(monkeypatch):
    """Sequences are short here: masks that hide keys are read sparsely as soon as a list has half of the keys."""
    monkeypatch.setattr(block_sparse, "GAIN", 2)
    monkeypatch.setattr(block_sparse, "PRICE", 0)
