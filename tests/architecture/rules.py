"""The rules of the house. Each is a function from the folder that holds `headspring/` to a list of violations."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.architecture.source import PACKAGE, Module, modules

# A room may import from itself and from rooms before it. docs/architecture.md shows the same order.
ORDER = (
    *("artifacts", "text", "tokenization", "data", "models", "inference", "training", "posttraining", "retrieval"),
    *("evaluation", "interpretability", "line", "scaling", "tracing", "serving", "cli"),
)
# `import headspring` offers the whole line, so that only the command line may use it.
FACADE = ORDER.index("cli")
OUTSIDE = len(ORDER)  # the package's own __init__ and __main__: they may import everything, and nobody imports them


# ---- imports run one way


def imports_against_the_order(root: Path) -> list[str]:
    """Imports of a later room, wherever they stand: at the top, in a function, for type checkers, or by a name in a string."""
    found = []
    for module in modules(root):
        own = OUTSIDE if module.room in ("__init__", "__main__") else rank(module.room)
        if own is None:
            found.append(f"{module.path}: {module.room!r} is no room of the house; ORDER does not list it")
            continue
        for node, name in _imported(module):
            other = FACADE if name == PACKAGE else rank(name.split(".")[1])
            if other is None or other > own:
                why = "is no room" if other is None else "comes later"
                found.append(module.at(node, f"{module.room} imports {name}, which {why}"))
    return found


def rank(room: str) -> int | None:
    return ORDER.index(room) if room in ORDER else None


def _imported(module: Module) -> Iterator[tuple[ast.AST, str]]:
    """Dotted names of the package that a module imports: "headspring.models.decoder", or "headspring" for the facade."""
    folders = (PACKAGE, *module.path.split("/")[:-1])
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names if alias.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom):
            base = folders[: len(folders) - node.level + 1] if node.level else ()
            origin = ".".join((*base, *filter(None, [node.module])))
            if origin == PACKAGE:  # from headspring import models
                yield from ((node, f"{origin}.{alias.name}" if alias.name in ORDER else origin) for alias in node.names)
            elif origin.startswith(f"{PACKAGE}."):
                yield node, origin
        elif isinstance(node, ast.Constant) and re.fullmatch(rf"{PACKAGE}(\.\w+)+", str(node.value)):
            yield node, node.value


# ---- one loop, one log-probability path

LOOP, OPTIMIZERS = "training/loop.py", "training/optimizers.py"


def training_outside_the_loop(root: Path) -> list[str]:
    """`x.backward(…)` and `optimizer.step(…)` outside the loop, and optimizers made outside `training.optimizers`."""
    found = []
    for module in modules(root):
        for call, name in module.calls():
            owner, _, method = name.rpartition(".")
            steps = method == "step" and re.search(r"optim|scaler|\bopt\b", owner, re.I)
            if module.path != LOOP and owner and (method == "backward" or steps):
                found.append(module.at(call, f"{name}(…) outside {LOOP}"))
            if module.path != OPTIMIZERS and "optim." in name and method[:1].isupper():
                found.append(module.at(call, f"{name}(…) outside {OPTIMIZERS}"))
    return found


# A router's normaliser runs over experts, not over the vocabulary.
SCORING = ("models/scoring.py", "inference/sampling.py", "models/routing.py")
NORMALISERS = {"log_softmax", "logsumexp", "cross_entropy", "nll_loss", "LogSoftmax", "CrossEntropyLoss", "NLLLoss"}


def log_probabilities_elsewhere(root: Path) -> list[str]:
    """A log-softmax by any of its names, outside scoring and the sampler."""
    found = []
    for module in modules(root):
        for call, name in module.calls():
            method = name.rpartition(".")[2]
            of_softmax = method == "log" and re.search(r"softmax\(", name)
            if module.path not in SCORING and (method in NORMALISERS or of_softmax):
                found.append(module.at(call, f"{name}(…) outside {' and '.join(SCORING[:2])}"))
    return found


# ---- configs are read, code is not loaded from data

# What only describes a value in its serialised form, and is read there by pydantic.
TAGS = {"kind"}


def config_fields_that_nothing_reads(root: Path) -> list[str]:
    """Fields of a `Value` whose name no code reads: options that are accepted and ignored."""
    everything = list(modules(root))
    definitions = [(module, node) for module in everything for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]
    classes = {node.name: (module, node) for module, node in definitions}
    values = _descendants("Value", {name: node for name, (_, node) in classes.items()})
    read = {name for module in everything for name in _read(module)}
    found = []
    for name in sorted(values):
        module, node = classes[name]
        for field in node.body:
            if not isinstance(field, ast.AnnAssign) or "ClassVar" in ast.unparse(field.annotation):
                continue
            if isinstance(field.target, ast.Name) and field.target.id not in read | TAGS:
                found.append(module.at(field, f"nothing reads {name}.{field.target.id}"))
    return found


def _descendants(base: str, classes: dict[str, ast.ClassDef]) -> set[str]:
    """Classes that derive from `base`, directly or not."""
    known, before = {base}, set()
    while known != before:
        before = set(known)
        known |= {name for name, node in classes.items() if {ast.unparse(b).rpartition(".")[2] for b in node.bases} & known}
    return known - {base}


def _read(module: Module) -> Iterator[str]:
    """Names of attributes that are read, with a dot or with a literal `getattr`; checking a value is not reading it."""
    waiting: list[ast.AST] = [module.tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef) and any("validator" in ast.unparse(mark) for mark in node.decorator_list):
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            yield from (str(name.value) for name in node.args[1:2] if isinstance(name, ast.Constant))
        waiting.extend(ast.iter_child_nodes(node))


SANDBOX = ("artifacts/sandbox.py", "artifacts/sandbox_server.py")
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUNNERS = {"eval", "exec", "compile", "torch.load", "torch.save", "os.system", "os.popen", "yaml.unsafe_load"}


def code_from_data(root: Path) -> list[str]:
    """Pickle under any name, `eval` and `exec`, loaders that unpickle, and shells, outside the sandbox."""
    found = []
    for module in modules(root):
        if module.path in SANDBOX:
            continue
        for node in ast.walk(module.tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [module.at(node, f"imports {name}") for name in names if name.split(".")[0] in UNPICKLERS]
        running = [(call, name) for call, name in module.calls() if _runs(call, name, module)]
        found += [module.at(call, f"{name}(…) runs what it reads") for call, name in running]
    return found


def _runs(call: ast.Call, name: str, module: Module) -> bool:
    on = {keyword.arg for keyword in call.keywords if not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)}
    if name == "yaml.load":  # with a loader of plain values it does not
        loaders = {ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "Loader"}
        return not loaders or not loaders <= _safe_loaders(module)
    return name in RUNNERS or name.endswith(".read_pickle") or bool(on & {"allow_pickle", "shell"})


def _safe_loaders(module: Module) -> set[str]:
    classes = [node for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]
    return {"yaml.SafeLoader"} | {node.name for node in classes if "yaml.SafeLoader" in map(ast.unparse, node.bases)}


# ---- the command line is the documented one


def undocumented_verbs(registered: set[str], page: str) -> list[str]:
    """Differences between the verbs of the command line and the page's headings. A documented verb needs an example in a
    shell block of its section."""
    sections = dict(re.findall(r"(?ms)^## `headspring ([^`]+)`\n(.*?)(?=^## |\Z)", page))
    found = [f"{verb}: registered, not documented" for verb in sorted(registered - sections.keys())]
    found += [f"{verb}: documented, not registered" for verb in sorted(sections.keys() - registered)]
    for verb, text in sections.items():
        if not re.search(rf"(?ms)^```sh\n.*^headspring {verb} .*^```$", text):
            found.append(f"{verb}: documented without an example")
    return found
