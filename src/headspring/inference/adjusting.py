"""What a request changes in its logits before anything is chosen: penalties, bias, and what is allowed at its place.

It all depends on the text before the token, and so is done for each row by itself: on a few entries where it can be (penalties,
bias, early stops), over the vocabulary where it must be (a structure's mask).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from headspring.artifacts import HeadspringError
from headspring.inference.generation import Request
from headspring.inference.sampling import RowParams, pick


def adjusts(request: Request) -> bool:
    """Whether the request's next rows are not to be taken as they are."""
    special = request.matcher is not None or request.history is not None or bool(request.params.logit_bias)
    return special or not request.may_stop


def adjust(rows: Tensor, request: Request, proposed: Sequence[int], first: int = 0) -> None:
    """Change logits (n, V) float32 in place: row i follows the request's text and its first `first + i` proposals.

    Raises `HeadspringError` where a structure cannot go on. Rows behind a proposal that it does not allow are left as they
    are: nobody will look at them."""
    params = request.params
    if request.history is not None:
        _penalize(rows, request, proposed, first)
    if params.logit_bias:
        biased = torch.tensor(list(params.logit_bias), device=rows.device)
        rows[:, biased] += torch.tensor(list(params.logit_bias.values()), device=rows.device)
    early = params.min_tokens - len(request.token_ids) - first
    if early > 0 and request.stop_ids:
        stops = [token for token in request.stop_ids if token < rows.shape[1]]
        rows[:early, torch.tensor(stops, dtype=torch.int64, device=rows.device)] = -torch.inf
    if request.matcher is not None:
        for row, mask in zip(rows, request.matcher.masks(proposed, first)):
            row.masked_fill_(torch.from_numpy(~mask).to(rows.device), -torch.inf)


def _penalize(rows: Tensor, request: Request, proposed: Sequence[int], first: int) -> None:
    assert request.history is not None
    for token in proposed[:first]:
        request.history.push(token)
    for i, row in enumerate(rows):
        request.history.penalize(row, request.params)
        if first + i < len(proposed):
            request.history.push(proposed[first + i])
    for _ in proposed:
        request.history.pop()


def choose(request: Request, logits: Tensor, proposed: Sequence[int]) -> int | None:
    """The token that these logits (1, V) give after the proposals, chosen as the request's own will be; None where a structure
    allows none."""
    row = logits.clone() if adjusts(request) else logits
    try:
        adjust(row, request, proposed, first=len(proposed))
    except HeadspringError:
        return None
    uniform = request.uniforms[len(request.token_ids) + len(proposed)][None].to(logits.device)
    return int(pick(row, RowParams.of([request.params], logits.shape[-1], logits.device), uniform))
