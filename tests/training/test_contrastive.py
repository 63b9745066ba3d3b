"""InfoNCE by its definition, and embeddings that find more after training than before."""

import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headspring.data.text_pairs import PairsConfig, TextPairs, mine_pairs
from headspring.inference.embeddings import embed
from headspring.models import Attention, Block, Encoder, Full, SwiGLU, repeat
from headspring.models.pooling import Pooling, pool
from headspring.text.documents import Document
from headspring.tokenization.train import TokenizerConfig, train_tokenizer
from headspring.training.config import TrainConfig
from headspring.training.contrastive import Contrast, ranks
from headspring.training.loop import train
from headspring.training.optimizers import AdamW
from tests.models.conftest import randomise

CUTS = PairsConfig(query_tokens=24, passage_tokens=64, max_pairs=900)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """Some of the standard library's own modules."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[20:110]
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in paths]
    return [Document(text=text, source="stdlib", kind="code", path=path.name, start=0, end=len(text.encode()))
            for path, text in zip(paths, texts)]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer([each.text for each in documents[::4]], TokenizerConfig(vocab_size=1000))


def encoder(vocab: int, width: int = 48) -> Encoder:
    block = Block(mixer=Attention(heads=4, mask=Full()), feedforward=SwiGLU(hidden=2 * width))
    return Encoder(vocab=vocab, width=width, layers=repeat(2, block), context=64, head=None)


def test_the_loss_is_infonce(documents, tokenizer):
    """Both directions written out in float64, its gradient too; a temperature that is ignored is seen."""
    pairs = mine_pairs(documents[:20], CUTS, 0)[:7]
    model = randomise(encoder(tokenizer.vocab_size, 24).build())
    data = TextPairs(pairs, tokenizer, CUTS, 0)
    batch = data.collate([data.sample(i) for i in range(7)])
    objective = Contrast(Pooling(normalize=False), temperature=0.3)  # normalised nonetheless
    loss, metrics = objective.loss(model, batch)
    found = torch.autograd.grad(loss, list(model.parameters()))

    def plain(temperature: float) -> torch.Tensor:
        rows = (batch.queries, batch.query_padding), (batch.passages, batch.passage_padding)
        sides = [pool(model, model(tokens, padding=pads), pads, Pooling()).double() for tokens, pads in rows]
        scores = sides[0] @ sides[1].T / temperature
        return -(scores.log_softmax(1).diagonal() + scores.log_softmax(0).diagonal()).sum() / 2

    torch.testing.assert_close(loss.double(), plain(0.3))
    assert abs(loss.item() - plain(1.0).item()) > 0.01
    for ours, theirs in zip(found, torch.autograd.grad(plain(0.3), list(model.parameters()))):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert objective.count(batch) == 7 and 0 <= float(metrics["right"]) <= 7


def test_ranks_count_ties_against_the_model():
    same = torch.nn.functional.normalize(torch.ones(4, 3), dim=1)
    assert ranks(same, same).tolist() == [4, 4, 4, 4]  # a model that says the same of everything finds nothing
    assert ranks(torch.eye(3), torch.eye(3)).tolist() == [1, 1, 1]
    assert ranks(torch.eye(3), torch.eye(3)[[1, 0, 2]]).tolist() == [3, 3, 1]


@pytest.mark.slow
def test_trained_embeddings_find_more_held_out_functions(documents, tokenizer, tmp_path):
    """Docstring → source, for functions that were never trained on; with the control of pairs that do not belong together.

    The untrained model is no zero: two texts with the same tokens have similar means. Training has to find which tokens
    matter. A larger learning rate learns the training functions by heart and finds fewer of the others."""
    pairs = mine_pairs(documents, CUTS, 0)
    trained, held_out = pairs[:-150], pairs[-150:]
    shuffled = [replace(a, passage=b.passage) for a, b in zip(trained, [*trained[1:], trained[0]])]

    def reciprocal_rank(model) -> float:
        sides = [[getattr(pair, side) for pair in held_out] for side in ("query", "passage")]
        vectors = [embed(model, tokenizer, texts, Pooling(max_tokens=64), 64) for texts in sides]
        return float((1 / ranks(*vectors)).mean())

    settings = TrainConfig(steps=40, batch_size=32, precision="fp32", compile="never", checkpoint_every=100,
                           optimizer=AdamW(learning_rate=1e-4, weight_decay=0.0))  # fmt: skip
    after = {}
    for name, pairs in (("right", trained), ("shuffled", shuffled)):
        model = encoder(tokenizer.vocab_size, 64).build(seed=1)
        before = reciprocal_rank(model)
        train(model, Contrast(Pooling(), 0.05), TextPairs(pairs, tokenizer, CUTS, 0), settings, tmp_path / name)
        after[name] = reciprocal_rank(model)
    assert after["right"] > before + 0.05, (before, after)
    assert after["right"] > after["shuffled"] + 0.05, (before, after)
