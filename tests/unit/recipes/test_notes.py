"""What a run says is passed on and kept; a disk that takes no note stops nothing."""

from __future__ import annotations

from relinear.distill.files import read_metrics
from relinear.distill.manifest import check_manifest, write_manifest
from relinear.recipes.notes import NOTES, Kept


class Heard:
    """Takes down what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple] = []

    def __getattr__(self, name):
        return lambda *given, **more: self.heard.append((name, *given, *more.items()))


def test_everything_is_passed_on_and_notes_are_kept(tmp_path):
    heard = Heard()
    kept = Kept(heard, tmp_path)
    kept.stage("align", 100, 5)
    kept.update(10, loss=0.5)
    kept.note("warning: “a”\nand b")
    kept.done()
    Kept(heard, tmp_path).note("after a resume")
    assert heard.heard == [
        ("stage", "align", 100, 5, "tokens"),
        ("update", 10, ("loss", 0.5)),
        ("note", "warning: “a”\nand b"),
        ("done",),
        ("note", "after a resume"),
    ]
    assert [line["text"] for line in read_metrics(tmp_path / NOTES)] == ["warning: “a”\nand b", "after a resume"]


def test_a_folder_that_cannot_be_written_loses_notes_alone(tmp_path):
    (tmp_path / "logs").write_text("a file stands in the way")
    heard = Heard()
    Kept(heard, tmp_path).note("still heard")
    assert heard.heard == [("note", "still heard")]


def test_what_comes_after_a_run_is_no_part_of_its_manifest(tmp_path):
    for name in ("run.json", "eval/core.json", "report/index.html", "logs/notes.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert write_manifest(tmp_path, complete=True).keys() == {"run.json"}
    (tmp_path / "report" / "index.html").write_text("another")
    assert check_manifest(tmp_path) == []
