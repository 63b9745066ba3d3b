"""The contrastive stage: a model whose embeddings find the source of a function by what its docstring says.

It starts from an encoder (or any model of the line) and ends with a folder that `LanguageModel.embed` and
sentence-transformers read. Measured by retrieval on functions of held-out documents: each summary has to find its own
source among all of them.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from headspring.data.store import read_documents
from headspring.data.text_pairs import PairsConfig, TextPair, TextPairs, mine_pairs
from headspring.inference.embeddings import embed, write_pooling
from headspring.models import load_model, save_model
from headspring.models.model import ModelModule
from headspring.models.pooling import Pooling
from headspring.posttraining.rates import difference, rate
from headspring.tokenization.tokenizer import Tokenizer
from headspring.training import distributed
from headspring.training.callbacks import Validation
from headspring.training.config import TrainConfig
from headspring.training.contrastive import Contrast, ranks
from headspring.training.loop import DTYPES, train
from headspring.training.optimizers import AdamW, OptimizerConfig


class ContrastiveConfig(TrainConfig):
    """Pairs, pooling and training of the contrastive stage. A batch is `batch_size` pairs: each query has as many choices."""

    packs_documents: ClassVar[bool] = False

    pairs: PairsConfig = PairsConfig()
    pooling: Pooling = Pooling()
    temperature: float = Field(0.05, gt=0)
    validation_pairs: int = Field(200, gt=1)
    steps: int = Field(200, gt=0)
    batch_size: int = Field(64, gt=1)
    optimizer: OptimizerConfig = AdamW(learning_rate=5e-4, weight_decay=0.01)


def contrast(config: ContrastiveConfig, model_folder: Path, data_folder: Path, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Train the model of `model_folder` on pairs of the training documents, and write model, tokenizer and pooling.

    Returns the metrics; `retrieval` has the share of held-out queries whose own source is the nearest of all, before and
    after, with intervals (95 %, paired for the difference), and the mean of 1 / rank."""
    folder = Path(folder)
    model, tokenizer = load_model(model_folder), Tokenizer.load(model_folder)
    pairs = mine_pairs(read_documents(data_folder, "train"), config.pairs, seed)
    most = config.pairs.model_copy(update={"max_pairs": config.validation_pairs})
    held_out = unseen(mine_pairs(read_documents(data_folder, "validation"), most, seed=0), pairs)
    data = TextPairs(pairs, tokenizer, config.pairs, seed)
    TextPairs(held_out, tokenizer, config.pairs, 0)  # says so where there are too few

    def found() -> torch.Tensor:
        return find(model, tokenizer, held_out, config)

    def measure() -> dict[str, float]:
        return summary(found())

    before = found()
    objective, watch = Contrast(config.pooling, config.temperature), Validation(measure, config.validate_every)
    result = train(model, objective, data, config, folder, [watch], "contrastive")
    after = found()
    if distributed.rank() == 0:
        save_model(model, folder)
        tokenizer.save(folder)
        write_pooling(folder, pooling_of(config), model.config.width)
    return {
        "parameters": model.num_parameters(),
        **result.metrics(),
        "validation_before": summary(before),
        "validation_after": summary(after),
        "retrieval": comparison(before, after),
        "pairs": len(pairs),
        "validation_pairs": len(held_out),
        "compute_dtype": config.precision,
    }


def unseen(held_out: list[TextPair], trained: list[TextPair]) -> list[TextPair]:
    """Those of which neither text was trained on."""
    texts = {text for pair in trained for text in (pair.query, pair.passage)}
    return [pair for pair in held_out if not texts & {pair.query, pair.passage}]


def pooling_of(config: ContrastiveConfig) -> Pooling:
    """How the trained model is to be used: normalised, and cut where the passages were."""
    return config.pooling.model_copy(update={"normalize": True, "max_tokens": config.pairs.passage_tokens})


def find(model: ModelModule, tokenizer: Tokenizer, pairs: list[TextPair], config: ContrastiveConfig) -> torch.Tensor:
    """(n,) int64: the rank of each query's own passage among all."""
    pooling = pooling_of(config)
    with model.computing_in(DTYPES[config.precision]):
        queries = embed(model, tokenizer, [pair.query for pair in pairs], pooling, config.batch_size)
        passages = embed(model, tokenizer, [pair.passage for pair in pairs], pooling, config.batch_size)
    return ranks(queries, passages)


def summary(found: torch.Tensor) -> dict[str, float]:
    return {"first": float((found == 1).float().mean()), "reciprocal_rank": float((1 / found).mean())}


def comparison(before: torch.Tensor, after: torch.Tensor) -> dict[str, Any]:
    first: tuple[list[bool], list[bool]] = (before == 1).tolist(), (after == 1).tolist()
    return {"before": rate(first[0]), "after": rate(first[1]), "difference": difference(*first)}
