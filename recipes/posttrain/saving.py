"""What a Trainer is made to do at each step: log, measure, save, stop; and the steps that it saved.

A saved step is a folder `checkpoint-N` of the Trainer. It counts once `commit.json` stands in it, which is written
last: what a kill left half-written is not taken up. Optimizer, schedule and random states are files of torch, which
transformers reads with `weights_only=True`: nothing in them is executed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ...distill import files
from ...distill.errors import RunFailed
from .schema import PosttrainRecipe

COMMIT = "commit.json"


class Keeper(TrainerCallback):
    """The run's own part in training.

    Args:
        recipe: for how often.
        folder: of the Trainer's saved steps.
        metrics: of the run.
        stop: asked after every step; True saves and stops.
        progress: called with (step, numbers to show).
        measure: called every `eval.every` steps.
    """

    def __init__(
        self,
        recipe: PosttrainRecipe,
        folder: Path,
        metrics: files.MetricsLog,
        stop: Callable[[], bool],
        progress: Callable[[int, dict[str, float]], None],
        measure: Callable[[int], None],
    ) -> None:
        self.recipe, self.folder, self.metrics = recipe, folder, metrics
        self.stop, self.progress, self.measure = stop, progress, measure
        self.stopped = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradients before they touch a weight.

        Raises:
            RunFailed: one is not finite.
        """
        gradients = (p.grad for p in kwargs["model"].parameters() if p.grad is not None)
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            last = newest(self.folder)
            kept = "nothing was saved before" if last is None else f"{last.name} is saved: --resume goes on from there"
            raise RunFailed(
                f"{self.recipe.method}, step {state.global_step + 1}: the gradient is not finite; the "
                f"weights are as they were, and {kept}. Try a lower rate: lr={self.recipe.lr / 10:g}"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """A line of metrics.jsonl."""
        logs = dict(logs or {})
        if "loss" not in logs:  # the Trainer's summary at the end
            return
        logs.pop("num_tokens", None)  # TRL counts anew in a run that goes on
        self.metrics.append({"stage": self.recipe.method, "step": state.global_step, **logs})
        shown = {name: float(logs[name]) for name in ("loss", "reward", "rewards/accuracies") if name in logs}
        self.progress(state.global_step, shown)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Measure, save and stop where it is time."""
        step, every = state.global_step, self.recipe.save.every
        last = step >= self.recipe.steps
        if not last and self.recipe.eval.every and step % self.recipe.eval.every == 0:
            self.measure(step)
        self.stopped = not last and self.stop()
        if last or self.stopped or (every and step % every == 0):
            control.should_save = True
        if self.stopped:
            control.should_training_stop = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the step count, and older ones go."""
        path = self.folder / f"checkpoint-{state.global_step}"
        for file in sorted(path.rglob("*")):
            files.sync(file)
        files.write_json(path / COMMIT, {"step": state.global_step, "metrics": self.metrics.offset()})
        for old in saved(self.folder)[: -self.recipe.save.keep]:
            files.remove_directory(old)


def saved(folder: Path) -> list[Path]:
    """The saved steps that count, oldest first."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{COMMIT}")] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def newest(folder: Path) -> Path | None:
    """The last saved step, None where there is none."""
    return next(reversed(saved(folder)), None)


def take_up(folder: Path, metrics: files.MetricsLog) -> Path | None:
    """The step to go on from; metrics of later ones are forgotten, and what a kill left half-saved is removed."""
    keep = saved(folder)
    for path in folder.glob("checkpoint-*") if folder.is_dir() else []:
        if path not in keep:
            shutil.rmtree(path)
    last = keep[-1] if keep else None
    metrics.truncate(0 if last is None else json.loads((last / COMMIT).read_text(encoding="utf-8"))["metrics"])
    return last
