"""Generation as one would write it on a blackboard: one prompt, no cache, no batch, the whole text again each token."""

import torch

from headspring.inference.generation import uniform_numbers
from headspring.inference.sampling import RowParams, SamplingParams, sample


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
        token, log_prob = sample(logits, RowParams.of([params], vocab), uniforms[step, None], seen, banned)
        ids.append(token.item())
        log_probs.append(log_prob.item())
        if ids[-1] in ends and step >= params.min_tokens:
            break
    return ids[len(prompt) :], log_probs
