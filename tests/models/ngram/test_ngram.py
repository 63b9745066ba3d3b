"""The n-gram model as a model: the distributions of its counts, exact, in every way a model can be asked."""

import numpy as np
import pytest
import torch

from headspring.artifacts import UserError
from headspring.artifacts.errors import CorruptArtifact
from headspring.models.folder import load_model, save_model
from headspring.models.ngram import NGram
from headspring.models.ngram.arpa import arpa_words, read_arpa, write_arpa
from headspring.models.ngram.backoff import STUPID_WEIGHT
from headspring.models.ngram.kneser_ney import KneserNey
from headspring.models.scoring import cross_entropy_sum, log_probs
from tests.models.ngram.test_kneser_ney import BOS, VOCAB, corpus


def counted(order: int = 4, smoothing: str = "kneser_ney"):
    model = NGram(vocab=VOCAB, order=order, smoothing=smoothing, bos=BOS, context=64).build()
    model.count(corpus(0))
    return model


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_interpolated_model(order):
    """Backed-off tables say what Chen & Goodman's interpolation says, after seen and unseen contexts alike."""
    model, reference = counted(order), KneserNey(corpus(0), VOCAB, BOS, order)
    for document in corpus(1, 6):
        found = model(torch.tensor(document)[None])[0].double()
        for t in range(len(document)):
            expected = reference.distribution(document[: t + 1])
            np.testing.assert_allclose(found[t].exp().numpy(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("smoothing", ["kneser_ney", "stupid_backoff"])
def test_scoring_and_logits_are_normalised(smoothing):
    model, tokens = counted(smoothing=smoothing), torch.randint(1, VOCAB, (3, 12))
    totals = model.logits(model(tokens)).softmax(-1).double().sum(-1)
    torch.testing.assert_close(totals, torch.ones_like(totals), atol=1e-6, rtol=0)
    values = log_probs(model, model(tokens), tokens.roll(-1, 1))
    torch.testing.assert_close(-values.sum(), cross_entropy_sum(model, model(tokens), tokens.roll(-1, 1)))


def test_kneser_ney_probabilities_sum_to_one_without_a_softmax():
    model = counted()
    contexts = torch.randint(0, VOCAB, (40, 6))
    totals = model(contexts).double().exp().sum(-1)
    torch.testing.assert_close(totals, torch.ones_like(totals), atol=1e-6, rtol=0)
    model.tables[2].probabilities.mul_(1.01)  # the control: counts that do not fit each other
    assert (model(contexts).double().exp().sum(-1) - 1).abs().max() > 1e-4


def test_stupid_backoff_by_hand():
    """a b a b a c: after "a", b is 2 of 3; after "b", only a; "a a" was never seen, so 0.4 times the frequency of a."""
    model = NGram(vocab=5, order=2, smoothing="stupid_backoff", bos=0).build()
    model.count([np.array([0, 2, 3, 2, 3, 2, 4])])
    scores = model(torch.tensor([[2]]))[0, 0].exp()
    unigrams = torch.tensor([0.0, 0.5, 3, 2, 1]) / 6.5
    torch.testing.assert_close(scores[3:], torch.tensor([2 / 3, 1 / 3]))
    torch.testing.assert_close(scores[1:3], STUPID_WEIGHT * unigrams[1:3])


def test_a_folder_holds_the_tables_and_the_state_the_last_tokens(tmp_path):
    model, tokens = counted(), torch.randint(0, VOCAB, (2, 9))
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config and torch.equal(loaded(tokens), model(tokens))
    state = loaded.new_state(2, 9)
    pieces = [loaded(tokens[:, a:b], state=state) for a, b in ((0, 1), (1, 5), (5, 9))]
    assert torch.equal(torch.cat(pieces, 1), model(tokens))
    state.rewind(3)
    assert torch.equal(loaded(tokens[:, 6:], state=state), model(tokens)[:, 6:])


@pytest.mark.parametrize("smoothing", ["kneser_ney", "stupid_backoff"])
def test_arpa_there_and_back(smoothing, tmp_path):
    model, words = counted(3, smoothing), [f"w{i}" for i in range(VOCAB)]
    tables = [model.table(n) for n in (1, 2, 3)]
    write_arpa(tables, words, tmp_path / "model.arpa")
    back = read_arpa(tmp_path / "model.arpa", words)
    for a, b in zip(tables, back, strict=True):
        assert np.array_equal(a.keys, b.keys)
        np.testing.assert_allclose(a.probabilities, b.probabilities, rtol=1e-14)
        np.testing.assert_allclose(a.weights, b.weights, rtol=1e-14)
    other = NGram(vocab=VOCAB, order=3, bos=BOS).build()
    other.fill(back)
    tokens = torch.randint(0, VOCAB, (2, 8))
    torch.testing.assert_close(other(tokens), model(tokens))


ARPA = "\\data\\\nngram 1=3\nngram 2=1\n\n\\1-grams:\n-1\ta\t-0.5\n-0.3\tb\n-2\t<unk>\n\n\\2-grams:\n-0.1\ta b\n\n\\end\\\n"


def test_a_file_of_another_program(tmp_path):
    """Fields by hand: p(b|a) = 10^−0.1; p(a|a) = 10^−0.5 · 10^−1; p(c|b), never seen, is that of <unk>."""
    (tmp_path / "m.arpa").write_text(ARPA)
    model = NGram(vocab=3, order=2, bos=None, smoothing="stupid_backoff").build()
    model.fill(read_arpa(tmp_path / "m.arpa", ["a", "b", "c"]))
    after_a, after_b = model(torch.tensor([[0, 1]]))[0].double() / np.log(10)
    assert after_a.tolist() == pytest.approx([-1.5, -0.1, -2.5], abs=1e-6)
    assert after_b.tolist() == pytest.approx([-1.0, -0.3, -2.0], abs=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("ngram 2=1", "ngram 2=5"), CorruptArtifact, r"promises \[3, 5\].*hold \[3, 1\]"),
        (("\\end\\", ""), CorruptArtifact, "not a whole ARPA file"),
        (("-0.1\ta b", "minus\ta b"), CorruptArtifact, "not a 2-gram"),
        (("a b\n", "a zebra\n"), UserError, "'zebra' is not in the vocabulary"),
    ],
)
def test_damaged_files_are_refused(change, error, message, tmp_path):
    (tmp_path / "m.arpa").write_text(ARPA.replace(*change))
    with pytest.raises(error, match=message):
        read_arpa(tmp_path / "m.arpa", ["a", "b", "c"])


def test_words_for_tokens():
    assert arpa_words([b"the", b" the", b"x", b"x", b"\xff", b"<s>"]) == ["the", "<1>", "<2>", "<3>", "<4>", "<5>"]
    with pytest.raises(UserError, match="all different"):
        write_arpa([], ["a", "a"], None)


def test_nothing_to_count_and_bad_values():
    with pytest.raises(UserError, match="at least one"):
        NGram(vocab=5, bos=0).build().count([np.array([0])])
    with pytest.raises(ValueError, match="needs bos"):
        NGram(vocab=5, bos=None)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        NGram(vocab=5, bos=5)
