"""Ranks of a node hold one copy of what stands between stages; where they cannot, each has its own."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from relinear.distill.engine import node
from relinear.distill.engine.world import World
from relinear.distill.student import assemble, transfer, unfilled
from relinear.distill.teacher import load_teacher

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux's")
CASES = ("together", "another node", "not allowed")


def arrange(case: str, patch: pytest.MonkeyPatch) -> None:
    """Have the ranks find each other, or not."""

    def refuse(*_: Any) -> Any:
        raise PermissionError("no")

    if case == "another node":
        patch.setattr(node, "_home", lambda: f"node {os.getpid()}")
    if case == "not allowed":
        patch.setattr(node, "_map", refuse)


def rank(number: int, port: int, teacher_folder: Path, out: Path) -> None:
    """What one rank finds in every case."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2, timeout=timedelta(seconds=120)
    )
    teacher = load_teacher(teacher_folder)
    plan: Any = {layer: ("rwkv7", {}) for layer in range(1, teacher.num_layers)}
    mixers = transfer(teacher, plan)[0]
    found = {}
    for case in CASES:
        with pytest.MonkeyPatch.context() as patch:
            arrange(case, patch)
            found[case] = compare(World(number, 2), teacher, mixers)
    torch.save(found, out / f"{number}.pt")
    dist.destroy_process_group()


def compare(world: World, teacher: Any, mixers: Any) -> dict[str, Any]:
    """The student of both ranks beside one of this rank's own."""
    made = []

    def make() -> Any:
        made.append(1)
        return assemble(teacher, mixers)

    def shell() -> Any:
        with torch.device("meta"):
            return unfilled(teacher, mixers)

    student, writes = node.one_per_node(world, make, shell)
    own = assemble(teacher, mixers)
    found: dict[str, Any] = {"writes": writes, "made": len(made)}
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found["logits"] = torch.equal(student(ids).logits, own(ids).logits)
    found["states"] = all(torch.equal(own.state_dict()[k], v) for k, v in student.state_dict().items())
    found["tied"] = student.lm_head.weight is student.model.embed_tokens.weight
    found["trains"] = all(p.requires_grad and p.is_leaf for p in student.parameters())
    dist.barrier()
    if world.main:
        student.model.norm.weight.data.fill_(7.0)
    dist.barrier()
    found["seen"] = float(student.model.norm.weight[0].detach())
    return found


def test_ranks_of_a_node_hold_one_copy(make_teacher: Any, tmp_path: Path) -> None:
    tied = make_teacher("qwen2", tie_word_embeddings=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank, (port, tied, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(2))
    for case in CASES:
        for found in (first[case], second[case]):
            assert found["logits"] and found["states"] and found["tied"] and found["trains"], case
        assert first[case]["writes"] and first[case]["made"] == 1 and first[case]["seen"] == 7.0
        together = case == "together"
        assert second[case]["writes"] is not together
        assert second[case]["made"] == (not together)
        assert (second[case]["seen"] == 7.0) is together


def test_a_module_without_parameters_is_handed_on_too() -> None:
    file, table = node._move(torch.nn.Identity())
    assert isinstance(node._map(torch.nn.Identity(), table), torch.nn.Identity)
    os.close(file)
