"""Every family of models generates through the engine as it does alone, without cache and company."""

import pytest
import torch

from headspring.artifacts import UserError
from headspring.inference.engine import Engine, EngineConfig
from headspring.inference.engine.runner import PlainRunner, RaggedRunner
from headspring.inference.sampling_params import SamplingParams
from headspring.models import scoring
from headspring.models.families import FAMILIES

CONFIGS = {name: tiny() for name, tiny in FAMILIES.items()}
CAUSAL = [name for name, config in CONFIGS.items() if config.causal]
SOURCE = [3, 9, 4]
NEW = 5
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3], [3, 1, 4, 1, 5, 9, 2, 7, 1]]


class Named:
    """As much of a tokenizer as the engine needs where nobody reads the text."""

    eos_id = end_id = None

    def __init__(self, vocab: int):
        self.vocab_size = vocab

    def stream(self):
        return self

    def push(self, token: int) -> str:
        return ""

    finish = str


@pytest.fixture(scope="module", params=CAUSAL)
def model(request):
    made = CONFIGS[request.param].build(1).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # opinions: greedy choices should not hang on rounding
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3, generator=generator)
    return made


def alone(model, prompt: list[int], given: dict) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities, the whole text read again for each."""
    ids, values = list(prompt), []
    for _ in range(NEW):
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), **given)[:, -1:]
            ids.append(int(model.logits(hidden)[0, 0].argmax()))
            values.append(scoring.log_probs(model, hidden, torch.tensor([ids[-1:]])).item())
    return ids[len(prompt) :], values


def test_a_family_generates_as_alone(model):
    config = model.config
    given = {"source": torch.tensor([SOURCE])} if config.reads_source else {}
    engine = Engine(model, Named(config.vocab), EngineConfig(max_sequences=3, chunk=4, debug=True))
    params = SamplingParams(temperature=0.0, max_tokens=NEW, n=2)
    prompts = [[config.start]] if config.reads_source else [[token % config.vocab for token in prompt] for prompt in PROMPTS]
    jobs = [engine.submit(prompt, params, source=SOURCE if given else ()) for prompt in prompts]
    engine.run()
    for prompt, job in zip(prompts, jobs, strict=True):
        assert job.error is None
        tokens, values = alone(model, prompt, given)
        for answer in job.generations:
            assert answer.token_ids == tokens
            torch.testing.assert_close(torch.tensor(answer.logprobs), torch.tensor(values), atol=2e-4, rtol=1e-4)


def test_both_runners_have_families(model):
    """Which runner a family has is decided by its parts; nobody should fall to the slow one unseen."""
    engine = Engine(model, Named(model.config.vocab))
    slow = model.config.kind == "ngram" or any(block.mixes.by_length for block in model.blocks())
    assert isinstance(engine.runner, PlainRunner if slow else RaggedRunner)


def test_pictures_are_answered_as_without_the_engine():
    """What towers saw goes along with a job; cut anywhere, and forked."""
    config = CONFIGS["multimodal"]
    model, tokenizer = config.build(3).eval(), Named(config.vocab)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(parameter)))
    tower = config.towers["image"]
    media = {"image": torch.rand(1, 1, tower.channels, tower.height, tower.columns, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        soft = model.look(media)
    prompt = [1, *[tower.placeholder] * soft.hidden.shape[1], 2, 3]
    engine = Engine(model, tokenizer, EngineConfig(max_sequences=3, chunk=3, debug=True))
    params = SamplingParams(temperature=0.0, max_tokens=NEW, n=2)
    jobs = [engine.submit(prompt, params, soft=soft), engine.submit([1, 2, 3], params)]
    engine.run()
    for job, given in zip(jobs, ({"media": media}, {}), strict=True):
        assert job.error is None
        assert [answer.token_ids for answer in job.generations] == [alone(model, job.prompt, given)[0]] * 2
    with pytest.raises(UserError, match="placeholders"):
        engine.submit(prompt[2:], params, soft=soft)
