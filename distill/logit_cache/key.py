"""What a cache of logits belongs to. Two stages with the same key read the same cache; any difference is named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.source import Source
from ..digest import value_digest
from ..teacher import Teacher

FORMAT = 1
MANIFEST = "cache.json"


@dataclass(frozen=True)
class LogitSettings:
    """What is kept of a teacher's logits.

    Attributes:
        top_k: tokens per position; the vocabulary where that is smaller.
        temperature: that the logits are divided by.
        dtype: of the log-probabilities, a key of `sizes.VALUE_BYTES`.
    """

    top_k: int = 64
    temperature: float = 1.0
    dtype: str = "float16"


def cache_key(
    teacher: Teacher, source: Source, tokens: int, settings: LogitSettings, precision: str = "fp32"
) -> dict[str, Any]:
    """Everything that the numbers in a cache depend on, as plain values.

    Args:
        teacher: whose weights, config and tokenizer are known by what their files hold, wherever they lie.
        source: of the stage's batches; its identity holds the data, their weights, seq_len, batch, seed and packing.
        tokens: non-padding input tokens of the stage, which say how many steps there are.
        settings: what is kept.
        precision: `fp32` or `bf16`, of the teacher's forward pass.
    """
    found = teacher.fingerprint()
    weights = {name: value for name, value in found.items() if name == "config.json" or name.endswith(".safetensors")}
    return {
        "format": FORMAT,
        "teacher": weights,
        "teacher_dtype": str(teacher.model.dtype).removeprefix("torch."),
        "tokenizer": {name: value for name, value in found.items() if name not in weights},
        **{f"data.{name}": value for name, value in source.state_dict()["identity"].items()},
        "tokens": tokens,
        "top_k": min(settings.top_k, teacher.model.config.vocab_size),
        "temperature": float(settings.temperature),
        "dtype": settings.dtype,
        "precision": precision,
    }


def cache_name(key: dict[str, Any]) -> str:
    """Of the cache's folder."""
    return f"top{key['top_k']}-{value_digest(key)[:16]}"


def cache_folder(place: Path, key: dict[str, Any]) -> Path:
    """Where a cache lies: below `place`, or `place` itself where that is a cache already, of this key or another."""
    return place if (place / MANIFEST).exists() else place / cache_name(key)


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """`data.seed: made with 3, now 4`, for everything in which two keys differ."""
    made = []
    for name in dict.fromkeys([*wanted, *found]):
        old, new = found.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            made += [f"{name} {line}" for line in differences(old, new)]
        elif old != new:
            made.append(f"{name}: made with {old}, now {new}")
    return made
