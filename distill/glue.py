"""Glue and extend: the student learns, as one model, to give the teacher's logits or the text (DESIGN §5)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .align import align_visit, compile_mixers
from .data.batch import Batch
from .engine.base import Engine
from .errors import UserError
from .logit_cache.store import LogitCache
from .lora import add_adapters, is_adapter, merge_adapters, settings_of
from .losses import TERMS, logit_loss
from .precision import autocast, no_autocast
from .stage import Group, Stage, StageSettings
from .teacher import Teacher
from .walk import walk

TRAIN = ("all", "no-ffn", "mixers+norms", "mixers", "lora")
"""What may train: everything; all but the feed-forward blocks; mixers and every norm; mixers; adapters alone."""


def glue_stage(
    teacher: Teacher, student: Any, settings: StageSettings, name: str = "glue", cache: LogitCache | None = None
) -> Stage:
    """The stage in which the student trains end to end; `extend` is the same at another length and loss.

    Args:
        teacher: frozen. Not run where only `ce` has a weight.
        student: a RelinearForCausalLM; its parameters are made trainable or not here, and what trains fp32.
        settings: `loss` holds weights of `kl`, `reverse_kl` and `ce`, and of `align` (see `glue_step`); `train` is one
            of `TRAIN`.
        name: of the stage.
        cache: of the teacher's logits on the stage's batches. With it the teacher is not run, and may lie on another
            device: its tensors are looked at only, when the stage begins and when it ends.

    Raises:
        ValueError: unknown `train`, no weight on the logits, or one on what a cache does not hold.
        UserError: the output head is not a linear layer, or a target of `lora` is not there.
        MachineError: `lora` without peft.
    """
    if settings.train not in TRAIN:
        raise ValueError(f"{name} cannot train {settings.train!r}. Available: {', '.join(TRAIN)}")
    weights = settings.loss
    if not isinstance(weights, dict) or set(weights) - {*TERMS, "align"} or not any(weights.get(t, 0) for t in TERMS):
        raise ValueError(f"{name}.loss: expected positive weights of {', '.join(TERMS)}, found {weights!r}")
    if cache is not None and (weights.get("align") or weights.get("reverse_kl")):
        raise ValueError(f"{name}.loss: align and reverse_kl need the teacher itself, not a cache of its logits")
    for model in (teacher.model, student):
        _check_head(model)
    lora = settings.train == "lora"
    tuner = add_adapters(student, settings_of(settings.lora), settings.seed, f"stages.{name}.lora") if lora else None
    groups = _choose(teacher, student, settings)
    if settings.checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
    else:
        student.activation_checkpointing_disable()
    compile_mixers(student.mixers(), settings.compile)
    trained = {id(p) for group in groups for p in group.parameters.values()}
    theirs = {} if teacher.bare else teacher.model.state_dict(keep_vars=True)
    frozen = {f"teacher {key}": tensor for key, tensor in theirs.items()}
    frozen |= {key: tensor for key, tensor in student.state_dict(keep_vars=True).items() if id(tensor) not in trained}
    whole = StudentLoss(teacher, student, weights, settings, cache)
    stage = Stage(
        name=name,
        module=student,
        groups=groups,
        step=lambda batch, total: glue_step(whole, batch, total, stage.engine),
        count=lambda batch: int(batch.targets[:, 1:].sum()),
        frozen=frozen,
        joint_clip=True,
        report=lambda: {} if teacher.bare else {"changed": changed_tensors(teacher, student, stage.engine)},
        finish=lambda: None if tuner is None else merge_adapters(tuner),
        blame=lambda batch: first_bad_layer(teacher, student, batch),
        whole=whole,
    )
    return stage


class StudentLoss(nn.Module):
    """The student's forward and its loss in one call: what an engine wraps, gathers weights for and reduces.

    Args:
        teacher: frozen; not part of the module.
        student: see `glue_stage`.
        weights: of the loss terms; `align` is that of each layer.
        settings: for precision and temperature.
        cache: of the teacher's logits, read by the rows' numbers, in place of its forward.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: Any,
        weights: dict[str, float],
        settings: StageSettings,
        cache: LogitCache | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.weights = weights
        self.settings = settings
        self.cache = cache
        self.held = (teacher,)  # in a tuple, so that its tensors are not this module's

    @property
    def teacher(self) -> Teacher:
        """The teacher."""
        return self.held[0]

    def align(self, batch: Batch, total: int, backward: float | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's forward as an align step of the student's own mixers.

        Args:
            batch: as for `forward`.
            total: likewise.
            backward: each layer's backward runs at once, of its error times this; None leaves the graphs in place.

        Returns:
            The teacher's last hidden state, and each layer's relative error.
        """
        mixers = self.student.mixers()
        layers: dict[str, Tensor] = {}
        visit = align_visit(
            mixers, layers, total, "relative", self.settings.precision, backward, graph=backward is None
        )
        wanted = walk(self.teacher, mixers, batch, visit, self.settings.precision, whole=True)
        assert wanted is not None
        return wanted, layers

    def forward(self, batch: Batch, total: int, wanted: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a part of a batch, and its terms.

        Args:
            batch: the part.
            total: counted targets of the whole batch.
            wanted: the teacher's last hidden state, where `align` has run already.
        """
        device, weights, settings = batch.input_ids.device.type, self.weights, self.settings
        teacher, student = self.teacher, self.student
        call = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        layers: dict[str, Tensor] = {}
        cached = None
        if self.cache is not None and weights.get("kl"):
            assert batch.index is not None
            cached = self.cache.read(batch.index).to(batch.input_ids.device)
        elif wanted is None and weights.get("align"):
            wanted, layers = self.align(batch, total, None)
        with autocast(device, settings.precision):
            if cached is None and wanted is None and (weights.get("kl") or weights.get("reverse_kl")):
                with torch.no_grad():
                    wanted = teacher.backbone(**call).last_hidden_state
            made = student.base_model(**call).last_hidden_state
            loss, terms = logit_loss(
                made,
                student.get_output_embeddings(),
                wanted,
                teacher.model.get_output_embeddings(),
                batch.input_ids,
                batch.targets,
                {term: weights.get(term, 0.0) for term in TERMS},
                total=total,
                temperature=settings.temperature,
                scale=teacher.head.scale,
                softcap=teacher.head.softcap,
                cached=cached,
            )
        if layers:
            terms["align"] = torch.stack(list(layers.values())).sum()
            loss = loss + weights["align"] * terms["align"]
        return loss, {name: value.detach() for name, value in terms.items()}


def glue_step(whole: StudentLoss, batch: Batch, total: int, engine: Engine | None = None) -> dict[str, Tensor]:
    """Forward and backward of the student against the teacher.

    With a weight of `align`, the teacher's forward is also an align step: each mixer runs on the teacher's layer input,
    and that weight times its `relative` error goes backward too. So the mixers learn twice from every token, for
    themselves and as parts of the model. Where the engine allows, a layer's graph goes backward at once, as in align.

    Args:
        whole: the student and its loss.
        batch: all of a batch or a part of it.
        total: counted targets of the whole batch.
        engine: what it runs on; one process by default.

    Returns:
        `loss`, its terms, and `ce` in any case.
    """
    engine = engine or Engine()
    weight = whole.weights.get("align", 0.0)
    wanted, layers = None, {}
    if weight and engine.split:
        wanted, layers = whole.align(batch, total, weight * engine.scale)
    loss, terms = engine.call(whole, batch, total, wanted)
    with no_autocast(batch.input_ids.device.type):
        engine.backward(loss)
    if layers:
        terms["align"] = torch.stack(list(layers.values())).sum()
        loss = loss.detach() + weight * terms["align"]
    return {"loss": loss.detach(), **terms}


def changed_tensors(teacher: Teacher, student: Any, engine: Engine | None = None) -> list[str]:
    """Names of the teacher's tensors that the student holds with other values, compared in the teacher's dtype."""
    full = (engine or Engine()).full
    own = student.state_dict(keep_vars=True)
    found = []
    for name, tensor in teacher.model.state_dict(keep_vars=True).items():
        if name in own:
            before, after = full(tensor), full(own[name])
            if not torch.equal(after.to(before), before):
                found.append(name)
    return found


def first_bad_layer(teacher: Teacher, student: Any, batch: Batch) -> str | None:
    """The first decoder layer whose output is not finite, as `teacher layer 2` or `layer 3`; None where all are."""
    for owner, model in (("teacher ", teacher.model), ("", student)):
        if model is teacher.model and next(model.parameters()).device != batch.input_ids.device:
            continue  # it was not run
        found: list[int] = []

        def note(_: Any, __: Any, output: Any, layer: int, found: list[int] = found) -> None:
            if not (output[0] if isinstance(output, tuple) else output).isfinite().all():
                found.append(layer)

        backbone = model.base_model
        layers = getattr(backbone, teacher.family.layers)
        handles = [block.register_forward_hook(partial(note, layer=i)) for i, block in enumerate(layers)]
        with torch.no_grad():
            backbone(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        for handle in handles:
            handle.remove()
        if found:
            return f"{owner}layer {found[0]}"
    return None


def _choose(teacher: Teacher, student: Any, settings: StageSettings) -> list[Group]:
    """Decide what trains, bring it to fp32, and group it."""
    student.requires_grad_(False)
    if settings.precision == "fp32":
        student.float()
    mixers, rest = trained_parameters(student, settings.train, teacher.family.mlp)
    for parameter in (*mixers.values(), *rest.values()):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    groups = [Group("mixers", mixers, settings.lr_mixers), Group("the rest", rest)]
    return [group for group in groups if group.parameters]


def trained_parameters(student: Any, train: str, mlp: str) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The parameters that a choice of `TRAIN` names, by name: those of the mixers, and the others.

    Args:
        student: a RelinearForCausalLM; with `lora`, one that has its adapters.
        train: one of `TRAIN`.
        mlp: what the family calls a decoder layer's feed-forward block.
    """
    in_mixers = {id(p) for mixer in student.mixers().values() for p in mixer.parameters()}
    mixers: dict[str, nn.Parameter] = {}
    rest: dict[str, nn.Parameter] = {}
    for name, parameter in student.named_parameters():
        if train == "lora" and not is_adapter(name):
            continue
        if id(parameter) in in_mixers:
            mixers[name] = parameter
        elif _trains(name, train, f".{mlp}."):
            rest[name] = parameter
    return mixers, rest


def _trains(name: str, train: str, ffn: str) -> bool:
    """Whether a parameter outside the mixers trains; `ffn` is what the names of feed-forward blocks contain."""
    if train == "mixers+norms":
        return "norm" in name.rsplit(".", 2)[-2]
    return train in ("all", "lora") or (train == "no-ffn" and ffn not in name)


def _check_head(model: Any) -> None:
    """Refuse a head that `logit_loss`, which multiplies by a weight, cannot compute."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(model).__name__}: its output head is {type(head).__name__}, glue knows nn.Linear only")
