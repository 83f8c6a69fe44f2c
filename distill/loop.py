"""The one training loop. A stage says what trains, on which loss; the loop does the rest the same way for all."""

from __future__ import annotations

import dataclasses
import math
import random
import re
import resource
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint as saved
from . import files
from .average import RAW, Average
from .data.batch import Batch
from .data.source import Source
from .engine.base import Engine
from .errors import MachineError, RunFailed, UserError
from .fingerprints import different, tensor_fingerprint
from .replay import Moment
from .schedule import learning_rate
from .spikes import Spikes, SpikeSettings
from .stage import COSMETIC, Callbacks, Group, Stage, StageResult, StageSettings
from .watchdog import beat

__all__ = ["Callbacks", "Group", "Stage", "StageResult", "StageSettings", "run_stage"]


def run_stage(
    stage: Stage,
    source: Source,
    settings: StageSettings,
    *,
    folder: Path | str,
    resume: bool = False,
    after: str | None = None,
    callbacks: Callbacks | None = None,
    deadline: float | None = None,
    engine: Engine | None = None,
) -> StageResult:
    """Train a stage to its end, or until told to stop. Of several ranks, all call it with the same arguments.

    Args:
        stage: what trains and how.
        source: of batches, at its beginning; put to where it was when a run resumes.
        settings: see there.
        folder: of the run: `metrics.jsonl` and `checkpoints/` are written there.
        resume: go on from this stage's newest commit, if it has one. A stage that had ended is loaded and returned.
        after: the stage that this one builds on; it must be complete in this folder.
        callbacks: see there.
        deadline: `time.monotonic()` after which no further step starts.
        engine: what the stage runs on; one process by default.

    Raises:
        UserError: the batch is not a multiple of the number of ranks, the folder already holds this stage and `resume`
            is False, `after` is not complete, the commit is of another model or other settings, or a batch is empty.
        RunFailed: a loss or gradient that is not finite (the weights are those before the step), or an end check.
        MachineError: no disk space; what was committed is untouched.
    """
    folder = Path(folder)
    engine = stage.engine = engine or Engine()
    world = engine.world
    engine.require(stage.name, settings.batch, settings.spike)
    world.first(lambda: bool(files.clean_temporaries(folder)))
    store = world.first(lambda: saved.Checkpoints(folder / "checkpoints", settings.keep))
    callbacks = callbacks or Callbacks()
    found = world.first(lambda: store.newest(stage.name))
    if resume and found:
        found = world.first(lambda: store.sound(stage.name, callbacks.message))
    if found and not resume:
        raise UserError(
            f"{folder}: already holds stage {stage.name!r} up to step {found.step}. Continue it with --resume, or "
            "choose another folder: --out DIR"
        )
    if after is not None:
        store.require_complete(after)
    for path in store.damaged():
        callbacks.message(f"{path}: not a whole checkpoint, ignored")
    with files.MetricsLog(folder / "metrics.jsonl") if world.main else files.Unwritten() as log:
        run = _Run(stage, source, settings, store, log, callbacks, engine)
        try:
            if found:
                run.restore(found, world.first(lambda: found.damage() is None))
                if found.complete:
                    return StageResult(**found.state["result"], path=found.path)
            else:
                run.begin(resume)
            return run.train(deadline)
        finally:
            engine.end()


class _Run:
    """One stage under way: the counters, and what is done with them."""

    def __init__(
        self,
        stage: Stage,
        source: Source,
        settings: StageSettings,
        store: saved.Checkpoints,
        log: files.MetricsLog,
        callbacks: Callbacks,
        engine: Engine,
    ) -> None:
        self.engine = engine
        self.world = engine.world
        self.optimizer = engine.begin(stage, lambda: _optimizer(stage, settings), settings.clip)
        self.stage = stage
        self.source = source
        self.settings = settings
        self.store = store
        self.log = log
        self.callbacks = callbacks
        self.parameters = stage.parameters
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in self.parameters.items()}
        self.device = next(iter(self.names)).device
        held = {name: engine.local(parameter) for name, parameter in self.parameters.items()}
        self.average = None if settings.average is None else Average(held, settings.average)
        self.spikes = None if settings.spike is None else Spikes(SpikeSettings(**settings.spike))
        self.moment = Moment()
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.committed: saved.Checkpoint | None = None
        self.point: saved.Checkpoint | None = None  # where a spike takes the weights back to
        self.best: dict[str, Any] | None = None
        self.metrics: dict[str, Any] = {}
        self.before: dict[str, dict[str, str]] = {}
        self._window = (0.0, 0)
        self.deadline: float | None = None
        self._agreed: bool | None = None

    def begin(self, resume: bool) -> None:
        """The very start of a stage."""
        if resume:
            self.log.truncate_at_stage(self.stage.name)
        seed_all(self.settings.seed)
        self.moment.mark(self.source.state_dict())
        self.before = {"frozen": self._fingerprints(self.stage.frozen), "trained": self._fingerprints(self.parameters)}
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in self.names)
        self.callbacks.message(f"{self.stage.name}: {trained:,} parameters train, {self.settings.tokens:,} tokens")

    def restore(self, commit: saved.Checkpoint, sound: bool = True) -> None:
        """Take up a commit; of one whose files are damaged, and that a later stage makes needless, all but weights."""
        state = commit.state
        self._check_same(state, commit.path)
        if commit.complete:
            self.stage.finish()
        if sound:
            saved.load_module(self.stage.module, commit.weights(), commit.path, self.engine.put)
        self.step, self.tokens, self.seconds = commit.step, state["tokens"], state["seconds"]
        self.best, self.metrics, self.before = state["best"], state["metrics"], state["fingerprints"]
        self.committed = commit
        self._window = (self.seconds, self.tokens)
        if commit.complete:
            self.callbacks.message(f"{self.stage.name}: complete, loaded from {commit.path}")
            return
        self.log.truncate(state["metrics_offset"])
        self._restore_optimizer(commit)
        if self.spikes is not None and state.get("spikes"):
            self.spikes.load_state_dict(state["spikes"])
            self.point = next((c for c in self.store.all(commit.stage) if c.step == state.get("point")), None)
        self.source.load_state_dict(commit.source())
        self.moment.mark(commit.source())
        warning = saved.environment_warning(commit)
        if warning:
            self.callbacks.message(f"warning: {warning}")
        self.callbacks.message(f"{self.stage.name}: goes on from {commit.path} (step {self.step})")
        saved.restore_rng(commit, self.world.rank)

    def _restore_optimizer(self, commit: saved.Checkpoint) -> None:
        optimizer = commit.optimizer()
        if self.average is not None:
            self.average.take()
            for name, parameter in self.parameters.items():
                self.engine.put(parameter, optimizer.pop(f"{name}/{RAW}"))
        self.engine.load_optimizer(optimizer, self.parameters)
        self.engine.loaded()

    def _fingerprints(self, tensors: dict[str, Any]) -> dict[str, str]:
        return {name: tensor_fingerprint(self.engine.full(tensor)) for name, tensor in tensors.items()}

    def _check_same(self, state: dict[str, Any], path: Path) -> None:
        now = _settings_dict(self.settings)
        then = state["settings"]
        for key in now:
            if key not in COSMETIC and now[key] != then.get(key):
                raise UserError(
                    f"{path}: was made with {self.stage.name}.{key} = {then.get(key)}, now it is {now[key]}. Set it "
                    "back to resume, or start in a new folder: --out DIR"
                )
        frozen = self._fingerprints(self.stage.frozen)
        changed = different(state["fingerprints"]["frozen"], frozen)
        if changed:
            raise UserError(
                f"{path}: was made with another teacher ({len(changed)} tensors differ, e.g. {changed[0]}). Resume "
                "with the teacher that the run began with, or start in a new folder: --out DIR"
            )

    def train(self, deadline: float | None) -> StageResult:
        """Steps until the tokens are spent, or until told to stop."""
        settings = self.settings
        self.deadline = deadline
        self.stage.module.train()
        try:
            while self.tokens < settings.tokens:
                beat(self.stage.name)
                if self._stopping():
                    if self.committed is None or self.committed.step != self.step:
                        self._commit()
                    return self._result("stopped", [])
                before = self.tokens
                self._one_step()
                last = self.tokens >= settings.tokens
                improved = self._evaluate() if last or _due(before, self.tokens, settings.eval_every) else False
                if not last and (improved or _due(before, self.tokens, settings.save_every)):
                    self._commit(scheduled=True)
        finally:
            self.stage.module.eval()
        if self.average is not None:
            self.average.swap()
            self.average = None
        unchanged = self._check_end()
        self.stage.finish()
        result = self._result("complete", unchanged)
        self._commit(result)
        return dataclasses.replace(result, path=self.committed.path if self.committed else result.path)

    def _stopping(self) -> bool:
        """Whether to stop before the next step. What one rank wishes at the end of a step, all know."""
        if self.world.size == 1:
            return self._wish()
        return self.world.any(self._wish()) if self._agreed is None else self._agreed

    def _wish(self) -> bool:
        return self.callbacks.should_stop() or (self.deadline is not None and time.monotonic() >= self.deadline)

    def _one_step(self) -> None:
        start = time.perf_counter()
        whole, batch = self._next_batch()
        rates = self._set_rates()
        counted = self.stage.count(whole)
        metrics = self._accumulate(batch, counted)
        losses, norms = self._check(metrics, batch, whole)
        usual = None if self.spikes is None else self.spikes.judge(losses["loss"])
        if counted and usual is None:
            self._clip(norms)
            joint = self.engine.step()
            if joint is not None:
                norms = self._check_joint(joint, whole)
            if self.average is not None:
                self.average.update(self.step)
        self.engine.zero_grad()
        self.step += 1
        self.tokens += whole.tokens
        self.seconds += time.perf_counter() - start
        self._record(losses, norms, rates, usual)
        if usual is not None:
            self._leave_out(losses["loss"], usual)

    def _leave_out(self, loss: float, usual: float) -> None:
        """After a step whose loss was a spike: its gradient went nowhere; go back to the last commit, if so asked.

        Raises:
            RunFailed: there were nothing but spikes for a while.
        """
        assert self.spikes is not None
        said = f"{self.stage.name}: step {self.step}: loss {loss:.4g}, {loss / usual:.1f} times the usual {usual:.4g}"
        if self.spikes.hopeless:
            raise RunFailed(
                f"{said}, and so were the {self.spikes.row - 1} steps before: this is no spike. Go on from the last "
                f"checkpoint with --resume and a higher stages.{self.stage.name}.spike.factor, or null"
            )
        before = self.point
        if before is None:
            self.callbacks.message(f"{said}: its batch is left out")
            return
        saved.load_module(self.stage.module, before.weights(), before.path, self.engine.put)
        self._restore_optimizer(before)
        row = self.spikes.row
        if before.state.get("spikes"):
            self.spikes.load_state_dict(before.state["spikes"] | {"row": row})
        self.callbacks.message(
            f"{said}: weights go back to {before.path.name}, and the batches since then are left out"
        )
        self._commit(scheduled=True)  # or a later resume would take the weights back, and not the data

    def _next_batch(self) -> tuple[Batch, Batch]:
        """The next batch of all ranks, and this one's rows of it."""
        self.moment.begin()
        batch = self.source.next_batch()
        if batch.tokens == 0:
            raise UserError(
                f"{self.stage.name}: step {self.step + 1} got a batch of nothing but padding: check the data"
            )
        size = batch.shape[0] // self.world.size
        start = self.world.rank * size
        return batch, batch.rows(start, start + size).to(self.device)

    def _set_rates(self) -> list[float]:
        """The learning rate of each optimizer group for the coming step. Position is counted in tokens."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(
                self.tokens,
                settings.tokens,
                lr=group["peak"],
                lr_final=settings.lr_final,
                schedule=settings.schedule,
                warmup=settings.warmup * settings.batch * settings.seq_len,
            )
        return [group["lr"] for group in self.optimizer.param_groups]

    def _accumulate(self, batch: Batch, counted: int) -> dict[str, Tensor]:
        """Forward and backward of the batch, in parts where `micro_batch` says so."""
        rows = batch.shape[0]
        size = self.settings.micro_batch or rows
        sums: dict[str, Tensor] = {}
        for start in range(0, rows, size):
            beat()
            part = batch if size >= rows else batch.rows(start, min(start + size, rows))
            with self.engine.part(start + size >= rows):
                for name, value in self.stage.step(part, counted).items():
                    sums[name] = sums[name] + value if name in sums else value
        self.engine.reduce(self.stage)
        return sums

    def _check(self, metrics: dict[str, Tensor], batch: Batch, whole: Batch) -> tuple[dict[str, float], list[float]]:
        """Losses and each group's gradient norm as numbers: the step's only wait for the device.

        Raises:
            RunFailed: one is not finite.
        """
        norms = self.engine.norms(self.stage.groups)
        wish = self.world.size > 1 and self._wish()
        numbers = [*(v.float() for v in metrics.values()), *(n.float().to(self.device) for n in norms)]
        numbers.append(torch.tensor(float(wish), device=self.device))
        values = self.engine.agree(torch.stack(numbers), len(metrics), len(norms)).tolist()
        self._agreed = values.pop() > 0
        if not all(map(math.isfinite, values)):
            self._fail(dict(zip(metrics, values, strict=False)), batch, whole)
        return dict(zip(metrics, values, strict=False)), values[len(metrics) :]

    def _check_joint(self, norm: float, whole: Batch) -> list[float]:
        """The gradient's norm as an engine gives it after its step: too late to spare the weights.

        Raises:
            RunFailed: it is not finite.
        """
        if not math.isfinite(norm):
            where = self._keep(whole, {}, "the norm of the gradient", commit=False)
            raise RunFailed(
                f"{self.stage.name}: step {self.step + 1}: the norm of the gradient is not finite, and "
                f"{self.engine.name} found it after its step: {where}. Go on from it with --resume and a lower rate "
                f"(stages.{self.stage.name}.lr={self.settings.lr / 3:.1e})"
            )
        return [norm]

    def _fail(self, losses: dict[str, float], batch: Batch, whole: Batch) -> NoReturn:
        """Say where the step went wrong, before it reaches the weights."""
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if bad:
            # The sum is not finite when a part is not: name the part.
            with self.engine.shown(self.stage.module):
                blamed = self.stage.blame(batch)
            part = blamed or next((name for name in bad if name != "loss"), None)
            culprit = "the loss" + (f" ({part})" if part else "")
        else:
            wrong = [n for n, p in self.parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
            # Gradients flow downwards: the highest layer with a bad one is where it began.
            name = max(wrong, key=lambda n: [int(number) for number in re.findall(r"\d+", n)], default=None)
            culprit = f"the gradient of {name}" if name else "the norm of a gradient"
        self.engine.zero_grad()
        where = self._keep(whole, losses, culprit)
        raise RunFailed(
            f"{self.stage.name}: step {self.step + 1}: {culprit} is not finite. The weights are still those of step "
            f"{self.step}; {where}. Try a lower rate (stages.{self.stage.name}.lr={self.settings.lr / 3:.1e})"
            + (" or engine.precision=fp32" if self.settings.precision == "bf16" else "")
        )

    def _keep(self, batch: Batch, losses: dict[str, float], culprit: str, commit: bool = True) -> str:
        """Keep what makes a failed step happen again: its batch and, with `commit`, the last good state. In words.

        A disk without room hides nothing of the failure itself.
        """
        try:
            if commit and self.step and (self.committed is None or self.committed.step != self.step):
                self.moment.rewind(self.source)
                self._commit()
            last = f"the last checkpoint is {self.committed.path}" if self.committed else "there is no checkpoint yet"
            record = {"stage": self.stage.name, "step": self.step + 1, "tokens": self.tokens, "not_finite": culprit}
            record |= {"losses": losses, "checkpoint": str(self.committed.path) if self.committed else None}
            path = self.world.first(lambda: str(self.moment.save(self.store.folder.parent, batch, record)))
        except MachineError as error:
            return f"neither they nor the batch could be kept ({error})"
        return f"{last}, and the step's batch is in {path}: --resume carries it out again"

    def _clip(self, norms: list[float]) -> None:
        clip = self.settings.clip
        if clip is None:
            return
        joint = math.sqrt(sum(norm * norm for norm in norms))
        for group, own in zip(self.stage.groups, norms or [0.0] * len(self.stage.groups), strict=True):
            norm = joint if self.stage.joint_clip else own
            if norm > clip:
                self.engine.clip(group, norm, clip)

    def _record(self, losses: dict[str, float], norms: list[float], rates: list[float], usual: float | None) -> None:
        """Tell of the step; write it down every few steps, the first, the last and a spike with the `usual` loss."""
        settings = self.settings
        seconds, tokens = self.seconds - self._window[0], self.tokens - self._window[1]
        names = [group.name for group in self.stage.groups]
        self.metrics = {
            "stage": self.stage.name,
            "step": self.step,
            "tokens": self.tokens,
            "loss": losses["loss"],
            "losses": {name: value for name, value in losses.items() if name != "loss"},
            "lr": rates[0] if len(rates) == 1 else rates,
            "grad_norm": dict(zip(names if len(norms) == len(names) else ["all"], norms, strict=True)),
            "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
            "peak_memory": peak_memory(self.device),
        }
        rate = self.tokens / self.seconds if self.seconds > 0 else 0.0
        left = max(0, settings.tokens - self.tokens) / rate if rate else None
        done = min(1.0, self.tokens / settings.tokens)
        self.callbacks.progress(self.metrics | {"fraction": done, "seconds_left": left})
        if usual is not None:
            self.metrics["spike"] = {"usual": usual}
        logged = self.step == 1 or self.step % settings.log_every == 0 or self.tokens >= settings.tokens
        if logged or usual is not None:
            self.log.append(self.metrics)
            self._window = (self.seconds, self.tokens)

    def _evaluate(self) -> bool:
        """Evaluate, write it down, and say whether this is the best step so far."""
        if self.callbacks.evaluate is None:
            return False
        self.stage.module.eval()
        with self._shown(), self.engine.shown(self.stage.module):
            values = self.callbacks.evaluate()
        self.stage.module.train()
        line = {"stage": self.stage.name, "step": self.step, "tokens": self.tokens, "eval": values}
        self.log.append(line)
        self.callbacks.measured(line)
        score = values.get("score")
        if score is None or not math.isfinite(score) or (self.best and score >= self.best["score"]):
            return False
        self.best = {"step": self.step, "score": score}
        return True

    def _shown(self) -> AbstractContextManager[None]:
        """The weights are those that are measured and kept: their average, where there is one."""
        return nullcontext() if self.average is None else self.average.shown()

    def _check_end(self) -> list[str]:
        """What should have trained did change, what should not did not.

        Returns:
            Single parameters that are as they were; a whole group is an error.
        """
        moved = different(self.before["frozen"], self._fingerprints(self.stage.frozen))
        if moved:
            raise RunFailed(
                f"{self.stage.name}: {len(moved)} tensors that must not change did, e.g. {', '.join(moved[:3])}. This "
                "is an error of relinear, not of your input; the stage was not marked complete"
            )
        changed = set(different(self.before["trained"], self._fingerprints(self.parameters)))
        for group in self.stage.groups:
            if not changed & group.parameters.keys():
                raise RunFailed(
                    f"{self.stage.name}: {group.name} did not train: none of its {len(group.parameters)} tensors "
                    f"changed in {self.step} steps. Check stages.{self.stage.name}.lr, and that its loss counts a token"
                )
        return [name for name in self.parameters if name not in changed]

    def _result(self, status: Literal["complete", "stopped"], unchanged: list[str]) -> StageResult:
        report = self.stage.report() if status == "complete" else {}
        path = self.committed.path if self.committed else self.store.folder
        return StageResult(
            self.stage.name,
            status,
            self.step,
            self.tokens,
            self.seconds,
            self.metrics,
            self.best,
            unchanged,
            report,
            path,
        )

    def _commit(self, result: StageResult | None = None, scheduled: bool = False) -> None:
        """One commit of everything; `result` marks the stage complete. A spike goes back to `scheduled` ones alone: an
        undisturbed run must have them too."""
        beat(f"saving {self.stage.name}-{self.step}")
        rolls = self.spikes is not None and self.spikes.settings.action == "rollback"
        point = self.step if scheduled else None if self.point is None else self.point.step
        state: dict[str, Any] = {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "best": self.best,
            "metrics": self.metrics,
            "metrics_offset": self.log.offset(),
            "fingerprints": self.before,
            "settings": _settings_dict(self.settings),
            "source": self.source.state_dict(),
            "spikes": None if self.spikes is None else self.spikes.state_dict(),
            "point": point if rolls else None,
        }
        self.moment.mark(state["source"])
        if result is not None:
            state["result"] = {k: v for k, v in result.__dict__.items() if k != "path"}
        optimizer = None if result else self.engine.optimizer_tensors(self.names)
        if optimizer is not None and self.average is not None:
            raw = self._share(dict(self.parameters))
            optimizer |= {f"{name}/{RAW}": value.clone() for name, value in raw.items()}
        with self._shown():
            self.committed = self.store.commit(
                self.stage.name,
                self.step,
                self._share(saved.module_tensors(self.stage.module)),
                state,
                optimizer=optimizer,
                complete=result is not None,
                world=self.world,
            )
        if rolls and scheduled:
            self.point = self.committed

    def _share(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those tensors, whole, that this rank writes. All ranks gather each."""
        made = {}
        for number, (name, tensor) in enumerate(tensors.items()):
            whole = self.engine.full(tensor)
            if self.engine.mine(number):
                made[name] = whole.cpu() if self.engine.sharded else whole
        return made


def _optimizer(stage: Stage, settings: StageSettings) -> torch.optim.AdamW:
    """AdamW over all groups. Groups of one rate share an optimizer group: fewer, larger kernels, the same numbers."""
    by_rate: dict[float, list[nn.Parameter]] = {}
    for group in stage.groups:
        by_rate.setdefault(settings.lr if group.lr is None else group.lr, []).extend(group.parameters.values())
    for name, parameter in stage.parameters.items():
        if parameter.dtype != torch.float32 or not parameter.requires_grad:
            raise ValueError(f"{name}: what trains must be fp32 and require a gradient, found {parameter.dtype}")
    return torch.optim.AdamW(
        [{"params": parameters, "lr": rate, "peak": rate} for rate, parameters in by_rate.items()],
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def seed_all(seed: int) -> None:
    """Seed python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _due(before: int, now: int, every: int | None) -> bool:
    """Whether a multiple of `every` was passed."""
    return bool(every) and before // every != now // every


def _settings_dict(settings: StageSettings) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()}
