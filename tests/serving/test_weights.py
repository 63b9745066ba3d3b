"""Files that an operator was given: damaged safetensors are refused with a line, and never read beyond their bytes.

GGUF has the same tests in `tests/models/test_gguf.py` and `tests/tokenization/test_gguf.py`.
"""

import json
import shutil
import struct
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headspring.artifacts import HeadspringError
from headspring.inference import LanguageModel
from tests.inference.tiny import tiny_model

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    place = tmp_path_factory.mktemp("weights") / "model"
    LanguageModel(tiny_model(tokenizer.vocab_size), tokenizer).save(place)
    return place


def load_with(folder, raw: bytes, place):
    """Load the model of `folder` with other weights; only a `HeadspringError` may come out of it."""
    if not place.exists():
        shutil.copytree(folder, place)
    (place / WEIGHTS).write_bytes(raw)
    try:
        return LanguageModel.load(place)
    except HeadspringError as error:
        assert "\n" not in str(error)
        return None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_safetensors_are_refused_with_a_line(folder, tmp_path_factory, data):
    raw = bytearray((folder / WEIGHTS).read_bytes())
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    load_with(folder, bytes(raw), tmp_path_factory.getbasetemp() / "damaged")


def lying(raw: bytes, **changes) -> bytes:
    """The same file whose header says something else of its first tensor."""
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    header[name] |= changes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + size :]


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: struct.pack("<Q", 2**63) + raw[8:],
        lambda raw: struct.pack("<Q", 2**40) + raw[8:],
        lambda raw: lying(raw, shape=[2**31, 2**31]),
        lambda raw: lying(raw, data_offsets=[0, 2**50]),
        lambda raw: lying(raw, data_offsets=[2**50, 0]),
        lambda raw: lying(raw, dtype="F64"),
        lambda raw: lying(raw, shape=[-1]),
        lambda raw: raw[:-1],
        lambda raw: b"",
    ],
)
def test_sizes_that_lie_are_refused_without_memory(folder, tmp_path, change):
    raw = change((folder / WEIGHTS).read_bytes())
    tracemalloc.start()
    try:
        assert load_with(folder, raw, tmp_path / "lying") is None
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
