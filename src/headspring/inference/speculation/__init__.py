"""Speculation: tokens are proposed cheaply, and checked many at a time by the model whose tokens they would be."""

from headspring.inference.speculation.controller import Controller
from headspring.inference.speculation.looking_ahead import LookingAhead
from headspring.inference.speculation.lookup import Lookup
from headspring.inference.speculation.speculator import Proposer, Speculator
from headspring.inference.speculation.values import Draft, EarlyExit, MultiToken, PromptLookup, Speculation

__all__ = [
    "Controller",
    "Draft",
    "EarlyExit",
    "LookingAhead",
    "Lookup",
    "MultiToken",
    "PromptLookup",
    "Proposer",
    "Speculation",
    "Speculator",
]
