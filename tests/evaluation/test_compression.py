"""Bits per byte: every token is scored once, with the context it should have, whatever the batch and the windows."""

from math import log

import pytest
import torch

from headspring.artifacts import UserError
from headspring.evaluation import compression
from headspring.evaluation.compression import continuation_log_probs, score_documents, sequences, windows_of
from headspring.evaluation.held_out import HeldOut, by_source, fingerprint, held_out, num_bytes
from headspring.models import scoring
from headspring.text.documents import Document


@pytest.mark.parametrize(("length", "context", "stride"), [(1, 8, None), (8, 8, None), (9, 8, 4), (100, 8, 3), (50, 8, 8)])
def test_windows_score_each_target_once(length, context, stride):
    windows = list(windows_of(0, length, context, stride))
    scored = [w.start + t for w in windows for t in range(w.first, w.length)]
    assert scored == list(range(length))
    assert all(w.length <= context and w.start >= 0 for w in windows)
    least = context - (stride or context // 2)
    assert all(w.first >= least for w in windows[1:])


def reference_bits(lm, document, context, stride):
    """One token at a time, one window a token."""
    (ids,) = sequences(lm.tokenizer, [document.text])
    total = 0.0
    for target in range(1, len(ids)):
        done = context if target > context else 0
        while done and target > done + stride:
            done += stride
        last = min(len(ids) - 1, done + stride) if done else context
        start = max(0, last - context)
        log_probs = lm.logits(ids[start:target])[0, -1].log_softmax(-1)
        total -= log_probs[ids[target]].item() / log(2)
    return total


@torch.inference_mode()
def test_equals_the_slow_way(lm, documents):
    chosen = [documents[0], documents[3], documents[-1]]
    scores = score_documents(lm, chosen, stride=24, max_context=32, batch_tokens=100)
    for score, document in zip(scores, chosen):
        assert score.bits == pytest.approx(reference_bits(lm, document, 32, 24), rel=1e-5)
        assert score.num_tokens == len(lm.tokenizer.encode(document.text)) + 1  # eos counts, bos does not


def test_batches_do_not_matter(lm, documents):
    small = score_documents(lm, documents, batch_tokens=1)
    large = score_documents(lm, documents, batch_tokens=100_000)
    assert [s.bits for s in small] == pytest.approx([s.bits for s in large], rel=1e-5)


def test_control_a_shifted_target_changes_the_figure(lm, documents, monkeypatch):
    right = score_documents(lm, documents[:2])
    honest = scoring.log_probs
    shifted = lambda model, hidden, targets: honest(model, hidden, targets.roll(1, 1))
    monkeypatch.setattr(compression.scoring, "log_probs", shifted)
    assert [s.bits for s in score_documents(lm, documents[:2])] != pytest.approx([s.bits for s in right], rel=1e-3)


def test_precision_is_only_for_the_block(lm, documents):
    narrow = score_documents(lm, documents[:2], precision="bf16")
    wide = score_documents(lm, documents[:2], precision="fp32")
    assert lm.model.compute_dtype == torch.float32
    assert narrow[0].bits == pytest.approx(wide[0].bits, rel=0.02) and narrow[0].bits != wide[0].bits


def test_continuations(lm):
    prompt, continuation = lm.prompt_ids("def area("), lm.tokenizer.encode("width)")
    (both,) = lm.logprobs([[*prompt, *continuation]])
    (found, other) = continuation_log_probs(lm, [(prompt, continuation), (prompt[:3], continuation)])
    assert found == pytest.approx(both[-len(continuation) :].sum().item(), rel=1e-5) and found != other
    with pytest.raises(UserError):
        continuation_log_probs(lm, [([1] * 128, [1, 2])])


def test_held_out_is_a_function_of_the_documents(data_folder, documents):
    everything = held_out(data_folder, HeldOut(max_bytes=None))
    some = held_out(data_folder, HeldOut(max_bytes=2000))
    assert 0 < sum(map(num_bytes, some)) <= 2000 and some == held_out(data_folder, HeldOut(max_bytes=2000))
    assert {d.id for d in some} < {d.id for d in everything} and fingerprint(some) != fingerprint(everything)
    assert len(held_out(data_folder, HeldOut(max_bytes=1))) == 1
    with pytest.raises(UserError, match="validation split"):
        held_out(data_folder, HeldOut(split="validation"))


def test_by_source():
    documents = [Document("abcd", "a", "code", "1"), Document("ää", "b", "prose", "2"), Document("xy", "a", "code", "3")]
    assert by_source(documents, [8.0, 4.0, 4.0]) == {"all": 1.6, "a": 2.0, "b": 1.0}


@pytest.mark.parametrize("stride", [0, 129])
def test_strides_outside_the_context(lm, documents, stride):
    with pytest.raises(UserError, match="stride"):
        score_documents(lm, documents[:1], stride=stride)
