"""A decoder of the line learns to look: what it was stays, what it answers is measured on what it has not seen."""

import numpy as np
import pytest
import torch

from headspring.artifacts import UserError
from headspring.data.media_questions import AboutFilms, AboutTones, Asked, MediaQuestions
from headspring.inference.language_model import LanguageModel
from headspring.models import GRU, Attention, Block, Branch, Decoder, Encoder, Full, SwiGLU, save_model
from headspring.posttraining import multimodal
from headspring.posttraining.multimodal import Asking, MultimodalConfig, teach
from headspring.tokenization.train import TokenizerConfig, train_tokenizer
from headspring.training.multimodal import SPARE, Hearing, Sight, with_sense
from headspring.training.optimizers import AdamW

SMALL = {"width": 32, "depth": 1, "heads": 2}
TRAINED = {"compile": "never", "precision": "fp32", "batch_size": 16, "validation_questions": 40}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A folder with a decoder and its tokenizer, as a pretrain stage leaves it."""
    folder = tmp_path_factory.mktemp("model")
    words = ["which digit is this?", "is it even?", "yes", "no", "zero one two three four five six seven eight nine"]
    tokenizer = train_tokenizer(words * 4, TokenizerConfig(vocab_size=290))
    block = Block(mixer=Attention(heads=2), feedforward=SwiGLU(hidden=64))
    save_model(Decoder(vocab=tokenizer.vocab_size, width=32, layers=(block,), context=64).build(), folder)
    tokenizer.save(folder)
    return folder


def test_as_a_function_of_text_it_stays_what_it_was():
    for mixer in (Attention(heads=2), Branch(f=GRU(), residual=False)):
        model = Decoder(vocab=50, width=32, layers=(Block(mixer=mixer),), context=64, tied=False).build(seed=3)
        seeing = with_sense(model, Sight(**SMALL), (1, 8, 8), seed=0)
        tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
        assert torch.equal(seeing.logits(seeing(tokens))[..., :50], model.logits(model(tokens)))
        assert seeing.config.vocab == 50 + SPARE and seeing.config.towers["image"].placeholder == 50


def test_it_learns_from_answers_and_is_asked_about_what_it_has_not_seen(taught, tmp_path):
    config = MultimodalConfig(tower=Sight(**SMALL), steps=60, optimizer=AdamW(learning_rate=0.005), **TRAINED)
    metrics = teach(config, taught, tmp_path)
    assert metrics["answers"]["before"]["rate"] < 0.1 < metrics["answers"]["after"]["rate"]
    assert metrics["answers"]["blind"]["n"] == metrics["validation_questions"] == 40
    assert metrics["validation_after"]["loss"] < 0.5 * metrics["validation_before"]["loss"]
    lm = LanguageModel.load(tmp_path)
    assert metrics["parameters"] == lm.model.num_parameters() == lm.model.ledger().parameters
    assert lm.generate(["is"], max_tokens=3, seed=0)[0].text is not None


def test_an_answer_is_right_where_it_is_the_expected_one(taught, monkeypatch):
    lm = LanguageModel.load(taught)
    config = MultimodalConfig(tower=Sight(**SMALL), **TRAINED)
    asking = Asking(with_sense(lm.model, config.tower, (1, 8, 8), 0), lm.tokenizer, config)
    asked = [Asked("is it even?", word, np.zeros((1, 1, 8, 8), dtype=np.float32)) for word in ("yes", "no")]
    yes = lm.tokenizer.encode("yes")
    monkeypatch.setattr(multimodal, "answer", lambda *arguments: [yes, yes])  # whatever is shown
    assert asking.right(asked, asked) == [True, False]


@pytest.mark.parametrize(
    ("questions", "sense"), [(AboutFilms(times=1), Sight(patch=4, **SMALL)), (AboutTones(sounds=8), Hearing(**SMALL))]
)
def test_films_and_sounds(questions, sense, taught):
    lm = LanguageModel.load(taught)
    config = MultimodalConfig(tower=sense, questions=questions, **TRAINED)
    asking = Asking(with_sense(lm.model, sense, questions.shape, 0), lm.tokenizer, config)
    rows = asking.rows(questions.asked(held_out=True, seed=0)[:3], 0)
    batch = rows.collate([rows.sample(0)])
    assert batch.media[sense.name].shape[1:] == (questions.num_items, *questions.shape)
    assert abs(config.expected_tokens() - len(rows.sample(0).inputs)) < 12
    hidden = asking.model(batch.inputs, padding=batch.padding, media=batch.media)
    assert hidden.isfinite().all()


def test_held_out_items_are_others():
    for questions in (kind() for kind in MediaQuestions.kinds.values()):
        learn, held_out = (questions.asked(held_out, seed=0) for held_out in (False, True))
        seen = {one.items.tobytes() for one in learn}
        assert not seen & {one.items.tobytes() for one in held_out} and len(held_out) < len(learn)
        assert all(one.items.shape == (questions.num_items, *questions.shape) for one in learn[:4])
        again = questions.asked(False, seed=0)
        assert all(np.array_equal(a.items, b.items) for a, b in zip(learn, again))


def test_what_cannot_be_is_said(taught, tmp_path):
    encoder = Encoder(vocab=50, width=32, layers=(Block(mixer=Attention(heads=2, mask=Full())),), context=64).build()
    with pytest.raises(UserError, match="beside a decoder, and this model is of kind 'encoder'"):
        with_sense(encoder, Sight(**SMALL), (1, 8, 8), 0)
    with pytest.raises(UserError, match="use kind: sound"):
        Sight().tower(0, (6144,))
    with pytest.raises(UserError, match="use kind: vision"):
        Hearing().tower(0, (1, 8, 8))
    with pytest.raises(UserError, match="patches of 3 do not fill"):
        Sight(patch=3).tower(0, (1, 8, 8))
    with pytest.raises(UserError, match="the model's context is 64"):
        teach(MultimodalConfig(tower=Hearing(frames=1, **SMALL), questions=AboutTones(), **TRAINED), taught, tmp_path)
