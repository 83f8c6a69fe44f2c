"""The recipe as types: every key with its type, bounds, default and meaning. The reference page is made from it.

What a single key cannot say (either `keep` or `convert`, the order of the stages) is in `rules.py`; reading files and
naming the place of an error is `loader.py`'s work.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from ..mixers import registry
from . import rules
from .fields import (
    Betas,
    Count,
    Device,
    Faults,
    HeldOut,
    LayerChoice,
    Length,
    MixerName,
    Placed,
    Precision,
    Schedule,
    Section,
    Seed,
    Suites,
    Weight,
    Words,
)
from .layers import FORMS, check_form
from .schema_glue import LoraSection, LossWeights, TeacherLogitsSection
from .schema_publish import PublishSection
from .stream_section import StreamSection
from .units import COUNT_WORDS

SCHEMA = 1
EMBEDDED = "embedded"  # in teacher.model and data.source: what the package brings along


class TeacherSection(Section):
    """The pretrained softmax-attention model. It is never changed."""

    model: str = Field(
        min_length=1, description="local folder (relative to where the command runs) or Hub id; `embedded` for the toy"
    )
    revision: str | None = Field(
        default=None, description="branch, tag or commit on the Hub; the commit used is recorded"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="precision the teacher runs in"
    )
    trust_remote_code: bool = Field(
        default=False, description="must be false: every known family is transformers' own code"
    )

    @field_validator("trust_remote_code")
    @classmethod
    def _no_remote_code(cls, value: bool) -> bool:
        if value:
            raise ValueError("teachers never run code of their own here; remove the line or write false")
        return value


class OverrideSection(Section):
    """What stands in some layers instead of `layers.mixer`."""

    mixer: MixerName = Field(description="mixer for these layers")


def _override(value: Any) -> Any:
    return {"mixer": value} if isinstance(value, str) else value


class AttentionSection(Section):
    """What is changed in the layers that keep their attention, from glue on. The teacher and align are not touched."""

    rope: bool = Field(default=True, description="rotary embedding; false takes it away (NoPE)")
    logit_scale: float | None = Field(
        default=None,
        gt=1,
        description="a: the scores of the query at position t are multiplied by log_a(t + a), one at the start "
        "(HALO takes 500 to 900); null leaves them as they are",
    )
    window: int | None = Field(
        default=None,
        ge=2,
        description="tokens that a layer sees, the token itself included; a layer whose own window is smaller keeps "
        "that; null leaves windows as they are",
    )

    def changes(self) -> dict[str, Any] | None:
        """Fields of `distill.modeling.kept.KeptAttention`; None where nothing is changed."""
        return None if self == AttentionSection() else self.model_dump()


class LayersSection(Section):
    """Which layers keep their attention and what replaces it in the others."""

    mixer: MixerName = Field(description="what replaces attention: a mixer's name, or one of its aliases")
    keep: LayerChoice = Field(default=None, description="layers whose attention stays; the others are converted")
    convert: LayerChoice = Field(default=None, description="layers that are converted; the others keep their attention")
    overrides: dict[str, Annotated[OverrideSection, BeforeValidator(_override)]] = Field(
        default_factory=dict, description='another mixer for some converted layers: {"0-2": gated_deltanet}'
    )
    attention: AttentionSection = Field(
        default_factory=AttentionSection, description="what is changed in the layers whose attention stays"
    )

    @field_validator("overrides", mode="before")
    @classmethod
    def _ranges(cls, value: Any) -> Any:
        if isinstance(value, dict):
            faults = []
            for text in value:
                try:
                    check_form(text)
                except ValueError as error:
                    faults.append(((text,), str(error)))
            if faults:
                raise Faults(faults)
        return value


class DataSection(Section):
    """The text that the stages see."""

    source: str | None = Field(
        default=None,
        min_length=1,
        description="file, folder or glob (txt, jsonl, parquet; relative to where the command runs), or Hub dataset; "
        "`embedded` for the toy text",
    )
    mix: dict[str, Weight] | None = Field(
        default=None, min_length=1, description="several sources with their shares of the tokens"
    )
    split: str = Field(default="train", description="split of a Hub dataset")
    text: str | None = Field(
        default="text", min_length=1, description="field of jsonl, parquet and Hub records with the text"
    )
    messages: str | None = Field(
        default=None,
        min_length=1,
        description="field with chat messages, preferred where a record has it: chat template, loss on the "
        "assistant's words only",
    )
    valid: HeldOut = Field(default=0.01, description="held-out text: a file, or a share of the documents set aside")
    seq_len: Length = Field(
        default="auto", description="window in tokens; auto is 512, and never more than the teacher's context"
    )
    pack: bool = Field(default=True, description="fill windows with several documents; their borders are respected")
    separator: str = Field(
        default="auto",
        min_length=1,
        description="splits plain text files into documents; auto is `<|endoftext|>`, none splits nothing",
    )
    seed: Seed | None = Field(default=None, description="order of the documents; the recipe's seed if null")
    shuffle_buffer: Count = Field(
        default=2048, ge=1, description="documents held for shuffling when a Hub dataset is streamed"
    )


class Stage(Section):
    """One step of the way. `kind` is its key in the recipe."""

    kind: ClassVar[str]
    title: ClassVar[str]
    name: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9_-]{0,64}$",
        description="what overrides, metrics and folders call it; its kind if empty",
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {**value, "name": value.get("name") or cls.kind} if isinstance(value, dict) else value


class TransferStage(Stage):
    """Initialise every mixer from its attention's own weights, without data."""

    kind = "transfer"
    title = "no data, trains nothing"


class CalibrateStage(Stage):
    """Set decays, strengths and scales, or output projections too, in closed form from a few teacher batches."""

    kind = "calibrate"
    title = "closed form, no gradient step"
    tokens: Count = Field(default=64_000, ge=1, description="tokens that are fitted; an eighth as many are held out")
    batch: int = Field(default=8, ge=1, description="sequences per forward pass")
    seq_len: Length | None = Field(default=None, description="window in tokens; data.seq_len if null")
    method: Literal["auto", "full", "taylor", "spread"] = Field(
        default="auto",
        description="full: decays and strengths by a grid, gates and output projection by least squares; taylor: "
        "decays, write strength and a scale per head as published (Taylor-Calibrate); spread: decays alone, spread "
        "over heads; auto: full where no training follows, else spread, from which training ends best",
    )
    inputs: Literal["auto", "student", "teacher"] = Field(
        default="auto",
        description="what a layer is fitted on: what the calibrated layers below it make of the text, or the teacher's "
        "own layer inputs; auto: the student's with full, the teacher's with the others",
    )
    ridge: float | None = Field(
        default=None,
        gt=0,
        le=10,
        description="relative damping of the output projection; held-out tokens choose if null",
    )
    seed: Seed | None = Field(default=None, description="of this stage; the recipe's seed if null")


class SpikeSection(Section):
    """What is done where a step's loss jumps. The step's batch is left out; what came before decides, nothing else."""

    factor: float = Field(default=3.0, gt=1, description="a spike is a loss above so many times the usual one")
    window: int = Field(default=50, ge=2, description="steps whose median loss is the usual one; none is judged before")
    action: Literal["skip", "rollback"] = Field(
        default="skip",
        description="rollback: weights and optimizer also go back to the last saved step, and all batches since then "
        "are left out",
    )


class TrainingStage(Stage):
    """What every training stage can set."""

    tokens: Count = Field(ge=1, description="non-padding input tokens that the stage sees")
    batch: int = Field(default=32, ge=1, description="sequences per optimizer step, over all ranks")
    micro_batch: int | None = Field(
        default=None, ge=1, description="sequences per forward pass, a divisor of batch; batch if null"
    )
    seq_len: Length | None = Field(default=None, description="window in tokens; data.seq_len if null")
    lr: float = Field(default=1e-3, gt=0, le=1, description="highest learning rate")
    lr_final: float | None = Field(
        default=None, ge=0, le=1, description="learning rate at the end; a hundredth of lr if null"
    )
    schedule: Schedule = Field(
        default="constant", description="way from lr to lr_final; constant never leaves lr, wsd falls in the last fifth"
    )
    warmup: int = Field(default=50, ge=0, description="optimizer steps from a hundredth of lr to lr")
    betas: Betas = Field(default=(0.9, 0.95), description="AdamW's decay of the moments")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="AdamW's decoupled weight decay")
    clip: float | None = Field(default=1.0, gt=0, description="largest gradient norm; null never clips")
    average: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="decay per step of a running average of the weights, which is measured and kept in their stead; "
        "null keeps the weights themselves",
    )
    seed: Seed | None = Field(default=None, description="of this stage; the recipe's seed if null")
    spike: SpikeSection | None = Field(default=None, description="jumps of the loss that leave out a batch; null: none")

    @property
    def final_lr(self) -> float:
        """Learning rate at the end: `lr_final`, or a hundredth of `lr`."""
        return self.lr / 100 if self.lr_final is None else self.lr_final


class MatrixStage(TrainingStage):
    """Each mixer learns to mix tokens as the attention does that it replaces. Trains no values, gates and outputs."""

    kind = "matrix"
    title = "trains what mixes tokens, each layer for itself"
    schedule: Schedule = Field(
        default="cosine", description="way from lr to lr_final; constant never leaves lr, wsd falls in the last fifth"
    )


class AlignStage(TrainingStage):
    """Each mixer learns, on the teacher's layer input, to give the teacher's layer output. Trains the mixers alone."""

    kind = "align"
    title = "trains the mixers, each layer for itself"
    schedule: Schedule = Field(
        default="cosine", description="way from lr to lr_final; constant never leaves lr, wsd falls in the last fifth"
    )
    loss: Literal["l2", "mse", "relative", "cosine"] = Field(
        default="l2",
        description="distance of the outputs: l2 is the norm itself, not squared (RADLADS); relative is mse over the "
        "mean square of the outputs of the same forward pass (micro-batches and ranks change it a little)",
    )
    train: Literal["all", "new"] = Field(
        default="all", description="what learns: all of the mixers, or only what attention did not have (LoLCATs)"
    )
    stream: StreamSection | None = Field(
        default=None, description="for a teacher larger than memory; null has all of it in memory"
    )


class GlueStage(TrainingStage):
    """The student as a whole learns the teacher's predictions."""

    kind = "glue"
    title = "trains end to end on the teacher's logits"
    lr: float = Field(default=1e-5, gt=0, le=1, description="highest learning rate")
    lr_mixers: float | None = Field(
        default=None, gt=0, le=1, description="highest learning rate of the mixers alone; lr if null"
    )
    loss: LossWeights = Field(
        default_factory=lambda: LossWeights(kl=1.0), description="weights of kl, reverse_kl and ce"
    )
    temperature: float = Field(default=1.0, gt=0, le=100, description="of the two KL terms")
    train: Literal["all", "no-ffn", "mixers+norms", "mixers", "lora"] = Field(
        default="all",
        description="what learns; the published runs found a frozen feed-forward part worse; lora: adapters alone, "
        "needs the extra relinear[lora]",
    )
    lora: LoraSection | None = Field(default=None, description="with train: lora, the adapters; its defaults if null")
    teacher_logits: TeacherLogitsSection | None = Field(
        default=None, description="learn from a cache of the teacher's logits, made where it is not there; null runs it"
    )


class ExtendStage(GlueStage):
    """Glue again, at the length that `seq_len` says."""

    kind = "extend"
    title = "glue on longer sequences"
    seq_len: Length = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        description="window in tokens, never more than the teacher's context"
    )
    batch: int = Field(default=16, ge=1, description="sequences per optimizer step, over all ranks")


STAGES: dict[str, type[Stage]] = {
    s.kind: s for s in (TransferStage, CalibrateStage, MatrixStage, AlignStage, GlueStage, ExtendStage)
}


def _one_key(value: Any) -> Any:
    """A stage as written, refused unless it is one known key with a mapping below."""
    if isinstance(value, Stage):
        return value
    known = ", ".join(STAGES)
    if isinstance(value, str) and value in STAGES:
        raise ValueError(f"a stage is a key with its settings, found the word alone; write - {value}: {{}}")
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"a stage is one key with its settings, such as - glue: {{tokens: 2M}}, found {value!r}")
    kind, settings = next(iter(value.items()))
    if kind not in STAGES:
        raise ValueError(f"unknown stage {kind!r}.{rules.nearest(str(kind), STAGES)} Available: {known}")
    return {kind: {} if settings is None else settings}


def _kind(value: Any) -> str:
    return value.kind if isinstance(value, Stage) else next(iter(value))


def _settings(kind: str) -> BeforeValidator:
    return BeforeValidator(lambda value: value[kind] if isinstance(value, dict) else value)


AnyStage = Annotated[
    Annotated[TransferStage, _settings("transfer"), Tag("transfer")]
    | Annotated[CalibrateStage, _settings("calibrate"), Tag("calibrate")]
    | Annotated[MatrixStage, _settings("matrix"), Tag("matrix")]
    | Annotated[AlignStage, _settings("align"), Tag("align")]
    | Annotated[GlueStage, _settings("glue"), Tag("glue")]
    | Annotated[ExtendStage, _settings("extend"), Tag("extend")],
    Discriminator(_kind),
    BeforeValidator(_one_key),
    Words("stages"),
]


class EngineSection(Section):
    """What the run runs on."""

    precision: Precision = Field(default="fp32", description="of the student's compute; weights stay fp32 masters")
    parallel: Literal["single", "ddp", "fsdp2", "deepspeed-zero1", "deepspeed-zero2", "deepspeed-zero3"] = Field(
        default="single",
        description="one process; ddp: each holds everything; fsdp2: shards of everything; deepspeed-zeroN: shards of "
        "optimizer (1), gradients (2), weights (3)",
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        default="none", description="DeepSpeed: where the optimizer's state lies, under zero3 the weights too"
    )
    offload_dir: str | None = Field(default=None, min_length=1, description="folder on the NVMe drive")
    checkpointing: bool = Field(
        default=False, description="glue keeps the input of each decoder block and computes the rest again (slower)"
    )
    compile: bool = Field(default=False, description="torch.compile the mixers; the first steps take minutes")
    device: Device = Field(default="auto", description="auto takes a GPU where there is one")
    threads: int | None = Field(default=None, ge=1, description="CPU threads; as torch finds them if null")
    timeout: int = Field(
        default=10_800,
        ge=10,
        description="seconds without any progress after which a process writes the stacks of its threads to RUN/logs "
        "and ends",
    )

    @model_validator(mode="after")
    def _offload(self) -> EngineSection:
        if self.offload != "none" and not self.parallel.startswith("deepspeed"):
            raise ValueError(
                f"offload: {self.offload} is DeepSpeed's; write parallel: deepspeed-zero2, or offload: none"
            )
        if self.offload == "nvme" and self.offload_dir is None:
            raise ValueError("offload: nvme needs a folder on that drive; write offload_dir: FOLDER")
        return self


class EvalSection(Section):
    """What is measured on held-out text while the stages run."""

    suite: Suites = Field(
        default=["quick"],
        min_length=1,
        description="quick: fidelity, always; the others too: at the end, as `relinear eval --suite` measures them",
    )
    tasks: list[str] | None = Field(
        default=None, min_length=1, description="of core: lm-eval's tasks by name; its own choice if null"
    )
    limit: int | None = Field(default=None, ge=1, description="of core: the first so many documents of each task")
    data: str | None = Field(
        default=None, min_length=1, description="of core: folder of files for the local_… tasks; no Hub is asked"
    )
    task_dir: str | None = Field(default=None, min_length=1, description="of core: folder of tasks in lm-eval's YAML")
    against: Literal["teacher", "text"] = Field(
        default="teacher",
        description="what the student is compared with; text: nothing, its own perplexity on the text alone, so that "
        "with `teacher_logits` no forward pass of the teacher is needed in glue",
    )
    every: Count | None = Field(
        default=None, ge=1, description="training tokens between measurements; ten per stage if null"
    )
    tokens: Count = Field(default=50_000, ge=1, description="held-out tokens per measurement")
    assembled: bool = Field(
        default=False,
        description="before glue too, put the student together at every measurement and compare it with the teacher",
    )


class TrackSection(Section):
    """Where metrics go besides the metrics.jsonl that is always written."""

    wandb: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_.-]{1,128}$",
        description="Weights & Biases project; needs the extra relinear[wandb]",
    )
    wandb_mode: Literal["online", "offline"] = Field(
        default="online", description="offline writes below the run folder; `wandb sync` sends it later"
    )
    tensorboard: bool = Field(
        default=False, description="event files in RUN/tensorboard; needs the extra relinear[tensorboard]"
    )


class SaveSection(Section):
    """The run folder."""

    dir: str | None = Field(default=None, min_length=1, description="run folder; runs/RECIPE-TEACHER if null")
    every: Count | None = Field(
        default=None, ge=1, description="training tokens between saved steps; ten per stage if null"
    )
    keep: int = Field(default=2, ge=1, description="saved steps kept, the newest ones; the best is kept beside them")


class Recipe(Placed):
    """A whole recipe."""

    schema_version: Literal[1] = Field(alias="schema", description="version of this format: 1")
    teacher: TeacherSection = Field(description="the model to convert")
    layers: LayersSection = Field(description="what is converted")
    mixers: dict[str, dict[str, Any]] = Field(default_factory=dict, description="options of the mixers, by mixer")
    data: DataSection = Field(description="the text")
    stages: list[AnyStage] = Field(
        min_length=1, description="what happens, in order; each item is one key with settings"
    )
    engine: EngineSection = Field(default_factory=EngineSection, description="what it runs on")
    eval: EvalSection = Field(default_factory=EvalSection, description="what is measured")
    track: TrackSection = Field(default_factory=TrackSection, description="trackers")
    save: SaveSection = Field(default_factory=SaveSection, description="run folder")
    publish: PublishSection = Field(default_factory=PublishSection, description="Hub repository")
    seed: Seed = Field(default=0, description="of everything that is random")
    max_hours: float | None = Field(
        default=None, gt=0, description="save and stop after so many hours; --resume goes on"
    )

    @field_validator("mixers", mode="before")
    @classmethod
    def _options(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        faults: list[tuple[tuple[str | int, ...], str]] = []
        parsed: dict[str, dict[str, Any]] = {}
        for name, options in value.items():
            try:
                known = registry.resolve(str(name))
            except ValueError as error:
                faults.append(((name,), str(error)))
                continue
            if known in parsed:
                faults.append(((name,), f"{known} has its options twice; put them under one name"))
            elif not isinstance(options, dict | None):
                faults.append(((name,), f"expected a mapping of options, found {options!r}"))
            else:
                kind = registry.spec(known).options
                names = [field.name for field in dataclasses.fields(kind)]
                for key in [key for key in options or {} if key not in names]:
                    hint = rules.nearest(key, names) or f" Known here: {', '.join(names)}"
                    faults.append(((name, key), f"unknown option.{hint}"))
                try:
                    parsed[known] = kind.parse({k: v for k, v in (options or {}).items() if k in names}).to_dict()
                except ValueError as error:
                    for line in str(error).split("\n"):
                        key, _, message = line.partition(": ")
                        faults.append(((name, key), message))
        if faults:
            raise Faults(faults)
        return parsed

    @model_validator(mode="after")
    def _rules(self) -> Recipe:
        found = rules.check(self.to_dict())
        if found:
            raise Faults(found)
        return self

    def __eq__(self, other: object) -> bool:
        """Same values; where they were written does not matter."""
        return isinstance(other, Recipe) and self.to_dict() == other.to_dict()

    def stage(self, name: str) -> Any:
        """The stage of that name.

        Raises:
            KeyError: there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values with every key, in the recipe's own form."""
        plain = self.model_dump(mode="json", by_alias=True, exclude={"stages"})
        stages = [{stage.kind: stage.model_dump(mode="json")} for stage in self.stages]
        return {name: stages if name == "stages" else plain[name] for name in _TOP}


_TOP = [field.alias or name for name, field in Recipe.model_fields.items()]

__all__ = ["COUNT_WORDS", "FORMS", "STAGES", "Faults", "Recipe", "Section", "Stage", "Words"]
