"""The loop's promises: resume is bitwise, accumulation and processes do not matter, nothing bad is written."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from headspring.artifacts import UserError
from headspring.training import checkpoint, compilation
from headspring.training.callbacks import Callback, Diverged, Validation
from headspring.training.loop import Interrupted, train
from headspring.training.objective import NextToken
from tests.models.conftest import randomise, small_decoder
from tests.training.conftest import Stream, config, gradients


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def run(build, stream, folder, callbacks=(), **changes):
    model = build()
    result = train(model, NextToken(), stream, config(**changes), folder, callbacks)
    return model, result


def assert_equal(a: dict, b: dict) -> None:
    assert all(torch.equal(a[name], b[name]) for name in a)


class StopAt(Callback):
    def __init__(self, step: int, number: int = signal.SIGTERM):
        self.step, self.number = step, number

    def on_step(self, run, record):
        if run.step == self.step:
            os.kill(os.getpid(), self.number)


def test_training_learns_and_writes_every_step(build, stream, tmp_path):
    _, result = run(build, stream, tmp_path, steps=60)
    records = [json.loads(line) for line in (tmp_path / "logs/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 61))
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    assert result.tokens == records[-1]["tokens"] == 60 * 8 * 16
    assert set(records[9]["update_size"]) == {"embed", "layers.0", "layers.1", "norm"}
    assert list((tmp_path / "logs/tensorboard").iterdir())


@pytest.mark.parametrize("optimizer", [{"kind": "muon"}, {"kind": "adamw"}], ids=["muon", "adamw"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_an_interrupted_run_that_goes_on_is_bitwise_the_whole_run(build, stream, tmp_path, optimizer, number):
    whole, _ = run(build, stream, tmp_path / "whole", optimizer=optimizer)
    with pytest.raises(Interrupted, match="saved at step 7 of 12"):
        run(build, stream, tmp_path / "parts", [StopAt(7, number)], optimizer=optimizer)
    resumed, _ = run(build, stream, tmp_path / "parts", optimizer=optimizer)
    assert_equal(parameters(whole), parameters(resumed))
    lines = [(tmp_path / name / "logs/metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    losses = [[json.loads(line)["loss"] for line in text] for text in lines]
    assert losses[0] == losses[1]


def test_the_comparison_sees_a_stream_that_forgets_its_place(build, stream, tmp_path):
    """The control: a resume that starts the data from the beginning again is not the whole run."""

    class Forgetful(Stream):
        def sample(self, index):
            return super().sample(index - 7 * 8 if index >= 7 * 8 else index)

    whole, _ = run(build, stream, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(build, stream, tmp_path / "parts", [StopAt(7)])
    resumed, _ = run(build, Forgetful(), tmp_path / "parts")
    assert any(not torch.equal(a, b) for a, b in zip(parameters(whole).values(), parameters(resumed).values()))


def test_kill_minus_nine_loses_only_the_steps_since_the_checkpoint(build, stream, tmp_path):
    """A process that kills itself at step 8 leaves the checkpoint of step 5; the run goes on from there, bitwise."""
    script = """
        import os, sys
        from pathlib import Path
        from headspring.training.callbacks import Callback
        from headspring.training.loop import train
        from headspring.training.objective import NextToken
        from tests.models.conftest import small_decoder
        from tests.training.conftest import Stream, config
        class Die(Callback):
            def on_step(self, run, record):
                if run.step == 8:
                    os.kill(os.getpid(), 9)
        train(small_decoder().build(seed=1), NextToken(), Stream(), config(), Path(sys.argv[1]), [Die()])
    """
    arguments = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "killed")]
    done = subprocess.run(arguments, capture_output=True, timeout=120)
    assert done.returncode == -9, done.stderr.decode()
    assert checkpoint.steps(tmp_path / "killed/checkpoints") == [5]
    whole, _ = run(build, stream, tmp_path / "whole")
    resumed, _ = run(build, stream, tmp_path / "killed")
    assert_equal(parameters(whole), parameters(resumed))


def worst(a: dict, b: dict) -> float:
    """The largest difference of two gradients, relative to the largest entry of each tensor."""
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-12)) for name in b)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_accumulation_of_n_is_one_batch_of_n(stream, micro_batch_size):
    """Rows have different numbers of trained tokens, so a mean of means would differ."""
    whole = gradients(randomise(small_decoder().build()), stream)
    pieces = gradients(randomise(small_decoder().build()), stream, micro_batch_size=micro_batch_size)
    assert worst(pieces, whole) < 1e-5


def test_the_comparison_sees_a_mean_of_means(stream):
    class MeanOfMeans(NextToken):
        def count(self, batch):
            return 1

        def loss(self, model, batch):
            loss, metrics = super().loss(model, batch)
            return loss / super().count(batch), metrics

    model = randomise(small_decoder().build())
    whole = gradients(model, stream, MeanOfMeans())
    assert worst(gradients(model, stream, MeanOfMeans(), micro_batch_size=1), whole) > 1e-3


TWO_PROCESSES = """
    import sys, torch
    from pathlib import Path
    from safetensors.torch import save_file
    from headspring.training import distributed
    from headspring.training.loop import train
    from headspring.training.objective import NextToken
    from tests.models.conftest import randomise, small_decoder
    from tests.training.conftest import Stream, config, gradients
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    found = gradients(randomise(small_decoder().build()), Stream())
    model = small_decoder().build(seed=1)
    train(model, NextToken(), Stream(), config(), Path(sys.argv[1]))
    weights = {"trained/" + name: p.detach() for name, p in model.named_parameters()}
    save_file(found | weights, Path(sys.argv[1]) / f"rank{distributed.rank()}.safetensors")
"""


def test_two_processes_are_one(stream, tmp_path):
    path = tmp_path / "two.py"
    path.write_text(textwrap.dedent(TWO_PROCESSES))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, path, tmp_path / "two"], capture_output=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    first, second = (load_file(tmp_path / f"two/rank{rank}.safetensors") for rank in (0, 1))
    assert_equal(first, second)
    one = gradients(randomise(small_decoder().build()), stream)
    assert worst(first, one) < 1e-5
    half = gradients(randomise(small_decoder().build()), stream, batch_size=4)  # the control: one process's share alone
    assert worst(first, half) > 1e-2
    assert len((tmp_path / "two/logs/metrics.jsonl").read_text().splitlines()) == 12


def test_a_step_without_a_trained_token_changes_nothing(build, tmp_path):
    before = parameters(build())
    optimizer = {"kind": "adamw", "weight_decay": 0.0}
    model, result = run(build, Stream(masked=True), tmp_path, steps=3, optimizer=optimizer)
    assert result.loss == 0.0
    assert_equal(before, parameters(model))


def test_nan_stops_before_the_update_and_says_where(build, stream, tmp_path):
    class Poison(Callback):
        def on_step(self, run, record):
            if run.step == 7:
                run.model.layers[1].mixer.f.q.weight.data[0, 0] = float("nan")

    with pytest.raises(Diverged, match=r"parameter layers\.1\.mixer\.f\.q\.weight is not finite"):
        run(build, stream, tmp_path, [Poison()])
    good = checkpoint.latest(tmp_path / "checkpoints")
    assert good.step == 5
    assert all(tensor.isfinite().all() for name, tensor in good.tensors.items() if name.startswith("model/"))


def test_a_loss_spike_stops_with_the_gradient_named(build, stream, tmp_path):
    class Scramble(Callback):
        def on_step(self, run, record):
            if run.step == 25:
                run.model.embed.weight.data.normal_(0, 5.0)

    with pytest.raises(Diverged, match=r"step 25: loss jumped from .* the largest gradient is in"):
        run(build, stream, tmp_path, [Scramble()], steps=40)


def test_a_corrupt_checkpoint_is_named_and_the_older_one_used(build, stream, tmp_path):
    whole, _ = run(build, stream, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(build, stream, tmp_path / "parts", [StopAt(7)])
    file = tmp_path / "parts/checkpoints/step-000007/state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"step-000007/state\.safetensors: content differs.*using an older"):
        resumed, _ = run(build, stream, tmp_path / "parts")
    assert_equal(parameters(whole), parameters(resumed))


def test_listed_checkpoints_stay(build, stream, tmp_path):
    run(build, stream, tmp_path, steps=12, checkpoint_every=2, keep_checkpoints=2, keep_steps=(3,))
    assert checkpoint.steps(tmp_path / "checkpoints") == [3, 10, 12]


def test_a_budget_in_minutes_cuts_the_run_and_its_schedule(build, stream, tmp_path):
    """A tenth of a step's time is affordable: the run ends right after the measurement, with the rate decayed."""
    _, result = run(build, stream, tmp_path / "cut", steps=400, minutes=1e-6, schedule={"kind": "wsd", "warmup_steps": 2})
    assert result.steps == 13
    records = [json.loads(line) for line in (tmp_path / "cut/logs/metrics.jsonl").read_text().splitlines()]
    assert records[-1]["learning_rate_factor"] < 0.5
    _, result = run(build, stream, tmp_path / "whole", steps=15, minutes=60)
    assert result.steps == 15


def test_validation_is_measured_and_logged(build, stream, tmp_path):
    run(build, stream, tmp_path, [Validation(lambda: {"loss": 1.5}, 5)])
    records = [json.loads(line) for line in (tmp_path / "logs/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "validation" in r] == [5, 10, 12]


def test_bfloat16_trains_close_to_float32(build, stream, tmp_path):
    losses = [run(build, stream, tmp_path / p, steps=40, precision=p)[1].loss for p in ("fp32", "bf16")]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_fp16_needs_a_gpu(build, stream, tmp_path):
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        run(build, stream, tmp_path, precision="fp16", device="cpu")


def test_compilation_is_tried_only_where_it_can_repay(monkeypatch):
    monkeypatch.setattr(compilation.shutil, "which", lambda name: "/usr/bin/g++")
    assert not compilation.worth_trying(300.0)
    assert compilation.worth_trying(3600.0)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not compilation.worth_trying(3600.0)


def test_a_compiler_that_fails_leaves_the_model_eager(build, monkeypatch):
    model = build()

    def broken(model):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compilation, "compile_blocks", lambda model: None)
    times = iter([1.0, 2.0])
    monkeypatch.setattr(compilation, "_best_time", lambda work: next(times))
    assert compilation.faster_compiled(model, lambda: None) is False
