"""The house keeps its rules, and every rule sees a planted violation."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture import rules

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
HEAVY = ("torch", "transformers", "pyarrow", "matplotlib", "pandas")

SCANS = (
    rules.imports_against_the_order,
    rules.training_outside_the_loop,
    rules.log_probabilities_elsewhere,
    rules.config_fields_that_nothing_reads,
    rules.code_from_data,
)
VALUE = "class Value: pass\n"
# scan, file, its text: each violates the rule once.
VIOLATIONS = [
    (rules.imports_against_the_order, "models/a.py", "from headspring.training.loop import train"),
    (rules.imports_against_the_order, "models/a.py", "def f():\n    import headspring.inference"),
    (rules.imports_against_the_order, "models/a.py", "if TYPE_CHECKING:\n    from headspring import line"),
    (rules.imports_against_the_order, "models/deep/a.py", "from ...training import loop"),
    (rules.imports_against_the_order, "models/a.py", "import importlib\nimportlib.import_module('headspring.cli')"),
    (rules.imports_against_the_order, "line/a.py", "import headspring"),
    (rules.imports_against_the_order, "line/a.py", "from headspring.attic import box"),
    (rules.imports_against_the_order, "attic/a.py", ""),
    (rules.training_outside_the_loop, "posttraining/a.py", "def f(loss):\n    (loss * 2).sum().backward()"),
    (rules.training_outside_the_loop, "posttraining/a.py", "def f(self):\n    self.optimizers[0].step()"),
    (rules.training_outside_the_loop, "posttraining/a.py", "def f(opt):\n    opt.step()"),
    (rules.training_outside_the_loop, "training/callbacks.py", "def f(run):\n    run.scaler.step(run.x)"),
    (rules.training_outside_the_loop, "training/loop.py", "import torch\ntorch.optim.SGD([])"),
    (rules.log_probabilities_elsewhere, "evaluation/a.py", "def f(logits):\n    return logits.log_softmax(-1)"),
    (rules.log_probabilities_elsewhere, "evaluation/a.py", "def f(logits):\n    return logits.softmax(-1).log()"),
    (rules.log_probabilities_elsewhere, "training/a.py", "from torch.nn.functional import cross_entropy\ncross_entropy(1, 2)"),
    (rules.log_probabilities_elsewhere, "training/a.py", "import torch.nn as nn\nloss = nn.CrossEntropyLoss()"),
    (rules.config_fields_that_nothing_reads, "data/a.py", VALUE + "class A(Value):\n    ignored: int = 3"),
    (rules.config_fields_that_nothing_reads, "data/a.py", VALUE + "class A(Value): pass\nclass B(A):\n    ignored: int = 3"),
    (rules.config_fields_that_nothing_reads, "data/a.py", VALUE + "class A(Value):\n    ignored: int\n"
     "    @field_validator('x')\n    def f(self):\n        return self.ignored"),
    (rules.config_fields_that_nothing_reads, "data/a.py", VALUE + "class A(Value):\n    set: int\ndef f(a):\n    a.set = 2"),
    (rules.code_from_data, "models/a.py", "import pickle"),
    (rules.code_from_data, "models/a.py", "from joblib import load"),
    (rules.code_from_data, "models/a.py", "import torch\ntorch.load('x')"),
    (rules.code_from_data, "models/a.py", "eval('1')"),
    (rules.code_from_data, "models/a.py", "import numpy\nnumpy.load('x', allow_pickle=True)"),
    (rules.code_from_data, "models/a.py", "import yaml\nyaml.load('x', Loader=yaml.Loader)"),
    (rules.code_from_data, "models/a.py", "import subprocess\nsubprocess.run('ls', shell=True)"),
]  # fmt: skip
# What looks alike and is no violation.
HARMLESS = {
    "models/a.py": "from headspring.artifacts import UserError\nfrom . import b\nsubprocess.run(['ls'], shell=False)",
    "models/scoring.py": "def f(x):\n    return x.logsumexp(-1)",
    "models/block.py": "def f(scores):\n    return scores.softmax(-1)",
    "training/loop.py": "def f(loss, optimizer):\n    loss.backward()\n    optimizer.step()",
    "training/optimizers.py": "import torch\ntorch.optim.AdamW([])",
    "line/run.py": VALUE + "class A(Value):\n    kind: str\n    used: int\n    asked: int\ndef f(a, recipe):\n"
    "    recipe.step(1)\n    return a.used, getattr(a, 'asked')",
    "line/source.py": "import yaml\nclass L(yaml.SafeLoader): pass\nyaml.load('x', Loader=L)\nimport re\nre.compile('x')",
    "artifacts/sandbox.py": "exec('1')",
    "cli/a.py": "import headspring",
    "__init__.py": "HOME = 'headspring.line.run'",
}


@pytest.mark.parametrize("scan", SCANS, ids=lambda scan: scan.__name__)
def test_the_house_keeps_the_rule(scan):
    assert scan(SOURCE) == []


def plant(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = folder / "headspring" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(("scan", "file", "text"), VIOLATIONS, ids=lambda part: getattr(part, "__name__", None))
def test_the_rule_sees_a_violation(scan, file, text, tmp_path):
    found = scan(plant(tmp_path, {file: text}))
    assert len(found) == 1 and found[0].startswith(file), found


@pytest.mark.parametrize("scan", SCANS, ids=lambda scan: scan.__name__)
def test_the_rule_lets_the_rest_pass(scan, tmp_path):
    assert scan(plant(tmp_path, HARMLESS)) == []


def test_every_rule_has_a_planted_violation():
    assert {scan for scan, _, _ in VIOLATIONS} == set(SCANS)


def order_of(page: str) -> list[str]:
    """The rooms as docs/architecture.md lists them: names between dots, planned ones in parentheses."""
    listed = re.search(r"(?m)^    (artifacts ·(?:.|\n    )*)", page)
    assert listed
    return [re.sub(r"[()\s]|\.py", "", name) for name in listed[1].split("·") if name.strip()]


def test_the_documented_order_is_the_one_that_is_tested():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert order_of(page) == list(rules.ORDER)
    assert order_of(page.replace("models · inference", "inference · models")) != list(rules.ORDER)


# ---- the command line


def registered_verbs() -> set[str]:
    """Every verb, such as "tokens train", as typer has them."""
    import typer

    from headspring.cli import app

    found: set[str] = set()

    def walk(command, name: str) -> None:
        for child_name, child in getattr(command, "commands", {}).items():
            walk(child, f"{name} {child_name}".strip())
        if not hasattr(command, "commands"):
            found.add(name)

    walk(typer.main.get_command(app), "")
    return found


def test_the_documented_verbs_are_those_that_exist():
    verbs = registered_verbs()
    assert {"run", "generate", "chat", "eval", "tokens train"} <= verbs
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert rules.undocumented_verbs(verbs, page) == []


def test_the_rule_on_verbs_sees_a_difference():
    page = "## `headspring run`\n\n```sh\nheadspring run x.yaml\n```\n\n## `headspring fly`\n\nUp.\n"
    assert rules.undocumented_verbs({"run", "swim"}, page) == [
        "swim: registered, not documented",
        "fly: documented, not registered",
        "fly: documented without an example",
    ]


def modules_after(program: str) -> set[str]:
    """Top-level modules that a fresh Python holds after `program`."""
    report = "\nimport sys\nprint(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program + report], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.splitlines()[-1].split())


def test_help_loads_nothing_heavy():
    """`headspring --help` answers at once: no verb's machinery is loaded before the verb runs."""
    help_of_all = "from typer.testing import CliRunner\nfrom headspring.cli import app\nimport headspring\n"
    for verb in ("", *registered_verbs()):
        help_of_all += f"assert CliRunner().invoke(app, {[*verb.split(), '--help']}).exit_code == 0\n"
    loaded = modules_after(help_of_all)
    assert "typer" in loaded and not loaded & set(HEAVY)


def test_the_rule_on_help_sees_what_is_loaded():
    assert "decimal" in modules_after("import decimal")
