"""What `doctor` checks of a machine: every finding with what to type where it is not as it should be."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ..distill import files
from ..distill.errors import MachineError

SKEW = 5.0
"""Seconds that a file system's clock may differ from this machine's."""


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        state: whether a run can do with it; a warning is worth reading.
        found: what there is.
        fix: what to do or type; empty where all is well.
    """

    name: str
    state: Literal["ok", "warning", "failure"]
    found: str
    fix: str = ""


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check whose own failure is a finding, so that the others are still made."""
    try:
        return check()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return Check(name, "failure", f"{type(error).__name__}: {first}", "relinear --traceback doctor")


def machine(folder: Path, kernels: list[dict[str, str]]) -> Iterator[Check]:
    """Everything that needs no recipe.

    Args:
        folder: where runs would be written.
        kernels: rows of `mixers.kernels.survey`.
    """
    yield guarded("python", python)
    yield from libraries()
    yield guarded("torch", torch_works)
    yield guarded("cuda", cuda)
    yield guarded("processes", process_groups)
    yield guarded("kernels", lambda: chosen_kernels(kernels))
    where = existing(folder)
    yield guarded("writing", lambda: writing(where))
    yield guarded("locks", lambda: locks(where))
    yield guarded("clock", lambda: clock(where))


def python() -> Check:
    """Python's version against the package's."""
    wanted, found = SpecifierSet(metadata.metadata("relinear")["Requires-Python"] or ""), platform.python_version()
    if wanted.contains(found, prereleases=True):
        return Check("python", "ok", found)
    return Check("python", "failure", f"{found}, needed {wanted}", "make a virtual environment with a newer Python")


def libraries() -> Iterator[Check]:
    """Installed versions against the package's bounds: one line where all fit, else one for each that does not."""
    wrong, fitting = [], 0
    for line in metadata.requires("relinear") or []:
        requirement = Requirement(line)
        extra = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        if extra and requirement.marker is not None and requirement.marker.evaluate({"extra": "dev"}):
            continue
        found = version(requirement.name)
        if found is not None and requirement.specifier.contains(found, prereleases=True):
            fitting += 1
        elif found is not None or not extra:
            said = f"{requirement.name} {found or 'is not installed'}, needed {requirement.specifier}"
            fix = f"pip install '{requirement.name}{requirement.specifier}'"
            wrong.append(Check("libraries", "warning" if extra else "failure", said, fix))
    yield from dict.fromkeys(wrong)
    if not wrong:
        yield Check("libraries", "ok", f"{fitting} installed, each within its bounds")


def version(name: str) -> str | None:
    """Version of an installed distribution, None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def torch_works() -> Check:
    """torch loads and multiplies."""
    import torch

    made = torch.arange(6.0).view(2, 3) @ torch.ones(3, 1)
    if made.flatten().tolist() != [3.0, 12.0]:
        return Check("torch", "failure", f"{torch.__version__} computes {made.flatten().tolist()}", "reinstall torch")
    return Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")


def cuda() -> Check:
    """GPUs: seen by torch, and each multiplies as the CPU does."""
    import torch

    if not torch.cuda.is_available():
        listed = _nvidia()
        if not listed:
            return Check("cuda", "ok", "no GPU: everything runs on the CPU")
        if torch.version.cuda is None:
            fix = "pip install torch --index-url https://download.pytorch.org/whl/cu128"
            return Check("cuda", "failure", f"{listed} GPUs, but torch {torch.__version__} is built for CPUs", fix)
        said = f"{listed} GPUs, but torch {torch.__version__} (CUDA {torch.version.cuda}) sees none"
        return Check("cuda", "failure", said, "look at nvidia-smi, CUDA_VISIBLE_DEVICES, and the driver's version")
    names, generator = [], torch.Generator().manual_seed(0)
    left = torch.randn(64, 64, generator=generator)
    for index in range(torch.cuda.device_count()):
        made = (left.to(f"cuda:{index}") @ left.to(f"cuda:{index}")).cpu()
        if not torch.allclose(made, left @ left, rtol=1e-2, atol=1e-2):
            return Check("cuda", "failure", f"cuda:{index} computes other numbers than the CPU", "nvidia-smi -q -d ECC")
        names.append(torch.cuda.get_device_name(index))
    said = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return Check("cuda", "ok", f"{said}, CUDA {torch.version.cuda}")


def _nvidia() -> int:
    """GPUs that the driver lists."""
    if shutil.which("nvidia-smi") is None:
        return 0
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
        return sum(line.startswith("GPU ") for line in done.stdout.splitlines())
    return 0


def process_groups() -> Check:
    """What several processes would speak: NCCL between GPUs, gloo between CPUs."""
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        return Check("processes", "warning", "this torch has no torch.distributed: one process only", "reinstall torch")
    if not torch.cuda.is_available():
        return Check("processes", "ok", "gloo")
    if not dist.is_nccl_available():
        return Check("processes", "failure", "GPUs, but torch has no NCCL", "install torch's CUDA build for Linux")
    from torch.cuda import nccl

    number: Any = nccl.version()
    return Check("processes", "ok", f"NCCL {'.'.join(map(str, number))}, gloo")


def chosen_kernels(rows: list[dict[str, str]]) -> Check:
    """What would run was chosen without an error, and the chunked forms give what the step-by-step forms give here."""
    wrong = [row for row in rows if "error" in (row["train"], row["prefill"], row["decode"])]
    if wrong:
        said = f"{', '.join(row['recurrence'] for row in wrong)}: {wrong[0]['why']}"
        return Check("kernels", "failure", said, "RELINEAR_KERNELS=auto, or mend what the table above says")
    tried = self_test()
    bad = [f"{name}: {said}" for name, (agrees, said) in tried.items() if not agrees]
    if bad:
        return Check("kernels", "failure", "; ".join(bad), "RELINEAR_KERNELS=torch; reinstall torch if that is it")
    fused = sorted({row["train"] for row in rows} - {"torch"})
    names = f"fused: {', '.join(fused)}" if fused else "plain torch"
    return Check("kernels", "ok", f"{names}; {len(tried)} chunked forms agree with their step-by-step forms")


def self_test() -> dict[str, tuple[bool, str]]:
    """Chunked forms in plain torch against the step-by-step forms in fp64, with gradients, on this machine's device.

    Returns:
        Recurrence -> whether they agree, and the largest error or what went wrong.
    """
    import torch

    from ..mixers.ops import check, fused

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for name in sorted(fused.KERNELS):
        op = import_module(f"..mixers.ops.{name}", __package__).OP
        call = fused.Call(device.type, torch.float32, 2, 16, 16, "train", state=True)
        found[name] = check.verdict(op, op.chunked, call, device)
    return found


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    path = folder.expanduser().absolute()
    return next((place for place in (path, *path.parents) if place.is_dir()), Path("/"))


def writing(folder: Path) -> Check:
    """A file is written, synced and replaced, as every saved step is."""
    other = "choose another folder: save.dir=DIR"
    with _room(folder) as place:
        if place is None:
            return Check("writing", "failure", f"{folder} cannot be written", other)
        try:
            for content in (b"old", b"new"):
                files.write_bytes(place / "file", content)
        except (OSError, MachineError) as error:
            return Check("writing", "failure", f"{folder}: {error}", other)
        if (place / "file").read_bytes() != b"new" or len(list(place.iterdir())) != 1:
            return Check("writing", "failure", f"{folder}: replacing a file is not atomic there", other)
    return Check("writing", "ok", f"{folder}: fsync and atomic replacement")


_LOCK = """
import fcntl, sys
for number, take in enumerate((fcntl.flock, fcntl.lockf)):
    with open(sys.argv[1 + number], "r+") as file:
        try:
            take(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            print(take.__name__)
        except OSError:
            pass
"""


def locks(folder: Path) -> Check:
    """A lock held here keeps another process out."""
    fix = "use a file system with locks (NFS 4, Lustre with -o flock), or see to it that one run alone uses the folder"
    with _room(folder) as place:
        if place is None:
            return Check("locks", "failure", f"{folder} cannot be written", "choose another folder: save.dir=DIR")
        paths = [place / "flock", place / "lockf"]
        with paths[0].open("w") as first, paths[1].open("w") as second:
            try:
                fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.lockf(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                return Check("locks", "warning", f"{folder}: no locks here ({error.strerror})", fix)
            command = [sys.executable, "-c", _LOCK, *map(str, paths)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        broken = done.stdout.split()
    if done.returncode:
        return Check("locks", "warning", f"could not be tried: {done.stderr.strip()[-100:]}", "relinear doctor again")
    if broken:
        return Check("locks", "failure", f"{folder}: {', '.join(broken)} lets two processes in at once", fix)
    return Check("locks", "ok", f"{folder}: flock and fcntl keep a second process out")


def clock(folder: Path, now: Callable[[], float] = time.time) -> Check:
    """The time that the file system gives a new file, a server's on network storage, against this machine's."""
    with _room(folder) as place:
        if place is None:
            return Check("clock", "failure", f"{folder} cannot be written", "choose another folder: save.dir=DIR")
        before = now()
        (place / "now").touch()
        stamp, after = (place / "now").stat().st_mtime, now()
    # File systems round down, by up to two seconds.
    skew = max(0.0, before - stamp - 2.0, stamp - after)
    if skew > SKEW:
        return Check("clock", "warning", f"{folder}: its clock differs by {skew:.0f} s", "timedatectl set-ntp true")
    return Check("clock", "ok", f"{folder}: no difference beyond {SKEW:.0f} s")


class _room:
    """A new folder inside `folder`, removed afterwards; None where none can be made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: Path | None = None

    def __enter__(self) -> Path | None:
        with suppress(OSError):
            self.made = Path(tempfile.mkdtemp(prefix=f"doctor{files.TEMPORARY}", dir=self.folder))
        return self.made

    def __exit__(self, *_: object) -> None:
        if self.made is not None:
            shutil.rmtree(self.made, ignore_errors=True)


def installed(module: str) -> bool:
    """Whether a module can be imported; it is not."""
    return importlib.util.find_spec(module) is not None


def available_memory() -> int | None:
    """Bytes that processes can still take, None where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with suppress(ValueError, AttributeError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
