"""Toy lines for the tests of this folder."""

import pytest

from tests.line import toy


@pytest.fixture(autouse=True)
def _no_calls():
    toy.calls.clear()
    yield
    toy.calls.clear()
