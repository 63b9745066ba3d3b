"""The engine: many requests, one model, one step at a time."""

from headspring.inference.engine.config import EngineConfig, QueueFull
from headspring.inference.engine.engine import Engine, Statistics
from headspring.inference.engine.job import Job, Update

__all__ = ["Engine", "EngineConfig", "Job", "QueueFull", "Statistics", "Update"]
