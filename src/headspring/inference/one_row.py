"""The choice of one token from one row of logits on a CPU: `sampling.filtered` and `draw`, in the order that costs least.

A filter leaves a few hundred tokens of fifty thousand. So the threshold is found first, by a partial sort (a full one only
where the distribution is so flat that the first tokens do not hold the mass asked for), and only what passes it is
exponentiated and summed. And a row at a time stays in the processor's cache, as sixteen at once do not.
"""

import math

import numpy as np
import torch

from headspring.inference.sampling_params import SamplingParams

FIRST = (1024, 8192)  # tokens that mostly hold the mass of a nucleus
Row = np.ndarray  # (V,) float32


def draw_one(logits: Row, params: SamplingParams, uniform: float) -> int:
    """The token of logits (V,) float32, adjusted already, at a uniform number in [0, 1). Temperature 0 is not for this."""
    largest = logits.max()
    if not math.isfinite(largest):
        return 0  # its log-probability is NaN too, and tells
    # The best logit at 0: a tiny temperature then sends the others to −inf, and not the best to +inf.
    scaled = logits - largest
    if params.temperature != 1:
        scaled /= np.float32(max(params.temperature, 1e-30))
    threshold = threshold_of(scaled, params)
    ids = None if threshold == -math.inf else np.flatnonzero(scaled >= np.float32(threshold))
    # torch sums in float64 three times as fast as NumPy
    mass = torch.from_numpy(np.exp(scaled if ids is None else scaled[ids])).cumsum(0, dtype=torch.float64).numpy()
    # u · total may round up to total, which no token's interval contains.
    target = min(uniform * mass[-1], np.nextafter(mass[-1], 0.0))
    place = int(np.searchsorted(mass, target, side="right"))
    return place if ids is None else int(ids[place])


def threshold_of(scaled: Row, params: SamplingParams) -> float:
    """The least likely logit that top-k, top-p and min-p leave; −inf where they leave everything."""
    threshold, vocab = -math.inf, len(scaled)
    inside = scaled
    if params.top_k is not None and params.top_k < vocab:
        threshold = float(np.partition(scaled, vocab - params.top_k)[vocab - params.top_k])
        inside = scaled[scaled >= threshold]
    if params.top_p < 1:
        threshold = max(threshold, edge_of_nucleus(inside, params.top_p))
    if params.min_p > 0:
        threshold = max(threshold, math.log(params.min_p))
    return threshold


def edge_of_nucleus(inside: Row, p: float) -> float:
    """The least likely logit of the nucleus: a token stays if those before it, in order of probability, hold less than p."""
    mass_inside = p * float(torch.from_numpy(inside).exp().sum(dtype=torch.float64))
    for count in (*(count for count in FIRST if count < len(inside)), len(inside)):
        first = inside if count == len(inside) else np.partition(inside, len(inside) - count)[len(inside) - count :]
        ordered = np.sort(first)
        mass = torch.from_numpy(ordered).flip(0).exp().cumsum(0, dtype=torch.float64).numpy()
        before = int(np.searchsorted(mass, mass_inside))  # tokens that do not hold that much, with those before them
        if before < count:
            break
    return float(ordered[-1 - min(before, count - 1)])
