"""`bench train`'s case `ranks`: two processes (ddp) beside one, each with a thread and a batch of its own.

All three processes stay up; in each turn first the one, then the two train the same number of steps, the others wait.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..eval.speed import spread

if TYPE_CHECKING:
    from .bench_train import Settings

STEPS = 3
"""Optimizer steps per turn; of the first one nothing is counted."""
SECONDS = 900
"""For a process to start or to do its steps."""


def two_processes(settings: Settings) -> dict[str, Any]:
    """Align with ddp on two processes (gloo), against one process.

    Returns:
        {"value" (tokens/s over those of one process: median over turns, with _min and _max), "tokens_per_second" (of
        both), "alone_tokens_per_second", "turns"}.

    Raises:
        RuntimeError: a process ended, with what it said.
    """
    context = multiprocessing.get_context("spawn")
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in (None, 0, 1):
            ours, theirs = context.Pipe()
            process = context.Process(target=_child, args=(theirs, settings, rank, port, folder), daemon=True)
            process.start()
            pipes.append(ours)
            processes.append(process)
        try:
            for pipe in pipes:
                _answer(pipe)
            alone, both = [], []
            for turn in range(settings.repeats + 1):
                order = (pipes[:1], pipes[1:]) if turn % 2 else (pipes[1:], pipes[:1])
                rates = {}
                for group in order:
                    for pipe in group:
                        pipe.send(turn)
                    rates[len(group)] = min(_answer(pipe) for pipe in group)
                if turn:  # the first one warms up
                    alone.append(rates[1])
                    both.append(rates[2])
            for pipe in pipes:
                pipe.send(None)
        finally:
            for process in processes:
                process.join(5)
                process.kill()
    return {
        **spread("value", [b / a for a, b in zip(alone, both, strict=True)]),
        "tokens_per_second": statistics.median(both),
        "alone_tokens_per_second": statistics.median(alone),
        "turns": len(both),
    }


def _answer(pipe: Any) -> Any:
    if not pipe.poll(SECONDS):
        raise RuntimeError(f"a process of the bench said nothing for {SECONDS} s")
    found = pipe.recv()
    if isinstance(found, str):
        raise RuntimeError(f"a process of the bench failed: {found}")
    return found


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _child(pipe: Any, settings: Settings, rank: int | None, port: int, folder: str) -> None:
    """Answer every number with the tokens/s of some steps, until None comes."""
    try:
        if rank is not None:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        train = _trainer(settings, rank, Path(folder))
        pipe.send(0.0)
        while (turn := pipe.recv()) is not None:
            pipe.send(train(turn))
    except Exception as error:  # the parent says it
        pipe.send(f"{type(error).__name__}: {error}")


def _trainer(settings: Settings, rank: int | None, folder: Path) -> Any:
    """(turn) -> tokens/s of all ranks in `run_stage`, saving left out."""
    import time

    import torch

    from ..distill.align import align_stage
    from ..distill.engine import open_engine
    from ..distill.loop import run_stage
    from ..distill.stage import Callbacks, StageSettings
    from ..distill.student import transfer
    from .bench import RandomSource
    from .bench_train import MEASURED, random_teacher, teacher_config

    torch.set_num_threads(1)
    engine = open_engine("single" if rank is None else "ddp", "cpu")
    batch = settings.batch * engine.world.size
    teacher = random_teacher(teacher_config(settings))
    plan: Any = {layer: (MEASURED, {}) for layer in range(settings.layers)}
    tokens = batch * settings.seq_len

    def train(turn: int) -> float:
        mixers, _ = transfer(teacher, plan)
        asked = StageSettings(tokens=tokens * STEPS, batch=batch, seq_len=settings.seq_len, lr=1e-4, warmup=1)
        times: list[float] = []
        run_stage(
            align_stage(teacher, mixers, asked, name=f"turn{turn}"),
            RandomSource(settings.vocab, batch, settings.seq_len),
            asked,
            folder=folder / ("alone" if rank is None else "both"),
            callbacks=Callbacks(progress=lambda record: times.append(time.perf_counter())),
            engine=engine,
        )
        return tokens * (STEPS - 1) / (times[-1] - times[0])

    return train
