"""Which students a published architecture can express, and with which options of the mixer. Torch-free.

A format is an entry of `FORMATS`; what it does to the tensors is in the module of its name. The table for people is in
docs/reference/doors.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from ...mixers import registry
from ...mixers.specs import rwkv6, rwkv7
from ...mixers.specs.base import Geometry
from .. import families
from ..errors import UserError
from ..modeling.config import mixer_plan

Plan = Mapping[int, tuple[str, Mapping[str, Any]]]


class Student(NamedTuple):
    """What is asked of a student.

    Attributes:
        family: transformers' model_type of the teacher.
        config: the teacher's config.json, or that of an exported folder.
        plan: layer -> (mixer, options) of the converted layers.
    """

    family: str
    config: Mapping[str, Any]
    plan: Plan

    @property
    def layers(self) -> int:
        """How many there are."""
        return self.config["num_hidden_layers"]

    def geometry(self, layer: int) -> Geometry:
        """The attention that stood in a layer."""
        return families.FAMILIES[self.family].geometry(self.config, layer)

    def options(self, layer: int) -> Any:
        """Of the mixer in a converted layer."""
        name, options = self.plan[layer]
        return registry.spec(name).options.parse(dict(options))


def of_folder(config: Mapping[str, Any]) -> Student:
    """The student that an exported folder's config.json describes."""
    plain = {**config, "layer_types": config["attention_types"]}
    return Student(config["base_model_type"], plain, mixer_plan(SimpleNamespace(**config)))


def read_student(folder: Path) -> tuple[Student, dict[str, Any]]:
    """What is asked of the student in an exported folder, and its config.json.

    Raises:
        UserError: no exported student is there.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no exported student is there ({error}). Write one: relinear export RUN") from error
    if config.get("model_type") != "relinear":
        raise UserError(f"{folder}: model_type {config.get('model_type')!r}; --format takes students of relinear's own")
    return of_folder(config), config


class Demand(NamedTuple):
    """An option of the mixer and its values with which the pair is exact, the one to choose first; and why so."""

    option: str
    values: tuple[Any, ...]
    why: str


@dataclass(frozen=True)
class Format:
    """A published architecture.

    Attributes:
        name: as on the command line.
        title: what it is called elsewhere.
        architecture: the class that its config.json names.
        mixer: of every layer.
        demands: on the mixer's options.
        served: who runs it.
        next: what to type next, with {folder}.
        sizes: demands that depend on the width: student, layer -> sentences on what stands in the way.
        choose: further options for a recipe, so that the sizes fit.
    """

    name: str
    title: str
    architecture: str
    mixer: str
    demands: tuple[Demand, ...]
    served: str
    next: str
    sizes: Callable[[Student, int], list[str]] = lambda student, layer: []
    choose: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> str:
        """The options that make the pair exact, where they are not the mixer's defaults, as a recipe holds them."""
        values = {demand.option: demand.values[0] for demand in self.demands} | dict(self.choose)
        usual = registry.spec(self.mixer).options().to_dict()
        plain = ", ".join(f"{name}: {_yaml(value)}" for name, value in values.items() if usual[name] != value)
        return f"mixers: {{{self.mixer}: {{{plain}}}}}"


BLOCKS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Families whose blocks are Qwen2's but for attention: RMSNorm before attention and before a SwiGLU without biases."""

_NO_ROPE = Demand("rope", (False,), "it turns neither queries nor keys")
_NO_WINDOW = Demand("window", (0,), "it has no softmax window beside the recurrence")
_NO_CONV = Demand("conv", (0,), "it has no convolution")
_NO_UNIT = Demand("qk_norm", ("none",), "queries and keys keep their length")
_NO_BIAS = Demand("qkv_bias", (False,), "its projections have no biases")

ARWKV7_RANKS = {"w": 64, "a": 64, "v": 32, "g": 128}
"""What the converter of llama.cpp takes for granted; smaller maps are filled up with zeros."""
GLA_RANK = 16


def _arwkv7_sizes(student: Student, layer: int) -> list[str]:
    geometry, options = student.geometry(layer), student.options(layer)
    found = rwkv7.ranks(geometry.hidden_size, options)
    # A gate that starts at one has a constant beside its map: one more row of it.
    limits = ARWKV7_RANKS | {"g": 127} if options.gate_init == "identity" else ARWKV7_RANKS
    names = {"w": "decay_rank", "a": "removal_rank", "v": "value_rank", "g": "gate_rank"}
    problems = [
        f"mixers.rwkv7.{names[part]} is {rank}; at most {limits[part]}: the format's maps have that rank"
        for part, rank in found.items()
        if rank > limits[part] and (part != "v" or options.value_residual)
    ]
    if geometry.head_dim % 64:
        problems.append(
            f"heads of {geometry.head_dim}: llama.cpp's code for this mixer takes multiples of 64, and computes other "
            "sizes wrongly without a word"
        )
    elif options.group_norm and geometry.head_dim != 64:
        problems.append(f"group_norm: true with heads of {geometry.head_dim}; its epsilon is that of heads of 64")
    return problems


def _gla_sizes(student: Student, layer: int) -> list[str]:
    rank = student.options(layer).decay_rank
    return (
        [f"mixers.gla.decay_rank is {rank}; at most {GLA_RANK}: the format's map has that rank"]
        if rank > GLA_RANK
        else []
    )


_LLAMA_CPP = (
    "llama.cpp and what is built on it (Ollama, LM Studio), through its convert_hf_to_gguf.py",
    "python llama.cpp/convert_hf_to_gguf.py {folder}",
)
_FLA = (
    "flash-linear-attention's model classes",
    'in Python, import fla, then transformers.AutoModelForCausalLM.from_pretrained("{folder}")',
)

FORMATS: dict[str, Format] = {
    found.name: found
    for found in (
        Format(
            "rwkv6qwen2", "RWKV6Qwen2 (QRWKV6)", "RWKV6Qwen2ForCausalLM", "rwkv6",
            (
                Demand("token_shift", (True,), "five inputs, each a mix of the token and the one before"),
                _NO_ROPE, _NO_UNIT,
                Demand("gate", ("identity", "sigmoid"), "the gate is a sigmoid"),
                Demand("out_norm", ("none",), "outputs are not normalised"),
                _NO_CONV, _NO_WINDOW,
            ),
            *_LLAMA_CPP,
        ),
        Format(
            "arwkv7", "ARWKV-7 (RwkvHybrid)", "RwkvHybridForCausalLM", "rwkv7",
            (
                _NO_ROPE, _NO_BIAS,
                Demand("balance_state", (False,), "keys are written as RWKV-7 does, with k_k and k_a"),
                Demand("unit_keys", (False,), "receptance and keys keep their length"),
                _NO_CONV, _NO_WINDOW,
            ),
            *_LLAMA_CPP, _arwkv7_sizes, {"value_rank": 32, "gate_rank": 127},
        ),
        Format(
            "fla-gla", "GLA of flash-linear-attention", "GLAForCausalLM", "gla",
            (
                _NO_ROPE, _NO_UNIT, _NO_BIAS,
                Demand("balance", (False,), "keys are written as they are"),
                Demand("temperature", (16.0,), "the log-decay is divided by 16"),
                Demand("out_norm", ("rms",), "each head's output is normalised"),
                Demand("gate", ("silu", "none"), "the gate is silu, or there is none"),
                _NO_CONV, _NO_WINDOW,
            ),
            *_FLA, _gla_sizes,
        ),
        Format(
            "fla-gated_deltanet", "Gated DeltaNet of flash-linear-attention", "GatedDeltaNetForCausalLM",
            "gated_deltanet",
            (
                _NO_ROPE, _NO_BIAS,
                Demand("activation", ("silu",), "queries, keys and values pass silu"),
                Demand("unit_q", (True,), "queries are of unit length"),
                Demand("beta_bias", (False,), "the write strength has no bias"),
                Demand("out_norm", ("rms",), "each head's output is normalised"),
                Demand("gate", ("identity", "silu", "sigmoid", "none"), "any of these gates"),
                _NO_WINDOW,
            ),
            *_FLA,
        ),
    )
}  # fmt: skip

IMPOSSIBLE = {
    "fla-rwkv7": (
        "flash-linear-attention's RWKV-7 has LayerNorms with biases and a squared-ReLU feed-forward block with token "
        "shift, which no family that relinear converts has. A student with mixer rwkv7 can be written as arwkv7"
    ),
    "fla-mamba2": (
        "flash-linear-attention's Mamba-2 has no feed-forward blocks, and every family that relinear converts has. "
        "Convert with gla or gated_deltanet for a format of that library"
    ),
}
"""Names that one may ask for, and why no student can be written so."""


def find(name: str) -> Format:
    """The format of a name.

    Raises:
        UserError: there is none, or none that any student could have; says why and which there are.
    """
    if name in IMPOSSIBLE:
        raise UserError(f"--format {name}: {IMPOSSIBLE[name]}")
    if name not in FORMATS:
        raise UserError(f"--format {name}: unknown. Published formats: {', '.join(FORMATS)}; without --format: ours")
    return FORMATS[name]


def obstacles(wanted: Format, student: Student) -> list[str]:
    """Everything that keeps a student from being written in a format, a sentence each; nothing where it is exact."""
    return [*_model(student), *_layers(wanted, student)]


def possible(student: Student) -> list[str]:
    """The formats that express the student exactly."""
    return [name for name, found in FORMATS.items() if not obstacles(found, student)]


def check(wanted: Format, student: Student, where: str) -> None:
    """Refuse a pair that is not exact.

    Raises:
        UserError: everything that stands in the way, what is possible instead, and the options for a new run.
    """
    problems = obstacles(wanted, student)
    if not problems:
        return
    others = possible(student)
    instead = f"It can be written as {', '.join(others)}: --format {others[0]}. " if others else ""
    listed = "\n  ".join(problems)
    raise UserError(
        f"{where}: {wanted.name} ({wanted.architecture}) cannot express this student exactly:\n  {listed}\n{instead}"
        f"relinear's own format always can: the same command without --format. For {wanted.name} convert all layers "
        f"(layers: {{mixer: {wanted.mixer}, convert: all}}) with\n  {wanted.recipe}"
    )


def _model(student: Student) -> list[str]:
    """What is wrong outside the mixers."""
    if student.family not in BLOCKS:
        return [f"family {student.family}: its blocks are not those of {', '.join(BLOCKS)}, which the format has"]
    family, config = families.FAMILIES[student.family], student.config
    problems = []
    if family.has_mlp_bias(config):
        problems.append("mlp_bias: the feed-forward blocks have biases, which the format has no room for")
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act: {config['hidden_act']}; the format's feed-forward block is silu")
    first = student.geometry(0)
    if first.inner_size != first.hidden_size:
        problems.append(f"heads of {first.head_dim} times {first.num_heads} are not the width, {first.hidden_size}")
    if first.o_bias:
        problems.append("attention_bias: the output projection has a bias, which the format has no room for")
    if first.qk_norm:
        problems.append("queries and keys are normalised by the teacher's own norms, which the format has not")
    return problems


def _layers(wanted: Format, student: Student) -> list[str]:
    """What is wrong with the converted layers, and that there are others."""
    problems: dict[str, list[int]] = {}

    def note(problem: str, layer: int) -> None:
        problems.setdefault(problem, []).append(layer)

    for layer in range(student.layers):
        if layer not in student.plan:
            note("keeps its attention; the format has linear layers only", layer)
        elif student.plan[layer][0] != wanted.mixer:
            note(f"holds {student.plan[layer][0]}; the format's mixer is {wanted.mixer}", layer)
        else:
            for problem in _demands(wanted, student, layer):
                note(problem, layer)
            if other := _unlike(wanted, student, layer):
                note(f"{', '.join(other)} differ from the first layer's; the format has one value for all", layer)
    every = student.layers
    return [_at(layers, every) + problem for problem, layers in problems.items()]


def _unlike(wanted: Format, student: Student, layer: int) -> list[str]:
    """Options, those of first values aside, that are not as in the first layer."""
    if student.plan.get(0, ("",))[0] != wanted.mixer:
        return []
    first, here = student.options(0).to_dict(), student.options(layer).to_dict()
    free = ("form", "chunk", "start", *(name for name, value in first.items() if type(value) is float))
    return [name for name in here if here[name] != first[name] and name not in free]


def _demands(wanted: Format, student: Student, layer: int) -> list[str]:
    options, geometry = student.options(layer), student.geometry(layer)
    problems = []
    for option, values, why in wanted.demands:
        found = getattr(options, option)
        moot = (option == "qkv_bias" and not geometry.qkv_bias) or (option == "rope" and not geometry.rope)
        if found not in values and not moot:
            fitting = " or ".join(map(_yaml, values))
            problems.append(
                f"mixers.{wanted.mixer}.{option} is {_yaml(found)}; the pair is exact with {fitting}: {why}"
            )
    return problems + wanted.sizes(student, layer)


def _at(layers: list[int], every: int) -> str:
    if len(layers) == every:
        return ""
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}: "


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def ranks(student: Student, layer: int) -> dict[str, int]:
    """Ranks of the low-rank maps of an RWKV layer: of RWKV-6 `w` (decay) and `shift`, of RWKV-7 as its spec says."""
    geometry, options = student.geometry(layer), student.options(layer)
    if student.plan[layer][0] == "rwkv7":
        return rwkv7.ranks(geometry.hidden_size, options)
    hidden = geometry.hidden_size
    return {"w": rwkv6.rank(hidden, options.decay_rank), "shift": rwkv6.rank(hidden, options.shift_rank)}
