"""1 process = 2 processes, for every family: one pair of processes computes the gradients of them all."""

import pytest

from tests.contract.training_checks import TRAINED, assert_same_gradients, gradients
from tests.models.conftest import randomise
from tests.two_processes import in_two_processes

WORKER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from headspring.training import distributed
from tests.contract.training_checks import TRAINED, gradients
from tests.models.conftest import randomise
torch.set_num_threads(1)
distributed.start(torch.device("cpu"))
found = {}
for name, tiny in TRAINED.items():
    found |= {f"right/{name}/{key}": g for key, g in gradients(randomise(tiny().build())).items()}
distributed.sum_gradients = lambda parameters: None  # the planted bug: each process keeps its share
for name, tiny in TRAINED.items():
    found |= {f"wrong/{name}/{key}": g for key, g in gradients(randomise(tiny().build())).items()}
save_file(found, Path(sys.argv[1]) / f"rank{distributed.rank()}.safetensors")
"""


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """What each of two gloo processes holds, by "right/family/parameter"."""
    return in_two_processes(tmp_path_factory.mktemp("two"), WORKER, 200)


def of(tensors, kind, family):
    prefix = f"{kind}/{family}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("family", TRAINED)
def test_one_process_is_two(family, of_two_processes):
    alone = gradients(randomise(TRAINED[family]().build()))
    for tensors in of_two_processes:
        assert_same_gradients(of(tensors, "right", family), alone)
        with pytest.raises(AssertionError):
            assert_same_gradients(of(tensors, "wrong", family), alone)
