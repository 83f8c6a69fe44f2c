"""The mixers that exist: one line each. Nothing is imported until it is asked for."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Mixer
    from .specs.base import MixerSpec

# name: (class in specs/NAME.py, class in NAME.py, other names that users type)
_MIXERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "rwkv7": ("RWKV7Spec", "RWKV7", ("rwkv-7", "rad-rwkv7", "qrwkv7", "goose")),
    "gated_deltanet": ("GatedDeltaNetSpec", "GatedDeltaNet", ("gdn", "gated-deltanet", "gated_delta_net")),
    "deltanet": ("DeltaNetSpec", "DeltaNet", ("delta-net", "delta_net", "delta")),
    "swa": ("SWASpec", "SWA", ("sliding-window", "sliding_window", "streaming-llm", "lighttransfer")),
    "hedgehog": ("HedgehogSpec", "Hedgehog", ("lolcats", "hedgehog-swa")),
    "liger": ("LigerSpec", "Liger", ("liger-gla", "liger_gla")),
    "gla": ("GLASpec", "GLA", ("gated-linear-attention", "gated_linear_attention")),
    "lightning": ("LightningSpec", "Lightning", ("lightning-attention", "lightning_attention", "retnet", "halo")),
    "mamba2": ("Mamba2Spec", "Mamba2", ("mamba-2", "ssd", "mohawk")),
    "rwkv6": ("RWKV6Spec", "RWKV6", ("rwkv-6", "rad-rwkv6", "qrwkv6", "finch")),
    "hgrn2": ("HGRN2Spec", "HGRN2", ("hgrn-2", "hgrn")),
    "kda": ("KDASpec", "KDA", ("kimi", "kimi-delta-attention", "kimi_delta_attention")),
    "mlstm": ("MLSTMSpec", "MLSTM", ("xlstm", "m-lstm", "matrix-lstm")),
    "titans": ("TitansSpec", "Titans", ("titans-lmm", "neural-memory", "lmm")),
    "mamba": ("MambaSpec", "Mamba", ("mamba1", "mamba-1", "s6", "mamba-in-the-llama")),
    "identity": ("IdentitySpec", "Identity", ("no-mixing", "no_mixing")),
}


def names() -> list[str]:
    """Every registered mixer's name, in the order of the registry."""
    return list(_MIXERS)


def resolve(name: str) -> str:
    """The registered name for `name` or one of its aliases.

    Raises:
        ValueError: unknown name; says the nearest one and all that exist.
    """
    lowered = name.lower()
    for known, (_, _, aliases) in _MIXERS.items():
        if lowered == known or lowered in aliases:
            return known
    every = {alias: known for known, (_, _, aliases) in _MIXERS.items() for alias in (known, *aliases)}
    near = difflib.get_close_matches(lowered, every, n=1)
    hint = f" Did you mean {every[near[0]]}?" if near else ""
    raise ValueError(f"unknown mixer {name!r}.{hint} Available: {', '.join(names())}")


def spec(name: str) -> type[MixerSpec]:
    """The torch-free spec class of a mixer."""
    known = resolve(name)
    return getattr(import_module(f".specs.{known}", __package__), _MIXERS[known][0])


def module(name: str) -> type[Mixer]:
    """The torch module class of a mixer (imports torch)."""
    known = resolve(name)
    return getattr(import_module(f".{known}", __package__), _MIXERS[known][1])
