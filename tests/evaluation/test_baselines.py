"""The other compressors: their sizes are what one can decompress, and they are measured on the model's bytes."""

import json
import lzma
from math import log

import numpy as np
import pytest
import zstandard

from headspring.artifacts import UserError
from headspring.data.shards import TokenShards
from headspring.evaluation.baselines import BaselinesConfig, baselines, kneser_ney, xz_bits, zstd_bits
from headspring.evaluation.compression import score_documents
from headspring.evaluation.held_out import HeldOut, by_source, held_out
from headspring.models.ngram.kneser_ney import KneserNey


def test_metrics(data_folder, tokens_folder, tmp_path):
    metrics = baselines(BaselinesConfig(), data_folder, tokens_folder, tmp_path)
    assert {"xz", "zstd", "kneser_ney_5gram", "xz_primed", "zstd_primed", "held_out"} <= set(metrics)
    assert set(metrics["xz"]) == set(metrics["kneser_ney_5gram"]) == {"all", "code", "prose"}
    assert all(0 < value < 8 for name in ("xz", "zstd", "kneser_ney_5gram") for value in metrics[name].values())
    assert metrics["xz_primed"]["all"] < metrics["xz"]["all"]
    assert metrics["zstd_primed"]["all"] < metrics["zstd"]["all"]
    assert metrics["kneser_ney_5gram"]["all"] < metrics["zstd"]["all"]  # the splits are much alike
    assert json.loads((tmp_path / "baselines.json").read_text())["xz"] == metrics["xz"]
    unprimed = baselines(BaselinesConfig(primed_bytes=0, order=2), data_folder, tokens_folder, tmp_path)
    assert "xz_primed" not in unprimed and "kneser_ney_2gram" in unprimed


def test_sizes_are_those_of_the_tools():
    text = b"some text, some more text, and again some text " * 50
    packed = lzma.compress(text, preset=9)
    assert xz_bits(text) == 8 * len(packed) and lzma.decompress(packed) == text
    assert zstd_bits(text) == 8 * len(zstandard.ZstdCompressor(level=19).compress(text))


def test_primed_sees_all_of_the_training_text():
    rng = np.random.default_rng(0)
    secret = rng.bytes(20_000)  # cannot be compressed, unless it was seen
    training = secret + rng.bytes(500_000)
    for bits in (xz_bits, zstd_bits):
        assert bits(secret) > 7.9 * len(secret)
        assert bits(secret, training) < 0.5 * len(secret), bits


def test_the_ngram_model_is_scored_on_the_documents_own_tokens(data_folder, tokens_folder, tokenizer):
    documents, shards = held_out(data_folder, HeldOut()), TokenShards(tokens_folder)
    found = kneser_ney(BaselinesConfig(), documents, shards)
    encode = lambda text: np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
    from headspring.data.store import read_documents

    training = [encode(document.text) for document in read_documents(data_folder, split="train")]
    model = KneserNey(training, tokenizer.vocab_size, tokenizer.bos_id)
    bits = [-scores.sum() / log(2) for scores in model.log_probs([encode(d.text) for d in documents])]
    assert found == pytest.approx(by_source(documents, bits))


def test_model_and_ngrams_predict_the_same_tokens(lm, data_folder, tokens_folder):
    documents, shards = held_out(data_folder, HeldOut()), TokenShards(tokens_folder)
    for document, score in zip(documents, score_documents(lm, documents)):
        ((split, source, number),) = shards.find(document.id)
        table = shards.documents(split, source)
        assert score.num_tokens == table.token_end[number] - table.token_start[number] - 1


def test_tokens_of_other_data_are_refused(data_folder, tokens_folder, documents):
    from headspring.text.documents import Document

    with pytest.raises(UserError, match="no tokens of held-out document"):
        kneser_ney(BaselinesConfig(), [Document("new", "code", "code", "new.py")], TokenShards(tokens_folder))
