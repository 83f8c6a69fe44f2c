"""One rank of a test run: align, then glue, on an engine. Started by test_engines.py, under torchrun or alone."""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch

from relinear.distill.align import align_stage
from relinear.distill.data.batch import Batch
from relinear.distill.engine import Engine, close_world, open_engine
from relinear.distill.glue import glue_stage
from relinear.distill.loop import run_stage
from relinear.distill.stage import Callbacks, StageSettings
from relinear.distill.student import assemble, transfer_between, unfilled
from relinear.distill.teacher import load_teacher
from relinear.eval.fidelity import measure

ROWS, LENGTH = 4, 24


class Numbered:
    """Batches that are a function of their number: two packed documents a row, some rows padded."""

    def __init__(self) -> None:
        self.number = 0

    def next_batch(self) -> Batch:
        self.number += 1
        generator = torch.Generator().manual_seed(self.number)
        ids = torch.randint(3, 320, (ROWS, LENGTH), generator=generator)
        border = torch.randint(4, LENGTH - 6, (ROWS, 1), generator=generator)
        place = torch.arange(LENGTH).expand(ROWS, LENGTH)
        real = torch.ones_like(ids, dtype=torch.bool)
        real[1::2, -5:] = False
        segments = (place >= border).long() + (~real).cumsum(1)
        positions = torch.where(place >= border, place - border, place).masked_fill(~real, 0)
        return Batch(ids, positions, segments, real, real & (positions > 0))

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


def measured(engine: Engine, student: Any, teacher: Any) -> dict[str, Any]:
    """Fidelity on three batches, an odd number: as ranks divide them, and as each rank finds it by itself."""
    source = Numbered()
    batches = [source.next_batch() for _ in range(3)]
    done: list[int] = []

    def spread(items: Any, work: Any) -> Any:
        return engine.world.spread(items, lambda item: done.append(1) or work(item), engine.sharded)

    divided = measure(student, teacher, batches, spread=spread)
    return {"score": divided["kl"], "divided": divided, "each": measure(student, teacher, batches), "own": len(done)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engine")
    parser.add_argument("teacher", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mixer", default="gated_deltanet")
    parser.add_argument("--offload", default="none")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill", default="", help="STAGE:STEP at which every rank is killed")
    parser.add_argument("--settings", default="{}", help="of both stages, JSON")
    parser.add_argument("--glue", default="{}", help="of glue, JSON")
    parser.add_argument("--stages", default="align,glue")
    parser.add_argument("--measure", action="store_true", help="held-out text, divided among the ranks and not")
    given = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    engine = open_engine(given.engine, offload=given.offload)
    if hasattr(engine, "persist"):
        engine.persist = 0  # at this size all weights would stay whole
    world = engine.world
    teacher = load_teacher(given.teacher)
    plan: Any = {layer: (given.mixer, {}) for layer in range(teacher.num_layers)}
    mixers = transfer_between(engine, teacher, plan, seed=1)[0]
    common = {"tokens": 8 * ROWS * LENGTH, "batch": ROWS, "seq_len": LENGTH, "lr": 3e-3, "warmup": 0, "log_every": 1}
    common |= {"save_every": 2 * ROWS * LENGTH, "weight_decay": 0.01} | json.loads(given.settings)

    def killer(stage: str) -> Callbacks:
        def told(record: dict[str, Any]) -> None:
            if given.kill == f"{stage}:{record['step']}":
                os.kill(os.getpid(), signal.SIGKILL)

        return Callbacks(progress=told)

    placed = engine.place_mixers(mixers)
    around = engine.place_teacher(teacher)
    done = None
    if "align" in given.stages:
        settings = StageSettings(**common)
        made = align_stage(around, placed, settings)
        run_stage(
            made,
            Numbered(),
            settings,
            folder=given.folder,
            resume=given.resume,
            callbacks=killer("align"),
            engine=engine,
        )
        for layer, mixer in mixers.items():
            engine.collect(placed[layer], mixer)
        done = "align"
    if "glue" in given.stages:
        values = common | {"loss": {"kl": 1.0, "ce": 0.2}} | json.loads(given.glue)
        settings = StageSettings(**values)
        student: Any = engine.between(lambda: assemble(teacher, mixers), lambda: unfilled(teacher, mixers))
        held = engine.place_student(student)
        made = glue_stage(around, held, settings)
        callbacks = killer("glue")
        if given.measure:
            callbacks.evaluate = lambda: measured(engine, held, around.model)
        result = run_stage(
            made,
            Numbered(),
            settings,
            folder=given.folder,
            resume=given.resume,
            after=done,
            callbacks=callbacks,
            engine=engine,
        )
        engine.collect(held, student)
        if world.main:
            (given.folder / "changed.json").write_text(json.dumps(result.report["changed"]))
            torch.save({k: v.clone() for k, v in student.state_dict().items()}, given.folder / "student.pt")
    close_world()


if __name__ == "__main__":
    main()
