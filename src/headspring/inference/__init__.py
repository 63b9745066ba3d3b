"""Inference: a language model that answers, token by token."""

from headspring.inference.generation import Generation
from headspring.inference.language_model import LanguageModel
from headspring.inference.sampling import SamplingParams

__all__ = ["Generation", "LanguageModel", "SamplingParams"]
