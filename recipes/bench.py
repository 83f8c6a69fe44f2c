"""Speed as ratios within one run: align against the teacher's own forward pass. Decoding is in eval/speed.py."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..distill import checkpoint
from ..distill.align import align_stage
from ..distill.data.batch import Batch
from ..distill.loop import run_stage
from ..distill.stage import StageSettings
from ..distill.student import transfer
from ..distill.teacher import load_teacher
from ..eval.speed import throughput
from .teacher_config import locate


def random_batch(vocab: int, batch: int, seq_len: int) -> Batch:
    """Random tokens, one document per row, every position counted."""
    ids = torch.randint(3, vocab, (batch, seq_len), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(seq_len).expand(batch, -1)
    real = torch.ones(batch, seq_len, dtype=torch.bool)
    return Batch(ids, positions, torch.zeros_like(ids), real, real)


class RandomSource:
    """A data source of random tokens, one document per row: speed does not depend on what the text says."""

    def __init__(self, vocab: int, batch: int, seq_len: int) -> None:
        self.batch = random_batch(vocab, batch, seq_len)

    def next_batch(self) -> Batch:
        """The same batch every time."""
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take up."""


def align_ratio(
    teacher: str, mixer: str, *, batch: int = 8, seq_len: int = 512, steps: int = 6, repeats: int = 5
) -> dict[str, Any]:
    """Training tokens/s of align, all layers converted, against the teacher's own forward-only tokens/s.

    Both are timed in turns; the ratio is taken within each turn and the median over turns is given, so that a slow
    spell of the machine touches both sides. Align is the whole step: teacher forward, every mixer's forward and
    backward, clipping, AdamW.

    Args:
        teacher: folder, Hub id, or `embedded`.
        mixer: a registered mixer.
        batch: sequences per step.
        seq_len: tokens per sequence, at most the teacher's context.
        steps: optimizer steps per turn.
        repeats: turns.

    Returns:
        {"ratio", "ratio_min", "ratio_max", "align_tokens_per_second", "forward_tokens_per_second", settings, versions}.
    """
    loaded = load_teacher(locate(teacher))
    seq_len = min(seq_len, loaded.context)
    source = RandomSource(loaded.config.vocab_size, batch, seq_len)
    settings = StageSettings(tokens=batch * seq_len * steps, batch=batch, seq_len=seq_len, lr=1e-3, warmup=1)
    ratios, aligns, forwards = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeats + 1):
            forward = throughput(loaded.model, batch, seq_len, repeats=steps)
            mixers, _ = transfer(loaded, {layer: (mixer, {}) for layer in range(loaded.num_layers)})
            stage = align_stage(loaded, mixers, settings, name=f"turn{turn}")
            result = run_stage(stage, source, settings, folder=Path(folder))
            if turn:  # the first one warms up
                aligns.append(result.tokens / result.seconds)
                forwards.append(forward)
                ratios.append(aligns[-1] / forward)
    return {
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "align_tokens_per_second": statistics.median(aligns),
        "forward_tokens_per_second": statistics.median(forwards),
        "teacher": teacher,
        "mixer": mixer,
        "batch": batch,
        "seq_len": seq_len,
        "environment": checkpoint.environment(),
    }
