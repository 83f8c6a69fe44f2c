"""What is predicted of an export's cache is what `plan` says, and what the tensors are."""

from __future__ import annotations

import pytest
import torch

from relinear.distill.student import assemble, transfer
from relinear.distill.teacher import load_teacher
from relinear.eval.cache import Sequence, held_bytes
from relinear.recipes.cache_plan import predicted_cache_bytes


@pytest.mark.parametrize(
    ("family", "layers", "kept"),
    [
        ("llama", {1: ("rwkv7", {})}, None),
        ("qwen3", {0: ("gated_deltanet", {"conv": 4}), 2: ("gated_deltanet", {})}, None),
        ("llama", {0: ("mamba2", {}), 3: ("gla", {"window": 8})}, {"window": 16}),
        ("gemma2", {1: ("gla", {})}, None),
    ],
)
def test_equal_to_the_tensors(make_teacher, tmp_path, family, layers, kept):
    folder = make_teacher(family)
    teacher = load_teacher(folder)
    torch.manual_seed(0)
    student = assemble(teacher, transfer(teacher, layers)[0], kept)
    student.save_pretrained(tmp_path)
    for length in (6, 40):
        for path, model in ((folder, teacher.model), (tmp_path, student)):
            sequence = Sequence(model, chunk=64)
            sequence.grow(length - 1)
            sequence.decode(1)
            found, planned = held_bytes(sequence.cache), predicted_cache_bytes(path, length, "float32")
            assert planned is not None and abs(found - planned) <= 0.1 * planned, (path, length, found, planned)


def test_unknown_families_have_no_plan(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert predicted_cache_bytes(tmp_path, 10, "float32") is None
