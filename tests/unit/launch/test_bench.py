"""`bench ops` and `bench decode`: wrong input, tables, JSON, and the exit code of a comparison that is none."""

from __future__ import annotations

import json

import pytest

from relinear.launch import main as cli
from relinear.recipes import bench_ops

ALONE = {
    "op": "gla", "turns": 3, "cost_ratio": 1.2, "cost_ratio_min": 1.1, "cost_ratio_max": 1.3, "memory_ratio": 1.0,
    "lengths": {2048: {"us_per_token": 50.0, "bytes_per_token": 9000.0}, 9: {"us_per_token": 4, "bytes_per_token": 5}},
}  # fmt: skip
PAIR = {
    "op": "gla", "baseline": "theirs", "length": 2048, "error": 3e-7, "agrees": True, "turns": 3, "ratio": 2.5,
    "ratio_min": 2.0, "ratio_max": 3.0, "ours_ms": 100.0, "theirs_ms": 250.0, "ours_bytes": 18e6, "theirs_bytes": 36e6,
}  # fmt: skip
LATER = {"op": "gla", "baseline": "theirs", "length": 8192, "note": "skipped: takes over 60 s"}
STEP = {"op": "gla", "baseline": None, "batch": 8, "ours_us": 40.0, "turns": 3, "extra_bytes": 12}
STEPS = {
    "op": "gla", "baseline": "theirs", "batch": 64, "error": 1e-7, "agrees": True, "turns": 3, "ratio": 4.0,
    "ratio_low": 3.0, "ratio_high": 5.0, "ours_us": 100.0, "theirs_us": 400.0,
}  # fmt: skip


def joined(text: str) -> list[str]:
    """Lines of a table with single spaces."""
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.fixture
def measured(monkeypatch):
    """The result that the command gets, and the settings that it asked for."""
    result = {"settings": {}, "alone": [ALONE], "sequence": [PAIR, LATER], "step": [STEP, STEPS]}
    asked = []

    def measure(settings, progress):
        asked.append(settings)
        progress("gla / theirs")
        return result

    monkeypatch.setattr(bench_ops, "measure", measure)
    return result, asked


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ops", "--op", "gla,softmax"], ["--op", "'softmax'", "There are: simple_gla, gla"]),
        (["ops", "--op", ""], ["--op", "''"]),
        (["ops", "--lengths", "2k,many"], ["--lengths", "'many'", "For example: --lengths 2Ki,8Ki"]),
        (["ops", "--lengths", "0,8"], ["--lengths", "found 0, expected at least 1"]),
        (["ops", "--batches", "one"], ["--batches", "'one'"]),
        (["ops", "--fla", "no-such-folder"], ["--fla", "no-such-folder", "checkout"]),
        (["ops", "--threads", "0"], ["--threads"]),
        (["decode", "folder", "--lengths", "1"], ["--lengths", "found 1, expected at least 2"]),
        (["decode", "./no-such-folder"], ["no-such-folder"]),
    ],
)
def test_wrong_input_is_one_message_and_code_2(capsys, arguments, words):
    assert cli.main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.strip().splitlines()) == 1
    assert all(word in err for word in words), err


def test_tables(measured, capsys):
    assert cli.main(["bench", "ops", "--op", "gla,kda", "--lengths", "8Ki,2Ki", "--batches", "8"]) == 0
    out, err = capsys.readouterr()
    (settings,) = measured[1]
    assert (settings.ops, settings.lengths, settings.batches) == (("gla", "kda"), (2048, 8192), (8,))
    assert err == "gla / theirs\n"
    lines = joined(out)
    assert "gla 2k 50.0 9000 cost × 1.20 (1.10 to 1.30), memory × 1.00" in lines
    assert "gla 9 4.0 5" in lines
    assert "gla theirs 2k 2.50 (2.00 to 3.00) 100.0 ms 250.0 ms 18.0 MB 36.0 MB 3e-07" in lines
    assert "gla theirs 8k – – – – – – skipped: takes over 60 s" in lines
    assert "gla 8 40 µs 12" in lines
    assert "gla theirs 64 4.00 (3.00 to 5.00) 100 µs 400 µs 1e-07" in lines


def test_all_ops_by_default(measured, capsys):
    assert cli.main(["bench", "ops", "--json", "--max-seconds", "5", "--max-gb", "2"]) == 0
    (settings,) = measured[1]
    assert settings == bench_ops.Settings(max_seconds=5, max_gb=2)
    assert json.loads(capsys.readouterr().out)["sequence"][0]["ratio"] == 2.5


def test_a_comparison_of_different_things_fails_after_the_table(measured, capsys):
    measured[0]["sequence"][0] = {"op": "gla", "baseline": "theirs", "length": 2048, "error": 0.3, "agrees": False}
    assert cli.main(["bench", "ops"]) == 1
    out, err = capsys.readouterr()
    assert "gla theirs 2k – – – – – 3e-01 not compared: they compute different things" in joined(out)
    assert "gla / theirs compute different things (relative error 0.3)" in err


def test_decode_beside_the_teacher(llama, capsys):
    arguments = ["bench", "decode", str(llama), "--against", str(llama), "--lengths", "8,600", "--repeats", "1"]
    assert cli.main([*arguments, "--prefill", "16"]) == 0
    lines = joined(capsys.readouterr().out)
    assert [line.split()[:2] for line in lines[1:5]] == [[n, c] for n in ("student", "teacher") for c in ("8", "600")]
    notes = lines[5:]
    assert notes[0].startswith("student: 600 over 8 tokens of context: time × ") and notes[0].endswith("cache × 75")
    assert sum("made for" in note for note in notes) == 2

    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sources"] == {"student": str(llama), "teacher": str(llama)}
    assert found["models"]["teacher"]["bytes_ratio"] == 75
