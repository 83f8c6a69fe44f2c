"""Pushing an export to the Hub: only what was verified, without secrets, in one commit, seen whole or not at all.

Weight files go up first, each by itself; what the Hub holds already it does not take again, so that a push which was
cut off goes on where it stopped. The commit then names them all. No reader ever sees half of it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files
from ..errors import MachineError, UserError
from . import proof
from .errors import explain, offline
from .leaks import leaks
from .licence import front_matter

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Say = Callable[[str], None]
ATTEMPTS = 3
"""Tries at the commit, which huggingface_hub makes but once; its uploads try again by themselves."""


@dataclass
class Plan:
    """What a push would do.

    Attributes:
        folder: the export.
        repo: OWNER/NAME, or NAME for one's own.
        revision: branch that the commit is made on.
        private: a new repository is.
        files: (path, bytes).
        metadata: of the card.
        missing: what a reader of the model would miss; no obstacle.
        problems: why it may not be pushed.
    """

    folder: Path
    repo: str
    revision: str = "main"
    private: bool = True
    files: list[tuple[str, int]] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "folder": str(self.folder),
            "repo": self.repo,
            "revision": self.revision,
            "private": self.private,
            "bytes": sum(size for _, size in self.files),
            "files": [{"path": name, "bytes": size} for name, size in self.files],
            "metadata": self.metadata,
            "missing": self.missing,
            "problems": self.problems,
        }


def plan_push(
    folder: Path, repo: str, *, revision: str = "main", private: bool = True, places: Iterable[str] = ()
) -> Plan:
    """Look at an export as a push would, without any network.

    Args:
        folder: the export.
        repo: OWNER/NAME, or NAME.
        revision: branch.
        private: a new repository is to be.
        places: of this machine, whose names must not go along.

    Raises:
        UserError: no such folder.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not an export. `relinear export RUN` writes one")
    card = folder / proof.CARD
    metadata = front_matter(card.read_text(encoding="utf-8")) if card.is_file() else {}
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not files.is_temporary(path))
    plan = Plan(folder, repo, revision, private, metadata=metadata)
    plan.files = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths]
    unproved = proof.problems(folder)
    if unproved:
        plan.problems += [*unproved, f"not verified as it is now. Prove it first: relinear verify {folder}"]
    plan.problems += [f"{folder}/{leak}" for leak in leaks(folder, places)]
    if not metadata.get("license"):
        need = "license: the teacher's files do not say which one its weights have. relinear card DIR --license ID"
        (plan.missing if private else plan.problems).append(need)
    if not metadata.get("base_model"):
        plan.missing.append(
            "base_model: the teacher was a local folder. If it is on the Hub: relinear card DIR --base-model ID"
        )
    if not metadata.get("datasets"):
        plan.missing.append("datasets: the text was local files, or is not on the Hub under that name")
    if not metadata.get("model-index"):
        plan.missing.append(
            "results: nothing was measured of this step. relinear eval DIR --against TEACHER, then relinear card DIR"
        )
    return plan


def places_of(run: Path | None, *more: Path | str) -> list[str]:
    """Names of places that say something of this machine: home, working folder, those of the run, teacher, texts."""
    found = {str(Path.home()), str(Path.cwd()), *(str(Path(place).absolute()) for place in more)}
    if run is not None:
        found |= {str(run.resolve()), str(run.absolute())}
        try:
            record = json.loads((run / "run.json").read_text(encoding="utf-8"))
            found.add(str(record["teacher"]["folder"]))
            data = record["recipe"].get("data") or {}
            named = [*(data.get("mix") or {}), data.get("source"), data.get("valid")]
            found |= {str(Path(name).parent) for name in named if isinstance(name, str) and name.startswith("/")}
        except (OSError, ValueError, KeyError):
            pass
    return sorted(found)


def push(plan: Plan, *, collection: str | None = None, message: str | None = None, say: Say = print) -> dict[str, Any]:
    """Do what a plan says.

    Args:
        plan: without problems.
        collection: title or slug of a collection of one's own to put the model in; made if there is none.
        message: of the commit.
        say: whom to tell.

    Returns:
        {"repo", "url", "revision", "commit", "private", "files", "bytes", "collection"}.

    Raises:
        UserError: the plan has problems, or the Hub refuses.
        MachineError: offline, no network, or the Hub is busy. Nothing half is ever visible; push again to go on.
    """
    if plan.problems:
        raise UserError(f"{plan.folder}: not pushed:\n  " + "\n  ".join(plan.problems))
    from huggingface_hub import HfApi, constants

    if constants.is_offline_mode():
        raise offline(plan.repo)
    try:
        with _bars_on_terminals_only():
            return _push(HfApi(library_name="relinear"), plan, collection, message, say)
    except (UserError, MachineError):
        raise
    except Exception as error:
        explained = explain(error, plan.repo)
        if explained is None:
            raise
        raise explained from error


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """huggingface_hub's progress bars fill a log file with their every step."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    change = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if change:
        disable_progress_bars()
    try:
        yield
    finally:
        if change:
            enable_progress_bars()


def _push(api: HfApi, plan: Plan, collection: str | None, message: str | None, say: Say) -> dict[str, Any]:
    owner = api.whoami()["name"]
    if "/" not in plan.repo:
        plan.repo = f"{owner}/{plan.repo}"
    repo = plan.repo
    api.create_repo(repo, private=plan.private, exist_ok=True)
    found = api.model_info(repo)
    if plan.private and not found.private:
        raise UserError(
            f"{repo}: exists already, and everybody can read it. If that is meant: --public; else choose another --repo"
        )
    if plan.revision != "main":
        api.create_branch(repo, branch=plan.revision, exist_ok=True)
    total = sum(size for _, size in plan.files)
    say(f"{repo}, revision {plan.revision}: {len(plan.files)} files, {total:,} bytes")
    _upload_large(api, plan, repo, say)
    commit = _commit(api, plan, repo, message or f"Upload {plan.folder.name} with relinear", say)
    made = {
        "repo": repo,
        "url": f"{api.endpoint}/{repo}" + ("" if plan.revision == "main" else f"/tree/{plan.revision}"),
        "revision": plan.revision,
        "commit": commit,
        "private": bool(found.private),
        "files": len(plan.files),
        "bytes": total,
        "collection": None,
    }
    if collection is not None:
        made["collection"] = _collect(api, collection, repo, owner, plan.private)
    return made


def _operations(plan: Plan, repo: str, only: str | None = None) -> list[Any]:
    """Additions of the plan's files, of one of them where it is named."""
    from huggingface_hub import CommitOperationAdd

    made = []
    for name, _ in plan.files:
        if only in (None, name):
            content: str | bytes = str(plan.folder / name)
            if name == proof.CARD:  # the quick start names the model as it is called there
                content = named(Path(content).read_text(encoding="utf-8"), repo, plan.revision).encode("utf-8")
            made.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content))
    return made


def named(card: str, repo: str, revision: str = "main") -> str:
    """A card whose quick start loads the model of that name."""
    card = proof.MODEL_LINE.sub(f'model_id = "{repo}"', card)
    return card if revision == "main" else card.replace("(model_id", f'(model_id, revision="{revision}"')


def _upload_large(api: HfApi, plan: Plan, repo: str, say: Say) -> None:
    weights = [(name, size) for name, size in plan.files if name.endswith(".safetensors")]
    for number, (name, size) in enumerate(weights, 1):
        api.preupload_lfs_files(repo, _operations(plan, repo, name), revision=plan.revision, num_threads=1)
        say(f"{name}: {size:,} bytes are there ({number} of {len(weights)})")


def _commit(api: HfApi, plan: Plan, repo: str, message: str, say: Say) -> str:
    """One commit: all files, and those gone that an earlier push left. Tried again where the answer was lost."""
    from huggingface_hub import CommitOperationDelete

    names = {name for name, _ in plan.files}
    for attempt in range(1, ATTEMPTS + 1):
        there = api.list_repo_files(repo, revision=plan.revision)
        stale = [name for name in there if name not in names and name != ".gitattributes"]
        operations = [*_operations(plan, repo), *(CommitOperationDelete(path_in_repo=name) for name in stale)]
        try:
            # Where the commit was made and only its answer lost, nothing is left to do: no second one comes of it.
            return api.create_commit(repo, operations, commit_message=message, revision=plan.revision).oid
        except Exception as error:
            # All other requests were tried again already, by huggingface_hub.
            told = explain(error, repo)
            if attempt == ATTEMPTS or "/commit/" not in _asked(error) or not isinstance(told, MachineError):
                raise
            say(f"{told}; trying again")
            time.sleep(attempt)
    raise AssertionError("unreachable")


def _asked(error: Any) -> str:
    """The address of the request that failed."""
    try:
        response = getattr(error, "response", None)
        return str((error if response is None else response).request.url)
    except (AttributeError, RuntimeError):  # no request belongs to it
        return ""


def _collect(api: HfApi, wanted: str, repo: str, owner: str, private: bool) -> str:
    """Put the model into a collection; its slug."""
    slug = wanted
    if "/" not in wanted:
        slug = api.create_collection(
            wanted, namespace=repo.partition("/")[0] or owner, private=private, exists_ok=True
        ).slug
    return api.add_collection_item(slug, item_id=repo, item_type="model", exists_ok=True).slug
