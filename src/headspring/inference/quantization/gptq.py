"""GPTQ (arXiv 2210.17323): round one input's weights at a time, and let the inputs that are still free make up for it.

What a matrix shall keep is its outputs on real inputs, ‖X Wᵀ − X Ŵᵀ‖², not its weights. With H = Xᵀ X the error e of the
weights of input i, after rounding, is best answered by changing those of the later inputs j by

    W[:, j] −= e · C[i, j] / C[i, i],     C = upper Cholesky factor of H⁻¹          (equations 2, 3 and section 3.3, step 3)

The grid of a group of inputs is chosen when the walk reaches it, for the weights as they then are, each input's error
weighted by H[i, i]. Inputs are walked in their own order, so that groups stay runs of neighbours. All outputs go at once, and
matrices that read the same inputs (queries, keys, values) share H: they are walked as one.

Why this and not AWQ (arXiv 2306.00978): AWQ scales channels, which has to be undone in the part before, so that each family
needs its own table of what comes before what. GPTQ needs the inputs of a matrix and nothing else. What it gives up: time (a
few seconds for each hundred million weights, and a pass of text through the model).
"""

import torch

from headspring.inference.quantization.rounding import best_grid
from headspring.models.quantized import QuantizedMatrix

DAMPING = 0.01  # of the mean of H's diagonal, added to it: directions that the text does not show must not explode
BLOCK = 128  # inputs whose corrections are made at once; the later ones get theirs in one product


@torch.no_grad()
def gptq_int4(weight: torch.Tensor, hessian: torch.Tensor, group: int, minimum: bool = False) -> QuantizedMatrix:
    """weight (O, I), hessian (I, I) = Σ x xᵀ over inputs x, both float32; `group` divides I.

    An input that was never other than 0 keeps its rounded weight, and corrects nothing.
    """
    weight, (outputs, inputs) = weight.float().clone(), weight.shape
    damped = _damped(hessian)
    importance, factor = damped.diagonal().float(), _inverse_factor(damped)
    values = torch.empty(outputs, inputs, dtype=torch.int8)
    scales, minimums = torch.empty(outputs, inputs // group), torch.empty(outputs, inputs // group)
    step = group * max(1, BLOCK // group)
    for start in range(0, inputs, step):
        end = min(start + step, inputs)
        errors = torch.empty(end - start, outputs)
        # The walk goes over inputs, which lie together in the transposed matrix.
        part, corner = weight[:, start:end].T.contiguous(), factor[start:end, start:end]
        for i in range(end - start):
            if i % group == 0:
                grid = best_grid(part[i : i + group].T.contiguous(), minimum, importance[start + i : start + i + group])
                scales[:, (start + i) // group] = grid.scale[:, 0]
                if grid.minimum is not None:
                    minimums[:, (start + i) // group] = grid.minimum[:, 0]
            column = part[i, :, None]
            chosen = grid.nearest(column)
            values[:, start + i] = chosen[:, 0]
            errors[i] = (column - grid.meaning(chosen))[:, 0] / corner[i, i]
            part[i + 1 :].addr_(corner[i, i + 1 :], errors[i], alpha=-1.0)
        weight[:, end:].addmm_(errors.T, factor[start:end, end:], alpha=-1.0)
    return QuantizedMatrix(values, scales, minimums if minimum else None, 4)


def _damped(hessian: torch.Tensor) -> torch.Tensor:
    """H with `DAMPING`, float64; the identity for a part that no text reached, which makes GPTQ plain rounding."""
    wide = hessian.double()
    mean = wide.diagonal().mean()
    return wide + torch.eye(len(wide), dtype=wide.dtype) * (DAMPING * mean if mean > 0 else 1.0)


def _inverse_factor(damped: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor C of H⁻¹ = Cᵀ C, float32."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True).float()
