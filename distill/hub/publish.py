"""A run's models on their way to the Hub: export, verify, card, push, each done only where it is not done yet.

Torch-free where all is exported and verified already.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..card import write_card
from ..errors import RunFailed, UserError
from ..manifest import renew
from . import proof
from .card_results import Results
from .licence import parse_licence
from .push import Plan, Say, places_of, plan_push, push

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint


@dataclass(frozen=True)
class Wish:
    """What is to be pushed where.

    Attributes:
        repo: OWNER/NAME, or NAME for one's own.
        private: new repositories are.
        license: of the model, where the teacher's files do not say it; as for `licence.parse_licence`.
        base_model: Hub id of the teacher, where it was a local folder.
        collection: title or slug of a collection to put it in.
        steps: every saved step goes up too, each as a revision of its name, STAGE-STEP.
        dtype: of the steps' weights.
    """

    repo: str
    private: bool = True
    license: str | None = None
    base_model: str | None = None
    collection: str | None = None
    steps: bool = False
    dtype: str = "float32"

    def metadata(self) -> dict[str, Any]:
        """What it says of the card's."""
        given: dict[str, Any] = {} if self.license is None else dict(parse_licence(self.license))
        return given | ({} if self.base_model is None else {"base_model": self.base_model})


def publish(run: Path, wish: Wish, results: Results, say: Say) -> dict[str, Any]:
    """Push a finished run's export, and its saved steps where they are wished for.

    Args:
        run: the run folder.
        wish: see there.
        results: measured on the export, for its card.
        say: whom to tell.

    Returns:
        What `push` returns of the export, and `steps`: the same of each step.

    Raises:
        UserError, MachineError, RunFailed: as the parts do; the run is not harmed.
    """
    folder = run / "export"
    _prove(folder, say)
    make_card(folder, results, wish.metadata())
    made = push(_plan(run, folder, wish), collection=wish.collection, message="Upload with relinear", say=say)
    steps = [push_step(run, commit, wish, say) for commit in step_commits(run)] if wish.steps else []
    return {**made, "steps": steps}


def step_commits(run: Path) -> list[Checkpoint]:
    """The saved steps that a push of all steps takes, oldest first."""
    from ..checkpoint import Checkpoints

    return Checkpoints(run / "checkpoints").all()


def prepare_step(run: Path, commit: Checkpoint, wish: Wish, say: Say) -> Plan:
    """Export and prove a saved step, where that is not done yet, and plan its push as the revision of its name."""
    from ..export import export

    folder = run / "exports" / commit.path.name
    if not (folder / "config.json").exists():
        say(f"export of {commit.path.name}")
        export(run, commit.step, folder, stage=commit.stage, dtype=wish.dtype)
    _prove(folder, say)
    make_card(folder, {}, wish.metadata())
    return _plan(run, folder, wish, commit.path.name)


def push_step(run: Path, commit: Checkpoint, wish: Wish, say: Say) -> dict[str, Any]:
    """Push a saved step as the revision of its name, STAGE-STEP."""
    plan = prepare_step(run, commit, wish, say)
    message = f"Stage {commit.stage}, step {commit.step}"
    return push(plan, collection=wish.collection, message=message, say=say)


def make_card(folder: Path, results: Results, given: dict[str, Any]) -> Path:
    """Write an export's card anew; a run's manifest learns of it."""
    path = write_card(folder, results, given)
    renew([path])
    return path


def _plan(run: Path, folder: Path, wish: Wish, revision: str = "main") -> Plan:
    return plan_push(folder, wish.repo, revision=revision, private=wish.private, places=places_of(run))


def _prove(folder: Path, say: Say) -> None:
    from ..verify import verify

    if not folder.is_dir():
        raise UserError(f"{folder}: not there. Export first: relinear export {folder.parent}")
    if not proof.problems(folder):
        return
    say(f"verify {folder}: a fresh process without relinear")
    report = verify(folder)
    failed = [name for name, check in report["checks"].items() if not check["ok"]]
    if failed:
        raise RunFailed(f"{folder}: not pushed: {', '.join(failed)} failed. See: relinear verify {folder}")
