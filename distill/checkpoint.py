"""Training state on disk: one atomic directory per commit, from which a run goes on to the same numbers."""

from __future__ import annotations

import json
import os
import platform
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import files
from .digest import checksum, inside, value_digest
from .engine.world import World
from .errors import MachineError, UserError

FORMAT = 1
WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
RNG = "rng.safetensors"
HELD = "state.safetensors"
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A committed directory `STAGE-STEP`.

    Attributes:
        path: the directory.
        stage: the stage that wrote it.
        step: optimizer steps done.
        complete: the stage had ended.
        state: everything else, plain values: `tokens`, `best`, `source`, `metrics_offset`, `environment`, `result`, …
        verified: files whose content was compared with its checksum already.
    """

    path: Path
    stage: str
    step: int
    complete: bool
    state: dict[str, Any]
    verified: set[str] = field(default_factory=set, compare=False, repr=False)

    def damage(self) -> str | None:
        """Which file has other content than when it was written, in a sentence; None where none has. Reads all."""
        for name in self.state["files"]:
            problem = self._damage_of(name)
            if problem is not None:
                return problem
        return None

    def weights(self) -> dict[str, Tensor]:
        """The stage's tensors by name, whole, on the CPU."""
        return self._all(WEIGHTS)

    def source(self) -> dict[str, Any]:
        """The data source's state, with its tensors."""
        return _give_tensors(self.state["source"], self._load(HELD))

    def optimizer(self) -> dict[str, Tensor]:
        """The optimizer's tensors, `PARAMETER/KIND`, whole, on the CPU."""
        return self._all(OPTIMIZER)

    def rng(self, rank: int) -> dict[str, Tensor]:
        """Generators' states of a rank; rank 0's where the commit is of fewer ranks."""
        name = _of_rank(RNG, rank)
        return self._load(name if name in self.state["files"] else RNG)

    def _all(self, name: str) -> dict[str, Tensor]:
        """What all ranks wrote of a file: each tensor is whole and in one of them."""
        stem = name.removesuffix(".safetensors")
        made: dict[str, Tensor] = {}
        for held in self.state["files"]:
            if held == name or (held.startswith(f"{stem}-") and held.endswith(".safetensors")):
                made |= self._load(held)
        return made

    def _load(self, name: str) -> dict[str, Tensor]:
        """A file's tensors.

        Raises:
            UserError: its content is not what was written.
        """
        path = self.path / name
        problem = self._damage_of(name)
        if problem is not None:
            raise UserError(f"{problem}. Remove {self.path} to go on from the one before")
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(
                f"{path}: cannot be read ({reason}). Remove {self.path} to go on from the one before"
            ) from None

    def _damage_of(self, name: str) -> str | None:
        # Commits from before checksums were kept have none.
        wanted = self.state.get("checksums", {}).get(name)
        if wanted is None or name in self.verified:
            return None
        path = self.path / name
        try:
            found = checksum(path)
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror})"
        if found != wanted:
            return f"{path}: other content than when it was saved (checksum {found[:12]}, expected {wanted[:12]})"
        self.verified.add(name)
        return None


class Checkpoints:
    """The commits of a run: `FOLDER/STAGE-STEP/`."""

    def __init__(self, folder: Path | str, keep: int = 2) -> None:
        """Open, and clear away what a killed save left behind.

        Args:
            folder: the run's `checkpoints` folder; made when first written to.
            keep: unfinished commits of a stage to keep, besides the best one and every completed stage.
        """
        self.folder = Path(folder)
        self.keep = keep
        files.clean_temporaries(self.folder)

    def all(self, stage: str | None = None) -> list[Checkpoint]:
        """Every whole commit, oldest first; of one stage, where it is named.

        Directories whose files are missing or have another size than recorded are left out.
        """
        if not self.folder.is_dir():
            return []
        found = [_read(path) for path in self.folder.iterdir() if not files.is_temporary(path) and path.is_dir()]
        whole = [c for c in found if c is not None and stage in (None, c.stage)]
        return sorted(whole, key=lambda c: c.state["sequence"])

    def damaged(self) -> list[Path]:
        """Directories here that are not whole commits."""
        if not self.folder.is_dir():
            return []
        paths = [path for path in self.folder.iterdir() if path.is_dir() and not files.is_temporary(path)]
        return sorted(path for path in paths if _read(path) is None)

    def sound(self, stage: str, say: Callable[[str], None] = lambda text: None) -> Checkpoint | None:
        """The last commit of a stage whose content is what was written; each damaged one on the way is said.

        A complete stage is given back damaged where a later one has a sound commit: it needs these weights no more.
        Its `damage` then tells.
        """
        everything = self.all()
        for commit in reversed([c for c in everything if c.stage == stage]):
            problem = commit.damage()
            if problem is None:
                return commit
            later = [c for c in everything if c.stage != stage and c.state["sequence"] > commit.state["sequence"]]
            needless = next((c for c in reversed(later) if c.damage() is None), None) if commit.complete else None
            if needless is not None:
                say(f"warning: {problem}. The run needs it no more: it goes on from {needless.path}")
                return commit
            say(f"warning: {problem}. This checkpoint is not used")
        return None

    def newest(self, stage: str | None = None) -> Checkpoint | None:
        """The last commit, of one stage where it is named."""
        found = self.all(stage)
        return found[-1] if found else None

    def require_complete(self, stage: str) -> Checkpoint:
        """The commit with which a stage ended.

        Raises:
            UserError: the stage has not ended; nothing may start from it.
        """
        found = [c for c in self.all(stage) if c.complete]
        if found:
            return found[-1]
        newest = self.newest(stage)
        where = f"stopped at step {newest.step}" if newest else "has no checkpoint"
        raise UserError(
            f"{self.folder}: stage {stage!r} {where}, and the next stage starts only from a complete one. "
            "Finish it first: run the same command with --resume"
        )

    def commit(
        self,
        stage: str,
        step: int,
        weights: dict[str, Tensor],
        state: dict[str, Any],
        *,
        optimizer: dict[str, Tensor] | None = None,
        complete: bool = False,
        world: World | None = None,
    ) -> Checkpoint:
        """Write a commit; afterwards remove those no longer needed.

        Several ranks call it together: each writes its own tensors, rank 0 the rest, and only when all are on the disk
        does the commit come into being. The folder must be one that all ranks see.

        Args:
            stage: its name.
            step: optimizer steps done.
            weights: the stage's tensors; of several ranks, those that this one writes.
            state: plain values that JSON gives back equal, and tensors among them.
            optimizer: tensors by name; likewise. A completed stage needs none.
            complete: the stage has ended.
            world: the ranks; this process alone by default.

        Raises:
            MachineError: no room; all earlier commits are untouched.
        """
        world = world or World()
        parts = {WEIGHTS: weights, RNG: _rng()} | ({OPTIMIZER: optimizer} if optimizer is not None else {})
        path = self.folder / f"{stage}-{step}"
        if not world.main:
            folder = world.tell(None)
            with suppress(Exception):  # rank 0 hears of it, and tells everyone
                world.outcomes(lambda: self._save_share(parts, Path(folder), path, world.rank) if folder else {})
        return world.first(lambda: self._write(path, stage, step, parts, state, complete, world))

    def _save_share(self, parts: dict[str, dict[str, Tensor]], folder: Path, final: Path, rank: int) -> dict[str, Any]:
        """Write the tensors of a rank other than 0; size and checksum by file name."""
        made = {}
        for name, tensors in parts.items():
            if tensors:
                target = folder / _of_rank(name, rank)
                _save(tensors, target, final, _bytes(parts))
                files.sync(target)
                made[target.name] = _written(target)
        return made

    def _write(
        self,
        path: Path,
        stage: str,
        step: int,
        parts: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        complete: bool,
        world: World,
    ) -> Checkpoint:
        """Rank 0's part of `commit`."""
        newest = self.newest()
        state = dict(state)
        state |= {"format": FORMAT, "stage": stage, "step": step, "complete": complete}
        state |= {"sequence": newest.state["sequence"] + 1 if newest else 0, "environment": environment()}
        state["python_rng"] = _plain(random.getstate())
        held: dict[str, Tensor] = {}
        state = {key: _take_tensors(value, held) for key, value in state.items()}
        parts = parts | {HELD: held}
        told = False

        def write(folder: Path) -> None:
            nonlocal told
            told = True
            world.tell(str(folder))
            failure: Exception | None = None
            try:
                for name, tensors in parts.items():
                    _save(tensors, folder / name, path, _bytes(parts))
            except Exception as error:
                failure = error
            shares = world.outcomes(dict)
            if failure is not None:
                raise failure
            found = {name: _written(folder / name) for name in parts}
            for share in shares:
                found |= share
            state["files"] = {name: size for name, (size, _) in found.items()}
            state["checksums"] = {name: check for name, (_, check) in found.items()}
            _check_exact(state)
            state["check"] = value_digest(state)
            (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")

        try:
            files.commit_directory(path, write, _bytes(parts))
        finally:
            if not told:  # the others wait
                world.tell(None)
                world.outcomes(dict)
        self._prune(stage)
        return Checkpoint(path, stage, step, complete, state)

    def _prune(self, stage: str) -> None:
        commits = self.all(stage)
        best = commits[-1].state.get("best") or {}
        partial = [c for c in commits if not c.complete]
        spare = 0 if commits[-1].complete else max(1, self.keep)
        wanted = [best.get("step"), None if commits[-1].complete else commits[-1].state.get("point")]
        for commit in partial[: max(0, len(partial) - spare)]:
            if commit.step not in wanted:
                files.remove_directory(commit.path)


def environment() -> dict[str, Any]:
    """What bit-identical numbers depend on: versions, threads, processes, hardware."""
    versions = {}
    for name in ("relinear", "torch", "transformers", "numpy", "flash-linear-attention"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        **versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def environment_warning(checkpoint: Checkpoint) -> str | None:
    """What differs between now and when a commit was written, in a sentence; None where nothing does."""
    before, now = checkpoint.state["environment"], environment()
    different = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    if not different:
        return None
    return f"{checkpoint.path.name} was written elsewhere ({', '.join(different)}): numbers will not be bit-identical"


def restore_rng(checkpoint: Checkpoint, rank: int = 0) -> None:
    """Put python's, numpy's and torch's random number generators back to where they were on that rank."""
    put_rng(checkpoint.state["python_rng"], checkpoint.rng(rank))


def take_rng() -> tuple[Any, dict[str, Tensor]]:
    """Where the generators stand: python's as plain values, numpy's and torch's as tensors."""
    return _plain(random.getstate()), _rng()


def put_rng(python: Any, saved: dict[str, Tensor]) -> None:
    """Put the generators where `take_rng` found them."""
    kind, values, gauss = python
    random.setstate((kind, tuple(values), gauss))
    keys, extra = saved["numpy"].numpy().astype(np.uint32), saved["numpy_extra"]
    np.random.set_state(("MT19937", keys, int(extra[0]), int(extra[1]), float(extra[2])))
    torch.set_rng_state(saved["torch"])
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, a tensor with two names (tied embeddings) once, under its first."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def load_module(
    module: nn.Module,
    tensors: dict[str, Tensor],
    where: Path | str,
    put: Callable[[Tensor, Tensor], None] | None = None,
) -> None:
    """Copy a commit's tensors into a module, in place and strictly.

    Args:
        module: what the stage trained.
        tensors: whole.
        where: for messages.
        put: writes a value into a tensor of the module; `copy_` by default.

    Raises:
        UserError: a name missing, left over, or of another shape: the checkpoint is of another model.
    """
    own = module_tensors(module)
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    # Under ZeRO-3 a parameter's own shape is that of its shard: ds_shape is the whole's.
    shapes = [n for n in own.keys() & tensors.keys() if getattr(own[n], "ds_shape", own[n].shape) != tensors[n].shape]
    for problem, names in (("missing", missing), ("unknown", extra), ("of another shape", sorted(shapes))):
        if names:
            raise UserError(
                f"{where}: {len(names)} tensors {problem}, e.g. {names[0]}. This checkpoint belongs to another teacher "
                "or recipe: resume with the recipe in its run folder, or start in a new folder: --out DIR"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name]) if put is None else put(tensor, tensors[name])


def _read(path: Path) -> Checkpoint | None:
    """The commit in a directory, None where it is not whole."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        sizes: dict[str, int] = state["files"]
        if any((path / inside(name, str(path / STATE))).stat().st_size != size for name, size in sizes.items()):
            return None
        check = state.pop("check", None)
        if check is not None and check != value_digest(state):
            return None
        return Checkpoint(path, state["stage"], state["step"], state["complete"], state)
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None


def _written(path: Path) -> tuple[int, str]:
    """A file's size and checksum."""
    return path.stat().st_size, checksum(path)


def _save(tensors: dict[str, Tensor], path: Path, final: Path, needed: int) -> None:
    try:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"}
        )
    except SafetensorError as error:
        if any(f"os error {code}" in str(error) for code in (27, 28, 122)):
            raise MachineError(files.full_disk(final, needed)) from error
        raise


def _of_rank(name: str, rank: int) -> str:
    """The file that a rank writes for `name`."""
    return name if rank == 0 else name.replace(".", f"-{rank}.", 1)


def _bytes(parts: dict[str, dict[str, Tensor]]) -> int:
    return sum(t.numel() * t.element_size() for part in parts.values() for t in part.values())


def _rng() -> dict[str, Tensor]:
    state: Any = np.random.get_state()
    _, keys, position, has_gauss, gauss = state
    tensors = {
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_extra": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def _take_tensors(value: Any, held: dict[str, Tensor]) -> Any:
    """`value` with every tensor inside moved to `held` and its key there left in its place."""
    if isinstance(value, Tensor):
        key = str(len(held))
        held[key] = value.detach()
        return {"__tensor__": key}
    if isinstance(value, dict):
        return {key: _take_tensors(entry, held) for key, entry in value.items()}
    return [_take_tensors(entry, held) for entry in value] if isinstance(value, list) else value


def _give_tensors(value: Any, held: dict[str, Tensor]) -> Any:
    """Undo `_take_tensors`."""
    if isinstance(value, dict):
        if value.keys() == {"__tensor__"}:
            return held[value["__tensor__"]]
        return {key: _give_tensors(entry, held) for key, entry in value.items()}
    return [_give_tensors(entry, held) for entry in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def _check_exact(state: dict[str, Any]) -> None:
    """Refuse what JSON does not give back as it was.

    Raises:
        TypeError: naming the entry (a tensor, a dict with integer keys, a tuple).
    """
    for key, value in state.items():
        if json.loads(json.dumps(value)) != value:
            raise TypeError(f"checkpoint entry {key!r} does not survive JSON; give plain lists, dicts and numbers")
