"""Artifacts: what a stage leaves behind, and the rules that make it trustworthy."""

from headspring.artifacts.errors import CorruptArtifact, HeadspringError, UserError
from headspring.artifacts.value import Value

__all__ = ["CorruptArtifact", "HeadspringError", "UserError", "Value"]
