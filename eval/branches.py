"""The linear part of a mixer alone, or its window alone: which of the two does the work?

A window makes local text easy and can hide a linear part that does nothing. See `AttentionMixer.branches`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..mixers.heads import AttentionMixer

BRANCHES = ("both", "linear", "window")


def branched(model: Any) -> list[AttentionMixer]:
    """The mixers of a model that have a window beside their linear part."""
    return [module for module in model.modules() if isinstance(module, AttentionMixer) and module.has_branches]


@contextmanager
def only(model: Any, branch: str) -> Iterator[None]:
    """Within the context every mixer that has two branches uses `branch` alone; layers without two stay as they are.

    Args:
        model: a student, or any module that holds mixers.
        branch: `linear` or `window`; `both` changes nothing.

    Raises:
        ValueError: an unknown branch, or no mixer that has two.
    """
    if branch not in BRANCHES:
        raise ValueError(f"branch {branch!r}: expected one of {', '.join(BRANCHES)}")
    mixers = branched(model)
    if branch != "both" and not mixers:
        raise ValueError("no mixer of this model has a window beside its linear part")
    before = [mixer.branches for mixer in mixers]
    try:
        for mixer in mixers:
            mixer.branches = branch
        yield
    finally:
        for mixer, branch_before in zip(mixers, before, strict=True):
            mixer.branches = branch_before
