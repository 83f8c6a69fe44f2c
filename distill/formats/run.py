"""A run's student, or an exported one, in a published architecture's own format."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from .. import run_folder
from ..errors import UserError
from ..files import TEMPORARY
from ..manifest import renew
from ..teacher import read_config
from . import pairs


def export_as(
    source: Path | str,
    name: str,
    step: str | int = "best",
    out: Path | str | None = None,
    *,
    stage: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
) -> tuple[Path, dict[str, Any]]:
    """Write a saved step of a run, or an exported folder, in the format `name`.

    Args:
        source: a run, or a folder that `relinear export` wrote.
        name: of the format, see `pairs.FORMATS`.
        step: of a run, as for `export`.
        out: folder to make; RUN/exports/NAME by default, RUN/exports/STAGE-STEP-NAME for another step than the newest
            stage's best, EXPORT-NAME beside an exported folder.
        stage: of a run, as for `export`.
        dtype: of the weights written; decays and their like stay fp32.
        overwrite: replace a folder that stands there already.
        max_shard_size: as for `export`.

    Returns:
        The folder, and what its format.json holds.

    Raises:
        UserError: no such run, step or format, the pair is not exact, or `out` exists.
        MachineError: the disk is full.
    """
    source, wanted = Path(source), pairs.find(name)
    is_run = (source / run_folder.RECORD).exists()
    if not is_run and not (source / "config.json").exists():
        raise UserError(f"{source}: neither a run nor an exported student. Runs hold {run_folder.RECORD}")
    if not is_run and (step != "best" or stage is not None):
        raise UserError(f"{source}: an exported student has one step; --step and --stage are for runs")
    if is_run:
        pairs.check(wanted, of_run(source), str(source))
    else:
        pairs.check(wanted, pairs.read_student(source)[0], str(source))
    from ..export import export, saved_step
    from .write import convert

    settings: dict[str, Any] = {"dtype": dtype, "overwrite": overwrite, "max_shard_size": max_shard_size}
    if not is_run:
        folder = Path(out) if out is not None else source.with_name(f"{source.absolute().name}-{name}")
        return folder, convert(source, name, folder, **settings)
    commit = saved_step(source, step, stage)
    default = step == "best" and stage is None
    folder = Path(out) if out is not None else source / "exports" / (name if default else f"{commit.path.name}-{name}")
    if folder.exists() and not overwrite:
        raise UserError(f"{folder}: already exists. Give another folder with --out, or add --overwrite to replace it")
    between = source / "exports" / f"student{TEMPORARY}{os.getpid()}"
    try:
        export(source, step, between, stage=stage, overwrite=True)
        record = convert(between, name, folder, **settings)
    finally:
        shutil.rmtree(between, ignore_errors=True)
    renew([folder])
    return folder, record


def of_run(run: Path) -> pairs.Student:
    """What is asked of a run's student, without its weights.

    Raises:
        UserError: no run, or its teacher is gone.
    """
    record = run_folder.read(run)
    config = read_config(Path(record["teacher"]["folder"]))
    plan = {int(layer): (name, options) for layer, (name, options) in record["layers"].items()}
    return pairs.Student(str(config["model_type"]), config, plan)
