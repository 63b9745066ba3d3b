"""Training to answer about pictures and sounds: cross-entropy of the answer, through decoder and towers at once."""

import torch

from headspring.artifacts.errors import UserError
from headspring.data.multimodal import MultimodalBatch
from headspring.models.model import ModelModule
from headspring.models.multimodal import MultimodalModule
from headspring.models.scoring import cross_entropy_sum
from headspring.training.objective import NextToken


class Answers(NextToken):
    """The next token where it is part of an answer. Rows without items are plain text."""

    def loss(self, model: ModelModule, batch: MultimodalBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        media = {}
        if batch.media:
            if not isinstance(model, MultimodalModule):
                kinds = ", ".join(batch.media)
                raise UserError(
                    f"these rows have items ({kinds}), for which a model of kind {model.config.kind!r} has no tower"
                )
            media = {"media": batch.media}
        return cross_entropy_sum(model, model(batch.inputs, padding=batch.padding, **media), batch.targets), {}
