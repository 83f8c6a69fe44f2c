"""How a session is left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from relinear.distill.engine import Engine, World
from relinear.distill.errors import UserError
from relinear.recipes import loader
from relinear.recipes import session as sessions
from relinear.recipes.session import Session, Silent, open_session


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


def test_what_an_engine_cannot_run_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sessions, "open_engine", lambda *given: Engine(World(size=3)))
    given = ["teacher.model=no/such", f"data.source={tmp_path}", f"save.dir={tmp_path / 'run'}", "stages.align.batch=3"]
    recipe = loader.load("gated_deltanet", [*given, "stages.glue.batch=4"])
    with pytest.raises(UserError, match=r"stages.glue.batch: 4 sequences cannot be shared by 3 ranks.*glue.batch=6"):
        open_session(recipe, resume=False, max_hours=None, progress=Silent(), start=None)


def test_a_session_that_fails_does_not_wait_for_ranks_that_may_be_gone(group: None, tmp_path: Path) -> None:
    with pytest.raises(ArithmeticError), session(tmp_path):
        raise ArithmeticError
    assert dist.is_initialized()
