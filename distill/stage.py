"""A stage as plain data: what trains, on which loss, how it talks and how it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from .data.batch import Batch
from .engine.base import Engine

COSMETIC = ("log_every", "eval_every", "save_every", "keep", "spike")
"""Settings that may differ when a run is resumed: they do not change the weights, or from the resumed step on only."""


@dataclass(frozen=True)
class StageSettings:
    """What a recipe says of one stage.

    Attributes:
        tokens: non-padding input tokens after which the stage ends.
        batch: sequences per optimizer step.
        seq_len: positions of a sequence.
        lr: learning rate after the warm-up.
        lr_final: learning rate at the end.
        lr_mixers: glue and extend: another `lr` for the mixers; the same `lr_final`.
        schedule: see `schedule.learning_rate`.
        warmup: steps from 1 % of `lr` to `lr`.
        betas, eps, weight_decay: of AdamW.
        clip: largest norm of a group's gradient; None leaves it alone.
        average: decay per step of a running average of the weights, which is what is evaluated and kept; None: none.
        precision: `fp32`, or `bf16`: products in bfloat16, weights and optimizer in fp32.
        micro_batch: sequences per forward and backward of a rank; None takes all of its batch. Changes memory, not the
            result.
        checkpointing: glue keeps each decoder block's input for the backward pass and computes the rest again.
        compile: torch.compile the mixers.
        loss: align: a key of `losses.ALIGN`; glue and extend: weights of `kl`, `reverse_kl`, `ce`.
        temperature: of the two KL terms.
        teacher_logits: glue and extend: name of the cache of the teacher's logits; None runs the teacher.
        train: align: `all` of a mixer, or what is `new` in it; glue and extend: a key of `glue.TRAIN`.
        lora: with `train: lora`, the fields of `lora.LoraSettings`; None for their defaults.
        seed: of every random number generator when the stage starts.
        spike: the fields of `spikes.SpikeSettings`; None looks for none.
        log_every: steps between lines of metrics.jsonl.
        eval_every: tokens between evaluations; None evaluates at the end only.
        save_every: tokens between commits; None commits at the end only.
        keep: unfinished commits kept.
    """

    tokens: int
    batch: int = 32
    seq_len: int = 512
    lr: float = 1e-3
    lr_final: float = 1e-5
    lr_mixers: float | None = None
    schedule: str = "cosine"
    warmup: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0
    average: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    micro_batch: int | None = None
    checkpointing: bool = False
    compile: bool = False
    loss: str | dict[str, float] = "l2"
    temperature: float = 1.0
    teacher_logits: str | None = None
    train: str = "all"
    lora: dict[str, Any] | None = None
    seed: int = 0
    spike: dict[str, Any] | None = None
    log_every: int = 10
    eval_every: int | None = None
    save_every: int | None = None
    keep: int = 2


@dataclass
class Group:
    """Parameters that are clipped, checked and scheduled together.

    Attributes:
        name: as errors and metrics name it: `layer 3`.
        parameters: by their name in the stage's module.
        lr: own peak rate; None takes the stage's.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    lr: float | None = None


@dataclass
class Stage:
    """A stage, as plain data and functions.

    Attributes:
        name: `align`, `glue`, `extend`, or as the recipe names it.
        module: what commits hold.
        groups: all that trains.
        step: (part of a batch, counted tokens of the whole batch) -> metrics. Does forward and backward; `loss` and
            the other values must sum over the parts to the batch's mean.
        count: tokens of a batch that the loss is a mean over.
        frozen: every tensor that must come out of the stage as it went in.
        joint_clip: clip all groups by their common norm instead of each by its own.
        report: what else the result should say, called at the end.
        finish: called once all has trained and been checked: gives `module` the form in which the next stage takes it,
            and the last commit holds it.
        blame: where a batch's loss stopped being finite, in words; asked only after it did.
        whole: the module whose forward makes the loss, where there is one: engines wrap it, and `step` calls it through
            `engine`. None where every layer goes backward by itself.
        engine: set when the stage begins.
    """

    name: str
    module: nn.Module
    groups: list[Group]
    step: Callable[[Batch, int], dict[str, Tensor]]
    count: Callable[[Batch], int]
    frozen: dict[str, Tensor] = field(default_factory=dict)
    joint_clip: bool = False
    report: Callable[[], dict[str, Any]] = dict
    finish: Callable[[], None] = lambda: None
    blame: Callable[[Batch], str | None] = lambda batch: None
    whole: nn.Module | None = None
    engine: Engine = field(default_factory=Engine)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All that trains, by name."""
        return {name: p for group in self.groups for name, p in group.parameters.items()}


@dataclass
class Callbacks:
    """How a stage talks to whoever runs it; everything is optional.

    Attributes:
        progress: called after every step with the step's metrics, and `fraction` done and `seconds_left`.
        message: one line for a person.
        measured: called with the line that an evaluation adds to metrics.jsonl.
        evaluate: () -> plain values; `score` among them, lower is better, decides the best step.
        should_stop: asked before every step; True commits and stops.
    """

    progress: Callable[[dict[str, Any]], None] = lambda record: None
    message: Callable[[str], None] = lambda text: None
    measured: Callable[[dict[str, Any]], None] = lambda record: None
    evaluate: Callable[[], dict[str, Any]] | None = None
    should_stop: Callable[[], bool] = lambda: False


@dataclass
class StageResult:
    """How a stage ended.

    Attributes:
        stage: its name.
        status: `complete`, or `stopped` by the deadline or the stop signal.
        step: optimizer steps done.
        tokens: non-padding input tokens seen.
        seconds: spent training, saving and evaluation left out, over all resumed parts.
        metrics: of the last step.
        best: `{step, score}` of the best evaluation, None without evaluation.
        unchanged: parameters that should have trained and are as they were.
        report: what the stage adds; glue: `changed`, the names of the teacher's tensors that changed.
        path: the last commit.
    """

    stage: str
    status: Literal["complete", "stopped"]
    step: int
    tokens: int
    seconds: float
    metrics: dict[str, Any]
    best: dict[str, Any] | None
    unchanged: list[str]
    report: dict[str, Any]
    path: Path

    @property
    def best_path(self) -> Path | None:
        """The commit of the best step; it holds weights as every other does."""
        return None if self.best is None else self.path.with_name(f"{self.stage}-{self.best['step']}")
