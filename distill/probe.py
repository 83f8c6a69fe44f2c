"""A few of the training student's logits beside its export, so that whoever loads the folder can compare.

FOLDER/probe.npz
    input_ids   (2, 37) int64
    vocabulary  (V,) int64: the entries whose logits are kept, spread over the whole vocabulary, 256 at most
    logits      (2, 37, V) float32: the student's, in fp32, as it was in memory
    logsumexp   (2, 37) float32: over the whole vocabulary
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

PROBE = "probe.npz"  # no safetensors: some servers load whatever has that ending
_SHAPE = (2, 37)  # no multiple of any chunk
_ENTRIES = 256


def probe_ids(vocab_size: int) -> Any:
    """The input: random ids (2, 37), the same each time; special tokens, which stand first, are left out."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(3, vocab_size - 1), vocab_size, _SHAPE, generator=generator)


def write_probe(student: Any, folder: Path) -> None:
    """Run the student and write what it gives.

    Args:
        student: a causal language model in memory, on any device; left in the mode in which it was.
        folder: the export.
    """
    import numpy
    import torch

    ids = probe_ids(student.config.vocab_size)
    training = student.training
    student.eval()
    fused = {mixer: mixer.options for mixer in student.mixers().values() if mixer.options.form == "fused"}
    try:
        for mixer, options in fused.items():  # asked for where it was trained; here there may be none
            mixer.options = replace(options, form="auto")
        with torch.no_grad():
            whole = student(ids.to(next(student.parameters()).device), use_cache=False).logits.float().cpu()
    finally:
        student.train(training)
        for mixer, options in fused.items():
            mixer.options = options
    size = whole.shape[-1]
    chosen = torch.linspace(0, size - 1, min(_ENTRIES, size)).round().long().unique()
    tensors = {
        "input_ids": ids,
        "vocabulary": chosen,
        "logits": whole[..., chosen],
        "logsumexp": whole.logsumexp(-1),
    }
    numpy.savez(folder / PROBE, **{name: value.numpy() for name, value in tensors.items()})
