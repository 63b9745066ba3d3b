"""The encoder's line end to end: hidden tokens, then pairs, then vectors; and what an encoder is not for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import headspring as hs
from headspring.artifacts import UserError
from headspring.artifacts.manifest import read_manifest
from headspring.inference.embeddings import read_pooling

ROOT = Path(__file__).parents[2]
HEADSPRING = Path(sys.executable).with_name("headspring")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = """
    data.sources.stdlib.max_documents=160 data.split.validation=0.2 tokenizer.vocab_size=512
    pretrain.model.width=48 pretrain.model.depth=2 pretrain.model.heads=2 pretrain.model.context=128
    pretrain.steps=40 pretrain.batch_size=8 pretrain.validation_samples=8 pretrain.compile=never
    contrastive.steps=10 contrastive.batch_size=16 contrastive.pairs.passage_tokens=64 contrastive.compile=never
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("encoder") / "run"
    command = [HEADSPRING, "run", ROOT / "recipes" / "encoder.yaml", "--run-dir", place, *SMALL.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    return place, done.stdout


@pytest.mark.slow
def test_every_stage_measures_itself(run):
    place, printed = run
    masked, pairs = (read_manifest(place / name).metrics for name in ("pretrain", "contrastive"))
    assert masked["validation_after"]["loss"] < masked["validation_before"]["loss"]
    assert "bits_per_byte" not in masked["validation_after"]
    retrieval = pairs["retrieval"]
    assert retrieval["before"]["n"] == retrieval["after"]["n"] == pairs["validation_pairs"] > 1
    assert "loss, nats a hidden" in printed and "held-out sources found first" in printed
    assert "embed(" in printed and "headspring chat" not in printed


@pytest.mark.slow
def test_the_run_embeds(run):
    """Loading a run gives its last model stage, with the pooling that it was trained with."""
    place, _ = run
    lm = hs.load(place)
    assert lm.kind == "contrastive" and read_pooling(lm.folder).max_tokens == 64
    assert lm.embed(["Return the sum.", "def add(a, b): ..."]).shape == (2, 48)
    assert json.loads((place / "contrastive" / "config.json").read_text())["model"]["kind"] == "encoder"


@pytest.mark.slow
def test_an_encoder_is_not_asked_for_text(run):
    place, _ = run
    for words in (["generate", place, "--prompt", "x"], ["eval", place]):
        done = subprocess.run([HEADSPRING, *words], capture_output=True, text=True, timeout=100, env=ENVIRONMENT)
        assert done.returncode == 2 and "sees both ways" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    with pytest.raises(UserError, match="sees both ways"):
        hs.load(place).logprobs("x")
