"""Pairs mined from source, and the stream that they become."""

import numpy as np
import pytest
import torch

from headspring.artifacts import UserError
from headspring.data.text_pairs import PairsConfig, TextPairs, mine_pairs
from headspring.text.documents import Document
from headspring.tokenization.train import TokenizerConfig, train_tokenizer


def function(i: int, summary: str | None = None) -> str:
    summary = f"Return the number {i} as a sum." if summary is None else summary
    return f'def number_{i}(x):\n    """{summary}"""\n    y = x + {i}\n    return y\n\n\n'


def document(text: str, path: str = "a.py") -> Document:
    return Document(text=text, source="code", kind="code", path=path, start=0, end=len(text.encode()))


@pytest.fixture(scope="module")
def documents():
    return [document("".join(function(i) for i in range(k, k + 5)), f"{k}.py") for k in range(0, 20, 5)]


@pytest.fixture(scope="module")
def stream(documents):
    tokenizer = train_tokenizer([each.text for each in documents], TokenizerConfig(vocab_size=280))
    return TextPairs(mine_pairs(documents, PairsConfig(), 0), tokenizer, PairsConfig(passage_tokens=40), 0), tokenizer


def test_a_pair_is_a_summary_and_a_source_without_it(documents):
    pairs = mine_pairs(documents, PairsConfig(), 0)
    assert len(pairs) == 20 and pairs == mine_pairs(documents, PairsConfig(), 0) != mine_pairs(documents, PairsConfig(), 1)
    texts = {each.id: each.text.encode() for each in documents}
    for pair in pairs:
        assert pair.query not in pair.passage and pair.passage.startswith("def number_")
        there = texts[pair.document_id][pair.byte_start : pair.byte_end].decode()
        assert pair.query in there and pair.passage.splitlines()[-1].strip() in there
    assert len(mine_pairs(documents, PairsConfig(max_pairs=7), 0)) == 7


def test_no_text_stands_in_two_pairs(documents):
    """A repeated summary has two right answers, and each would count as wrong for the other."""
    again = function(99, "Return the number 3 as a sum.") + function(7, "Say something else here.")
    double = [*documents, document(again)]
    pairs = mine_pairs(double, PairsConfig(), 0)
    for side in ("query", "passage"):
        texts = [getattr(pair, side) for pair in pairs]
        assert len(set(texts)) == len(texts) == 20


def test_the_stream_is_pure_and_padded_on_the_left(stream):
    pairs, tokenizer = stream
    batch = pairs.collate([pairs.sample(i) for i in range(6)])
    assert torch.equal(batch.queries, pairs.collate([pairs.sample(i) for i in range(6)]).queries)
    for row in range(6):
        query = batch.queries[row, int(batch.query_padding[row]) :].tolist()
        passage = batch.passages[row, int(batch.passage_padding[row]) :].tolist()
        number = pairs.queries.index(query)
        assert pairs.passages[number] == passage and len(passage) <= 40
        assert query[0] == tokenizer.bos_id and query[-1] == passage[-1] == tokenizer.eos_id
    epoch = sorted(pairs.queries.index(pairs.sample(i).inputs[pairs.sample(i).segments == 0].tolist()) for i in range(20))
    assert epoch == list(range(20))  # each once an epoch
    assert any((pairs.sample(i).inputs != pairs.sample(i + 20).inputs).any() for i in range(20)
               if len(pairs.sample(i).inputs) == len(pairs.sample(i + 20).inputs))  # fmt: skip


def test_where_is_the_inverse_of_sample(stream, documents):
    pairs, _ = stream
    for each in documents:
        visits = pairs.where(each.id, num_samples=50)
        expected = [i for i in range(50) if pairs.pairs[pairs._order(i)].document_id == each.id]
        assert [visit.sample for visit in visits] == expected
        for visit in visits:
            assert visit.end == len(pairs.sample(visit.sample).inputs)
            assert each.text.encode()[visit.byte_start : visit.byte_end].startswith(b"def number_")
    assert np.unique([visit.sample for each in documents for visit in pairs.where(each.id)]).size == 20


def test_too_few_pairs_are_refused(stream):
    _, tokenizer = stream
    with pytest.raises(UserError, match="0 pairs of docstring and source were found"):
        TextPairs(mine_pairs([document("x = 1\n")], PairsConfig(), 0), tokenizer, PairsConfig(), 0)
