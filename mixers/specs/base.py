"""What every mixer says of itself without torch: its geometry, its options and the table of its tensors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

Source = Literal["copied", "derived", "new"]


@dataclass(frozen=True)
class Geometry:
    """The attention that a mixer replaces, as the family's config.json states it.

    Attributes:
        hidden_size: width D of the layer input and output.
        num_heads: query heads H.
        num_kv_heads: key/value heads; divides `num_heads`.
        head_dim: channels per head; H * head_dim need not equal D (Qwen3).
        qkv_bias: q, k and v projections carry a bias (Qwen2).
        o_bias: the output projection carries a bias.
        qk_norm: RMSNorm on queries and keys before the rotary embedding: "" none, "head" over the channels of each
            head (Qwen3), "full" over all heads at once, before they are split (OLMo 2).
        norm_offset: that norm multiplies by 1 + weight (Gemma 3).
        norm_eps: epsilon of that norm.
        rope: queries and keys are rotated.
        rotary: which channels turn together: "half" (i and i + d/2, Llama) or "interleaved" (2i and 2i + 1, Cohere).
        scale: factor of the scores q . k; None is head_dim ** -0.5.
        softcap: scores are bounded by softcap * tanh(score / softcap) (Gemma 2); None where they are not.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: str = ""
    norm_offset: bool = False
    norm_eps: float = 1e-6
    rope: bool = True
    rotary: str = "half"
    scale: float | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")

    @property
    def query_scale(self) -> float:
        """Factor of the scores q . k."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def inner_size(self) -> int:
        """Channels over all query heads: H * head_dim."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Channels over all key/value heads."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class TensorSpec:
    """One row of a mixer's tensor table.

    Attributes:
        name: parameter name inside the mixer, e.g. `q_proj.weight`.
        shape: its shape.
        source: `copied` (equal to a tensor of the attention), `derived` (computed from one) or `new`.
        origin: the attention tensor it comes from (`q_proj.weight`), or how a new one is initialised, in words.
        fp32: kept in fp32 whatever the model's dtype (decays and their like).
    """

    name: str
    shape: tuple[int, ...]
    source: Source
    origin: str
    fp32: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple = (),
    samples: tuple = (),
) -> Any:
    """A dataclass field of a mixer's options.

    Args:
        default: its value where a recipe says nothing.
        help: what it does, in one line.
        low: lower bound, inclusive.
        high: upper bound, inclusive.
        choices: the values there are, where they can be listed.
        samples: values that the contract tests try, where the bounds would be out of their reach.
    """
    meta = {"help": help, "low": low, "high": high, "choices": choices, "samples": samples}
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True)
class MixerOptions:
    """Base of every mixer's options. Fields are declared with `option`: typed, bounded and documented."""

    form: str = option(
        "auto",
        "form of the recurrence: step by step, chunked in plain torch, fused kernels, or chosen for the device",
        choices=("auto", "chunked", "recurrent", "fused"),
    )

    @classmethod
    def parse(cls, values: dict[str, Any]) -> MixerOptions:
        """Options from a plain dict, as a recipe or config.json holds them.

        Raises:
            ValueError: naming every unknown key, wrong type and value out of bounds, one per line.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        problems = []
        for key, value in values.items():
            if key not in fields:
                problems.append(f"{key}: unknown option (known: {', '.join(fields)})")
                continue
            problem = _problem(fields[key], value)
            if problem:
                problems.append(f"{key}: {problem}")
        if problems:
            raise ValueError("\n".join(problems))
        options = cls(**{k: _coerce(fields[k], v) for k, v in values.items()})
        problems = options.conflicts()
        if problems:
            raise ValueError("\n".join(problems))
        return options

    def conflicts(self) -> list[str]:
        """Options that do not go together, one message each; a mixer overrides this where it has such."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json."""
        return dataclasses.asdict(self)


def _coerce(field: dataclasses.Field, value: Any) -> Any:
    return float(value) if field.type == "float" and isinstance(value, int) else value


def _problem(field: dataclasses.Field, value: Any) -> str | None:
    """What is wrong with `value` for `field`, or None."""
    names = str(field.type).split(" | ")
    accepted: dict[str, tuple[type, ...]] = {
        "bool": (bool,),
        "int": (int,),
        "float": (float, int),
        "str": (str,),
        "None": (type(None),),
    }
    kinds = tuple(t for name in names for t in accepted[name])
    if not isinstance(value, kinds) or (isinstance(value, bool) and "bool" not in names):
        return f"expected {field.type}, found {value!r}"
    meta = field.metadata
    if meta["choices"] and value not in meta["choices"]:
        return f"expected one of {', '.join(map(str, meta['choices']))}, found {value!r}"
    if value is None or isinstance(value, str):
        return None
    if meta["low"] is not None and value < meta["low"]:
        return f"must be at least {meta['low']}, found {value}"
    if meta["high"] is not None and value > meta["high"]:
        return f"must be at most {meta['high']}, found {value}"
    return None


class Floats(NamedTuple):
    """Floats per token of one layer's forward and backward: fitted to what torch's allocator gave on a CPU at widths of
    256 to 768 in fp32, within 10 %.

    Attributes:
        inner: per channel of all query heads.
        kv: per channel of all key/value heads.
        hidden: per channel of the layer input.
        state: per number of the state, divided by the tokens of a chunk.
    """

    inner: float
    kv: float = 0.0
    hidden: float = 0.0
    state: float = 0.0

    def total(self, geometry: Geometry, chunk: int) -> float:
        """Floats per token."""
        state = geometry.inner_size * geometry.head_dim / chunk
        widths = self.inner * geometry.inner_size + self.kv * geometry.kv_size + self.hidden * geometry.hidden_size
        return widths + self.state * state


class MixerSpec:
    """A mixer without torch. A subclass in `specs/NAME.py` fills the class attributes and the methods."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    options: ClassVar[type[MixerOptions]]
    aliases: ClassVar[tuple[str, ...]] = ()
    softmax: ClassVar[bool] = False
    """All of the layer's output is softmax attention, scaled and capped as the teacher's."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Matrices that multiply the layer input as it is: in align, where it is given, no gradient goes through them."""
    kept: ClassVar[Floats] = Floats(20.0, 0.5, 0.3, 0.7)
    """What plain torch keeps of a token for the backward pass, at default options and without a window; the largest
    of all, RWKV-7's, where a mixer does not say."""
    most: ClassVar[Floats] = Floats(27.4, 10.9, 1.5, 1.6)
    """The most that forward, loss and backward of one layer alone hold at once, likewise; weights left out."""
    near: ClassVar[tuple[tuple[float, float], tuple[float, float]]] = (1.1, 3.1), (1.1, 2.1)
    """What a softmax window adds to both: floats per score, and per key/value channel that a block copies."""

    @staticmethod
    def layer_type(options: Any) -> str:
        """What a layer with this mixer is in transformers' vocabulary of `layer_types`."""
        return "hybrid_sliding" if getattr(options, "window", 0) else "linear_attention"

    @staticmethod
    def refusal(geometry: Geometry, options: Any) -> str | None:
        """Why the mixer cannot stand in for this attention, and what could; None where it can."""
        return None

    @staticmethod
    def reach(options: Any) -> int | None:
        """How many tokens back an output of one layer can depend on; None where there is no limit."""
        return None

    @staticmethod
    def no_matrix(options: Any) -> str | None:
        """Why what each head does is no (tokens x tokens) matrix on its values; None where it is one."""
        return None

    @staticmethod
    def drops(geometry: Geometry, options: Any) -> tuple[str, ...]:
        """The attention's tensors that transfer leaves behind on purpose, by name; any other must have a row."""
        if geometry.qkv_bias and not getattr(options, "qkv_bias", True):
            return tuple(f"{part}_proj.bias" for part in "qkv")
        return ()

    @staticmethod
    def tensors(geometry: Geometry, options: Any, *, first: bool, position: float) -> list[TensorSpec]:
        """The table of the mixer's parameters, by name (their order is that of the card, not of the module).

        Args:
            geometry: of the attention being replaced.
            options: the mixer's own options.
            first: True for the lowest layer that this mixer takes (RWKV-7: it has no value residual).
            position: layer index / (layers - 1), for depth-dependent initial values.
        """
        raise NotImplementedError

    @staticmethod
    def flops_per_token(geometry: Geometry, options: Any) -> int:
        """Forward FLOPs per token in the chunked form (a multiply-add counts two), projections included."""
        raise NotImplementedError

    @staticmethod
    def backward_excess(geometry: Geometry, options: Any) -> int:
        """FLOPs per token of the backward pass beyond twice the forward's: what recurrences compute anew, and more."""
        return 0

    @classmethod
    def backward_flops(cls, geometry: Geometry, options: Any, input_gradient: bool = True) -> int:
        """Backward FLOPs per token where all of the mixer trains, counted as `flops_per_token`.

        Args:
            geometry: of the attention being replaced.
            options: the mixer's own.
            input_gradient: the layer input takes a gradient: glue; not in align, where the teacher gives it.
        """
        flops = 2 * cls.flops_per_token(geometry, options) + cls.backward_excess(geometry, options)
        return flops if input_gradient else flops - cls.input_flops(geometry, options)

    @classmethod
    def input_flops(cls, geometry: Geometry, options: Any) -> int:
        """FLOPs per token of the products with the layer input as it is (`reads`), in one direction."""
        rows = cls.tensors(geometry, options, first=False, position=0.5)
        return 2 * sum(row.numel for row in rows if row.name in cls.reads)

    @staticmethod
    def state_bytes(geometry: Geometry, options: Any) -> int:
        """Bytes that one sequence carries from token to token in one layer (fp32 state, plus any short buffers)."""
        raise NotImplementedError
