"""The recipe of training after conversion as types; the reference page is made from it. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from .. import loader, yaml_text
from ..fields import Betas, Count, Device, Faults, HeldOut, Length, Placed, Precision, Section, Seed, Words
from ..schema_glue import LoraSection
from ..units import listed

ARITHMETIC = "arithmetic"  # in data.source: problems made from a seed
METHODS = ("sft", "dpo", "grpo")
Operations = Annotated[
    list[Literal["+", "-", "*"]], BeforeValidator(listed), Field(min_length=1), Words("`+`, `-`, `*` or a list")
]


class ArithmeticSection(Section):
    """With `source: arithmetic`, problems such as `7 + 15 =`. No problem is both trained and held out."""

    low: int = Field(default=0, ge=0, le=10**6, description="smallest operand")
    high: int = Field(default=20, ge=1, le=10**6, description="largest operand")
    operations: Operations = Field(default=["+"], description="of the problems")
    problems: Count = Field(
        default=2000, ge=2, description="problems made, held-out ones among them; fewer where there are no more"
    )
    chat: bool = Field(
        default=False, description="as chat messages instead of plain text; needs a tokenizer with a chat template"
    )


class PosttrainData(Section):
    """What is trained on: prompts with completions (sft), with pairs (dpo), with answers (grpo)."""

    source: str = Field(
        min_length=1,
        description="file, folder or glob (jsonl, json, parquet; relative to where the command runs), or Hub dataset; "
        "`arithmetic` for problems made from a seed",
    )
    split: str = Field(default="train", description="split of a Hub dataset")
    valid: HeldOut = Field(default=0.1, description="held out: a file, or a share of the examples set aside")
    limit: Count | None = Field(default=None, ge=2, description="examples that are read at most; all if null")
    chat_template: str | None = Field(
        default=None,
        min_length=1,
        description="file with a chat template (Jinja), for a tokenizer without one; goes into the export",
    )
    arithmetic: ArithmeticSection | None = Field(
        default=None, description="with `source: arithmetic`, what is made; its defaults if null"
    )


class DpoSection(Section):
    """With `method: dpo`."""

    beta: float = Field(default=0.1, gt=0, le=100, description="how strongly the model is held to where it began")
    loss: Literal["sigmoid", "ipo", "hinge"] = Field(
        default="sigmoid", description="sigmoid is DPO's own (arXiv 2305.18290); ipo: arXiv 2310.12036"
    )


class GrpoSection(Section):
    """With `method: grpo` (arXiv 2402.03300)."""

    generations: int = Field(default=8, ge=2, le=1024, description="completions sampled for each prompt")
    max_new_tokens: int = Field(default=256, ge=1, le=2**20, description="tokens of a completion at most")
    temperature: float = Field(default=1.0, gt=0, le=10, description="of the sampling")
    beta: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="weight of the KL term to the model that it began as; 0 needs no second model in memory",
    )
    epsilon: float = Field(default=0.2, gt=0, lt=1, description="clipping of the ratio")
    reward: Literal["exact", "near"] = Field(
        default="exact",
        description="exact: 1 for the right answer, else 0; near: besides, a wrong number has 0.5 / (1 + its distance)",
    )
    read: Literal["last", "line"] = Field(
        default="last",
        description="what counts as the answer: the last number of the completion, or of its first line that is not "
        "empty; where the right answer is no number, that line or the completion as a whole",
    )


class PosttrainEval(Section):
    """What is measured on held-out examples: before, after, and between."""

    examples: Count = Field(default=256, ge=1, description="held-out examples per measurement at most")
    every: Count | None = Field(
        default=None, ge=1, description="steps between measurements; only before and after if null"
    )


class PosttrainEngine(Section):
    """What it runs on: one process, one device."""

    precision: Precision = Field(default="fp32", description="of the compute; weights stay fp32 masters")
    device: Device = Field(default="auto", description="auto takes a GPU where there is one")
    threads: int | None = Field(default=None, ge=1, description="CPU threads; as torch finds them if null")
    checkpointing: bool = Field(
        default=False, description="keep the input of each decoder block and compute the rest again (slower)"
    )


class PosttrainSave(Section):
    """The run folder."""

    dir: str | None = Field(default=None, min_length=1, description="run folder; runs/RECIPE-MODEL if null")
    every: Count | None = Field(default=None, ge=1, description="steps between saved ones; only at the end if null")
    keep: int = Field(default=2, ge=1, description="saved steps kept, the newest ones")


class PosttrainRecipe(Placed):
    """A whole recipe of training after conversion."""

    schema_version: Literal[1] = Field(alias="schema", description="version of this format: 1")
    method: Literal["sft", "dpo", "grpo"] = Field(
        description="sft: completions are learnt; dpo: which of two is preferred; grpo: what a reward can check"
    )
    model: str = Field(min_length=1, description="converted model: an export of relinear, a folder or a Hub id")
    data: PosttrainData = Field(description="the examples")
    train: Literal["all", "no-ffn", "mixers+norms", "mixers", "lora"] = Field(
        default="all", description="what learns; all but `all` freeze the feed-forward blocks, lora all but adapters"
    )
    lora: LoraSection | None = Field(default=None, description="with train: lora, the adapters; its defaults if null")
    steps: Count = Field(ge=1, description="optimizer steps")
    batch: int = Field(
        default=16, ge=1, description="prompts per optimizer step; grpo samples `generations` completions for each"
    )
    micro_batch: int | None = Field(
        default=None, ge=1, description="prompts per forward pass, a divisor of batch; batch if null"
    )
    max_length: Length = Field(
        default="auto", description="tokens of prompt and completion that are kept; auto: the model's context"
    )
    lr: float = Field(default=1e-5, gt=0, le=1, description="highest learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="way from lr to 0; constant never leaves lr"
    )
    warmup: int = Field(default=0, ge=0, description="optimizer steps from 0 to lr")
    betas: Betas = Field(default=(0.9, 0.999), description="AdamW's decay of the moments")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="AdamW's decoupled weight decay")
    clip: float | None = Field(default=1.0, gt=0, description="largest gradient norm; null never clips")
    dpo: DpoSection | None = Field(default=None, description="with method: dpo; its defaults if null")
    grpo: GrpoSection | None = Field(default=None, description="with method: grpo; its defaults if null")
    eval: PosttrainEval = Field(default_factory=PosttrainEval, description="what is measured")
    engine: PosttrainEngine = Field(default_factory=PosttrainEngine, description="what it runs on")
    save: PosttrainSave = Field(default_factory=PosttrainSave, description="run folder")
    seed: Seed = Field(default=0, lt=2**32, description="of everything that is random")
    max_hours: float | None = Field(
        default=None, gt=0, description="save and stop after so many hours; --resume goes on"
    )

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _rules(self) -> PosttrainRecipe:
        found = check(self.to_dict())
        if found:
            raise Faults(found)
        return self


def check(raw: Any) -> list[tuple[tuple[str | int, ...], str]]:
    """What no single key can say, as (path, message)."""
    if not isinstance(raw, dict):
        return []
    found: list[tuple[tuple[str | int, ...], str]] = []
    method = str(raw.get("method")).lower()
    for section in ("dpo", "grpo"):
        if raw.get(section) is not None and method in METHODS and method != section:
            found.append(((section,), f"the method is {method}, so nothing reads this; remove it"))
    if raw.get("lora") is not None and raw.get("train") != "lora":
        found.append((("lora",), "adapters train with train: lora only; write that too, or remove this"))
    batch, micro = raw.get("batch", 16), raw.get("micro_batch")
    if isinstance(batch, int) and isinstance(micro, int) and micro > 0 and batch % micro:
        found.append((("micro_batch",), f"{micro} does not divide batch, which is {batch}"))
    data = raw.get("data")
    if isinstance(data, dict):
        found += _data(data)
    return found


def _data(data: dict[str, Any]) -> list[tuple[tuple[str | int, ...], str]]:
    found: list[tuple[tuple[str | int, ...], str]] = []
    made, source = data.get("arithmetic"), data.get("source")
    if isinstance(made, dict):
        low, high = made.get("low", 0), made.get("high", 20)
        if isinstance(low, int) and isinstance(high, int) and low >= high:
            found.append((("data", "arithmetic", "low"), f"{low} is not below high, which is {high}"))
        if source not in (None, ARITHMETIC):
            found.append((("data", "arithmetic"), f"the source is {source}, so nothing reads this; remove it"))
    if source == ARITHMETIC and isinstance(data.get("valid"), str):
        found.append((("data", "valid"), "a share of the problems is held out; write for example 0.1"))
    return found


KIND = loader.Kind(PosttrainRecipe, check, "posttrain/", ("data",), "relinear show posttrain/sft")


def is_posttrain(name_or_path: str) -> bool:
    """Whether a recipe is one of this kind: by its name `posttrain/NAME`, its `method`, or what it extends.

    Raises:
        UserError: no such recipe, or not YAML.
    """
    if loader.inside(name_or_path):
        return name_or_path in KIND.shipped()
    found = yaml_text.read(loader.text_of(name_or_path), name_or_path, lambda path: True).value
    if not isinstance(found, dict):
        return False
    base = found.get("extends")
    return "method" in found or (isinstance(base, str) and KIND.named(base) in KIND.shipped())


def load(name_or_path: str, overrides: list[str] | None = None) -> PosttrainRecipe:
    """A validated recipe with everything written out.

    Args:
        name_or_path: `sft`, `dpo`, `grpo` (also as `posttrain/sft`), or the path of a YAML file.
        overrides: `key=value` changes, applied in order.

    Raises:
        UserError: every mistake, one per line, each with its place.
    """
    name = KIND.named(name_or_path)
    recipe = loader.load_as(KIND, name, overrides)
    model = Path(recipe.model).expanduser()
    of = model.resolve().parent.name if model.name == "export" else model.name
    folder = recipe.save.dir or f"runs/{Path(name).stem}-{of}"
    update: dict[str, Any] = {"save": recipe.save.model_copy(update={"dir": folder})}
    if recipe.data.source == ARITHMETIC and recipe.data.arithmetic is None:
        update["data"] = recipe.data.model_copy(update={"arithmetic": ArithmeticSection()})
    if recipe.method == "dpo" and recipe.dpo is None:
        update["dpo"] = DpoSection()
    if recipe.method == "grpo" and recipe.grpo is None:
        update["grpo"] = GrpoSection()
    if recipe.train == "lora" and recipe.lora is None:
        update["lora"] = LoraSection()
    return recipe.model_copy(update=update)
