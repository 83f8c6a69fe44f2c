"""Writing a student as a folder that plain transformers loads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import __version__
from . import checkpoint, families, run_folder
from .card import CONVERSION, conversion, model_card
from .errors import UserError
from .files import commit_directory, finite
from .flatten import auto_map, modelling_files
from .hub.leaks import public_recipe
from .hub.licence import licence_files, licence_of
from .hub.proof import CARD
from .manifest import renew
from .probe import write_probe
from .teacher import Teacher, load_teacher, load_tokenizer

# Copied byte for byte from the teacher's folder where they exist.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
SHARD = "5GB"
"""Most bytes of a weight file, by default."""
_SAMPLES = ("Once upon a time, there was 1 cat & 23 dogs.", " leading space", "line\nbreak\ttab", "naïve café, 日本語")


def export(
    run: str | Path,
    step: str | int = "best",
    out: str | Path | None = None,
    *,
    stage: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    max_shard_size: str | int = SHARD,
    teacher: Teacher | None = None,
    student: Any = None,
    result: dict[str, Any] | None = None,
) -> Path:
    """Export a saved step of a run.

    Args:
        run: the run folder.
        step: `best` or `last` of its stage, or a step's number.
        out: folder to make; RUN/export by default for the newest stage's best step, RUN/exports/STAGE-STEP for others.
        stage: whose step; the newest one that saved something by default.
        dtype: of the weights written.
        overwrite: replace an export that stands there already.
        max_shard_size: most bytes of a weight file, a number or e.g. `5GB`; a larger tensor has one of its own.
        teacher: of the run, where it is loaded already.
        student: the model to write as it is, where it is at hand already; `step` is then not read.
        result: of the run, for the model card; where result.json tells of this very step it is read by itself.

    Returns:
        The folder.

    Raises:
        UserError: no such run, stage or step, or `out` exists.
    """
    run = Path(run)
    record = run_folder.read(run)
    commit = saved_step(run, step, stage) if student is None or step != "best" else _newest(run)
    if out is None:
        default = step == "best" and stage is None
        out = run / "export" if default or commit is None else run / "exports" / commit.path.name
    out = Path(out)
    if out.exists() and not overwrite:
        raise UserError(f"{out}: already exists. Give another folder with --out, or add --overwrite to replace it")
    apart = student is None and commit is not None and _streamed(record, commit.stage)
    teacher = teacher or _teacher(record, apart)
    extra = _companions(run, record, commit, result, teacher, dtype)
    if apart and commit is not None:
        from .stream.export import StreamedWeights
        from .student import student_config

        plan = _plan(record)
        parts = StreamedWeights(teacher, plan, commit, dtype, shard_bytes(max_shard_size))  # pyright: ignore[reportArgumentType]

        def write(folder: Path) -> None:
            parts.write(folder)
            student_config(teacher, plan).save_pretrained(folder)

        return _export(student_config(teacher, plan), write, parts.bytes, teacher.folder, out, dtype, extra, overwrite)
    if student is None:
        assert commit is not None
        student = _load_step(record, commit, teacher)
    return export_student(
        student,
        teacher.folder,
        out,
        dtype=dtype,
        extra=extra,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
    )


def saved_step(run: Path, step: str | int, stage: str | None = None) -> checkpoint.Checkpoint:
    """The commit that `step` and `stage` name, as for `export`.

    Raises:
        UserError: the run holds none like it; says which there are.
    """
    store = checkpoint.Checkpoints(run / "checkpoints")
    commits = store.all(stage)
    if not commits:
        known = list(dict.fromkeys(commit.stage for commit in store.all()))
        if not known:
            raise UserError(f"{run}: holds no saved step yet. Go on with the run: relinear run RECIPE --resume")
        raise UserError(f"{run}: stage {stage} has no saved step. Stages that have: {', '.join(known)}")
    newest = commits[-1]
    wanted = newest.step if step == "last" else step
    if step == "best":
        wanted = (newest.state.get("best") or {"step": newest.step})["step"]
    found = {commit.step: commit for commit in commits if commit.stage == newest.stage}
    if wanted not in found:
        known = "; ".join(
            f"{name}: {', '.join(str(c.step) for c in store.all(name))}"
            for name in dict.fromkeys(commit.stage for commit in store.all())
        )
        raise UserError(f"{run}: stage {newest.stage} has no saved step {wanted}. Saved: {known}. Add --stage NAME")
    return found[wanted]


def _newest(run: Path) -> checkpoint.Checkpoint | None:
    """The best saved step of the newest stage, None where nothing was trained."""
    try:
        return saved_step(run, "best")
    except UserError:
        return None


def _companions(
    run: Path,
    record: dict[str, Any],
    commit: checkpoint.Checkpoint | None,
    result: dict[str, Any] | None,
    teacher: Teacher,
    dtype: str,
) -> dict[str, str | Path]:
    """What stands beside weights and code: facts for the card, recipe, metrics; no place of this machine."""
    extra: dict[str, str | Path] = {name: run / name for name in ("metrics.jsonl", "loss.png") if (run / name).exists()}
    saved = None
    if commit is not None:
        saved = {"stage": commit.stage, "step": commit.step, "tokens": commit.state.get("tokens")}
    if result is None:
        result = _result_of(run, record, saved)
    facts = conversion(record, saved, result, licence_of(teacher.folder), dtype)
    extra[CONVERSION] = json.dumps(finite(facts), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    extra["recipe.yaml"] = public_recipe((run / "recipe.yaml").read_text(encoding="utf-8"))
    return extra


def _result_of(run: Path, record: dict[str, Any], saved: dict[str, Any] | None) -> dict[str, Any] | None:
    """result.json, where what it measured is this step."""
    try:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    last = next((name for name, kind in reversed(record["stages"]) if kind != "transfer"), None)
    here = saved is None or (saved["stage"] == last and result.get("step") in (None, saved["step"]))
    return result if here else None


def _streamed(record: dict[str, Any], stage: str) -> bool:
    """That stage of a run never had the whole teacher in memory."""
    settings = {held["name"]: held for item in record["recipe"]["stages"] for held in item.values()}
    return bool(settings[stage].get("stream"))


def _plan(record: dict[str, Any]) -> dict[int, tuple[str, dict[str, Any]]]:
    return {int(layer): (name, options) for layer, (name, options) in record["layers"].items()}


def _teacher(record: dict[str, Any], apart: bool = False) -> Teacher:
    """The teacher of a run, from where the run found it; `apart` leaves its weights in the shards."""
    from .stream.teacher import open_teacher

    known, dtype = record["teacher"], record["recipe"]["teacher"]["dtype"]
    load = open_teacher if apart else load_teacher
    if known["revision"] is not None:
        return load(known["source"], known["revision"], dtype)
    return load(known["folder"], None, dtype)


def _load_step(record: dict[str, Any], commit: checkpoint.Checkpoint, teacher: Teacher) -> Any:
    """The student as a commit holds it."""
    from .align import align_module
    from .lora import load_student
    from .student import assemble, transfer

    mixers, _ = transfer(teacher, _plan(record))
    if dict(record["stages"])[commit.stage] in ("calibrate", "matrix", "align"):
        checkpoint.load_module(align_module(mixers), commit.weights(), commit.path)
        return assemble(teacher, mixers)
    student = assemble(teacher, mixers, record.get("kept_attention"))
    load_student(student, commit)
    return student


def export_student(
    student: Any,
    teacher_folder: Path,
    out: Path,
    *,
    dtype: str = "float32",
    extra: dict[str, str | Path] | None = None,
    overwrite: bool = False,
    max_shard_size: str | int = SHARD,
) -> Path:
    """Write `student` to `out`: weights, config, modelling files, tokenizer and what else is given (atomic).

    Args:
        student: a model of `modeling.classes.student_classes`.
        teacher_folder: where tokenizer, generation settings and licence files come from.
        out: the folder to make.
        dtype: of the weights written; decays and their like stay fp32.
        extra: further files: name -> text, or a path to copy.
        overwrite: replace an export that stands there already.
        max_shard_size: as for `export`.

    Returns:
        `out`.

    Raises:
        UserError: `out` exists, or the tokenizer gives other ids beside our config than beside the teacher's.
        MachineError: the disk is full; nothing that was there is harmed.
    """
    needed = sum(p.numel() * p.element_size() for p in student.parameters())

    limit = shard_bytes(max_shard_size)

    def write(folder: Path) -> None:
        _write_weights(student, folder, dtype, limit)
        write_probe(student, folder)

    return _export(student.config, write, needed, teacher_folder, out, dtype, extra, overwrite)


def _export(
    config: Any,
    weights: Callable[[Path], None],
    needed: int,
    teacher_folder: Path,
    out: Path,
    dtype: str,
    extra: dict[str, str | Path] | None,
    overwrite: bool,
) -> Path:
    """`export_student` with weights and config.json, of `needed` bytes, written by `weights`."""
    if out.exists() and not overwrite:
        raise UserError(f"{out}: already exists. Give another folder, or add --overwrite to replace it")

    def write(folder: Path) -> None:
        weights(folder)
        family = families.FAMILIES[config.base_model_type]
        used = sorted({name for name in config.mixer_types if name})
        for name, text in modelling_files(family, used).items():
            (folder / name).write_text(text, encoding="utf-8")
        copy_teacher_files(teacher_folder, folder)
        _write_config(folder, dtype)
        for name, content in (extra or {}).items():
            if isinstance(content, Path):
                shutil.copyfile(content, folder / name)
            else:
                (folder / name).write_text(content, encoding="utf-8")
        if CONVERSION in (extra or {}):
            (folder / CARD).write_text(model_card(folder), encoding="utf-8")
        _check_tokenizer(teacher_folder, folder, config.vocab_size)

    commit_directory(out, write, needed=needed)
    renew([out])
    return out


def shard_bytes(size: str | int) -> int:
    """Bytes that a size like `5GB`, `200 MB` or `1GiB` means.

    Raises:
        UserError: it means none.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    if not found or found[2] not in units or float(found[1]) <= 0:
        raise UserError(f"--max-shard-size {size}: expected a size, e.g. --max-shard-size 5GB")
    return int(float(found[1]) * units[found[2]])


def _write_weights(student: Any, folder: Path, dtype: str, limit: int) -> None:
    """Shards with index through transformers, in `dtype` except what must stay fp32."""
    import torch

    target = getattr(torch, dtype)
    fp32 = tuple(student._keep_in_fp32_modules_strict or ())
    state = {
        name: value if name.endswith(fp32) or not value.is_floating_point() else value.to(target)
        for name, value in student.state_dict().items()
    }
    student.save_pretrained(folder, state_dict=state, max_shard_size=limit)


def _write_config(folder: Path, dtype: str) -> None:
    """Complete the config.json that save_pretrained wrote."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["architectures"] = ["RelinearForCausalLM"]
    config["auto_map"] = auto_map()
    for settings in (config.get("mixers") or {}).values():
        for options in (settings, *settings.get("layers", {}).values()):
            if options.get("form") == "fused":  # asked for where it was trained; who loads it may not have them
                options["form"] = "auto"
    config["dtype"] = dtype
    config["relinear_version"] = __version__
    config["verified_transformers"] = None  # `verify` writes what it has seen
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_teacher_files(source: Path, folder: Path) -> None:
    """Tokenizer, generation settings and licence, byte for byte."""
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    if (source / "generation_config.json").exists():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    for path in licence_files(source):
        shutil.copyfile(path, folder / path.name)


def _check_tokenizer(teacher_folder: Path, folder: Path, vocab_size: int) -> None:
    """The same files must give the same ids, although the class that transformers picks depends on config.json too."""
    theirs = load_tokenizer(teacher_folder, vocab_size)
    if _same_ids(load_tokenizer(folder, vocab_size), theirs):
        return
    # The teacher's model type named the class; ours does not. Say it where the class is looked up first.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    settings["tokenizer_class"] = type(theirs).__name__
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if not _same_ids(load_tokenizer(folder, vocab_size), theirs):
        raise UserError(
            f"{teacher_folder}: its tokenizer gives other ids beside our config.json than beside its own. Save it "
            "again with transformers (tokenizer.save_pretrained) and use that folder as the teacher"
        )


def _same_ids(ours: Any, theirs: Any) -> bool:
    return (
        ours.get_vocab() == theirs.get_vocab()
        and ours.special_tokens_map == theirs.special_tokens_map
        and all(ours(text)["input_ids"] == theirs(text)["input_ids"] for text in _SAMPLES)
    )
