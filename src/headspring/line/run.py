"""Running a recipe: every stage whose artifact is not already the wanted one, in order.

    Run = folder + recipe;   hs.run("recipes/quickstart.yaml", overrides={"pretrain.steps": 200})

For each stage the wanted artifact is described (kind, revision, config, hashes of inputs, seed) and compared with the
manifest that is there. Equal: skipped. Different: made again, in a folder beside it (see `workspace.py`), with the
reason said. Hashes are of contents, so a stage made again with an equal result repeats nothing below it.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headspring.artifacts import progress
from headspring.artifacts.environment import environment
from headspring.artifacts.errors import HeadspringError, UserError
from headspring.artifacts.lock import folder_lock
from headspring.artifacts.manifest import Manifest, read_manifest, write_manifest
from headspring.line.decide import Wanted, finished, reasons, wanted
from headspring.line.failures import is_interrupt, one_line_failures
from headspring.line.measure import Meter
from headspring.line.ranks import Ranks
from headspring.line.recipe import Recipe, Step, load_recipe
from headspring.line.record import check_folder, new_record, write_record
from headspring.line.registry import Context, Registry
from headspring.line.report import write_report
from headspring.line.report.outcomes import outcome
from headspring.line.report.reading import StageView
from headspring.line.workspace import Workspace


@dataclass(frozen=True)
class Run:
    """A folder that a recipe filled. `made` names the stages that ran this time; `outdated` those after `until` whose
    artifact was made of something that has changed since. The rest was skipped."""

    folder: Path
    recipe: Recipe
    made: tuple[str, ...] = ()
    outdated: tuple[str, ...] = ()
    report: Path | None = None
    leader: bool = True  # false on the other ranks under torchrun, which have nothing to say

    def stage(self, name: str) -> Path:
        """The stage's artifact folder."""
        return self.folder / self.recipe.step(name).name

    def manifest(self, name: str) -> Manifest:
        """The stage's manifest. `UserError` where the stage has not run."""
        manifest = read_manifest(self.stage(name))
        if manifest is None:
            raise UserError(f"{self.stage(name)}: this stage has not run yet")
        return manifest

    def metrics(self, name: str) -> dict[str, Any]:
        """What the stage measured."""
        return self.manifest(name).metrics


def run(
    recipe: str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    run_dir: str | Path | None = None,
    until: str | None = None,
    force: str | Sequence[str] = (),
    registry: Registry | None = None,
    quiet: bool = False,
) -> Run:
    """Run a recipe (a file, or the name of one in `recipes/`), or what is left of it.

    `run_dir` defaults to `runs/<name of the recipe>`. `until` stops after a stage. `force` makes stages, and what
    follows from them, again. `quiet` prints nothing. Raises `UserError` for what is wrong with the recipe, the
    overrides, the folder or a finished artifact, and `HeadspringError` where a stage failed; stages that are done stay
    done either way.
    """
    loaded = load_recipe(recipe, overrides, registry)
    folder, steps, forced = selected(loaded, run_dir, until, force)
    ranks = Ranks()
    with ExitStack() as stack:
        if ranks.leader:
            check_folder(folder, loaded)
            stack.enter_context(folder_lock(folder))
        ranks.wait()
        runner = _Runner(loaded, folder, steps, forced, ranks, quiet)
        with progress.quiet() if quiet or not ranks.leader else nullcontext():
            runner.run()
        report = write_report(folder) if ranks.leader else None
        ranks.wait()
    return Run(folder, loaded, tuple(runner.made), tuple(runner.outdated), report, ranks.leader)


def selected(
    recipe: Recipe, run_dir: str | Path | None, until: str | None, force: str | Sequence[str]
) -> tuple[Path, tuple[Step, ...], set[str]]:
    """The run's folder, the steps up to `until`, and the names of the forced ones with what follows from them."""
    folder = Path(run_dir).expanduser() if run_dir else Path("runs") / recipe.name
    names = [step.name for step in recipe.steps]
    last = names.index(recipe.select(until, "--until")[-1]) if until else len(names) - 1
    forced = [name for one in ([force] if isinstance(force, str) else force) for name in recipe.select(one, "--force")]
    late = [name for name in forced if name not in names[: last + 1]]
    if late:
        raise UserError(f"--force {late[0]}: this stage comes after --until {until}, so it would not run")
    return folder, recipe.steps[: last + 1], recipe.following(forced)


class _Runner:
    """The state of one pass over `steps`, the first ones of the recipe."""

    def __init__(self, recipe: Recipe, folder: Path, steps: Sequence[Step], forced: set[str], ranks: Ranks, quiet: bool):
        self.recipe, self.folder, self.steps, self.forced, self.ranks = recipe, folder, steps, forced, ranks
        self.loud = ranks.leader and not quiet
        self.made: list[str] = []
        self.outdated: list[str] = []
        self.manifests: dict[str, Manifest] = {}
        self.record = new_record(recipe)
        self.environment: dict[str, Any] = {}

    def run(self) -> None:
        self._note("running")
        for number, step in enumerate(self.steps, 1):
            self._title = f"[{number}/{len(self.steps)}] {step.name}"
            try:
                self._step(step)
            except BaseException as error:
                state = "interrupted" if is_interrupt(error) else "failed"
                self._note(state, step, state)
                raise
        for step in self.recipe.steps[len(self.steps) :]:
            self._look_at(step)
        self._note("done" if all(state == "done" for state in self.record["states"].values()) else "partial")

    def _look_at(self, step: Step) -> None:
        """Note whether a stage beyond `--until` is done, and if so whether it is still up to date."""
        present = finished(step, self.folder / step.name, check=False)
        if present is None:
            return
        made_of_current = all(source.step in self.manifests for source in step.inputs.values())
        if made_of_current and present.cache_key == wanted(step, self.recipe.seed, self.manifests).key:
            self.manifests[step.name] = present
            self.record["states"][step.name] = "done"
        else:
            self.outdated.append(step.name)
            self.record["states"][step.name] = "outdated"

    def _step(self, step: Step) -> None:
        """Skip the stage or make it; leaves its manifest in `self.manifests`."""
        workspace = Workspace(self.folder, step.name)
        target, present = None, None
        if self.ranks.leader:
            workspace.recover()
            target = wanted(step, self.recipe.seed, self.manifests)
            present = finished(step, workspace.folder, check=True) if step.name not in self.forced else None
        target, present = self.ranks.share((target, present))
        assert target is not None
        if present is not None and present.cache_key == target.key:
            self._say("skipped (unchanged)")
            self.manifests[step.name] = present
            self._note("running", step, "done")
            return
        why = "forced" if step.name in self.forced else ", ".join(reasons(present, target)) if present else ""
        self._note("running", step, "running")
        with one_line_failures(step.name, self.folder, step.stage.training):
            self.manifests[step.name] = self._make(step, target, workspace, why)
        self._note("running", step, "done")

    def _make(self, step: Step, target: Wanted, workspace: Workspace, why: str) -> Manifest:
        before = None
        if self.ranks.leader:
            before = workspace.begin(target.key, step.stage.training, step.name in self.forced)
        before = self.ranks.share(before)
        goes_on = "going on with the interrupted attempt" if before is not None else ""
        self._say(" · ".join(("running", *filter(None, (why, goes_on)))))
        surroundings = self._environment()
        meter = Meter()
        try:
            metrics = {}
            if self.ranks.leader or step.stage.training:
                metrics = dict(step.stage.run(self._context(step, workspace.partial)))
            self.ranks.wait()
            cost = metrics.pop("cost", {}) | meter.cost(before or 0.0)
            manifest = Manifest(
                name=step.name, kind=target.kind, revision=target.revision, config=target.config, inputs=target.inputs,
                seed=target.seed, metrics=metrics, cost=cost, environment=surroundings,
            )  # fmt: skip
            if self.ranks.leader:
                manifest = write_manifest(workspace.partial, manifest)
                workspace.finish()
            manifest = self.ranks.share(manifest)
        except BaseException:
            if self.ranks.leader:
                self._abandon(step, workspace, (before or 0.0) + meter.seconds)
            raise
        self.made.append(step.name)
        view = StageView(step.name, step.stage.kind, workspace.folder, manifest, {})
        self._say(" · ".join([f"done in {meter.seconds:.1f} s", *outcome(view)]))
        return manifest

    def _abandon(self, step: Step, workspace: Workspace, seconds: float) -> None:
        """A training stage's checkpoints wait for the next run; what another stage left is of no use."""
        if step.stage.training:
            workspace.note_seconds(seconds)
        else:
            workspace.discard()

    def _context(self, step: Step, folder: Path) -> Context:
        inputs = {role: self.folder / source.step / source.part for role, source in step.inputs.items()}
        return Context(step.config, inputs, folder, self.recipe.seed, step.files, step.generator)

    def _environment(self) -> dict[str, Any]:
        self.environment = self.environment or environment()
        return self.environment

    def _note(self, state: str, step: Step | None = None, step_state: str = "") -> None:
        """Write run.json; a disk too full for it must not hide the error that says so."""
        self.record["state"] = state
        if step is not None:
            self.record["states"][step.name] = step_state
        if not self.ranks.leader:
            return
        try:
            write_record(self.folder, self.record)
        except OSError as error:
            if state == "running":
                raise HeadspringError(f"{self.folder}: cannot be written ({error.strerror})") from error

    def _say(self, text: str) -> None:
        if self.loud:
            print(f"{self._title}: {text}", flush=True)
