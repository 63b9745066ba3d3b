"""What the matrix shares."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Work this small gains nothing from a second thread, and on a busy machine waiting for it takes twenty times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
