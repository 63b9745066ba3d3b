"""The encoder–decoder's line end to end: spans are taken out, a model learns to write them, and answers about a source."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import headspring as hs
from headspring.artifacts import UserError
from headspring.artifacts.manifest import read_manifest

ROOT = Path(__file__).parents[2]
HEADSPRING = Path(sys.executable).with_name("headspring")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = """
    data.sources.stdlib.max_documents=160 data.split.validation=0.2 tokenizer.vocab_size=512 tokenizer.sentinels=8
    pretrain.model.width=48 pretrain.model.depth=1 pretrain.model.heads=2 pretrain.model.context=128
    pretrain.steps=40 pretrain.batch_size=8 pretrain.validation_samples=8 pretrain.compile=never
    pretrain.schedule.warmup_steps=4
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("vaswani") / "run"
    command = [HEADSPRING, "run", ROOT / "recipes" / "vaswani.yaml", "--run-dir", place, *SMALL.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    return place


@pytest.mark.slow
def test_it_learns_and_answers(place):
    metrics = read_manifest(place / "pretrain").metrics
    assert metrics["validation_after"]["loss"] < metrics["validation_before"]["loss"] - 0.3
    lm = hs.load(place)
    assert lm.config.kind == "encoder_decoder" and lm.config.start == lm.tokenizer.bos_id
    first = lm.tokenizer.sentinel_ids[0]
    source = [*lm.tokenizer.encode("def add(a, b):\n    "), first, *lm.tokenizer.encode("\n\n")]
    (answer,) = lm.generate(source, max_tokens=8, temperature=0, ignore_eos=True)
    assert len(answer.token_ids) == 8 and answer.prompt_token_ids == source


@pytest.mark.slow
def test_answers_belong_to_their_sources(place):
    """Sources of several lengths in a batch, and several answers to each: as one by one; and as by a plain loop."""
    lm = hs.load(place)
    texts = ["import os", "def area(width, height):\n    return width * height", "x = 1"]
    together = lm.generate(texts, max_tokens=12, temperature=0.8, seed=1, n=2, ignore_eos=True)
    alone = [
        answer for text in texts for answer in lm.generate(text, max_tokens=12, temperature=0.8, seed=1, n=2, ignore_eos=True)
    ]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    (greedy,) = lm.generate(texts[1], max_tokens=12, temperature=0, ignore_eos=True)
    source, tokens = torch.tensor([lm.prompt_ids(texts[1])]), [lm.config.start]
    with torch.no_grad():
        for _ in range(12):
            logits = lm.model.logits(lm.model(torch.tensor([tokens]), source=source)[:, -1])
            tokens.append(int(logits[0, : lm.tokenizer.vocab_size].argmax()))
    assert greedy.token_ids == tokens[1:]


@pytest.mark.slow
def test_wrong_questions(place):
    lm = hs.load(place)
    for question in (lambda: lm.logprobs("x"), lambda: lm.embed("x"), lambda: lm.logits([1, 2])):
        with pytest.raises(UserError, match="give it a source"):
            question()
    with pytest.raises(UserError, match="the encoder reads 128; shorten it"):
        lm.generate([5] * 129)
    done = subprocess.run([HEADSPRING, "eval", place], capture_output=True, text=True, timeout=100, env=ENVIRONMENT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
