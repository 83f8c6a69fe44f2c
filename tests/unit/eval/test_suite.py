"""The recall suite: teacher and student, branch by branch, as table, JSON and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from relinear.distill.errors import UserError
from relinear.distill.student import assemble, transfer
from relinear.distill.teacher import load_teacher
from relinear.eval.branches import only
from relinear.eval.heatmaps import heatmaps
from relinear.eval.recall_table import table
from relinear.eval.suite import recall_suite
from relinear.eval.tasks.document import Writer
from relinear.eval.tasks.likelihood import score
from relinear.eval.tasks.summary import summarised
from relinear.eval.tasks.tasks import TASKS, task_documents
from relinear.launch.main import main

SMALL = {"lengths": (400,), "samples": 2, "seed": 3}


@pytest.fixture(scope="module")
def folder(make_teacher) -> Path:
    return make_teacher("llama", num_hidden_layers=2, max_position_embeddings=700)


@pytest.fixture(scope="module")
def teacher(folder):
    return load_teacher(folder)


@pytest.fixture(scope="module")
def windowed(teacher):
    torch.manual_seed(0)
    return assemble(teacher, transfer(teacher, {0: ("gated_deltanet", {"window": 8}), 1: ("swa", {})})[0])


@pytest.fixture(scope="module")
def measured(teacher, windowed):
    tasks = ["needle-number", "multi-value", "pairs"]
    return recall_suite(windowed, teacher.tokenizer, teacher.model, tasks=tasks, generate=True, **SMALL)


def test_every_model_has_every_cell(measured):
    assert measured["lengths"] == [400] and measured["left_out"] == []
    assert list(measured["tasks"]) == ["needle-number", "multi-value", "pairs"]
    for name, task in measured["tasks"].items():
        assert list(task["models"]) == ["teacher", "student", "linear alone", "window alone"]
        for figures in task["models"].values():
            cells = [tuple(cell[axis] for axis in task["axes"]) for cell in figures["cells"]]
            seconds = {second for _, second in cells}
            assert seconds <= set(TASKS[name].seconds) and len(cells) == len(set(cells))
            assert sum(cell["n"] for cell in figures["cells"]) == figures["n"]
            assert all(0 <= cell["exact"] <= cell["credit"] <= 1 for cell in figures["cells"])
            for values in (figures, *figures["cells"]):
                assert values["generated"]["documents"] == values["documents"]
    assert "rank" in measured["tasks"]["needle-number"]["models"]["teacher"]


def test_a_branch_alone_is_what_the_model_scores_within_only(measured, teacher, windowed):
    writer = Writer(teacher.tokenizer)
    documents = task_documents(TASKS["needle-number"], writer, (400,), 2, seed=3)
    found = {}
    for branch in ("linear", "window"):
        figures = measured["tasks"]["needle-number"]["models"][f"{branch} alone"]["cells"]
        with only(windowed, branch):
            for cell, own in documents.items():
                (row,) = [row for row in figures if (row["length"], row["depth"]) == cell]
                wanted = summarised(score(windowed, teacher.tokenizer, own))
                assert row["logprob"] == pytest.approx(wanted["logprob"], rel=1e-5)
        found[branch] = [row["logprob"] for row in figures]
    whole = [row["logprob"] for row in measured["tasks"]["needle-number"]["models"]["student"]["cells"]]
    assert found["linear"] != found["window"] != whole != found["linear"]


def test_a_random_teacher_is_at_chance_and_the_table_says_so(measured):
    header, rows = table(measured)
    assert header[:6] == ["task", "figure", "chance", "teacher", "student", "linear alone"]
    assert all(len(row) == len(header) for row in rows)
    exact = [row for row in rows if row[1] in ("exact", "generated, exact")]
    assert len(exact) == 6
    assert all(row[-1] == "noise: the teacher is at chance" for row in exact)
    assert measured["tasks"]["needle-number"]["signal"] == []


def test_pictures_show_every_model_and_cell(measured, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    paths = heatmaps(measured, tmp_path / "new")
    assert [path.name for path in paths] == [f"recall-{name}.png" for name in measured["tasks"]]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    panels = [axes for axes in figures[0].axes if axes.get_title("left")]
    assert [axes.get_title("left") for axes in panels] == ["teacher", "student", "linear alone", "window alone"]
    cells = measured["tasks"]["needle-number"]["models"]["student"]["cells"]
    assert len(panels[1].texts) == len(cells)
    assert sorted(text.get_text() for text in panels[1].texts) == sorted(f"{100 * c['exact']:.0f}" for c in cells)


def test_the_same_seed_gives_the_same_figures_and_progress_ends(teacher):
    seen = []
    settings = {"tasks": ["needle", "multi-query"], "progress": lambda done, total: seen.append((done, total)), **SMALL}
    one = recall_suite(teacher.model.train(), teacher.tokenizer, **settings)
    assert teacher.model.training
    assert recall_suite(teacher.model.eval(), teacher.tokenizer, **settings) == one
    assert list(one["tasks"]["needle"]["models"]) == ["model"]
    assert seen[-1][0] == seen[-1][1]


def test_what_does_not_fit_is_left_out_or_refused(teacher):
    made = recall_suite(teacher.model, teacher.tokenizer, tasks=["needle", "common-word"], lengths=[100], samples=1)
    assert made["left_out"] == ["common-word"] and list(made["tasks"]) == ["needle"]
    for settings, said in (
        ({"tasks": ["needles"]}, "--tasks needles: unknown; there are needle, "),
        ({"lengths": [400, 701]}, "at most 700, the models' context"),
        ({"lengths": [10]}, "too short for every task"),
    ):
        with pytest.raises(UserError, match=said):
            recall_suite(teacher.model, teacher.tokenizer, **settings)


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [
        "eval",
        str(folder),
        "--suite",
        "recall",
        "--tasks",
        "needle, variables",
        "--lengths",
        "400",
        "--samples",
        "1",
    ]
    assert main([*given, "--plots", str(tmp_path / "plots")]) == 0
    shown = capsys.readouterr()
    assert "needle" in shown.out and "variables" in shown.out and "Drawn" in shown.err
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["recall-needle.png", "recall-variables.png"]
    assert main([*given, "--against", str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["models"] == {"teacher": str(folder), "student": str(folder)}
    models = result["tasks"]["needle"]["models"]
    assert models["teacher"] == models["student"]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--suite", "mmlu"], "--suite mmlu: unknown; there are quick, recall"),
        (["--tasks", "needle"], "--tasks: not for the suite quick"),
        (["--suite", "recall", "--text", "x.txt"], "--text: not for the suite recall"),
        (["--against", "x"], "x: no such folder"),
        ([], "--text FILE: the suite quick needs held-out text"),
        (["--suite", "recall,core", "--tasks", "needle"], "--tasks: recall, core each have their own"),
        (["--suite", "core", "--dtype", "int8"], "--dtype int8: expected one of auto, float32"),
        (["--suite", "core", "--device", "gpu"], "--device gpu: expected auto, cpu"),
        (["--suite", "core", "--data", "nowhere"], "--data nowhere: no such folder"),
        (["--suite", "core", "--task-dir", "nowhere"], "--task-dir nowhere: no such folder"),
        (["--suite", "mt_bench"], "--questions FILE: the suite mt_bench needs"),
        (["--suite", "recall", "--lengths", "1k"], "--lengths 1k: expected numbers of tokens"),
        (["--suite", "recall", "--filler", "no-such.txt"], "--filler no-such.txt: cannot be read"),
    ],
)
def test_the_command_says_what_is_wrong(folder, extra, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(folder), *extra]) == 2
    assert said in capsys.readouterr().err


def test_filler_of_ones_own(teacher, tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("Nothing happened. " * 100)
    settings = {"tasks": ["needle"], "lengths": [400], "samples": 1}
    own = recall_suite(teacher.model, teacher.tokenizer, filler=path, **settings)
    prose = recall_suite(teacher.model, teacher.tokenizer, **settings)
    assert own["filler"] == str(path) and own["tasks"] != prose["tasks"]
