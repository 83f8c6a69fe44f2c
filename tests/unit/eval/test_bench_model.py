"""Timings are of the machine: tested is what is counted, in which order, what is kept, and what memory really is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from relinear.distill.student import assemble, transfer
from relinear.distill.teacher import load_teacher
from relinear.eval import bench_model, bench_results, memory
from relinear.eval.bench_model import Settings, batch_at, largest_fitting, measure, measure_length, sizes_at
from relinear.eval.bench_plots import bench_plots
from relinear.eval.cache import Sequence, held_bytes
from relinear.eval.models import open_models
from relinear.recipes.cache_plan import predicted_cache_bytes

SMALL = Settings(tokens=3, repeats=3, chunk=16, memory=10**8)


class Clock:
    """Advances by what the fake model says a call takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Model(torch.nn.Module):
    """Takes 1 ms a token; `slow` times as long while its turn is slow. Its cache is a tensor of 4 bytes a token."""

    def __init__(self, clock: Clock, speed: float, log: list, name: str) -> None:
        super().__init__()
        self.embed, self.clock, self.speed, self.log, self.name = torch.nn.Embedding(10, 2), clock, speed, log, name
        self.config = type("Config", (), {"max_position_embeddings": 30})()

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embed

    def forward(self, input_ids, cache=None, past_key_values=None, use_cache=True):
        rows, tokens = input_ids.shape
        cache = past_key_values if cache is None else cache
        self.clock.now += 1e-3 * tokens * self.speed
        self.log.append((self.name, tokens))
        seen = 0 if cache is None else cache.tensor.shape[1]
        held = type("Cache", (), {})()
        held.tensor = torch.zeros(rows, seen + tokens)
        return {"cache": held, "past_key_values": held, "logits": torch.zeros(rows, 1, 10)}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch):
    clock, log = Clock(), []
    monkeypatch.setattr(bench_model, "time", clock)
    monkeypatch.setattr(bench_model, "peak_on", lambda device, call: (call(), 1000)[1])  # the profiler takes a second
    return {"student": Model(clock, 1.0, log, "s"), "teacher": Model(clock, 2.0, log, "t")}, log, clock


def test_a_row_by_hand(fakes):
    models, log, _ = fakes
    row = measure_length(models, 40, SMALL)
    assert row["length"] == 40 and row["beyond_context"] and row["turns"] == 3
    student, teacher = row["student"], row["teacher"]
    assert student["prefill_tokens_per_second"] == pytest.approx(1000)
    assert teacher["prefill_tokens_per_second"] == pytest.approx(500)
    assert student["time_to_first_token"] == pytest.approx(0.040)
    assert teacher["decode_tokens_per_second"] == pytest.approx(500)
    assert student["cache_bytes"] == teacher["cache_bytes"] == 160
    assert row["ratios"]["prefill_tokens_per_second"] == pytest.approx(2)
    assert row["ratios"]["time_to_first_token"] == pytest.approx(0.5)
    assert row["ratios"]["cache_bytes"] == 1
    # pieces of 16 tokens; a pass that warms up and measures memory, then turns of alternating order
    prefill, steps = [16, 16, 8], [1, 1, 1]
    assert log == [
        *[("s", n) for n in (*prefill, 1)], *[("t", n) for n in (*prefill, 1)],
        *[(name, n) for name in "st" for n in (*prefill, *steps)],
        *[(name, n) for name in "ts" for n in (*prefill, *steps)],
        *[(name, n) for name in "st" for n in (*prefill, *steps)],
    ]  # fmt: skip


def test_a_slow_spell_touches_both_sides(fakes):
    models, _, clock = fakes
    slow = iter([1.0, 1.0, 5.0, 5.0, 1.0, 1.0, 3.0, 3.0])  # warm-up of both, then three turns of both
    whole = Sequence.grow

    def grow(self, length, progress=None):
        factor, begin = next(slow), clock.now
        whole(self, length, progress)
        clock.now = begin + (clock.now - begin) * factor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sequence, "grow", grow)
        row = measure_length(models, 40, SMALL)
    assert row["student"]["prefill_tokens_per_second"] == pytest.approx(1000 / 3)
    assert row["student"]["prefill_tokens_per_second_min"] == pytest.approx(200)
    assert row["ratios"]["prefill_tokens_per_second_min"] == pytest.approx(2)
    assert row["ratios"]["prefill_tokens_per_second_max"] == pytest.approx(2)


def test_no_turn_begins_that_would_end_too_late(fakes):
    models, _, _ = fakes
    # a pass of both takes 3 * 43 ms, the warm-up almost as long
    assert measure_length(models, 40, Settings(tokens=3, repeats=3, chunk=16, max_seconds=0.3))["turns"] == 1
    assert measure_length(models, 40, Settings(tokens=3, repeats=3, chunk=16, max_seconds=0.4))["turns"] == 2


def test_what_was_measured_is_kept_length_by_length(fakes):
    models, log, _ = fakes
    kept: list[list[int]] = []
    rows = measure(models, [20, 10], SMALL, keep=lambda rows: kept.append([row["length"] for row in rows]))
    assert kept == [[10], [10, 20]]
    log.clear()
    again = measure(models, [10, 30, 20], SMALL, kept={row["length"]: row for row in rows})
    assert [row["length"] for row in again] == [10, 20, 30] and again[:2] == rows
    assert max(sum(n for name, n in log[:3] if name == "s"), 0) == 31  # only the new length ran
    with pytest.raises(ValueError, match="at least 2"):
        measure(models, [1], SMALL)
    alone = measure({"student": models["student"]}, [10], SMALL)
    assert alone[0]["teacher"] is None and alone[0]["ratios"] is None


def test_largest_batch():
    assert batch_at(1000, 300, 40, 100, 10) == 12  # (1000 - 300 - 100) / (40 + 10)
    assert batch_at(100, 300, 40, 100, 10) == 0
    asked = []
    assert largest_fitting(20, lambda rows: (asked.append(rows), rows <= 13)[1]) == 13 and len(asked) < 7
    assert largest_fitting(5, lambda rows: True) == 5
    assert largest_fitting(4, lambda rows: False) == 0


@pytest.fixture(scope="module")
def pair(make_teacher, tmp_path_factory):
    """(teacher's folder, export of a hybrid with a window) with their models."""
    folder = make_teacher("llama", num_hidden_layers=2)
    teacher = load_teacher(folder)
    torch.manual_seed(0)
    student = assemble(teacher, transfer(teacher, {0: ("gated_deltanet", {"conv": 4})})[0])
    export = tmp_path_factory.mktemp("run") / "export"
    student.save_pretrained(export)
    teacher.tokenizer.save_pretrained(export)
    (export.parent / "run.json").write_text("{}")
    return folder, export, teacher.model, student


def test_memory_is_what_the_tensors_are(pair):
    folder, export, teacher, student = pair
    for path, model in ((folder, teacher), (export, student)):
        made = sizes_at(model, 64, SMALL)
        sequence = Sequence(model, chunk=16)
        sequence.grow(64)
        assert made["cache_bytes"] == held_bytes(sequence.cache) == predicted_cache_bytes(path, 64, "float32")
        assert made["weights_bytes"] == memory.weights_bytes(model)
        assert made["peak_bytes"] >= made["weights_bytes"] + made["cache_bytes"]
        assert made["batch_at_memory"] == batch_at(
            10**8, made["weights_bytes"], made["cache_bytes"], made["prefill_bytes"], made["step_bytes"]
        )
    # tied embeddings count once
    parameters = sum(p.numel() for p in teacher.parameters())
    assert memory.weights_bytes(teacher) == 4 * parameters + sum(b.nbytes for b in teacher.buffers())
    assert predicted_cache_bytes(folder, 64, "bfloat16") == predicted_cache_bytes(folder, 64, "float32") // 2


def test_many_rows_decode_what_one_does(pair):
    """What a batch on a GPU is tried with."""
    *_, student = pair
    one, many = Sequence(student, chunk=16), Sequence(student, chunk=16)
    for sequence in (one, many):
        sequence.grow(20)
    held = held_bytes(many.cache)
    many.repeat(3)
    assert held_bytes(many.cache) == 3 * held
    one.decode(2)
    many.decode(2)
    assert many.next_token() == one.next_token()
    assert torch.allclose(many._logits, one._logits.expand_as(many._logits), atol=1e-5)


class Gpu:
    """torch.cuda as far as it is used; says what was called."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.held, self.peak, self.ms = 100, 0, 0.0
        self.OutOfMemoryError = torch.cuda.OutOfMemoryError

    def synchronize(self, device=None) -> None:
        self.calls.append("synchronize")

    def memory_allocated(self, device) -> int:
        return self.held

    def reset_peak_memory_stats(self, device) -> None:
        self.calls.append("reset")
        self.peak = self.held

    def max_memory_allocated(self, device) -> int:
        return self.peak

    def current_stream(self, device) -> str:
        return "stream"

    def Event(self, enable_timing: bool) -> Gpu:
        event = Gpu()
        event.calls = self.calls
        event.gpu = self
        return event

    def record(self, stream) -> None:
        self.calls.append("record")
        self.ms = self.gpu.ms

    def elapsed_time(self, other) -> float:
        return other.ms - self.ms


def test_a_gpu_is_waited_for_and_its_allocator_asked(monkeypatch):
    gpu, device = Gpu(), torch.device("cuda", 0)
    monkeypatch.setattr(torch, "cuda", gpu)
    watch = bench_model.Stopwatch(device)
    watch.start()
    gpu.ms += 250.0
    assert watch.stop() == 0.25
    assert gpu.calls == ["record", "record", "synchronize"]
    gpu.calls.clear()
    watch.now()
    assert gpu.calls == ["synchronize"]

    def call() -> None:
        gpu.peak = gpu.held + 4000

    gpu.calls.clear()
    assert memory.peak_on(device, call) == 4000
    assert gpu.calls == ["synchronize", "reset", "synchronize"]

    def too_much() -> None:
        raise torch.cuda.OutOfMemoryError("out of memory")

    gpu.empty_cache = lambda: None
    fits = []
    for peak, limit in ((500, 600), (500, 599), (None, 10**9)):

        class Many:
            """A sequence whose decoding takes `peak` bytes."""

            model = type("M", (), {"parameters": lambda self: iter([type("P", (), {"device": device})()])})()
            cache = None

            def repeat(self, rows: int, peak=peak) -> None:
                if peak is None:
                    too_much()
                gpu.peak = gpu.held + peak

            def decode(self, tokens: int) -> None:
                """Nothing more."""

        fits.append(bench_model._fits(Many(), 4, 100, limit))
    assert fits == [True, False, False]


def test_bench_json_is_kept_and_taken_up(pair, tmp_path, monkeypatch):
    folder, export, *_ = pair
    monkeypatch.setattr(bench_model, "peak_on", lambda device, call: (call(), 1000)[1])
    models = open_models(str(export), str(folder), device="cpu")
    settings = Settings(tokens=2, repeats=1, chunk=32)
    lines: list[str] = []

    def predict(side: str, length: int) -> int | None:
        return predicted_cache_bytes(models.folders[side], length, "float32")

    found = bench_results.bench(models, [32, 16], settings, tmp_path, predict=predict, progress=lines.append)
    on_disk = json.loads((tmp_path / "bench.json").read_text())
    assert on_disk == found and found["suite"] == "bench" and found["models"]["teacher"] == str(folder)
    assert [row["length"] for row in found["lengths"]] == [16, 32]
    assert set(found) >= {"checkpoints", "settings", "versions", "seconds", "machine", "memory_is"}
    for row in found["lengths"]:
        for side in ("student", "teacher"):
            assert row[side]["predicted_cache_bytes"] == row[side]["cache_bytes"]

    whole = bench_model.measure_length
    monkeypatch.setattr(bench_model, "measure_length", lambda *given: pytest.fail("measured again"))
    assert bench_results.bench(models, [16], settings, tmp_path, progress=lines.append) == found
    assert lines[-1] == "measured before: 16 tokens"
    monkeypatch.setattr(bench_model, "measure_length", whole)
    more = bench_results.bench(models, [64], settings, tmp_path)
    assert [row["length"] for row in more["lengths"]] == [16, 32, 64] and more["lengths"][:2] == found["lengths"]
    # other settings: other figures, and the old ones stand aside
    other = bench_results.bench(models, [16], Settings(tokens=2, repeats=2, chunk=32), tmp_path)
    assert [row["length"] for row in other["lengths"]] == [16]
    (aside,) = (tmp_path / "earlier").glob("bench-*.json")
    assert json.loads(aside.read_text()) == more
    assert bench_results.bench(models, [64], settings, tmp_path)["lengths"] == more["lengths"]

    paths = bench_plots(more, tmp_path / "plots")
    assert [path.name for path in paths] == ["bench-prefill.png", "bench-decode.png", "bench-memory.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    alone = more | {"lengths": [row | {"teacher": None, "ratios": None} for row in more["lengths"][:1]]}
    assert all(path.exists() for path in bench_plots(alone, Path(tmp_path / "alone")))
