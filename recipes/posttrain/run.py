"""Training after conversion, carried out: measure, train by TRL, measure again, export what came out."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import __version__
from ...distill import checkpoint, families, files, run_folder
from ...distill.card import CONVERSION, is_local
from ...distill.digest import teacher_fingerprint
from ...distill.errors import RunFailed, UserError
from ...distill.export import export_student
from ...distill.hub.leaks import public_name, public_recipe
from ...distill.lock import RunLock
from ...distill.teacher import load_model, locate, read_config
from .. import loader
from ..runner import stop_signals
from ..session import Progress, Silent, pick_device
from . import frozen, saving, trainers
from .examples import Examples, open_examples, set_template
from .measure import METRIC, measure
from .schema import PosttrainRecipe

RECORD = "posttrain.json"
"""Says in a run folder which run it is, as run.json does of a conversion."""
BEFORE, RESULT, RECIPE = "before.json", "result.json", "posttrain.yaml"


@dataclass
class Work:
    """A run under way.

    Attributes:
        recipe: resolved.
        folder: of the run.
        source: folder of the model that it begins with.
        model: that model, in fp32 on its device.
        tokenizer: its own.
        examples: limited, checked.
        held: its tensors as they were.
        template: the recipe's chat template, where it names one.
        progress: whom to tell.
    """

    recipe: PosttrainRecipe
    folder: Path
    source: Path
    model: Any
    tokenizer: Any
    examples: Examples
    held: frozen.Held
    template: str | None
    progress: Progress

    @property
    def checkpoints(self) -> Path:
        """Where the Trainer saves its steps."""
        return self.folder / trainers.CHECKPOINTS


def run(
    recipe: PosttrainRecipe,
    *,
    resume: bool = False,
    max_hours: float | None = None,
    progress: Progress | None = None,
    dry: bool = False,
) -> dict[str, Any]:
    """Carry out a recipe.

    Args:
        recipe: of `schema.load`.
        resume: the folder may hold this run already.
        max_hours: save and stop after so long; the recipe's own if None.
        progress: whom to tell; nobody by default.
        dry: open and check everything, and stop before anything is written.

    Returns:
        result.json as a dict, with `table`: the same for people. `status` is `complete`, `stopped` or `dry`.

    Raises:
        UserError: the model is no export of relinear, the data do not fit, the folder holds something else.
        MachineError: a package or the disk's space is missing.
        RunFailed: a gradient was not finite, or what was frozen changed.
    """
    import torch

    trainers.require_trl(recipe)
    if recipe.engine.threads is not None:
        torch.set_num_threads(recipe.engine.threads)
    progress = progress or Silent()
    work = _open(recipe, progress)
    if dry:
        return _dry(work)
    hours = recipe.max_hours if max_hours is None else max_hours
    deadline = None if hours is None else time.monotonic() + 3600 * hours
    lock = run_folder.take(work.folder, RECORD)
    try:
        done = _claim(work, resume)
        return done if done is not None else _carry_out(work, deadline, lock)
    finally:
        lock.release()


def _open(recipe: PosttrainRecipe, progress: Progress) -> Work:
    """The model and the examples, checked."""
    device = pick_device(recipe.engine.device)
    source, _ = locate(recipe.model)
    config = read_config(source)
    if config.get("model_type") != "relinear":
        raise UserError(
            f"{recipe.place('model')}: {recipe.model} is a {config.get('model_type')} model, not an export of "
            "relinear. Convert it first: relinear run RECIPE teacher.model=…, then give RUN/export"
        )
    examples = open_examples(recipe)
    model, tokenizer = _load(recipe, source, device)
    template = set_template(recipe, tokenizer, examples.chat)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    mlp = families.family(config["base_model_type"], str(source)).mlp
    limited = Examples(examples.train, examples.valid[: recipe.eval.examples], examples.chat)
    held = frozen.hold(model, recipe.train, mlp)
    progress.note(
        f"model {recipe.model}: {sum(p.numel() for p in model.parameters()):,} parameters on {device}; "
        f"{len(limited.train):,} examples to train on, {len(limited.valid):,} held out"
    )
    return Work(recipe, Path(str(recipe.save.dir)), source, model, tokenizer, limited, held, template, progress)


def _load(recipe: PosttrainRecipe, source: Path, device: str) -> tuple[Any, Any]:
    """Weights in fp32 whatever they were saved in: an optimizer's steps are smaller than bfloat16 can add."""
    return load_model(source, dtype="float32", device=device)


def _dry(work: Work) -> dict[str, Any]:
    recipe = work.recipe
    sizes = {part: values["bytes"] for part, values in frozen.changes(work.held, work.model).items()}
    learns = "adapters" if recipe.train == "lora" else f"{work.held.trained:,} parameters"
    lines = [
        f"{recipe.method} of {recipe.model}: {recipe.steps} steps of {recipe.batch}, lr {recipe.lr:g}",
        f"trains {recipe.train}: {learns}; feed-forward blocks hold {sizes['ffn']:,} bytes, mixers {sizes['mixers']:,}",
        f"{len(work.examples.train):,} examples to train on, {len(work.examples.valid):,} held out",
        f"would write {work.folder}",
    ]
    return {"status": "dry", "recipe": recipe.to_dict(), "parts": sizes, "table": "\n".join(lines)}


def _claim(work: Work, resume: bool) -> dict[str, Any] | None:
    """Make the folder this run's; the result, where the run is complete already."""
    recipe = work.recipe
    record = {
        "recipe": recipe.to_dict(),
        "teacher": {"source": recipe.model, "folder": str(work.source.resolve())}
        | {"fingerprint": teacher_fingerprint(work.source)},
        "environment": checkpoint.environment(),
        "relinear": __version__,
    }
    held = run_folder.claim(work.folder, record, loader.dump(recipe), resume=resume, name=RECORD)
    if resume and not held:
        work.progress.note(f"{work.folder}: holds no run yet; starting it")
    path = work.folder / RESULT
    if held and path.exists():
        work.progress.note(f"{work.folder}: complete already")
        result = json.loads(path.read_text(encoding="utf-8"))
        return result | {"table": table(result)}
    return None


def _carry_out(work: Work, deadline: float | None, lock: RunLock) -> dict[str, Any]:
    recipe, folder, progress = work.recipe, work.folder, work.progress
    if lock.unsupported:
        progress.note(f"warning: {folder}: no locks here ({lock.unsupported}); see to it that one run alone uses it")
    with (
        files.MetricsLog(folder / "metrics.jsonl") as metrics,
        stop_signals() as asked,
        trainers.quiet(_tied(work.model)),
    ):
        last = saving.take_up(work.checkpoints, metrics)

        def stop() -> bool:
            return asked() or (deadline is not None and time.monotonic() >= deadline)

        def shown(step: int, numbers: dict[str, float]) -> None:
            progress.update(step, **numbers)

        def between(step: int) -> None:
            _note(metrics, recipe, step, measure(recipe, trainer, work.examples.valid, before))

        keeper = saving.Keeper(recipe, work.checkpoints, metrics, stop, shown, between)
        trainer = trainers.open_trainer(
            recipe,
            work.model,
            work.tokenizer,
            work.examples,
            folder,
            lambda: _load(recipe, work.source, str(work.model.device))[0].requires_grad_(False),
            [keeper],
        )
        before = _before(work, trainer)
        if metrics.offset() == 0:
            _note(metrics, recipe, 0, before)
        if last is not None:
            progress.note(f"going on after {last.name}")
        began = time.monotonic()
        done = 0 if last is None else int(last.name.rpartition("-")[2])
        progress.stage(recipe.method, recipe.steps, done, unit="steps")
        if done < recipe.steps:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        else:
            trainer._load_from_checkpoint(str(last))
        progress.done()
        if keeper.stopped:
            return {"status": "stopped", "step": trainer.state.global_step, "folder": str(folder), "table": ""}
        frozen.check_frozen(work.held)
        seconds = time.monotonic() - began
        after = measure(recipe, trainer, work.examples.valid, before)
        _note(metrics, recipe, recipe.steps, after)
        return _finish(work, trainer, before, after, seconds)


def _tied(model: Any) -> list[str]:
    """Weights that are others' too, by the names that transformers gives them."""
    return sorted(model._tied_weights_keys or {}) if model.config.tie_word_embeddings else []


def _note(metrics: files.MetricsLog, recipe: PosttrainRecipe, step: int, found: dict[str, Any]) -> None:
    kept = {name: value for name, value in found.items() if name not in ("logps", "samples")}
    metrics.append({"stage": recipe.method, "step": step, "held_out": kept})


def _before(work: Work, trainer: Any) -> dict[str, Any]:
    """The metric of the model as it began: measured once, kept for runs that go on."""
    path = work.folder / BEFORE
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    found = measure(work.recipe, trainer, work.examples.valid, None)
    if found["value"] is None:
        raise RunFailed(f"{work.recipe.model}: its loss on held-out examples is not finite before any step")
    files.write_json(path, found)
    work.progress.note(f"before: {_figure(found)}")
    return found


def _finish(work: Work, trainer: Any, before: dict[str, Any], after: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Merge adapters, say what changed, export, write result.json."""
    recipe, model = work.recipe, work.model
    if recipe.train == "lora":
        merged = trainer.model.merge_and_unload(safe_merge=True)
        assert merged is model
        if hasattr(model, "peft_config"):
            del model.peft_config
    trainers.plain(model)
    parts = frozen.changes(work.held, model)
    if not any(values["changed_tensors"] for values in parts.values()):
        raise RunFailed(f"{recipe.method}: nothing changed in {recipe.steps} steps. Try a higher rate: lr=…")
    _, higher = METRIC[recipe.method]
    brief = [{k: v for k, v in found.items() if k not in ("logps", "samples")} for found in (before, after)]
    result = {
        "status": "complete",
        "method": recipe.method,
        "model": recipe.model,
        "train": recipe.train,
        "steps": recipe.steps,
        "seconds": seconds,
        "metric": {"name": before["name"], "higher_is_better": higher, "before": brief[0], "after": brief[1]},
        "changed": parts,
        "samples": [
            {**was, "completion": now["completion"], "before": was["completion"]}
            for was, now in zip(before.get("samples", []), after.get("samples", []), strict=True)
        ],
        "export": str(work.folder / "export"),
        "environment": checkpoint.environment(),
    }
    _export(work, result)
    files.write_json(work.folder / RESULT, files.finite(result))
    work.progress.note(f"after: {_figure(after)}")
    return result | {"table": table(result)}


def _export(work: Work, result: dict[str, Any]) -> None:
    """The model as relinear exports one, with what the model that it began with said of itself."""
    config = read_config(work.source)
    # The Trainer writes the tokenizer's ids into the config: what generation ends on is the model's own matter.
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"):
        if name in config:
            setattr(work.model.config, name, config[name])
    extra: dict[str, str | Path] = {RECIPE: public_recipe(loader.dump(work.recipe))}
    if (work.source / "recipe.yaml").exists():
        extra["recipe.yaml"] = work.source / "recipe.yaml"
    if work.template is not None:
        extra["chat_template.jinja"] = work.template
    if (work.source / CONVERSION).exists():
        extra[CONVERSION] = json.dumps(_provenance(work, result), indent=1, ensure_ascii=False) + "\n"
    export_student(
        work.model,
        work.source,
        work.folder / "export",
        dtype=str(config.get("dtype") or "float32"),
        extra=extra,
        overwrite=True,
    )


def _provenance(work: Work, result: dict[str, Any]) -> dict[str, Any]:
    """conversion.json of the model before, with this step after it; what was measured of those weights is left out."""
    facts = json.loads((work.source / CONVERSION).read_text(encoding="utf-8"))
    step = {name: result[name] for name in ("method", "train", "steps", "seconds", "metric", "changed")}
    step["model"] = public_name(work.recipe.model)
    step["data"] = public_name(work.recipe.data.source)
    step["local"] = is_local(work.recipe.data.source)
    step["weights"] = teacher_fingerprint(work.source)
    return files.finite(facts | {"result": None, "posttrain": [*facts.get("posttrain", []), step]})


def table(result: dict[str, Any]) -> str:
    """What came out, for people."""
    metric, parts = result["metric"], result["changed"]
    lines = [
        f"{result['method']} of {result['model']}: {result['steps']} steps in {result['seconds']:.0f} s",
        "",
        f"held-out {metric['name']}, {metric['before']['n']} examples",
        f"  before   {_value(metric['before'])}",
        f"  after    {_value(metric['after'])}",
    ]
    if "implicit" in metric["after"]:
        lines.append(f"  against the model as it began   {_value(metric['after']['implicit'])}")
    lines += ["", f"trained {result['train']}; bytes in tensors that changed"]
    lines += [f"  {part:<8} {values['changed_bytes']:,} of {values['bytes']:,}" for part, values in parts.items()]
    return "\n".join(lines)


def _figure(found: dict[str, Any]) -> str:
    return f"held-out {found['name']} {_value(found)}"


def _value(found: dict[str, Any]) -> str:
    stderr = found.get("stderr")
    return f"{found['value']:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
