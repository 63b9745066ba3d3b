"""Toy lines for the tests of this folder."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import toy


@pytest.fixture(autouse=True)
def _no_calls():
    toy.calls.clear()
    yield
    toy.calls.clear()
