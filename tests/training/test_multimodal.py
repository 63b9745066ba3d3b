"""Towers and decoder learn together, in the loop of every trainer, and answer in text; a shuffled picture is the control."""

import numpy as np
import pytest
import torch

from headspring.artifacts import UserError
from headspring.data.batch import IGNORE
from headspring.data.media import DIRECTIONS, RATE, digits, film, tones
from headspring.data.multimodal import example, join_examples
from headspring.data.rows import Rows
from headspring.inference.multimodal import answer
from headspring.models import Attention, Block, Decoder, Full, NoPE, SwiGLU
from headspring.models.multimodal import Multimodal
from headspring.models.vision import Vision
from headspring.training.config import TrainConfig
from headspring.training.loop import train
from headspring.training.multimodal import Answers
from headspring.training.optimizers import AdamW

END, ASK, IMAGE, VOCAB = 10, 11, 12, 13  # digits answer by their own number


def config(steps: int) -> TrainConfig:
    optimizer = AdamW(learning_rate=0.005, weight_decay=0.0)
    return TrainConfig(
        steps=steps, batch_size=16, precision="fp32", compile="never", checkpoint_every=10**6, optimizer=optimizer
    )


def small() -> Multimodal:
    block = Block(mixer=Attention(heads=4), feedforward=SwiGLU(hidden=64))
    seen = Block(mixer=Attention(heads=4, position=NoPE(), mask=Full()), feedforward=SwiGLU(hidden=64))
    tower = Vision(placeholder=IMAGE, height=8, columns=8, patch=4, width=32, blocks=(seen,))
    return Multimodal(decoder=Decoder(vocab=VOCAB, width=32, layers=(block,), context=16), towers={"image": tower})


@pytest.mark.slow
def test_it_says_which_digit_it_sees(tmp_path):
    pytest.importorskip("sklearn")
    learn, test = digits()
    prompt = [IMAGE] * 4 + [ASK]
    rows = [example(prompt, [int(d), END], {"image": p[None, None]}) for p, d in zip(learn.pictures, learn.labels)]
    model = small().build()
    train(model, Answers(), Rows(rows, join_examples, 6), config(250), tmp_path)
    shown = [{"image": picture[None, None]} for picture in test.pictures]

    def accuracy(media) -> float:
        said = answer(model, [np.array(prompt)] * len(test), media, 4, END)
        return float(np.mean([reply == [digit] for reply, digit in zip(said, test.labels)]))

    assert accuracy(shown) > 0.75
    assert accuracy([shown[i] for i in np.random.default_rng(0).permutation(len(shown))]) < 0.2  # chance is 0.1


def test_only_the_answer_is_learned():
    rows = [example([1, 2, 3], [4, END]), example([5], [6, END])]
    batch = join_examples(rows)
    assert batch.inputs.tolist() == [[1, 2, 3, 4], [0, 0, 5, 6]] and batch.padding.tolist() == [0, 2]
    assert batch.targets.tolist() == [[IGNORE, IGNORE, 4, END], [IGNORE, IGNORE, 6, END]]
    assert Answers().count(batch) == 4


def test_rows_without_pictures_are_text_and_mixed_ones_are_refused():
    model, picture = small().build(), {"image": np.zeros((1, 1, 8, 8), dtype=np.float32)}
    with_one = example([IMAGE] * 4 + [ASK], [3, END], picture)
    assert torch.isfinite(Answers().loss(model, join_examples([example([ASK], [3, END])]))[0])
    with pytest.raises(UserError, match="must have the same items"):
        join_examples([with_one, example([ASK], [3, END])])
    with pytest.raises(UserError, match=r"items \(image\), for which a model of kind 'decoder' has no tower"):
        Answers().loss(model.config.decoder.build(), join_examples([with_one]))


def test_answers_stop_keep_to_what_is_allowed_and_repeat_by_seed():
    model = small().build()
    prompts = [np.array([1, 2, 3]), np.array([4])]
    assert all(len(row) == 5 and set(row) <= {6, 7, 8} for row in answer(model, prompts, (), 5, allowed=range(6, 9)))
    first, second, other = (answer(model, prompts, (), 8, temperature=5.0, seed=seed) for seed in (1, 1, 2))
    assert first == second != other
    alone = answer(model, prompts[1:], (), 5)
    assert answer(model, prompts, (), 5)[1] == alone[0]
    assert answer(model, prompts[1:], (), 5, end=alone[0][2])[0] == alone[0][: alone[0].index(alone[0][2])]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_film_moves_a_pixel_a_frame(direction):
    picture = np.random.default_rng(0).random((8, 8)).astype(np.float32) + 0.1
    shown = film(picture, direction, np.random.default_rng(1))
    corners = np.array([[axis.min() for axis in np.nonzero(frame)] for frame in shown])
    assert (np.diff(corners, axis=0) == DIRECTIONS[direction]).all()
    assert all(frame.sum() == pytest.approx(picture.sum(), rel=1e-5) for frame in shown)
    with pytest.raises(UserError, match="6 frames need a picture to move 5 pixels"):
        film(picture, direction, np.random.default_rng(1), frames=6)


def test_tones_have_their_pitch_and_beats():
    wave = tones(500.0, 3, 6000, np.random.default_rng(0), noise=0.0)
    spectrum = np.abs(np.fft.rfft(wave[:1000] * np.hanning(1000)))
    assert spectrum.argmax() * RATE / 1000 == pytest.approx(500, abs=8)
    assert [bool(part.any()) for part in wave.reshape(6, 1000)] == [True, False] * 3


def test_the_digits_are_split_by_place():
    pytest.importorskip("sklearn")
    learn, test = digits()
    assert (len(learn), len(test)) == (1348, 449) and learn.pictures.max() == 1.0
    assert set(learn.labels) == set(test.labels) == set(range(10))
