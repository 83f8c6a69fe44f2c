"""What a recipe will do, from the teacher's config.json alone and before any GPU is rented."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..distill.errors import UserError
from ..distill.family import check_geometry, check_matrix, lost
from ..mixers import registry
from . import costs, stream_costs
from .costs import Counts
from .layers import LayerMap, resolve
from .logit_costs import logits_note, teacher_needs
from .ranks import SHARDED, World
from .schema import EMBEDDED, AlignStage, CalibrateStage, GlueStage, LoraSection, MatrixStage, Recipe, TrainingStage
from .teacher_config import TeacherConfig, read_teacher_config
from .units import format_bytes

AUTO_LENGTH = 512
"""`seq_len: auto`, where the teacher's context allows it: the length of the published align and glue runs."""


@dataclass(frozen=True)
class TensorRow:
    """One tensor of a mixer and where it comes from (`mixers.specs.base.TensorSpec`)."""

    name: str
    shape: tuple[int, ...]
    source: str
    origin: str


@dataclass(frozen=True)
class TensorTable:
    """The tensors of a mixer, once for all layers where they are the same."""

    mixer: str
    layers: list[int]
    parameters: int
    rows: list[TensorRow]


@dataclass(frozen=True)
class StagePlan:
    """One stage. Bytes and GPU-hours are estimates; `steps` takes windows as full.

    Attributes:
        settings: for `distill.stage.StageSettings`, empty for transfer.
        trained: parameters that learn.
        memory: bytes by use on rank 0, which holds the most.
        flops: of the whole stage, over all ranks.
        gpu_hours: on the plan's GPU, over all ranks.
        tokens_per_second: of all ranks.
        ranks: (first rank, bytes from this rank on), where ranks differ more than one pair.
        disk: of a streamed align: bytes by use, at most.
    """

    kind: str
    name: str
    title: str
    settings: dict[str, Any]
    steps: int
    trained: int
    memory: dict[str, int]
    flops: float
    gpu_hours: float
    tokens_per_second: float = 0.0
    ranks: tuple[tuple[int, int], ...] = ()
    disk: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def total_memory(self) -> int:
        """Bytes on one device: rank 0's."""
        return sum(self.memory.values())

    @property
    def sequences(self) -> int:
        """Sequences of one forward pass."""
        return self.settings.get("micro_batch") or self.settings["batch"] if self.settings else 0


@dataclass(frozen=True)
class Plan:
    """A recipe on its teacher.

    Attributes:
        teacher: what config.json says.
        layers: the layer map.
        counts: parameters.
        tensors: where every tensor of every mixer comes from.
        stages: in order.
        cache: tokens, teacher's and student's bytes, for one sequence.
        cache_dtype: of the cached keys and values.
        notes: what was derived or looks odd, in words.
        gpu: name in `costs.GPUS`.
        mfu: assumed share of its peak.
        world: the processes.
        price: of a GPU-hour, None where none was given.
        gpus: name -> (tokens per second over the training stages, GPU-hours of all stages) on other GPUs.
    """

    teacher: TeacherConfig
    layers: LayerMap
    counts: Counts
    tensors: list[TensorTable]
    stages: list[StagePlan]
    cache: list[tuple[int, int, int]]
    cache_dtype: str
    notes: list[str]
    gpu: str
    mfu: float
    world: World = dataclasses.field(default_factory=World)
    price: float | None = None
    gpus: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    @property
    def gpu_hours(self) -> float:
        """Of all stages."""
        return sum(stage.gpu_hours for stage in self.stages)

    @property
    def hours(self) -> float:
        """From start to end, with all GPUs at work."""
        return self.gpu_hours / self.world.size

    @property
    def cost(self) -> float | None:
        """At the price of a GPU-hour."""
        return None if self.price is None else self.price * self.gpu_hours

    def stage(self, name: str) -> StagePlan:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "teacher": {
                "model": self.teacher.source,
                "family": self.teacher.family.name,
                "layers": self.teacher.num_layers,
                "context": self.teacher.context,
                "parameters": self.counts.teacher,
                "geometry": dataclasses.asdict(self.teacher.geometry(0)),
            },
            "student": {"parameters": self.counts.student, "mixer_parameters": self.counts.all_mixers},
            "layers": {
                "drawing": self.layers.drawing,
                "legend": self.layers.legend,
                "kept": self.layers.kept,
                "kept_attention": self.layers.attention,
                "converted": {str(layer): mixer for layer, (mixer, _) in self.layers.converted.items()},
            },
            "mixers": dict(self.layers.converted.values()),
            "tensors": [dataclasses.asdict(table) for table in self.tensors],
            "stages": [
                {**dataclasses.asdict(stage), "total_memory": stage.total_memory, "memory_is": "an estimate"}
                for stage in self.stages
            ],
            "cache": [
                {"tokens": tokens, "teacher_bytes": before, "student_bytes": after, "dtype": self.cache_dtype}
                for tokens, before, after in self.cache
            ],
            "gpu": {"name": self.gpu, "peak_bf16_tflops": costs.GPUS[self.gpu][0], "assumed_mfu": self.mfu},
            "world": {**dataclasses.asdict(self.world), "size": self.world.size},
            "gpu_hours": self.gpu_hours,
            "hours": self.hours,
            "price_per_gpu_hour": self.price,
            "cost": self.cost,
            "gpus": {
                name: {"tokens_per_second": rate, "gpu_hours": hours} for name, (rate, hours) in self.gpus.items()
            },
            "notes": self.notes,
        }


def plan(
    recipe: Recipe,
    gpu: str = "H100",
    mfu: float = costs.MFU,
    *,
    nproc: int = 1,
    nodes: int = 1,
    price: float | None = None,
) -> Plan:
    """The plan of a recipe.

    Args:
        recipe: validated.
        gpu: whose hours are estimated; a key of `costs.GPUS`.
        mfu: share of the GPU's peak that the run is assumed to reach.
        nproc: processes per node, one device each.
        nodes: so many.
        price: of a GPU-hour, in whatever currency.

    Raises:
        UserError: no config.json, an unknown family, layers that the teacher does not have, an unknown GPU, several
            processes without an engine for them.
        MachineError: the Hub cannot be reached.
    """
    if gpu not in costs.GPUS:
        raise UserError(f"--gpu {gpu}: not in the table. Known: {', '.join(costs.GPUS)}")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu}: expected a share above 0 and up to 1, for example --mfu {costs.MFU}")
    world = World(recipe.engine.parallel, nproc, nodes, recipe.engine.offload)
    teacher = read_teacher_config(recipe.teacher.model, recipe.teacher.revision, recipe.place("teacher.model"))
    layers = layer_map(recipe, teacher.num_layers)
    counts = costs.count(teacher, layers)
    notes = _notes(recipe, layers) + _mixer_notes(teacher, layers)
    if world.size == 1 and world.parallel != "single":
        notes.append(
            f"engine.parallel: {world.parallel} needs two processes or more; give --nproc N for what each holds"
        )
    stages = [_stage(recipe, stage, teacher, layers, counts, gpu, mfu, notes, world) for stage in recipe.stages]
    dtype = "bfloat16" if recipe.engine.precision == "bf16" else recipe.teacher.dtype
    cache = [(length, *costs.cache_bytes(teacher, layers, length, dtype)) for length in costs.CACHE_LENGTHS]
    for stage in stages:
        size, limit = stage.total_memory, costs.GPUS[gpu][1] * 10**9
        if size > limit and recipe.engine.device != "cpu":
            fits = [name for name, (_, memory) in costs.GPUS.items() if memory * 10**9 >= size]
            notes.append(
                f"{stage.name} needs about {format_bytes(size)}, more than one {gpu} has ({costs.GPUS[gpu][1]} GB); "
                + (f"one of these holds it: {', '.join(fits)}" if fits else "no GPU of the table holds it")
                + (f". A smaller stages.{stage.name}.micro_batch needs less" if stage.sequences > 1 else "")
            )
    tables = tensor_tables(teacher, layers)
    flops, tokens = sum(s.flops for s in stages), sum(s.settings["tokens"] for s in stages if s.trained)
    trained = sum(s.flops for s in stages if s.trained)
    gpus = {
        name: (
            tokens * world.size * costs.flops_per_second(name, mfu) / trained if trained else 0.0,
            costs.gpu_hours(flops, name, mfu),
        )
        for name in costs.GPUS
    }
    made = list(dict.fromkeys(notes))
    return Plan(teacher, layers, counts, tables, stages, cache, dtype, made, gpu, mfu, world, price, gpus)


def layer_map(recipe: Recipe, num_layers: int) -> LayerMap:
    """The recipe's layers on a teacher of that many."""
    made = resolve(recipe.layers, num_layers, recipe.mixers, recipe.place)
    return dataclasses.replace(made, attention=recipe.layers.attention.changes())


def window(asked: int | str, context: int) -> tuple[int, str]:
    """The window for `seq_len`, and why it is that where it is not as written.

    Args:
        asked: a number, or `auto`.
        context: of the teacher; no window is longer.
    """
    if asked == "auto":
        length = min(AUTO_LENGTH, context)
        limit = f", the teacher's context; {AUTO_LENGTH} where that allows it" if length < AUTO_LENGTH else ""
        return length, f"auto is {length}{limit}"
    if int(asked) > context:
        return context, f"{asked} is cut to {context}, the teacher's context"
    return int(asked), ""


def stage_settings(recipe: Recipe, stage: TrainingStage, context: int) -> dict[str, Any]:
    """A training stage with everything filled in: the arguments of `distill.stage.StageSettings`.

    Args:
        recipe: that the stage belongs to.
        stage: one of its training stages.
        context: of the teacher.
    """
    asked = recipe.data.seq_len if stage.seq_len is None else stage.seq_len
    same = ("tokens", "batch", "micro_batch", "lr", "schedule", "warmup", "betas", "weight_decay", "clip", "average")
    settings: dict[str, Any] = {name: getattr(stage, name) for name in same}
    settings |= {
        "seq_len": window(asked, context)[0],
        "lr_final": stage.final_lr,
        "precision": recipe.engine.precision,
        "checkpointing": recipe.engine.checkpointing,
        "compile": recipe.engine.compile,
        "seed": recipe.seed if stage.seed is None else stage.seed,
        "eval_every": recipe.eval.every or max(1, stage.tokens // 10),
        "save_every": recipe.save.every or max(1, stage.tokens // 10),
        "keep": recipe.save.keep,
        "spike": None if stage.spike is None else stage.spike.model_dump(),
    }
    loss = getattr(stage, "loss", None)
    settings["loss"] = loss if isinstance(loss, str) or loss is None else loss.model_dump()
    settings |= {name: getattr(stage, name) for name in ("lr_mixers", "temperature", "train") if hasattr(stage, name)}
    if isinstance(stage, GlueStage) and stage.train == "lora":
        settings["lora"] = (stage.lora or LoraSection()).model_dump()
    return settings


def calibrate_settings(recipe: Recipe, stage: CalibrateStage, context: int) -> dict[str, Any]:
    """A calibrate stage with everything filled in: the arguments of `distill.calibrate.CalibrateSettings`."""
    asked = recipe.data.seq_len if stage.seq_len is None else stage.seq_len
    method, inputs = stage.method, stage.inputs
    if method == "auto":
        method = "spread" if any(isinstance(other, TrainingStage) for other in recipe.stages) else "full"
    if inputs == "auto":
        inputs = "student" if method == "full" else "teacher"
    return {
        **{name: getattr(stage, name) for name in ("tokens", "batch", "ridge")},
        "method": method,
        "inputs": inputs,
        "seq_len": window(asked, context)[0],
        "seed": recipe.seed if stage.seed is None else stage.seed,
    }


def tensor_tables(teacher: TeacherConfig, layers: LayerMap) -> list[TensorTable]:
    """Where every tensor of every mixer comes from; layers with the same tensors share a table."""
    last = max(1, teacher.num_layers - 1)
    names = {"copied": teacher.family.origin, "derived": teacher.family.derived, "new": str}
    groups: dict[tuple, tuple[list[int], list]] = {}
    for layer, (name, values) in layers.converted.items():
        spec = registry.spec(name)
        first = layer == min(layers.layers_of(name))
        rows = spec.tensors(teacher.geometry(layer), spec.options.parse(values), first=first, position=layer / last)
        key = (name, *((row.name, row.shape, row.source) for row in rows))
        members, tables = groups.setdefault(key, ([], []))
        members.append(layer)
        tables.append(rows)
    found = []
    for key, (members, tables) in groups.items():
        merged = []
        for low, high in zip(tables[0], tables[-1], strict=True):
            origin = names[low.source](low.origin)
            if low.origin != high.origin:
                origin += " (lowest layer; changes with depth)"
            merged.append(TensorRow(low.name, low.shape, low.source, origin))
        found.append(TensorTable(key[0], members, sum(row.numel for row in tables[0]), merged))
    return found


def _calibrate_stage(
    recipe: Recipe,
    stage: CalibrateStage,
    teacher: TeacherConfig,
    layers: LayerMap,
    counts: Counts,
    gpu: str,
    mfu: float,
    notes: list,
) -> StagePlan:
    settings = calibrate_settings(recipe, stage, teacher.context)
    parts = math.ceil(stage.tokens / (stage.batch * settings["seq_len"]))
    memory = costs.calibrate_memory(teacher, layers, counts, stage.tokens, recipe.teacher.dtype)
    align = next((other for other in recipe.stages if isinstance(other, AlignStage)), None)
    stream, needs = align and align.stream, {}
    if align is not None and stream is not None and layers.converted:
        needs = stream_costs.calibrate_disk(stream, settings, teacher, layers, recipe.teacher.dtype)
        memory = stream_costs.calibrate_memory(memory, stream, settings, teacher, layers, counts, recipe.teacher.dtype)
        notes.append(stream_costs.note(stage.name, needs, stream, align.name))
    flops = costs.calibrate_flops(
        teacher, layers, stage.tokens, settings["seq_len"], settings["inputs"] == "student", stream is not None
    )
    hours = costs.gpu_hours(flops, gpu, mfu)
    return StagePlan(stage.kind, stage.name, stage.title, settings, parts, 0, memory, flops, hours, disk=needs)


def _stage(
    recipe: Recipe,
    stage: Any,
    teacher: TeacherConfig,
    layers: LayerMap,
    counts: Counts,
    gpu: str,
    mfu: float,
    notes: list,
    world: World,
) -> StagePlan:
    if isinstance(stage, CalibrateStage):
        return _calibrate_stage(recipe, stage, teacher, layers, counts, gpu, mfu, notes)
    if not isinstance(stage, TrainingStage):
        return StagePlan(stage.kind, stage.name, stage.title, {}, 0, 0, {}, 0.0, 0.0)
    if isinstance(stage, MatrixStage):
        for layer, (name, values) in layers.converted.items():
            check_matrix(registry.spec(name), registry.spec(name).options.parse(values), layer, stage.name)
    settings = stage_settings(recipe, stage, teacher.context)
    length = settings["seq_len"]
    steps = math.ceil(stage.tokens / (stage.batch * length))
    notes += _stage_notes(recipe, stage, teacher, length, steps, world)
    loss = getattr(stage, "loss", None)
    needs_teacher = stage.kind in costs.PER_LAYER or bool(
        loss and not isinstance(loss, str) and loss.kl + loss.reverse_kl + loss.align > 0
    )
    runs_teacher, needs_teacher = teacher_needs(recipe, stage, needs_teacher)
    trained = counts.trained(stage.kind, getattr(stage, "train", ""))
    lora = settings.get("lora")
    if lora is not None:
        trained = costs.adapters(teacher, layers, lora["rank"], lora["targets"])
    align = not isinstance(loss, str | None) and loss.align > 0
    whole = costs.memory(
        teacher,
        layers,
        counts,
        stage.kind,
        trained,
        world.rows(settings["batch"], settings["micro_batch"]) * length,
        recipe.teacher.dtype,
        recipe.engine.precision,
        needs_teacher,
        length,
        recipe.engine.checkpointing,
        align,
        "cpu" if recipe.engine.device == "cpu" else "cuda",
    )
    if settings["average"] is not None:
        whole["average"] = 4 * trained
    if recipe.engine.device == "cpu":
        whole["allocator"] = costs.cpu_allocator(stage.kind, whole["activations"])
    stream, needs = getattr(stage, "stream", None), {}
    if stream is not None and layers.converted:
        needs = stream_costs.disk(stream, settings, teacher, layers, recipe.teacher.dtype, recipe.eval.tokens)
        notes.append(stream_costs.note(stage.name, needs, stream, stage.name))
        whole = stream_costs.memory(whole, stream, settings, teacher, layers, counts, recipe.teacher.dtype)
    ranks = _ranks(recipe, stage.kind, teacher, counts, whole, needs_teacher, world)
    train, adapted = getattr(stage, "train", "all"), 0 if lora is None else trained
    each = costs.flops_per_token(teacher, layers, stage.kind, length, runs_teacher, train, adapted, align)
    return StagePlan(
        stage.kind,
        stage.name,
        stage.title,
        settings,
        steps,
        trained,
        ranks[0][1],
        stage.tokens * each,
        costs.gpu_hours(stage.tokens * each, gpu, mfu),
        world.size * costs.flops_per_second(gpu, mfu) / each if each else 0.0,
        tuple((rank, sum(memory.values())) for rank, memory in ranks),
        needs,
    )


def _stage_notes(
    recipe: Recipe, stage: TrainingStage, teacher: TeacherConfig, length: int, steps: int, world: World
) -> list[str]:
    """What was derived for a stage, would stop it, or fills the disk."""
    notes = []
    key = "data.seq_len" if stage.seq_len is None else f"stages.{stage.name}.seq_len"
    why = window(recipe.data.seq_len if stage.seq_len is None else stage.seq_len, teacher.context)[1]
    if why:
        notes.append(f"{key}: {why}")
    if stage.warmup >= steps:
        notes.append(f"{stage.name}: warm-up takes {stage.warmup} of {steps} steps; lower stages.{stage.name}.warmup")
    if stage.batch % world.size:
        notes.append(
            f"{stage.name}: {stage.batch} sequences cannot be shared by {world.size} ranks: the run would stop. Write "
            f"stages.{stage.name}.batch={-(-stage.batch // world.size) * world.size}"
        )
    return notes + logits_note(stage, length, teacher.config["vocab_size"])


def _ranks(
    recipe: Recipe,
    kind: str,
    teacher: TeacherConfig,
    counts: Counts,
    whole: dict[str, int],
    needs_teacher: bool,
    world: World,
) -> list[tuple[int, dict[str, int]]]:
    """(first rank, bytes by use from this rank on): ranks differ where layers are owned."""
    per_layer = kind in costs.PER_LAYER
    gathered = 0
    if world.parallel in SHARDED:
        gathered = costs.gathered(teacher, counts, kind, recipe.teacher.dtype, needs_teacher)
    owning = per_layer and world.parallel.startswith("deepspeed")
    found: list[tuple[int, dict[str, int]]] = []
    for rank in range(world.size if owning else 1):
        owned = world.owned(counts.mixers, rank) if owning else None
        memory = world.divide(whole, per_layer=per_layer, gathered=gathered, owned=owned)
        if not found or memory != found[-1][1]:
            found.append((rank, memory))
    return found


def _notes(recipe: Recipe, layers: LayerMap) -> list[str]:
    """What looks odd before any cost is counted."""
    notes = []
    if not layers.converted:
        notes.append("no layer is converted: the result is the teacher itself")
    if layers.attention and not layers.kept:
        notes.append("layers.attention: no layer keeps its attention, so it changes nothing")
    used = {name for name, _ in layers.converted.values()}
    for name in recipe.mixers:
        if name not in used and layers.converted:
            notes.append(f"mixers.{name}: no layer uses it")
    kinds = [stage.kind for stage in recipe.stages]
    if "align" not in kinds and "glue" in kinds:
        notes.append("glue without align before it: the published runs ended worse, however long they trained")
    for source in [recipe.data.source] if recipe.data.source else list(recipe.data.mix or {}):
        local = source.startswith((".", "/", "~")) or Path(source).suffix in (".txt", ".jsonl", ".json", ".parquet")
        wild = any(sign in source for sign in "*?[")
        if source != EMBEDDED and local and not wild and not Path(source).expanduser().exists():
            notes.append(f"{recipe.place('data.source')}: {source} is not there (yet): the run would stop at once")
    return notes


def _mixer_notes(teacher: TeacherConfig, layers: LayerMap) -> list[str]:
    """What the mixers do not do that the attention of their layers did; refuses those that cannot replace it."""
    notes = []
    for layer, (name, values) in layers.converted.items():
        spec, shape = registry.spec(name), teacher.geometry(layer)
        options = spec.options.parse(values)
        check_geometry(spec, shape, options, layer)
        notes += lost(spec, shape, options)
    return list(dict.fromkeys(notes))


def render(plan: Plan, width: int = 110) -> str:
    """The plan as text: see `plan_text`."""
    from .plan_text import render as text

    return text(plan, width)
