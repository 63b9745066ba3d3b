"""A model that is served: its name, the model itself, and the loop in which it runs."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from headspring.artifacts import UserError
from headspring.inference import LanguageModel
from headspring.inference.engine import Engine, EngineConfig
from headspring.inference.inspection import Inspection
from headspring.inference.inspection.probe import row_shapes
from headspring.models.lora import Adapter
from headspring.models.multimodal import MultimodalModule
from headspring.serving.config import Limits
from headspring.serving.loop import EngineLoop, EngineThread


@dataclass
class Served:
    """`engine` is None for a model that sees both ways: it makes embeddings and continues no text. A model with an adapter has
    that of its base, and shares it with all who have the same one; `engine_name` is what the loop calls it."""

    name: str
    lm: LanguageModel
    engine: Engine | None
    loop: EngineLoop
    thread: EngineThread
    limits: Limits
    engine_name: str
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def adapter(self) -> str | None:
        """What the engine calls the adapter of this model."""
        return None if self.lm.adapter is None else self.name

    @property
    def parent(self) -> str | None:
        """The base of this model's adapter, where that is served too."""
        return self.engine_name if self.adapter is not None and self.engine_name not in self._adapters else None

    @property
    def _adapters(self) -> Mapping[str, Adapter]:
        return {} if self.engine is None else self.engine.adapters

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
        whole = self.loop.metrics.whole.labels(self.engine_name)
        count = sum(bucket.get() for bucket in whole._buckets)
        mean = whole._sum.get() / count if count else 1.0
        stats = self.engine.stats()
        return min(60.0, max(1.0, stats.waiting * mean / max(1, stats.running)))


def engine_names(models: Mapping[str, LanguageModel]) -> dict[str, str]:
    """Who answers for each model: models with adapters of one base share its engine, which has the base's name where that is
    served too, and else the first one's."""
    names = {id(lm): name for name, lm in models.items()}
    return {name: names.setdefault(id(lm.base or lm), name) for name, lm in models.items()}


def engines_of(models: Mapping[str, LanguageModel], config: EngineConfig) -> dict[str, Engine]:
    """The engines by name. Raises `UserError` for an adapter that cannot be served."""
    names, engines = engine_names(models), {}
    for name in dict.fromkeys(names.values()):
        base = models[name].base or models[name]
        adapters = {other: lm.adapter for other, lm in models.items() if names[other] == name and lm.adapter is not None}
        if base.model.config.causal:
            engines[name] = Engine(base.model, base.tokenizer, config, adapters=adapters)
    return engines
