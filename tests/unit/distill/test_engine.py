"""What ranks of a node share, and what each of them does of what all need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from relinear.distill.engine.base import twin
from relinear.distill.engine.world import World
from relinear.distill.teacher import load_teacher


def test_a_twin_lies_in_the_memory_of_its_original_until_it_is_sharded(qwen2: Path) -> None:
    model: Any = load_teacher(qwen2).model
    made: Any = twin(model)
    pairs = list(zip(model.named_parameters(), made.named_parameters(), strict=True))
    assert pairs and all(ours.data_ptr() == theirs.data_ptr() for (_, ours), (_, theirs) in pairs)
    assert not any(ours is theirs for (_, ours), (_, theirs) in pairs)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert (made.lm_head.weight is made.model.embed_tokens.weight) == tied
    before = model.model.norm.weight.clone()
    made.model.norm.weight.data = torch.zeros(0)  # what sharding does
    made.model.layers[0].mlp = torch.nn.Identity()
    assert torch.equal(model.model.norm.weight, before)
    assert not isinstance(model.model.layers[0].mlp, torch.nn.Identity)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux's")
def test_a_teacher_in_the_dtype_of_its_files_is_mapped_from_them(llama: Path) -> None:
    """So that all ranks of a node have one copy of it in memory, and the system may drop it at any time."""
    teacher = load_teacher(llama)
    held = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(llama) in line:
            held.append([int(end, 16) for end in line.split()[0].split("-")])
    for name, parameter in teacher.model.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in held), name


def test_work_is_spread_over_ranks_and_comes_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    items, done = list(range(7)), {}
    assert World().spread(items, str) == list("0123456")
    for rank in range(3):
        world = World(rank, 3)

        def alone(work: Any, rank: int = rank) -> list[Any]:
            done[rank] = work()
            return [done.get(other, []) for other in range(3)]

        monkeypatch.setattr(World, "outcomes", lambda self, work, alone=alone: alone(work))
        if rank < 2:
            with pytest.raises(IndexError):
                world.spread(items, lambda item: item * item)
        else:
            assert world.spread(items, lambda item: item * item) == [item * item for item in items]
    assert done == {0: [0, 9, 36], 1: [1, 16], 2: [4, 25]}


def test_work_that_needs_all_ranks_is_done_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    done: dict[int, Any] = {}
    for rank in range(3):

        def alone(self: World, work: Any) -> list[Any]:
            done[self.rank] = work()
            return [done.get(other, [0] * 3) for other in range(3)]

        monkeypatch.setattr(World, "outcomes", alone)
        found = World(rank, 3).spread(list(range(7)), lambda item: item * item, together=True)
    assert found == [item * item for item in range(7)]
    assert done == {0: [0, 9, 36], 1: [1, 16, 36], 2: [4, 25, 36]}
