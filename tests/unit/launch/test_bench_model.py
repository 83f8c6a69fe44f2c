"""`bench model`: wrong input, the table, the results folder, and that a second call measures nothing."""

from __future__ import annotations

import json

import pytest

from relinear.eval import bench_model
from relinear.launch import main as cli


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lengths", "1k,many"], ["--lengths", "'many'", "For example"]),
        (["--lengths", "1"], ["--lengths", "found 1, expected at least 2"]),
        (["--memory", "lots"], ["--memory", "'lots'", "16GB"]),
        (["--device", "tpu"], ["--device", "tpu"]),
        (["--dtype", "int4"], ["--dtype", "int4"]),
        (["--repeats", "0"], ["--repeats"]),
    ],
)
def test_wrong_input_is_one_message_and_code_2(capsys, llama, arguments, words):
    assert cli.main(["bench", "model", str(llama), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.strip().splitlines()) == 1
    assert all(word in err for word in words), err


def test_no_such_model(capsys):
    assert cli.main(["bench", "model", "./no-such-folder"]) == 2
    assert "no-such-folder" in capsys.readouterr().err


def test_table_json_and_resume(llama, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["bench", "model", str(llama), "--against", str(llama), "--lengths", "16,0.3k", "--repeats", "1"]
    arguments += ["--tokens", "2", "--memory", "1GiB"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0].startswith("model tokens prefill/s first token decode/s peak cache batch in 1.07 GB")
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["student", "16"], ["teacher", "16"], ["student", "300*"], ["teacher", "300*"],
    ]  # fmt: skip
    assert any(line.startswith("* beyond the context") for line in lines)
    assert "computed from them, not run" in lines[-1] and not any("the plan says" in line for line in lines)
    folder = tmp_path / "eval-results" / llama.name
    assert f"Stored: eval-results/{llama.name}/bench.json" in err and "Next: relinear eval" in err
    assert {path.name for path in folder.glob("bench*")} == {
        "bench.json", "bench-prefill.png", "bench-decode.png", "bench-memory.png",
    }  # fmt: skip

    monkeypatch.setattr(bench_model, "measure_length", lambda *given: pytest.fail("measured again"))
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((folder / "bench.json").read_text())
    assert found["settings"]["memory"] == 2**30
    assert [row["ratios"]["cache_bytes"] for row in found["lengths"]] == [1, 1]
