"""Where the baselines come from: transformers' torch fallbacks and fla's naive functions, as they are installed.

Nothing of theirs is copied here. Functions are looked up by name in the installed version, and what cannot be found is
a `Missing`, which becomes a row of the table. Where a wrapper would pick a fused kernel, the torch function inside is
taken.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Missing(Exception):
    """A baseline, or an op, that this installation does not have. The message says what is missing."""


def fallback(model: str, name: str) -> Callable[..., Any]:
    """The torch function `name` of `transformers.models.MODEL`.

    Raises:
        Missing: the installed transformers has no such model or function.
    """
    try:
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        return inspect.unwrap(getattr(module, name))
    except (ImportError, AttributeError):
        import transformers

        raise Missing(f"transformers {transformers.__version__} has no {model}.{name}") from None


def default(model: str, config: str, field: str) -> Any:
    """What a configuration of transformers says when nobody chooses, such as a chunk length.

    Raises:
        Missing: the installed transformers has no such model or field.
    """
    try:
        module = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
        return getattr(getattr(module, config)(), field)
    except (ImportError, AttributeError):
        raise Missing(f"transformers has no {model}.{config}.{field}") from None


def fla_root(folder: str | None) -> Path | None:
    """The folder of flash-linear-attention's `ops`: under `folder`, or of the installed package; None: not installed.

    Raises:
        FileNotFoundError: `folder` is given and holds no `ops/kda/naive.py`, neither directly nor under `fla`.
    """
    if folder is not None:
        for root in (Path(folder) / "fla" / "ops", Path(folder) / "ops"):
            if (root / "kda" / "naive.py").is_file():
                return root
        raise FileNotFoundError(f"{folder}: holds no fla/ops/kda/naive.py")
    spec = importlib.util.find_spec("fla")
    places = spec.submodule_search_locations if spec else None
    return next((Path(place) / "ops" for place in places or () if (Path(place) / "ops").is_dir()), None)


def naive(root: Path | None, file: str, name: str) -> Callable[..., Any]:
    """The function `name` of `fla/ops/FILE.py`, loaded from its file: importing `fla.ops` itself would need triton.

    Raises:
        Missing: flash-linear-attention is not there, has no such function, or a package that it imports is missing.
    """
    if root is None:
        raise Missing("flash-linear-attention is not installed; --fla FOLDER names its sources")
    path = root / f"{file}.py"
    spec = importlib.util.spec_from_file_location(f"fla_{file.replace('/', '_')}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise Missing(f"this flash-linear-attention has no ops/{file}.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise Missing(f"ops/{file}.py cannot be loaded: {error}") from None
    if not hasattr(module, name):
        raise Missing(f"this flash-linear-attention has no {name} in ops/{file}.py")
    return getattr(module, name)


def lightning(heads: int, dim: int) -> Any:
    """MiniMax's lightning attention, its recurrence alone: the projections, activation and norm pass on what they get.

    The module's own forward runs, on (B, T, heads * 3 * dim) with q, k and v of a head side by side. Of what surrounds
    the recurrence only `sigmoid(gate) * output` remains, with a gate that is one number: one pass over the output.

    Raises:
        Missing: the installed transformers has no MiniMax.
    """
    build = fallback("minimax", "MiniMaxLightningAttention")
    configuration = importlib.import_module("transformers.models.minimax.configuration_minimax")
    config = configuration.MiniMaxConfig(hidden_size=dim, num_attention_heads=heads, num_hidden_layers=2, head_dim=dim)
    module = build(config, 0).requires_grad_(False)
    for name in ("qkv_proj", "act_fn", "norm", "out_proj"):
        setattr(module, name, torch.nn.Identity())
    module.output_gate = _Open()
    return module


class _Open(torch.nn.Module):
    """A gate that lets everything through."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_full((), float("inf"))


class LightningCache:
    """The two calls that MiniMax's lightning attention makes on its cache.

    Attributes:
        state: (B, H, dk, dv).
    """

    def __init__(self, state: torch.Tensor) -> None:
        self.state = state

    def get_linear_cache(self, layer: int) -> torch.Tensor:
        """The state, whatever the layer."""
        return self.state

    def set_linear_cache(self, layer: int, state: torch.Tensor) -> None:
        """Take the next state."""
        self.state = state


def ours(name: str) -> Any:
    """The record of forms of one of our own ops.

    Raises:
        Missing: no such op.
    """
    try:
        return importlib.import_module(f"..mixers.ops.{name}", __package__).OP
    except (ImportError, AttributeError):
        raise Missing(f"mixers/ops/{name}.py has no OP") from None
