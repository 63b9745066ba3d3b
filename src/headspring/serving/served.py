"""A model that is served: its name, the model itself, and the loop in which it runs."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from headspring.artifacts import UserError
from headspring.inference import LanguageModel
from headspring.inference.engine import Engine
from headspring.inference.inspection import Inspection
from headspring.inference.inspection.probe import row_shapes
from headspring.models.multimodal import MultimodalModule
from headspring.serving.config import Limits
from headspring.serving.loop import EngineLoop, EngineThread


@dataclass
class Served:
    """`engine` is None for a model that sees both ways: it makes embeddings and continues no text."""

    name: str
    lm: LanguageModel
    engine: Engine | None
    loop: EngineLoop
    thread: EngineThread
    limits: Limits
    created: int = field(default_factory=lambda: int(time.time()))

    def look(self, items: Mapping[str, torch.Tensor]) -> Any:
        """Soft tokens of pictures and sounds. Only in the engine's thread."""
        module = self.lm.model
        assert isinstance(module, MultimodalModule)
        with torch.inference_mode():
            return module.look({name: tensor.to(module.device) for name, tensor in items.items()})

    @property
    def context(self) -> int:
        """Tokens, prompt and answer together, that a request may have here."""
        return self.lm.context if self.engine is None else self.engine.context

    def check_captures(self, asked: Inspection, length: int, answers: int) -> None:
        """Raise `UserError` where what is captured would be too much to send back. Only in the engine's thread."""
        shapes, sites = row_shapes(self.lm.model), self.lm.model.sites
        row = sum(math.prod(shapes.get(sites.resolve(name), ())) for name in asked.capture)
        size, most = 4 * row * length * answers, self.limits.capture_bytes
        if size > most:
            raise UserError(f"capture: up to {size} bytes of activations, and this server sends {most}; ask for less")

    def wait_estimate(self) -> float:
        """Seconds after which a place in the queue may be free: what waits, at the pace of the last minutes."""
        if self.engine is None:
            return 1.0
        whole = self.loop.metrics.whole.labels(self.name)
        count = sum(bucket.get() for bucket in whole._buckets)
        mean = whole._sum.get() / count if count else 1.0
        stats = self.engine.stats()
        return min(60.0, max(1.0, stats.waiting * mean / max(1, stats.running)))
