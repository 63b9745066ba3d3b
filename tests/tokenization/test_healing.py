"""Token healing, and what a trailing space costs."""

import numpy as np
import pytest

from headspring.artifacts import UserError
from headspring.tokenization import Tokenizer, corpora
from headspring.tokenization.healing import heal, trailing_space_sensitivity


def test_healing_takes_a_trailing_space_back(bpe: Tokenizer):
    ids, prefix = heal(bpe, bpe.encode("the value of "))
    assert prefix == b" " and bpe.decode(ids) == "the value of"
    allowed = bpe.ids_with_prefix(prefix)
    assert bpe.encode(" self")[0] in allowed and bpe.encode(" ")[0] in allowed
    assert all(bpe.token_bytes(i).startswith(b" ") for i in allowed)


def test_allowed_tokens_against_a_slow_search(trained: dict[str, Tokenizer]):
    for tokenizer in (trained["bpe"], trained["unigram"]):
        for prefix in (b"r", b" re", b"\xe6", b"zzzz"):
            ordinary = set(range(tokenizer.vocab_size)) - tokenizer.control_ids - {tokenizer.unk_id}
            slow = sorted(i for i in ordinary if tokenizer.token_bytes(i).startswith(prefix))
            assert tokenizer.ids_with_prefix(prefix).tolist() == slow


def test_the_text_is_kept(bpe: Tokenizer):
    for text in ("return sel", "é", "x = [", "日本"):
        ids = [bpe.bos_id, *bpe.encode(text)]
        before, prefix = heal(bpe, ids)
        assert b"".join(bpe.token_bytes(i) for i in before[1:]) + prefix == text.encode()


def test_where_healing_has_nothing_to_do(bpe: Tokenizer, trained: dict[str, Tokenizer]):
    for ids in ([], bpe.encode("a"), [*bpe.encode("ab c"), bpe.end_id]):
        assert heal(bpe, ids) == (ids, b"")
    words = trained["wordpiece"].encode("return it")
    assert heal(trained["wordpiece"], words) == (words, b"")


class FakeModel:
    """A model that gives a token spelled with its space −1, and any other −3."""

    def __init__(self, tokenizer: Tokenizer, flat: bool = False):
        self.tokenizer, self.flat = tokenizer, flat

    def prompt_ids(self, text: str) -> list[int]:
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text)]

    def logprobs(self, rows):
        likes = [[self.flat or self.tokenizer.token_bytes(i).startswith(b" ") for i in row[1:]] for row in rows]
        return [np.where(row, -1.0, -3.0) for row in likes]


def test_sensitivity_to_a_trailing_space(bpe: Tokenizer):
    pairs = [("the value of", "self"), ("a list of", "return")]
    found = trailing_space_sensitivity(FakeModel(bpe), pairs)
    assert found.pairs == 2 and found.hurt == 1 and found.healable == 1
    assert found.clean == -1 and found.drop > 0
    assert trailing_space_sensitivity(FakeModel(bpe, flat=True), pairs).drop <= 0  # the control feels nothing
    with pytest.raises(UserError, match="no prompts"):
        trailing_space_sensitivity(FakeModel(bpe), [])


def test_continuations_are_words_after_text():
    pairs = corpora.continuations(limit=100)
    assert 50 < len(pairs) <= 200
    assert all(word.isalpha() and not prompt.endswith(" ") and len(prompt) <= 100 for prompt, word in pairs)
