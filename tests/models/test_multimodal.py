"""Pictures and sounds in a prompt: where their soft tokens stand, what they may not touch, and the front ends by formula."""

from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
import torch

from headspring.artifacts import UserError
from headspring.models.audio import Sound, hertz_to_mel, log_mel, mel_filters, mel_to_hertz
from headspring.models.codebook import Codebook, fit_codebook
from headspring.models.families import FAMILIES
from headspring.models.folder import load_model, save_model
from headspring.models.multimodal import Multimodal
from headspring.models.soft_tokens import SoftTokens
from headspring.models.vision import Vision, from_patches, patches
from tests.contract.checks import assert_close
from tests.models.conftest import randomise, small_decoder

IMAGE, SOUND, PIECES = 51, 52, 6


@pytest.fixture(scope="module")
def model():
    return randomise(FAMILIES["multimodal"]().build()).eval()


@pytest.fixture(scope="module")
def recurrent():
    """The same towers before a decoder whose state is folded, and reads tokens again after a rewind."""
    config = FAMILIES["multimodal"]()
    decoder = FAMILIES["gru"]().model_copy(update={"vocab": 53, "width": 24, "context": 48})
    return randomise(
        Multimodal(decoder=type(decoder).model_validate(decoder.model_dump()), towers=config.towers).build()
    ).eval()


def prompt(rows: int = 2, pictures: int = 2, sounds: int = 0, seed: int = 0):
    """Words, pictures, words, sounds, words; and the items."""
    draw = torch.Generator().manual_seed(seed)

    def words(count):
        return torch.randint(0, 50, (rows, count), generator=draw)

    pieces = [words(2)]
    for token, count in ((IMAGE, pictures), (SOUND, sounds)):
        for _ in range(count):
            own = PIECES if token == IMAGE else 3
            pieces += [torch.full((rows, own), token), words(2)]
    media = {"image": torch.rand(rows, pictures, 1, 6, 9, generator=draw)} if pictures else {}
    media |= {"sound": torch.randn(rows, sounds, 700, generator=draw)} if sounds else {}
    return torch.cat(pieces, 1), media


# ---- what stands where


@torch.no_grad()
def test_without_media_it_is_its_decoder(model):
    tokens, alone = prompt()[0], model.config.decoder.build()
    alone.load_state_dict(model.body.state_dict())
    assert torch.equal(model(tokens), alone(tokens))


@torch.no_grad()
def test_soft_tokens_stand_where_the_placeholders_are(model):
    tokens, media = prompt(sounds=1)
    soft = model.look(media)
    with model.sites.capture(["embed"]) as seen:
        model(tokens, media=media)
    assert torch.equal(seen["embed"][tokens == IMAGE].view(2, 12, 24), soft.hidden[:, :12])
    assert torch.equal(seen["embed"][tokens == SOUND].view(2, 3, 24), soft.hidden[:, 12:])
    words = tokens < IMAGE
    assert torch.equal(seen["embed"][words], model.body.embed.weight[tokens[words]])


@torch.no_grad()
def test_only_what_comes_later_sees_a_picture(model):
    tokens, media = prompt()
    other = {"image": media["image"].clone()}
    other["image"][:, 1] += 0.5
    before, after = model(tokens, media=media), model(tokens, media=other)
    second = 2 + PIECES + 2
    assert torch.equal(before[:, :second], after[:, :second])
    assert ((before - after)[:, second:].abs().amax(-1) > 0).all()


@torch.no_grad()
def test_the_order_of_two_pictures_matters(model):
    tokens, media = prompt()
    swapped = model(tokens, media={"image": media["image"].flip(1)})
    assert (swapped[:, -1] - model(tokens, media=media)[:, -1]).abs().amax() > 1e-3


@torch.no_grad()
def test_a_row_is_the_same_alone_and_behind_pads(model):
    tokens, media = prompt(rows=3, sounds=1)
    together = model(tokens, media=media)
    padding = torch.tensor([0, 4, 7])
    padded = torch.zeros(3, tokens.shape[1] + 7, dtype=torch.int64)
    for row, pads in enumerate((0, 4, 7)):
        cut = 7 - pads  # each row with fewer words at its end, so that the lengths differ
        body = tokens[row] if cut == 0 else torch.cat([tokens[row], tokens[row, :1].expand(cut)])
        padded[row, pads:], padded[row, :pads] = body, IMAGE  # pads that look like placeholders
    found = model(padded, padding=padding, media=media)
    for row, pads in enumerate((0, 4, 7)):
        alone = model(tokens[row : row + 1], media={name: items[row : row + 1] for name, items in media.items()})
        assert_close(together[row], alone[0])
        assert_close(found[row, pads : pads + tokens.shape[1]], alone[0])


@pytest.mark.parametrize("kind", ["model", "recurrent"])
@torch.no_grad()
def test_the_state_law_with_pictures_in_the_prefix(kind, request):
    """Cut anywhere, in the middle of a picture too; rewound into a picture; selected and forked."""
    model = request.getfixturevalue(kind)
    tokens, media = prompt()
    padding = torch.tensor([0, 2])
    tokens[1, :2] = IMAGE
    whole, time = model(tokens, padding=padding, media=media), tokens.shape[1]
    for cuts in ([5], [1, 2, 3, 9], [8, 15], list(range(1, time))):
        state, pieces = model.new_state(2, time), []
        for start, end in pairwise([0, *cuts, time]):
            first = {"padding": padding, "media": media} if start == 0 else {}
            pieces.append(model(tokens[:, start:end], state=state, **first))
        for row, pads in enumerate((0, 2)):
            assert_close(torch.cat(pieces, 1)[row, pads:], whole[row, pads:])
    state = model.new_state(2, time)
    model(tokens[:, :10], state=state, padding=padding, media=media)
    model(tokens[:, 10:14], state=state)
    state.rewind(3)
    assert_close(model(tokens[:, 11:], state=state), whole[:, 11:])
    state = model.new_state(2, time)
    model(tokens[:, :12], state=state, padding=padding, media=media)
    state.select(torch.tensor([1, 0, 1]))
    assert_close(model(tokens[[1, 0, 1], 12:], state=state), whole[[1, 0, 1], 12:])


def test_the_law_sees_vectors_counted_from_the_call(model):
    """The planted bug: placeholders are counted among the tokens of one call, and not of all calls."""
    original = SoftTokens.place

    def forgetful(self, x, tokens, padding):
        return original(self, x, tokens[:, -x.shape[1] :], None)

    with patch.object(SoftTokens, "place", forgetful), pytest.raises(AssertionError):
        tokens, media = prompt()
        state = model.new_state(2, tokens.shape[1])
        pieces = [model(tokens[:, :5], state=state, media=media), model(tokens[:, 5:], state=state)]
        assert_close(torch.cat(pieces, 1), model(tokens, media=media))


def test_what_does_not_fit_is_refused_in_a_line(model):
    tokens, media = prompt()
    with pytest.raises(UserError, match=r"12 placeholders \(token 51\) for 6 vectors"):
        model(tokens, media={"image": media["image"][:, :1]})
    with pytest.raises(UserError, match=r"12 placeholders \(token 51\) for 18 vectors"):
        model(tokens, media={"image": media["image"][:, [0, 1, 1]]})
    with pytest.raises(UserError, match="no tower named 'film'; it has image, sound"):
        model(tokens, media={"film": media["image"]})
    with pytest.raises(UserError, match=r"reads pictures of \(1, 6, 9\)"):
        model(tokens, media={"image": media["image"][..., :8]})
    with pytest.raises(ValueError, match="do not fill a picture"):
        Vision(placeholder=1, height=8, columns=8, patch=3)
    with pytest.raises(ValueError, match="too narrow"):
        Sound(placeholder=1, samples=2000, window=64, bands=60)
    with pytest.raises(ValueError, match="no token of a vocabulary of 61"):
        Multimodal(decoder=small_decoder(), towers={"image": Vision(placeholder=61, height=4, columns=4, patch=2)})


def test_gradients_reach_the_towers_and_the_folder_keeps_them(model, tmp_path):
    tokens, media = prompt(sounds=1)
    gradients = torch.autograd.grad(model(tokens, media=media)[:, -1].sum(), list(model.towers.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(tokens, media=media), model(tokens, media=media))
    assert model.ledger().parameters == model.num_parameters()


# ---- front ends


def test_patches_are_squares_line_by_line():
    pictures = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    cut = patches(pictures, 2)
    assert cut.shape == (2, 6, 12)
    for place in range(6):
        top, left = 2 * (place // 3), 2 * (place % 3)
        assert torch.equal(cut[1, place], pictures[1, :, top : top + 2, left : left + 2].flatten())
    assert torch.equal(from_patches(cut, 2, 4, 6), pictures)


def test_mel_filters_are_those_of_the_formula():
    """Here as two loops, and by another library's function."""
    bins, bands, rate = 65, 10, 8000
    found, corners = mel_filters(bins, bands, rate), [mel_to_hertz(hertz_to_mel(4000) * i / 11) for i in range(12)]
    for i in range(bins):
        for band in range(bands):
            f, (low, middle, high) = i * 4000 / 64, corners[band : band + 3]
            height = (
                (f - low) / (middle - low) if low <= f <= middle else (high - f) / (high - middle) if middle < f < high else 0
            )
            assert float(found[i, band]) == pytest.approx(height, abs=1e-6)
    assert hertz_to_mel(1000) == pytest.approx(1000, abs=0.1) and mel_to_hertz(hertz_to_mel(440)) == pytest.approx(440)
    theirs = pytest.importorskip("transformers.audio_utils").mel_filter_bank(bins, bands, 0, 4000, rate, mel_scale="htk")
    np.testing.assert_allclose(found.numpy(), theirs, atol=1e-6)


def test_log_mel_is_a_fourier_transform_by_hand():
    wave = torch.randn(1, 400, generator=torch.Generator().manual_seed(0))
    found = log_mel(wave, 8000, 128, 64, 10)
    assert found.shape == (1, 10, 5)
    n, taper = np.arange(128), 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(128) / 128)
    for frame in range(5):
        piece = wave[0, 64 * frame : 64 * frame + 128].numpy() * taper
        power = np.array([abs((piece * np.exp(-2j * np.pi * k * n / 128)).sum()) ** 2 for k in range(65)]) / taper.sum() ** 2
        expected = np.log(np.maximum(mel_filters(65, 10, 8000).numpy().T @ power, 1e-6))
        np.testing.assert_allclose(found[0, :, frame].numpy(), expected, rtol=1e-4)


def test_a_tone_is_loudest_in_its_band():
    for hertz in (300, 1000, 2500):
        wave = torch.sin(2 * torch.pi * hertz * torch.arange(1024) / 8000)[None]
        loudest = int(log_mel(wave, 8000, 256, 128, 20)[0].mean(1).argmax())
        centre = mel_to_hertz(hertz_to_mel(4000) * (loudest + 1) / 21)
        assert abs(hertz_to_mel(centre) - hertz_to_mel(hertz)) <= hertz_to_mel(4000) / 21


def test_a_codebook_goes_there_and_back(tmp_path):
    draw = torch.Generator().manual_seed(0)
    true = 4 * torch.randn(8, 5, generator=draw)
    pieces = true[torch.randint(8, (600,), generator=draw)] + 0.05 * torch.randn(600, 5, generator=draw)
    book = fit_codebook(pieces, 8, offset=100)
    assert book.encode(pieces.view(60, 10, 5)).shape == (60, 10) and set(book.encode(pieces).tolist()) == set(range(100, 108))
    assert float((book.decode(book.encode(pieces)) - pieces).square().mean()) < 0.004  # the noise is 0.0025
    assert torch.equal(book.encode(book.centres), torch.arange(100, 108))
    book.save(tmp_path / "codes.safetensors")
    assert torch.equal(Codebook.load(tmp_path / "codes.safetensors").encode(pieces), book.encode(pieces))
    with pytest.raises(UserError, match="ids of this codebook are 100 … 107"):
        book.decode(torch.tensor([99]))
    with pytest.raises(UserError, match="as many different pieces, not 1"):
        fit_codebook(torch.zeros(50, 3), 4, offset=0)
