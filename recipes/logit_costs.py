"""What a stage's cache of the teacher's logits costs, before any of it is made. Torch-free."""

from __future__ import annotations

from typing import Any

from ..distill.logit_cache import sizes
from .schema import GlueStage, Recipe
from .units import format_bytes


def logits_bytes(stage: GlueStage, seq_len: int, vocab: int) -> int:
    """Bytes on the disk, at most; 0 for a stage without a cache.

    Args:
        stage: of a recipe.
        seq_len: its window.
        vocab: tokens of the teacher's vocabulary.
    """
    kept = stage.teacher_logits
    if kept is None:
        return 0
    return sizes.cache_bytes(stage.tokens, stage.batch, seq_len, kept.top_k, kept.dtype, vocab)


def logits_note(stage: Any, seq_len: int, vocab: int) -> list[str]:
    """The line of a plan that says so; none for a stage without a cache."""
    if not isinstance(stage, GlueStage) or stage.teacher_logits is None:
        return []
    kept = stage.teacher_logits
    each = sizes.position_bytes(kept.top_k, kept.dtype, vocab)
    return [
        f"{stage.name}: a cache of the teacher's logits takes {format_bytes(logits_bytes(stage, seq_len, vocab))} on "
        f"the disk at most ({min(kept.top_k, vocab)} of {vocab} tokens, {each} bytes a position); where it is not "
        "there, the teacher reads the stage's text once: relinear prepare makes it beforehand"
    ]


def teacher_needs(recipe: Recipe, stage: Any, needed: bool) -> tuple[bool, bool]:
    """Whether a step of a stage runs the teacher, and whether it lies on the device.

    Args:
        recipe: that the stage belongs to.
        stage: any training stage.
        needed: its loss needs the teacher.

    Returns:
        With a cache it is not run; it leaves the device where that is a GPU's and holds it whole.
    """
    if not needed or getattr(stage, "teacher_logits", None) is None:
        return needed, needed
    return False, recipe.engine.device == "cpu" or recipe.engine.parallel not in ("single", "ddp")
