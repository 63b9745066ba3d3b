"""Looking inside, and changing what is inside, one request at a time, while a model serves many.

    Inspection(capture=["layers.3.residual.post"],
               steer=[{"site": "layers.5.residual.post", "vector": […], "scale": 4.0, "start": -1}])

- `request`: what a request may ask for, as values that travel as JSON.
- `probe`: that, checked against a model and a prompt, and what one answer has seen so far.
- `watching`: taps on the named sites for one step, in which each sequence's rows go to its own probe and to no other.

An edit is a function of a row and of its token's position, and of nothing else. So it gives the same bits however the engine
cuts, shares, forgets and recomputes a sequence; and because the pages behind an edit hold other keys and values, its
description (`Probe.key`) is where the chain of prefix hashes begins. What was captured at a position is replaced when that
position is computed again, so that rejected proposals and preempted work leave nothing behind.

Why not hooks around a model that runs alone, as the libraries for interpretability do: they cannot share a batch, and so run
at a fraction of the engine's speed. What it gives up: an edit is one of four kinds and no program; for a program there is
`LanguageModel.intervene`, which runs outside of the engine.
"""

from headspring.inference.inspection.probe import Probe, Readings, Seen
from headspring.inference.inspection.request import Ablate, Inspection, Lens, Patch, Steer
from headspring.inference.inspection.watching import watching

__all__ = ["Ablate", "Inspection", "Lens", "Patch", "Probe", "Readings", "Seen", "Steer", "watching"]
