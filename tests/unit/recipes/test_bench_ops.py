"""The harness measures what it says: agreement before ratios, exact bytes, paired turns, and limits that hold."""

from __future__ import annotations

import pytest
import torch

from relinear.eval import memory
from relinear.recipes import bench_baselines as baselines
from relinear.recipes import bench_cases as cases
from relinear.recipes import bench_measure as measuring
from relinear.recipes import bench_ops, bench_steps

TINY = cases.Shape(1, 128, 2, 16)
TOKEN = cases.Shape(2, 1, 2, 16)


def found_or_skipped(build, *arguments):
    try:
        return build(*arguments)
    except baselines.Missing as missing:
        if "flash-linear-attention" in str(missing):
            pytest.skip(str(missing))
        raise


@pytest.mark.parametrize("pair", cases.CASES, ids=" / ".join)
def test_both_sides_of_a_sequence_compute_the_same(pair):
    case = found_or_skipped(cases.CASES[pair], TINY, baselines.fla_root(None))
    assert measuring.disagreement(case) < 2e-5
    assert case.ours(*case.inputs).shape[:2] == (1, 128)
    leaves = measuring.theirs_inputs(case)
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in leaves)


@pytest.mark.parametrize("pair", bench_steps.STEP_CASES, ids=" / ".join)
def test_both_sides_of_a_step_compute_the_same(pair):
    found = bench_steps.compare_step(bench_steps.STEP_CASES[pair](TOKEN), repeats=1, seconds=1)
    assert found["agrees"] and found["error"] < 2e-5
    assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]


@pytest.mark.parametrize("op", bench_ops.OPS)
def test_a_step_allocates_nothing_beyond_its_output(op):
    found = bench_steps.step_alone(op, TOKEN, repeats=1, seconds=1)
    # A number in an expression takes 12 bytes; Mamba's step makes its decays, as large as its state.
    decays = 2 * 32 * cases.MAMBA_STATE * 4 if op == "selective_scan" else 0
    assert 0 <= found["extra_bytes"] - decays <= 24
    assert found["ours_us"] > 0


def test_a_step_that_allocates_shows(monkeypatch):
    wasteful = baselines.ours("gated_delta")
    plain = wasteful.step
    monkeypatch.setattr(
        baselines, "ours", lambda name: wasteful._replace(step=lambda *inputs: plain(*inputs) + inputs[-1].mul(2).sum())
    )
    size = 2 * 2 * 16 * 16 * 4
    assert bench_steps.step_alone("gated_delta", TOKEN, repeats=1, seconds=1)["extra_bytes"] > size


def linear(theirs) -> cases.Case:
    """Ours doubles; theirs is what the test says."""
    inputs = tuple(torch.randn(1, 4, 2, 3).requires_grad_() for _ in range(2))
    return cases.Case(inputs, lambda a, b: a * 2 + b, theirs)


def test_the_same_computation_gets_a_ratio():
    found = measuring.compare(linear(lambda a, b: b + a + a), repeats=3, seconds=10)
    assert found["agrees"] and found["turns"] == 3
    assert 0 < found["ratio_min"] <= found["ratio"] <= found["ratio_max"]
    assert found["ours_bytes"] > 0 and found["theirs_bytes"] > 0


@pytest.mark.parametrize(
    "theirs",
    [
        lambda a, b: a * 2 + b * 1.01,
        lambda a, b: a * 2 + b.detach() + 0 * b,
        lambda a, b: (a * 2 + b).transpose(1, 2),
        lambda a, b: a * 2 + b + float("nan"),
    ],
    ids=["another number", "another gradient", "another shape", "not a number"],
)
def test_another_computation_is_flagged_and_gets_no_ratio(theirs):
    found = measuring.compare(linear(theirs), repeats=3, seconds=10)
    assert found.keys() == {"error", "agrees"}
    assert not found["agrees"] and found["error"] > measuring.TOLERANCE
    row = {"op": "gla", "baseline": "wrong", **found}
    (text,) = bench_ops.failures({"alone": [], "sequence": [row, row], "step": []})
    assert text.startswith("gla / wrong compute different things")


def test_another_step_is_flagged():
    case = bench_steps.STEP_CASES["gated_delta", "transformers qwen3_next"](TOKEN)
    wrong = case._replace(theirs=lambda *inputs: (case.theirs(*inputs)[0], inputs[-1]))  # forgets the token
    found = bench_steps.compare_step(wrong, repeats=1, seconds=1)
    assert not found["agrees"] and "ratio" not in found


def test_bytes_are_exact():
    x = torch.ones(1000)
    assert memory.allocated_bytes(lambda: x + x) == 4000
    assert memory.allocated_bytes(lambda: x.add_(x)) == 0
    assert memory.peak_bytes(lambda: [(x + x) * x for _ in range(3)]) == 16000  # three results, one temporary
    assert memory.peak_bytes(lambda: x * x * x * x) == 8000


def test_turns_alternate_and_end_in_time(monkeypatch):
    now, order = [0.0], []

    def call(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds

        return run

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])
    calls = [call("a", 1.0), call("b", 2.0)]
    assert measuring.turns(calls, repeats=3, seconds=100) == [[1.0] * 3, [2.0] * 3]
    assert "".join(order) == "baabba"
    assert len(measuring.turns(calls, repeats=9, seconds=7)[0]) == 2  # a third turn would end after 9 s
    assert len(measuring.turns(calls, repeats=9, seconds=-1)[0]) == 1


def test_cost_and_memory_per_token(monkeypatch):
    """A computation whose memory grows with the square of the length shows as such."""

    def side(length):
        return (torch.ones(length).requires_grad_(),), lambda x: x[:, None] * x

    found = measuring.scaling({length: side(length) for length in (100, 400)}, repeats=2, seconds=10)
    assert list(found["lengths"]) == [100, 400]
    assert found["memory_ratio"] == pytest.approx(4, rel=0.1)
    assert found["cost_ratio_min"] <= found["cost_ratio"] <= found["cost_ratio_max"]
    assert "cost_ratio" not in measuring.scaling({100: side(100)}, repeats=1, seconds=10)


def test_naive_functions_are_loaded_from_a_folder(tmp_path):
    folder = tmp_path / "fla" / "ops" / "kda"
    folder.mkdir(parents=True)
    (folder / "naive.py").write_text("def naive_chunk_kda():\n    return 7\n")
    root = baselines.fla_root(str(tmp_path))
    assert root == tmp_path / "fla" / "ops" == baselines.fla_root(str(tmp_path / "fla"))
    assert baselines.naive(root, "kda/naive", "naive_chunk_kda")() == 7
    with pytest.raises(baselines.Missing, match="no other in"):
        baselines.naive(root, "kda/naive", "other")
    with pytest.raises(baselines.Missing, match="no ops/gla/naive"):
        baselines.naive(root, "gla/naive", "naive_recurrent_gla")
    (folder / "naive.py").write_text("import no_such_package\n")
    with pytest.raises(baselines.Missing, match="no_such_package"):
        baselines.naive(root, "kda/naive", "naive_chunk_kda")
    with pytest.raises(baselines.Missing, match="--fla FOLDER"):
        baselines.naive(None, "kda/naive", "naive_chunk_kda")
    with pytest.raises(FileNotFoundError):
        baselines.fla_root(str(folder))


def test_another_version_of_transformers_is_a_row():
    with pytest.raises(baselines.Missing, match=r"has no qwen3_next\.no_such_function"):
        baselines.fallback("qwen3_next", "no_such_function")
    with pytest.raises(baselines.Missing, match=r"has no no_model"):
        baselines.fallback("no_model", "f")


class Sender:
    def __init__(self):
        self.sent = []

    def send(self, value):
        self.sent.append(value)


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (baselines.Missing("x is missing"), "not there: x is missing"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 GB\nmore"), "skipped: takes over 8 GB"),
        (MemoryError(), "skipped: takes over 8 GB"),
        (RuntimeError("backward is broken\nmore"), "failed: RuntimeError: backward is broken"),
        (TypeError("too many arguments"), "failed: TypeError: too many arguments"),
    ],
)
def test_what_goes_wrong_in_a_process_becomes_a_note(monkeypatch, error, note):
    def results(*arguments):
        yield {"ratio": 1}
        raise error

    monkeypatch.setattr(bench_ops, "results", results)
    monkeypatch.setattr(bench_ops, "_limit_memory", lambda gigabytes: None)
    sender = Sender()
    bench_ops._child(sender, bench_ops.Settings(), "sequence", "gla", "b")
    assert sender.sent == [True, {"ratio": 1}, {"note": note}]


def test_a_process_gives_rows_and_is_ended_at_the_limit():
    settings = bench_ops.Settings(("titans",), (32, 64), (1, 2), heads=2, head_dim=8, repeats=1)
    rows = bench_ops._rows(settings, "step", "titans", None)
    assert [(row["op"], row["baseline"], row["batch"], row["ours_us"] > 0) for row in rows] == [
        ("titans", None, batch, True) for batch in (1, 2)
    ]
    rows = bench_ops._rows(settings._replace(max_seconds=1e-6), "sequence", "simple_gla", "transformers minimax")
    assert [(row["length"], row["note"]) for row in rows] == [
        (length, "skipped: takes over 1e-06 s") for length in (32, 64)
    ]


def test_everything_of_an_op_is_measured(monkeypatch):
    monkeypatch.setattr(bench_ops, "_ask", lambda settings, kind, op, name, count: [{"kind": kind}] * count)
    lines = []
    result = bench_ops.measure(bench_ops.Settings(("mlstm", "titans")), lines.append)
    assert lines == [
        "mlstm alone", "mlstm / transformers xlstm", "mlstm, one token", "mlstm, one token / transformers xlstm",
        "titans alone", "titans, one token",
    ]  # fmt: skip
    assert result["alone"] == [{"op": op, "kind": "alone"} for op in ("mlstm", "titans")]
    assert [(row["op"], row["length"]) for row in result["sequence"]] == [("mlstm", n) for n in (2048, 8192, 32768)]
    assert [row["batch"] for row in result["step"]] == [1, 8, 64] * 3
    assert bench_ops.failures(result) == []


def test_the_cases_run_in_the_order_of_the_settings():
    settings = bench_ops.Settings(lengths=(32, 64), batches=(1,), heads=2, head_dim=8, repeats=1)
    pairs = bench_ops.results(settings, "sequence", "simple_gla", "transformers minimax")
    assert [row["agrees"] for row in pairs] == [True, True]
    (row,) = bench_ops.results(settings, "step", "simple_gla", "transformers minimax")
    assert row["agrees"]
    (row,) = bench_ops.results(settings, "alone", "simple_gla", None)
    assert list(row["lengths"]) == [32, 64] and "cost_ratio" in row
