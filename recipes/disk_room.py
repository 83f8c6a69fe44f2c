"""Whether the disks have room for what a streamed stage will write; said, and refused, before it begins."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from ..distill import files
from ..distill.errors import MachineError
from .units import format_bytes


def check_room(
    name: str, align: str, needs: dict[str, int], run: Path, folder: Path, say: Callable[[str], None]
) -> None:
    """Say what a stage will take on the disk, and refuse where there is not so much.

    Args:
        name: of the stage.
        align: of the streamed align, whose keys say where hidden states lie.
        needs: bytes by use; `checkpoints` go to the run folder, the rest to `folder`.
        run: the run folder.
        folder: for hidden states.
        say: one line for a person.

    Raises:
        MachineError: not enough room.
    """
    text = ", ".join(f"{use} {format_bytes(size)}" for use, size in needs.items() if size)
    say(f"{name}: up to {format_bytes(sum(needs.values()))} on the disk ({text}); hidden states in {folder}")
    by_disk: dict[int, tuple[Path, int]] = {}
    for use, size in needs.items():
        place = run if use == "checkpoints" else folder
        with files.disk_guard(place):
            place.mkdir(parents=True, exist_ok=True)
        device = place.stat().st_dev
        by_disk[device] = (place, by_disk.get(device, (place, 0))[1] + size)
    for place, needed in by_disk.values():
        used = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        free = shutil.disk_usage(place).free
        if needed > free + used:
            raise MachineError(
                f"stages.{align}.stream: {place}: {needed:,} bytes needed, {used:,} of them there already, and "
                f"{free:,} free. Name a folder on a larger disk (stages.{align}.stream.dir=DIR), keep less of "
                f"each number (stages.{align}.stream.borders=float8), or lower stages.{name}.tokens"
            )
