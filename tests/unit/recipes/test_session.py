"""How a session is left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from relinear.distill.engine import Engine, World
from relinear.recipes.session import Session, Silent


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def session(folder: Path) -> Session:
    """One of two ranks; what it would work on is not asked for."""
    nothing: Any = None
    return Session(nothing, folder, nothing, nothing, nothing, Silent(), engine=Engine(World(size=2)))


def test_a_session_that_ends_well_leaves_the_process_group(group: None, tmp_path: Path) -> None:
    with session(tmp_path):
        assert dist.is_initialized()
    assert not dist.is_initialized(), "its threads abort the process when they outlive the interpreter"


def test_a_session_that_fails_does_not_wait_for_ranks_that_may_be_gone(group: None, tmp_path: Path) -> None:
    with pytest.raises(ArithmeticError), session(tmp_path):
        raise ArithmeticError
    assert dist.is_initialized()
