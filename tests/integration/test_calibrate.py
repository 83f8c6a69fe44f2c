"""Calibrate: what it reads of attention, that no layer gets worse, and that a run takes it up again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from relinear.distill import calibrate as stage
from relinear.distill.attention import attention_heads
from relinear.distill.attention_stats import StatsSum
from relinear.distill.calibrate import CalibrateSettings, run_calibrate, teacher_errors
from relinear.distill.calibrate_layer import calibrate_layer, output_error
from relinear.distill.calibrate_streams import run_to, sample
from relinear.distill.data.batch import Batch
from relinear.distill.errors import RunFailed, UserError
from relinear.distill.families import FAMILIES
from relinear.distill.stage import Callbacks
from relinear.distill.student import transfer
from relinear.distill.teacher import Teacher, load_teacher
from relinear.mixers import registry

SETTINGS = CalibrateSettings(tokens=300, batch=4, seq_len=24, window=4)


class Batches:
    """The same batches for every run: two documents per row, the second row's end padded."""

    def __init__(self) -> None:
        self.number = 0

    def next_batch(self) -> Batch:
        self.number += 1
        tokens = torch.randint(3, 320, (4, 24), generator=torch.Generator().manual_seed(self.number))
        place = torch.arange(24).expand(4, 24)
        real = torch.ones_like(tokens, dtype=torch.bool)
        real[1, -5:] = False
        positions = torch.where(place >= 9, place - 9, place).masked_fill(~real, 0)
        segments = (place >= 9).long() + (~real).cumsum(1)
        return Batch(tokens, positions, segments, real, real & (positions > 0))

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_statistics_are_those_of_the_whole_softmax(family: str, make_teacher: Callable[..., Path], monkeypatch: Any):
    """In blocks of five queries; grouped heads, documents, padding, and with gemma2 a cap and a window."""
    monkeypatch.setattr("relinear.distill.attention_stats.BLOCK", 5)
    teacher = load_teacher(make_teacher(family))
    sums, batch = StatsSum(4, 24, 3), Batches().next_batch()
    given = run_to(teacher, {}, 0, batch, False)
    heads = attention_heads(teacher, 0, given.hidden, given.rotary)
    contexts = sums.add(heads, batch, contexts=True)
    found = sums.result()
    weights = heads.weights(batch).double()  # (B, H, T, T): held against transformers' own in test_attention.py
    back = (torch.arange(24)[:, None] - torch.arange(24)).clamp(min=0)
    real = int(batch.real.sum())
    torch.testing.assert_close(found.distance, (weights * back).sum((0, 2, 3)) / real)
    torch.testing.assert_close(found.near, (weights * (back < 3)).sum((0, 2, 3)) / real)
    edges = found.edges.tolist()
    for number, (low, high) in enumerate(pairwise(edges)):
        share = (weights * ((back >= low) & (back < high))).sum((0, 2, 3)) / real
        torch.testing.assert_close(found.histogram[:, number], share)
    entropies = []
    for row, query in batch.real.nonzero().tolist():
        seen = int((weights[row, 0, query] > 0).sum())
        if seen > 1:
            w = weights[row, :, query]
            entropies.append(-(w * w.clamp(min=1e-300).log()).sum(-1) / math.log(seen))
    torch.testing.assert_close(found.entropy, torch.stack(entropies).mean(0), rtol=1e-5, atol=1e-6)
    module = teacher.attention(0)
    assert contexts is not None and given.output is not None
    torch.testing.assert_close(
        module.o_proj(contexts.flatten(2))[batch.real], given.output[batch.real], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("inputs", ["teacher", "student"])
@pytest.mark.parametrize("name", registry.names())
def test_no_layer_gets_worse_where_it_is_judged(name: str, inputs: Any, llama: Path, tmp_path: Path):
    teacher = load_teacher(llama)
    mixers, _ = transfer(teacher, dict.fromkeys((0, 2), (name, {})))
    settings = CalibrateSettings(tokens=300, batch=4, seq_len=24, inputs=inputs)
    result = run_calibrate(teacher, mixers, Batches(), settings, folder=tmp_path)
    rows = json.loads((tmp_path / "calibrate.json").read_text())["layers"]
    assert rows == result.report["layers"] and list(rows) == ["0", "2"]
    for row in rows.values():
        assert row["mixer"] == name and row["aligned"] is None
        assert row["stream"][row["kept"]] == min(row["stream"].values()) <= row["stream"]["transfer"]
        if inputs == "teacher":
            assert row["calibrated"] <= row["transfer"] * (1 + 1e-6)
            assert row["calibrated"] == pytest.approx(row["stream"][row["kept"]], rel=1e-3)
    assert all(bool(p.isfinite().all()) for mixer in mixers.values() for p in mixer.parameters())


@pytest.mark.parametrize("name", ["gated_deltanet", "rwkv7", "mamba2", "gla"])
def test_with_a_window_and_as_published_too(name: str, llama: Path, tmp_path: Path):
    teacher = load_teacher(llama)
    for number, (options, method) in enumerate((({"window": 5}, "full"), ({}, "taylor"), ({}, "spread"))):
        mixers, _ = transfer(teacher, dict.fromkeys((1, 2), (name, options)))
        before = mixers[1].o_proj.weight.clone()
        settings = CalibrateSettings(tokens=300, batch=4, seq_len=24, method=method, inputs="teacher")
        rows = run_calibrate(teacher, mixers, Batches(), settings, folder=tmp_path / str(number)).report["layers"]
        assert all(row["calibrated"] <= row["transfer"] for row in rows.values())
        if method != "full":
            torch.testing.assert_close(mixers[1].o_proj.weight, before)
        if name == "gated_deltanet" and not options:
            # At the same distances, heads' half-lives differ by up to 16 * 16 where they are spread (rates have ends).
            rates = mixers[1].A_log.exp() * torch.nn.functional.softplus(mixers[1].dt_bias)
            looked = rates * torch.tensor(rows["1"]["distance"])
            most = (looked.max() / looked.min()).item()
            assert most > 16 if method == "spread" else most == pytest.approx(1, rel=1e-3)


def layer_samples(teacher: Teacher, mixers: dict[int, Any], layer: int, count: int) -> tuple[list[Any], Any]:
    source, sums, made = Batches(), StatsSum(4, 24, 4), []
    for _ in range(count):
        batch = source.next_batch()
        with torch.no_grad():
            given = run_to(teacher, mixers, layer, batch, False)
            one = sample(teacher, batch, given)
            one.context = sums.add(attention_heads(teacher, layer, given.hidden, given.rotary), batch, contexts=True)
        made.append(one)
    return made, sums.result()


def test_a_fit_that_does_not_help_is_rejected(llama: Path):
    """Held-out tokens that want something else: the mixer stays bit for bit what it was."""
    teacher = load_teacher(llama)
    mixers, _ = transfer(teacher, {1: ("gated_deltanet", {})})
    samples, stats = layer_samples(teacher, mixers, 1, 5)
    before = {name: value.clone() for name, value in mixers[1].state_dict().items()}
    held = samples[3:]
    for one in held:
        with torch.no_grad():
            one.target = one.run(mixers[1])  # transfer is perfect there
    report = calibrate_layer(mixers[1], stats, samples[:3], held, (1e-3,), "full")
    assert report.kept == "transfer" and report.errors["transfer"] == 0.0 and report.errors["full"] > 0.1
    assert all(torch.equal(value, before[name]) for name, value in mixers[1].state_dict().items())


def test_the_projection_kept_is_the_least_squares_of_all_tokens(llama: Path):
    from relinear.distill.calibrate_layer import features

    teacher = load_teacher(llama)
    mixers, _ = transfer(teacher, {1: ("swa", {"window": 3, "sinks": 0})})
    samples, stats = layer_samples(teacher, mixers, 1, 30)
    report = calibrate_layer(mixers[1], stats, samples, samples, (1e-9,), "full")
    with torch.no_grad():
        x = torch.cat([features(mixers[1], one) for one in samples]).double()
        y = torch.cat([one.rows(one.target) for one in samples]).double()
    expected = torch.linalg.lstsq(x, y).solution
    assert report.errors["full"] == pytest.approx(float((x @ expected - y).norm() / y.norm()), rel=1e-4)
    torch.testing.assert_close(mixers[1].o_proj.weight.double(), expected.mT, rtol=1e-3, atol=1e-4)
    assert output_error(mixers[1], samples) == pytest.approx(report.errors[report.kept], rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", list(FAMILIES))
def test_on_the_students_stream_the_target_is_the_teachers_residual(name: str, make_teacher: Callable[..., Path]):
    """A mixer that met its target would put the residual stream right, however wrong the layers below are."""
    teacher = load_teacher(make_teacher(name))
    mixers, _ = transfer(teacher, dict.fromkeys((0, 1), ("gated_deltanet", {})))
    batch = Batches().next_batch()
    given = run_to(teacher, mixers, 1, batch, False)
    mine = run_to(teacher, mixers, 1, batch, True)
    wanted = sample(teacher, batch, given, mine).target
    assert given.output is not None and not torch.allclose(mine.hidden, given.hidden, atol=1e-3)
    if teacher.family.post_norm:
        torch.testing.assert_close(wanted, given.output)
        return
    above: dict[str, torch.Tensor] = {}

    def after(key: str, attention: torch.Tensor, residual: torch.Tensor) -> None:
        """The decoder layer on a residual stream, its attention's output given and its feed-forward block silent."""
        block = teacher.layers[1]
        module, mlp = getattr(block, teacher.family.attention), getattr(block, teacher.family.mlp)
        module.forward = lambda *args, **kwargs: (attention, None)
        mlp.forward = lambda x, *args, **kwargs: torch.zeros_like(x)
        try:
            out = block(residual, position_embeddings=given.rotary, attention_mask=None)
        finally:
            del module.forward, mlp.forward
        above[key] = out[0] if isinstance(out, tuple) else out

    after("teacher", given.output, given.residual)
    after("student", wanted, mine.residual)
    torch.testing.assert_close(above["student"], above["teacher"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "granite", "gpt_neox"])
def test_families(family: str, make_teacher: Callable[..., Path], tmp_path: Path):
    """Biases, norms of queries and keys, a cap and norms after attention, a scaled residual, a bias of o_proj."""
    teacher = load_teacher(make_teacher(family))
    mixers, _ = transfer(teacher, dict.fromkeys((1, 2), ("rwkv7", {})))
    rows = run_calibrate(teacher, mixers, Batches(), SETTINGS, folder=tmp_path).report["layers"]
    assert all(row["stream"][row["kept"]] < row["stream"]["transfer"] for row in rows.values())


def test_the_student_stream_is_that_of_the_assembled_student(qwen3: Path):
    from relinear.distill.student import assemble

    teacher = load_teacher(qwen3)
    mixers, _ = transfer(teacher, dict.fromkeys((0, 2, 3), ("rwkv7", {})))
    batch = Batches().next_batch()
    found = run_to(teacher, mixers, 3, batch, True)
    seen: list[torch.Tensor] = []
    student = assemble(teacher, mixers)
    student.model.layers[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        student(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    torch.testing.assert_close(found.residual[batch.real], seen[0][batch.real], rtol=1e-4, atol=1e-5)
    assert found.inputs.shared["v_first"].shape == (4, 24, 64)


def test_a_stopped_stage_goes_on_to_the_same_bits(llama: Path, tmp_path: Path):
    teacher = load_teacher(llama)

    def run(folder: str, resume: bool, layers: int = 99, settings: CalibrateSettings = SETTINGS) -> Any:
        mixers, _ = transfer(teacher, dict.fromkeys(range(4), ("rwkv7", {})))
        done: list[Any] = []
        callbacks = Callbacks(progress=done.append, should_stop=lambda: len(done) >= layers)
        made = run_calibrate(
            teacher, mixers, Batches(), settings, folder=tmp_path / folder, resume=resume, callbacks=callbacks
        )
        return made, mixers, len(done)

    whole, expected, _ = run("whole", False)
    stopped, _, _ = run("cut", False, 2)
    assert (stopped.status, stopped.step) == ("stopped", 2) and not (tmp_path / "cut" / "calibrate.json").exists()
    with pytest.raises(UserError, match=r"already holds stage 'calibrate'.*--resume"):
        run("cut", False)
    again, found, count = run("cut", True)
    assert (again.status, count) == ("complete", 2) and again.report == whole.report
    _, third, count = run("cut", True)
    assert count == 0
    for layer, mixer in expected.items():
        for name, value in mixer.state_dict().items():
            assert torch.equal(value, found[layer].state_dict()[name]) and torch.equal(
                value, third[layer].state_dict()[name]
            )
    with pytest.raises(UserError, match=r"calibrate\.tokens = 300, now it is 600"):
        run("cut", True, settings=CalibrateSettings(tokens=600, batch=4, seq_len=24, window=4))


def test_what_is_not_finite_names_the_layer(llama: Path, tmp_path: Path):
    teacher = load_teacher(llama)
    mixers, _ = transfer(teacher, dict.fromkeys((1, 2), ("gated_deltanet", {})))
    with torch.no_grad():
        mixers[2].v_proj.weight[0, 0] = torch.nan
    with pytest.raises(RunFailed, match=r"calibrate: layer 2 \(gated_deltanet\): .*not finite"):
        run_calibrate(teacher, mixers, Batches(), SETTINGS, folder=tmp_path)
    assert not (tmp_path / "calibrate.json").exists()


def test_errors_of_aligned_mixers_are_those_of_the_report(llama: Path, tmp_path: Path):
    teacher = load_teacher(llama)
    mixers, _ = transfer(teacher, dict.fromkeys((1, 3), ("gla", {})))
    rows = run_calibrate(teacher, mixers, Batches(), SETTINGS, folder=tmp_path).report["layers"]
    held = stage.calibration_batches(Batches(), SETTINGS.tokens)[1]
    for layer, error in teacher_errors(teacher, mixers, held).items():
        assert error == pytest.approx(rows[str(layer)]["calibrated"], rel=1e-6)
