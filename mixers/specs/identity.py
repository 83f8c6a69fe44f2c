"""Attention replaced by what each token sees of itself, without torch: options, tensors, FLOPs; there is no state."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Floats, Geometry, MixerOptions, MixerSpec, TensorSpec, option


@dataclass(frozen=True)
class IdentityOptions(MixerOptions):
    """Options of `identity`."""

    skip: bool = option(False, "give zero instead, as if the layer had no attention at all; nothing is left to train")


class IdentitySpec(MixerSpec):
    """No mixing: attention with all its weight on the token itself. For ablations."""

    name = "identity"
    title = "Identity (no mixing, for ablations)"
    paper = "https://arxiv.org/abs/2511.02651"
    options = IdentityOptions
    aliases = ("no-mixing", "no_mixing")
    reads = ("v_proj.weight",)
    kept = Floats(1.0)
    most = Floats(1.0, 0.0, 6.0)

    @staticmethod
    def reach(options: IdentityOptions) -> int:
        """None but itself."""
        return 0

    @staticmethod
    def drops(geometry: Geometry, options: IdentityOptions) -> tuple[str, ...]:
        """Queries and keys: with one token to look at, their scores do not matter. With `skip` everything."""
        weights = [f"{part}_proj.weight" for part in ("qkvo" if options.skip else "qk")]
        biases = [f"{part}_proj.bias" for part in ("qkv" if options.skip else "qk") if geometry.qkv_bias]
        biases += ["o_proj.bias"] if options.skip and geometry.o_bias else []
        return (*weights, *biases, *([f"{part}_norm.weight" for part in "qk"] if geometry.qk_norm else []))

    @staticmethod
    def no_matrix(options: IdentityOptions) -> str | None:
        """See the base class."""
        return "it mixes no tokens"

    @staticmethod
    def tensors(geometry: Geometry, options: IdentityOptions, *, first: bool, position: float) -> list[TensorSpec]:
        """The table; see the base class. Every layer has the same."""
        if options.skip:
            return []
        shapes: dict[str, tuple[int, ...]] = {"v_proj.weight": (geometry.kv_size, geometry.hidden_size)}
        if geometry.qkv_bias:
            shapes["v_proj.bias"] = (geometry.kv_size,)
        shapes["o_proj.weight"] = (geometry.hidden_size, geometry.inner_size)
        if geometry.o_bias:
            shapes["o_proj.bias"] = (geometry.hidden_size,)
        return [TensorSpec(name, shape, "copied", name) for name, shape in shapes.items()]

    @staticmethod
    def flops_per_token(geometry: Geometry, options: IdentityOptions) -> int:
        """The value and output projections."""
        return 0 if options.skip else 2 * geometry.hidden_size * (geometry.kv_size + geometry.inner_size)

    @staticmethod
    def state_bytes(geometry: Geometry, options: IdentityOptions) -> int:
        """Nothing is carried."""
        return 0
