"""Writing a student as a folder that plain transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import __version__
from . import checkpoint, families, run_folder
from .card import model_card
from .errors import UserError
from .files import commit_directory
from .flatten import auto_map, modelling_files
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
_SAMPLES = ("Once upon a time, there was 1 cat & 23 dogs.", " leading space", "line\nbreak\ttab", "naïve café, 日本語")


def export(
    run: str | Path,
    step: str | int = "best",
    out: str | Path | None = None,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    teacher: Teacher | None = None,
    student: Any = None,
    result: dict[str, Any] | None = None,
) -> Path:
    """Export a saved step of a run.

    Args:
        run: the run folder.
        step: `best` or `last` of its newest stage, or a step's number.
        out: folder to make; RUN/export by default.
        dtype: of the weights written.
        overwrite: replace an export that stands there already.
        teacher: of the run, where it is loaded already.
        student: the model to write as it is, where it is at hand already; `step` is then not read.
        result: what the model card tells of it.

    Returns:
        The folder.

    Raises:
        UserError: no such run or step, or `out` exists.
    """
    run = Path(run)
    record = run_folder.read(run)
    out = run / "export" if out is None else Path(out)
    if out.exists() and not overwrite:
        raise UserError(f"{out}: already exists. Give another folder with --out, or add --overwrite to replace it")
    newest = checkpoint.Checkpoints(run / "checkpoints").newest()
    apart = student is None and newest is not None and _streamed(record, newest.stage)
    teacher = teacher or _teacher(record, apart)
    extra: dict[str, str | Path] = {
        name: run / name for name in ("recipe.yaml", "metrics.jsonl", "loss.png") if (run / name).exists()
    }
    extra["README.md"] = model_card(record, (run / "recipe.yaml").read_text(encoding="utf-8"), result)
    if apart and newest is not None:
        from .stream.export import StreamedWeights
        from .student import student_config

        if step not in ("best", "last", newest.step):
            raise UserError(f"{run}: stage {newest.stage} has no saved step {step}. Saved: {newest.step}")
        plan = _plan(record)
        parts = StreamedWeights(teacher, plan, newest, dtype)  # pyright: ignore[reportArgumentType]

        def write(folder: Path) -> None:
            parts.write(folder)
            student_config(teacher, plan).save_pretrained(folder)

        return _export(student_config(teacher, plan), write, parts.bytes, teacher.folder, out, dtype, extra, overwrite)
    student = student if student is not None else _load_step(run, record, step, teacher)
    return export_student(student, teacher.folder, out, dtype=dtype, extra=extra, overwrite=overwrite)


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


def _load_step(run: Path, record: dict[str, Any], step: str | int, teacher: Teacher) -> Any:
    """The student as a commit holds it."""
    from .align import align_module
    from .lora import load_student
    from .student import assemble, transfer

    store = checkpoint.Checkpoints(run / "checkpoints")
    newest = store.newest()
    if newest is None:
        raise UserError(f"{run}: holds no saved step yet. Go on with the run: relinear run RECIPE --resume")
    wanted = newest.step if step == "last" else step
    if step == "best":
        wanted = (newest.state.get("best") or {"step": newest.step})["step"]
    commits = {commit.step: commit for commit in store.all(newest.stage)}
    if wanted not in commits:
        known = ", ".join(map(str, sorted(commits)))
        raise UserError(f"{run}: stage {newest.stage} has no saved step {wanted}. Saved: {known}")
    mixers, _ = transfer(teacher, _plan(record))
    kinds = dict(record["stages"])
    if kinds[newest.stage] in ("calibrate", "matrix", "align"):
        module = align_module(mixers)
        checkpoint.load_module(module, commits[wanted].weights(), commits[wanted].path)
        return assemble(teacher, mixers)
    student = assemble(teacher, mixers, record.get("kept_attention"))
    load_student(student, commits[wanted])
    return student


def export_student(
    student: Any,
    teacher_folder: Path,
    out: Path,
    *,
    dtype: str = "float32",
    extra: dict[str, str | Path] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `student` to `out`: weights, config, modelling files, tokenizer and what else is given (atomic).

    Args:
        student: a model of `modeling.classes.student_classes`.
        teacher_folder: where tokenizer, generation settings and licence files come from.
        out: the folder to make.
        dtype: of the weights written; decays and their like stay fp32.
        extra: further files: name -> text, or a path to copy.
        overwrite: replace an export that stands there already.

    Returns:
        `out`.

    Raises:
        UserError: `out` exists, or the tokenizer gives other ids beside our config than beside the teacher's.
        MachineError: the disk is full; nothing that was there is harmed.
    """
    needed = sum(p.numel() * p.element_size() for p in student.parameters())

    def write(folder: Path) -> None:
        _write_weights(student, folder, dtype)

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
        _copy_teacher_files(teacher_folder, folder)
        _write_config(folder, dtype)
        for name, content in (extra or {}).items():
            if isinstance(content, Path):
                shutil.copyfile(content, folder / name)
            else:
                (folder / name).write_text(content, encoding="utf-8")
        _check_tokenizer(teacher_folder, folder, config.vocab_size)

    commit_directory(out, write, needed=needed)
    return out


def _write_weights(student: Any, folder: Path, dtype: str) -> None:
    """Shards with index through transformers, in `dtype` except what must stay fp32."""
    import torch

    target = getattr(torch, dtype)
    fp32 = tuple(student._keep_in_fp32_modules_strict or ())
    state = {
        name: value if name.endswith(fp32) or not value.is_floating_point() else value.to(target)
        for name, value in student.state_dict().items()
    }
    student.save_pretrained(folder, state_dict=state, max_shard_size="5GB")


def _write_config(folder: Path, dtype: str) -> None:
    """Complete the config.json that save_pretrained wrote."""
    import transformers

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
    config["verified_transformers"] = {"min": transformers.__version__, "max": transformers.__version__}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_teacher_files(source: Path, folder: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    if (source / "generation_config.json").exists():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    for path in source.iterdir():
        if path.is_file() and path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE")):
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
