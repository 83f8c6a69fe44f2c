"""A process of its own for test_plan_accuracy.py: one stage, its peak of resident memory or its FLOPs, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

# What a run imports on the way is no part of what it holds.
import relinear.distill.modeling.classes
import relinear.mixers.gated_deltanet
import relinear.mixers.rwkv7  # noqa: F401
from relinear.distill.align import align_stage
from relinear.distill.glue import glue_stage
from relinear.distill.loop import run_stage
from relinear.distill.stage import StageSettings
from relinear.distill.student import assemble, transfer
from relinear.distill.teacher import load_teacher
from relinear.recipes.bench import RandomSource


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def stage_of(folder: Path, mixer: str, kind: str, settings: dict[str, Any], attention: str | None) -> Any:
    """The stage on that teacher, all layers converted."""
    teacher = load_teacher(folder, attn_implementation=attention)
    plan: Any = {layer: (mixer, {}) for layer in range(teacher.num_layers)}
    mixers = transfer(teacher, plan)[0]
    asked = StageSettings(**settings)
    if kind == "align":
        return align_stage(teacher, mixers, asked), asked, teacher
    student = assemble(teacher, mixers)
    del mixers
    return glue_stage(teacher, student, asked), asked, teacher


def triangular(matrix: Any, right: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """FLOPs of solving for a matrix."""
    batch, size, columns = right
    return batch * size * size * columns


def product(added: Any, left: Any, right: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """FLOPs of adding a product of matrices, batched or not."""
    total = 2 * right[-1]
    for size in left:
        total *= size
    return total


def warm(folder: Path) -> None:
    """Library code and pools that any first step brings in."""
    weight = torch.randn(64, 64, requires_grad=True)
    (weight @ weight).square().sum().backward()
    torch.optim.AdamW([weight], fused=True).step()
    load_teacher(folder)


def flops(stage: Any, batch: Any) -> float:
    """FLOPs per token of a step that torch's counter sees."""
    aten = torch.ops.aten
    unknown = {aten.linalg_solve_triangular: triangular} | dict.fromkeys((aten.baddbmm_, aten.addmm_), product)
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        stage.step(batch, stage.count(batch))
    return counter.get_total_flops() / batch.tokens


def main() -> None:
    given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    parts = Path(given["folder"]), given["mixer"], given["kind"], given["settings"]
    warm(Path(given["small"]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    stage, asked, teacher = stage_of(*parts, None)
    source = RandomSource(teacher.config.vocab_size, asked.batch, asked.seq_len)
    run_stage(stage, source, asked, folder=Path(given["out"]))
    peak = status("VmHWM") - before
    del stage
    # Torch counts nothing of the attention that CPUs run by default.
    counted = flops(stage_of(*parts, "eager")[0], source.next_batch())
    print(json.dumps({"bytes": peak, "flops": counted}))


if __name__ == "__main__":
    main()
