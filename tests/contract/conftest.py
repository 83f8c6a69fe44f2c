"""What the contract suite needs: every registered mixer in every option, in a small stack, in every geometry.

A new mixer is covered by being registered; nothing here knows any mixer by name.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from relinear.mixers import registry
from relinear.mixers.base import Mixer, MixerInputs, State
from relinear.mixers.specs.base import Geometry

GEOMETRIES = {
    "llama-mha": Geometry(24, 3, 3, 8),
    "llama-gqa": Geometry(32, 4, 2, 8),
    "llama-mqa": Geometry(32, 4, 1, 8),
    "qwen2": Geometry(32, 4, 2, 8, qkv_bias=True),
    "qwen3": Geometry(32, 6, 3, 10, qk_norm="head"),
    "everything": Geometry(20, 4, 2, 14, qkv_bias=True, o_bias=True, qk_norm="head"),
    "no-rope": Geometry(32, 4, 2, 8, rope=False),
    "olmo2": Geometry(24, 4, 2, 6, qk_norm="full"),
    "gemma": Geometry(24, 4, 2, 6, qk_norm="head", norm_offset=True, scale=0.2, softcap=50.0),
    "cohere": Geometry(24, 4, 2, 6, rotary="interleaved"),
}


def variants(name: str, structural: bool) -> list[dict[str, Any]]:
    """The defaults, then every option alone at every other value worth a test: each choice, each bound.

    `structural`: only options that change what is computed (switches, named choices, counts), not initial values, sizes
    of projections or the length of chunks.
    """
    found: list[dict[str, Any]] = [{}]
    for f in dataclasses.fields(registry.spec(name).options):
        if f.name == "form":
            continue
        kinds, meta = str(f.type).split(" | "), f.metadata
        if structural and ("float" in kinds or ("int" in kinds and "None" in kinds and not meta["samples"])):
            continue
        values = list(meta["choices"] or meta["samples"])
        if not values and "bool" in kinds:
            values = [False, True]
        if not values:
            values = [value for value in (meta["low"], meta["high"]) if value is not None]
            values = [int(value) if "int" in kinds else float(value) for value in values]
        found += [{f.name: value} for value in values if value != f.default and value is not None]
    return found


MIXERS = registry.names()


def params(structural: bool) -> list:
    """Every mixer in every variant."""
    return [
        pytest.param(name, options, id=f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items()) or 'defaults'}")
        for name in MIXERS
        for options in variants(name, structural)
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests ask for `name` (every mixer), with it `options` or `any_options` (its variants), and `geometry` (all)."""
    if {"name", "options"} <= set(metafunc.fixturenames):
        metafunc.parametrize(("name", "options"), params(structural=True))
    elif {"name", "any_options"} <= set(metafunc.fixturenames):
        metafunc.parametrize(("name", "any_options"), params(structural=False))
    elif "name" in metafunc.fixturenames:
        metafunc.parametrize("name", MIXERS)
    if "geometry" in metafunc.fixturenames:
        metafunc.parametrize("geometry", [pytest.param(g, id=i) for i, g in GEOMETRIES.items()])


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised memory is NaN, so that nothing can lean on its being zero."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class FakeCache:
    """The part of a cache that `Mixer.forward` uses."""

    class Layer:
        def __init__(self) -> None:
            self.state: State | None = None
            self.tokens = 0
            self.history: list[State] = []

        def read(self) -> State | None:
            return self.state

        def write(self, state: State, tokens: int) -> None:
            self.state, self.tokens = state, self.tokens + tokens

        def record(self, history: list[State], tokens: int) -> None:
            self.history = history
            self.write(history[-1], tokens)

    def __init__(self, layers: int) -> None:
        self.layers = [FakeCache.Layer() for _ in range(layers)]


class Stack(torch.nn.Module):
    """Two layers of a mixer with residuals; the lower one is its `first`, so that links between layers are tested."""

    def __init__(
        self, name: str, options: dict[str, Any], geometry: Geometry, form: str = "auto", seed: int = 0
    ) -> None:
        super().__init__()
        self.geometry = geometry
        parsed = registry.spec(name).options.parse({**options, "form": form})
        build = registry.module(name)
        self.layers = torch.nn.ModuleList([build(geometry, parsed, i, 2, i == 0) for i in range(2)])
        generator = torch.Generator().manual_seed(seed)
        for layer in self.mixers():
            layer.reset_parameters(generator)
        with torch.no_grad():
            for parameter in self.parameters():
                scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.3
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)

    def mixers(self) -> list[Mixer]:
        return list(self.layers)  # type: ignore[arg-type]

    def beyond(self, length: int) -> int:
        """So many tokens more than the mixer's window, if it has one: what comes before the window takes part too."""
        return length + getattr(self.mixers()[0].options, "window", 0)

    def rotary(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not self.geometry.rope:
            return None
        half = self.geometry.head_dim // 2
        angles = positions.double()[..., None] * 100.0 ** (-torch.arange(half) / half)
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
        cache: FakeCache | None = None,
        record: int = 0,
    ) -> torch.Tensor:
        if positions is None:
            positions = torch.arange(x.shape[1]).expand(x.shape[:2])
        rotary = self.rotary(positions, x.dtype)
        inputs = MixerInputs(padding, segments, cache, record)
        for layer in self.layers:
            x = x + layer(x, position_embeddings=rotary, mixer_inputs=inputs)[0]
        return x


@pytest.fixture
def make_stack():
    return Stack


@pytest.fixture
def make_cache():
    return FakeCache


@pytest.fixture
def gqa() -> Geometry:
    return GEOMETRIES["llama-gqa"]


@pytest.fixture
def small() -> Geometry:
    """Biases, norms, groups and an odd head size at once."""
    return GEOMETRIES["everything"]


def tokens(batch: int, length: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def make_tokens():
    return tokens


@pytest.fixture
def close():
    """Assert that two tensors are equal to within `tolerance` of the expected one's largest value.

    Where that is the rounding of a zero (the gradient of what has no influence), to within `tolerance` itself.
    """

    def check(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "") -> None:
        assert found.shape == expected.shape, f"{what}: {tuple(found.shape)}, expected {tuple(expected.shape)}"
        assert found.isfinite().all(), f"{what}: not finite"
        found, expected = found.detach().double(), expected.detach().double()
        largest = float(expected.abs().max())
        error = float((found - expected).abs().max()) / (largest if largest > 1e-13 else 1.0)
        assert error <= tolerance, f"{what}: relative error {error:.1e} above {tolerance:.0e}"

    return check
