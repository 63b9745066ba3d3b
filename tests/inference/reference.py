"""Generation as one would write it on a blackboard: one prompt, no cache, no batch, the whole text again each token."""

import torch

from headspring.inference.generation import uniform_numbers
from headspring.inference.sampling import RowParams, SamplingParams, log_probs_of_logits, pick


@torch.no_grad()
def generate(lm, prompt: list[int], params: SamplingParams, answer: int = 0) -> tuple[list[int], list[float]]:
    """Sampled ids and their log-probabilities, up to a stop token, `max_tokens` or the end of the context."""
    ids, log_probs = list(prompt), []
    room = min(params.max_tokens, lm.context - len(prompt))
    uniforms = uniform_numbers(params, prompt, answer, room)
    ends = {lm.tokenizer.eos_id, lm.tokenizer.end_id, *params.stop_token_ids}
    if params.ignore_eos:
        ends = set(params.stop_token_ids)
    for step in range(room):
        logits = lm.model.logits(lm.model(torch.tensor([ids])))[:, -1]
        vocab = logits.shape[-1]
        seen, banned = torch.zeros(1, vocab, dtype=torch.bool), torch.zeros(1, vocab, dtype=torch.bool)
        seen[0, ids] = True
        banned[0, lm.tokenizer.vocab_size :] = True
        if step < params.min_tokens:
            banned[0, list(ends)] = True
        token, log_prob = sample(logits, params, uniforms[step, None], seen, banned)
        ids.append(token.item())
        log_probs.append(log_prob.item())
        if ids[-1] in ends and step >= params.min_tokens:
            break
    return ids[len(prompt) :], log_probs


def sample(logits, params: SamplingParams, uniforms, seen=None, banned=None) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each row of logits (B, V), all with the same params, and its log-probability under the model itself. `seen`
    and `banned` are (B, V) bool."""
    adjusted = logits
    if seen is not None:
        adjusted = penalize(logits, seen, params.repetition_penalty)
    if banned is not None:
        adjusted = adjusted.masked_fill(banned, -torch.inf)
    ids = pick(adjusted, RowParams.of([params] * len(logits), logits.shape[-1]), uniforms)
    return ids, log_probs_of_logits(logits, ids)


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """CTRL's penalty: a seen token's logit is divided by it where positive, multiplied where negative."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
