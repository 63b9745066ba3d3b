"""Encoder–decoders in the pretrain stage: what their architectures build, and what does not go together."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from headspring.artifacts import UserError
from headspring.data.batch import Batch
from headspring.models import Sinusoidal
from headspring.models.families import FAMILIES
from headspring.training.objective import NextToken
from headspring.training.pretrain import PretrainConfig, plan

SPANS = {"objective": "spans", "steps": 2, "batch_size": 2}
SMALL = {"width": 32, "depth": 1, "heads": 2, "context": 40}


def test_the_original_transformer_is_the_papers():
    """Base (table 3 of arXiv 1706.03762, without its dropout and label smoothing): 6 + 6 layers of 512, 65 million."""
    model = {"kind": "vaswani", "width": 512, "depth": 6, "heads": 8, "context": 64}
    value = PretrainConfig.model_validate({**SPANS, "model": model}).described(37_000)
    decoder = value.decoder
    assert isinstance(decoder.embed.positions, Sinusoidal) and decoder.embed.scale == 512**0.5
    assert all(branch.pre is None and branch.out is not None for block in decoder.layers for branch in block.branches)
    assert value.shared and decoder.tied and decoder.layers[0].feedforward.f.hidden == 2048
    with torch.device("meta"):
        parameters = value.module().num_parameters()
    assert abs(parameters / 63e6 - 1) < 0.01  # the paper's 65 million with biases of its projections and 37,000 tokens


@pytest.mark.parametrize("kind", ["vaswani", "encoder_decoder"])
def test_a_plan_measures_it(kind):
    figures = plan(PretrainConfig.model_validate({**SPANS, "model": {"kind": kind, **SMALL}}), vocab_size=300)
    assert figures["seconds"] > 0 and figures["tokens"] == 2 * 2 * 40 and figures["flops"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"kind": "transformer", **SMALL}}, "reads no source"),
        ({"objective": "next_token", "model": {"kind": "vaswani", **SMALL}}, "needs objective: spans"),
        ({"objective": "masked", "model": {"kind": "encoder_decoder", **SMALL}}, "needs objective: spans"),
        ({"objective": "next_token", "spans": {"share": 0.2}}, "spans belongs to objective: spans"),
        ({"packing": "best_fit", "model": {"kind": "vaswani", **SMALL}}, "needs packing: concat"),
        ({"spans": {"mean_length": 0.5}, "model": {"kind": "vaswani", **SMALL}}, "greater than or equal to 1"),
    ],
)
def test_what_does_not_go_together(changes, message):
    with pytest.raises((ValidationError, UserError), match=message):
        PretrainConfig.model_validate(SPANS | changes)


def test_rows_with_a_source_need_a_model_that_reads_one():
    ids = torch.from_numpy(np.arange(8).reshape(2, 4))
    with pytest.raises(UserError, match="have a source, which a model of kind 'decoder' cannot read"):
        NextToken().loss(FAMILIES["llama"]().build(), Batch(ids, ids, source=ids))
    with pytest.raises(UserError, match="give it a source"):
        NextToken().loss(FAMILIES["bart"]().build(), Batch(ids, ids))
