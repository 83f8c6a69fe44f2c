"""The report: well-formed, self-contained, escaped, true to the files, and honest about what is missing."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from relinear.distill.errors import UserError
from relinear.launch import main as cli
from relinear.recipes.report import page as pages
from relinear.recipes.report.read import read_run

VOID = {"meta", "link", "img", "br", "hr"}
BLOCK = {"p", "div", "table", "ul", "ol", "dl", "pre", "figure", "section", "details", "h1", "h2", "h3"}


class Checked(HTMLParser):
    """Reads a page strictly; `faults` is what is wrong with it.

    Attributes:
        text: of the page, tags left out, by the id of the section around it.
        tables: cells of every table, by caption.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.faults: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text: dict[str, str] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self._section = ""
        self._caption = ""
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag in self.open]
        self.faults += [f"id {name} twice" for name in set(self.ids) if self.ids.count(name) > 1]
        self.faults += [f"{link} leads nowhere" for link in self.links if link.removeprefix("#") not in self.ids]

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        where = f"line {self.getpos()[0]}"
        if len(given) != len(attrs):
            self.faults.append(f"{where}: <{tag}> has an attribute twice")
        if tag in BLOCK and "p" in self.open:
            self.faults.append(f"{where}: <{tag}> in a <p>")
        if tag in ("li", "dt", "tr", "td") and self.open[-1] not in ("ul", "ol", "div", "thead", "tbody", "tr"):
            self.faults.append(f"{where}: <{tag}> in <{self.open[-1]}>")
        if tag in ("script", "iframe", "object", "embed", "form", "audio", "video", "base"):
            self.faults.append(f"{where}: <{tag}>")
        if tag == "img" and not given.get("alt"):
            self.faults.append(f"{where}: a picture without words")
        if tag == "th" and given.get("scope") not in ("row", "col"):
            self.faults.append(f"{where}: a header of neither row nor column")
        for name, value in given.items():
            if name.startswith("on") or name in ("srcset", "action", "formaction", "background"):
                self.faults.append(f"{where}: {name}")
            if name == "src" and not value.startswith("data:image/png;base64,"):
                self.faults.append(f"{where}: loads {value}")
            if name == "href" and not value.startswith(("data:", "#")):
                self.faults.append(f"{where}: leads to {value}")
            if name == "href" and value.startswith("#"):
                self.links.append(value)
        if "id" in given:
            self.ids.append(given["id"])
        self.tags.append(tag)
        if tag == "section":
            self._section = given["id"]
        if tag == "tr" and "caption" not in self.open:
            self.tables[self._caption].append([])
        if tag in ("td", "th"):
            self.tables[self._caption][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.faults.append(f"line {self.getpos()[0]}: </{tag}> closes {self.open[-1:]}")
        else:
            self.open.pop()
        if tag == "section":
            self._section = ""

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            if re.search(r"url\(|@import|http", data):
                self.faults.append("the style loads something")
            return
        self.text[self._section] = self.text.get(self._section, "") + data
        if "caption" in self.open and data.strip():
            self._caption = data.strip()
            self.tables[self._caption] = []
        elif "table" in self.open and self.open[-1] in ("td", "th"):
            self.tables[self._caption][-1][-1] += data


def read(report: dict) -> tuple[str, Checked]:
    text = Path(report["report"]).read_text(encoding="utf-8")
    return text, Checked(text)


@pytest.fixture(scope="module")
def whole(sample, tmp_path_factory):
    """A complete run and its report."""
    folder = sample.whole(tmp_path_factory.mktemp("runs") / "mine")
    return folder, pages.report([folder], price=2.5)


@pytest.fixture
def unrendered(monkeypatch):
    """Pictures are made up to the last step, which takes most of the time: one pixel is written instead."""
    from matplotlib.figure import Figure

    pixel = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 1, 1) + bytes(5)
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(pixel))


def row(checked: Checked, caption: str, name: str) -> list[str]:
    (table,) = [cells for title, cells in checked.tables.items() if title.startswith(caption)]
    return next(cells for cells in table if cells[0] == name)


def test_page_is_well_formed_and_loads_nothing(whole):
    text, checked = read(whole[1])
    assert checked.faults == []
    assert text.startswith("<!doctype html>") and checked.tags.count("h1") == 1
    assert "http://" not in text and "https://" not in text
    assert (
        checked.tags.count("img") == len(list(Path(whole[1]["report"]).parent.glob("*.png"))) - 1
    )  # the layer map is words


@pytest.mark.parametrize(
    "broken",
    [
        "<p>a<div>b</div></p>", "<b>a", "</i>", '<img src="x.png" alt="x">',
        '<img alt="" src="data:image/png;base64,x">',
        '<a href="https://a.b">c</a>', '<a href="#nowhere">c</a>', "<script></script>", "<style>a{b:url(c)}</style>",
        '<i id="a"></i><b id="a"></b>', '<i onclick="a"></i>',
    ],
)  # fmt: skip
def test_the_check_sees_what_is_wrong(broken):
    assert Checked(f"<div>{broken}</div>").faults != []


def test_every_section_shows_its_figures_and_nothing_is_missing(whole):
    _, checked = read(whole[1])
    assert [name for name in checked.text if name] == [
        *("verdict", "layers", "parameters", "calibrate", "align", "losses", "fidelity", "recall", "benchmarks"),
        *("position", "generation", "speed", "cost", "happened", "recipe", "versions", "again"),
    ]
    assert whole[1]["runs"]["mine"]["missing"] == []
    assert "cannot be shown" not in str(checked.text) and "cannot be drawn" not in str(checked.text)


def test_numbers_are_those_of_the_files(whole, sample):
    folder, report = whole
    _, checked = read(report)
    result = json.loads((folder / "result.json").read_text())
    core = json.loads((folder / "eval" / "core.json").read_text())
    ours = result["fidelity"]
    ratio = f"{ours['perplexity_ratio']:.4f} ± {ours['perplexity_ratio_stderr']:.4f}"
    assert report["runs"]["mine"]["verdict"]["Perplexity / teacher's"] == ratio == "1.1506 ± 0.0071"
    assert ratio in checked.text["verdict"]
    assert row(checked, "Student against teacher", "exported, at the run's end") == [
        *("exported, at the run's end", "4.027 ± 0.080", "3.500 ± 0.080", ratio, "0.1234 ± 0.0056", "84.3 ± 0.3 %"),
        *("20,154", "result.json"),
    ]
    assert row(checked, "Student against teacher", "exported, suite quick")[3] == "1.1700 ± 0.0071"
    assert row(checked, "Student against teacher", "after align")[3] == "1.3000 ± 0.0071"
    task = core["tasks"]["arc_<b>easy</b>"]
    assert row(checked, "Benchmark tasks", "arc_<b>easy</b>") == [
        *("arc_<b>easy</b>", "acc", "100", "25.0 %", "50.0 ± 1.0 %", "45.0 ± 1.0 %"),
        f"{100 * task['recovery']['value']:.1f} ± {100 * task['recovery']['stderr']:.1f} %",
        "80.0 ± 6.0 %",
    ]
    assert row(checked, "Benchmark tasks", "wikitext")[1:6] == [
        *("word_perplexity (less is better)", "50", "–", "28.000 ± 0.010", "31.000 ± 0.010"),
    ]
    assert row(checked, "Perplexity by position", "256 to 512")[2:4] == ["4.185 ± 0.050", "3.875 ± 0.050"]
    assert row(checked, "Writing, tokens per second", "2k") == ["2k", "40", "80", "2 ×"]
    assert row(checked, "Writing, tokens per second", "4k") == ["4k", "–", "80", "–"]
    assert row(checked, "Greedy continuations", "same from the start (tokens)")[1] == "11.5 ± 1.2"
    assert row(checked, "Repetition", "different tokens")[1] == "40.0 ± 2.0 %"
    assert row(checked, "MT-Bench, judged by a judge", "math") == ["math", "–", "3.25 ± 0.50", "–", "20"]
    assert row(checked, "Examples of continuations", "Once <u>")[1:] == ["upon", "in"]
    assert f"relinear eval {folder / 'export'} --suite core --seed 0 --limit 100" in checked.text["again"]
    assert row(checked, "calibrate: relative error", "3")[1:5] == ["1.01", "0.9", "0.8", "0.3"]
    assert row(checked, "align: loss", "4") == ["4", "0.125", "0.0125", "0.025", "0.0125"]


def test_recall_recovered_counts_the_tasks_that_the_teacher_can_do(whole):
    # 0.6 / 0.8; the error is that of a quotient of independent means: hypot(0.05, 0.75 * 0.02) / 0.8.
    assert whole[1]["runs"]["mine"]["verdict"]["Recall recovered"] == "75.0 ± 6.5 %"


def test_cost_is_measured_time_at_the_price(whole):
    _, checked = read(whole[1])
    together = row(checked, "What it took", "together")
    assert together[1] == "100k" and together[3] == "3 min 50 s"
    assert together[4] == f"{230 / 3600:.3g}" and together[6] == f"{230 / 3600 * 2.5:,.2f}"
    planned = read_run(whole[0]).plan
    assert row(checked, "What it took", "align")[2] == f"{planned.stage('align').flops:.3g}"
    assert row(checked, "Decode cache of one sequence", "32,768")[3].startswith("÷")


def test_text_of_files_is_escaped(whole):
    text, checked = read(whole[1])
    assert "<script" not in text and "<i>damaged" not in text and "<b>easy" not in text
    assert "<script>alert(1)</script>.txt" in checked.text["recipe"]
    assert "a <i>damaged</i> save" in checked.text["happened"]


def test_warnings_are_said(whole):
    told = whole[1]["runs"]["mine"]["warnings"]
    assert "glue: 1 step left out, as the loss was a spike (step 36)" in told
    assert "warning: a <i>damaged</i> save" in told and "layers LLALL" not in told
    assert not [warning for warning in told if "hung" in warning], "an empty file is no hang"


def test_pictures_stand_inside_and_beside(whole):
    folder = Path(whole[1]["report"]).parent
    files = {path.name for path in folder.iterdir()}
    assert files == set(whole[1]["files"])
    for name in ("layers", "calibrate", "align", "glue", "recall-needle", "recall-pairs", "core", "position", "speed"):
        data = (folder / f"{name}.png").read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data.startswith(b"\x89PNG") and width > 300 and height > 100


def test_a_run_that_has_only_begun(sample, tmp_path, unrendered):
    folder = sample.begin(tmp_path / "young")
    report = pages.report([folder])
    _, checked = read(report)
    assert checked.faults == []
    young = report["runs"]["young"]
    assert young["state"] == "unfinished: calibrate at 0 of 64k tokens"
    assert young["verdict"]["Perplexity / teacher's"] == "–" and young["verdict"]["Decode cache smaller"].startswith(
        "÷"
    )
    missing = {entry["section"]: entry for entry in young["missing"]}
    assert {"parameters", "calibrate", "align", "losses", "recall", "benchmarks", "speed"} <= missing.keys()
    assert missing["align"]["command"] == f"relinear run {folder / 'recipe.yaml'} --out {folder} --resume"
    assert "alert(1)" in checked.text["recipe"]


def test_a_run_in_the_middle_shows_what_there_is(sample, tmp_path, unrendered):
    folder = sample.begin(tmp_path / "middle")
    sample.transferred(folder)
    sample.calibrated(folder)
    sample.trained(folder, share=0.5)
    report = pages.report([folder])
    _, checked = read(report)
    middle = report["runs"]["middle"]
    assert checked.faults == []
    assert middle["state"] == "unfinished: glue at 20k of 40k tokens"
    assert middle["verdict"]["Perplexity / teacher's"] == "1.2000 ± 0.0071"
    assert middle["verdict"]["Training"] == "80k tokens"
    # 500 tokens per second in every record: 60k took 120 s, 20k took 40 s.
    assert row(checked, "Stages", "align")[2:5] == ["60k", "120", "2 min 00 s"]
    assert row(checked, "Stages", "glue")[2:5] == ["20k of 40k", "60", "40 s"]
    assert (folder / "report" / "glue.png").exists()


def test_commands_for_what_a_complete_run_lacks(sample, tmp_path, unrendered):
    folder = sample.begin(tmp_path / "bare")
    sample.transferred(folder)
    sample.trained(folder)
    sample.ended(folder)
    commands = [entry["command"] for entry in pages.report([folder])["runs"]["bare"]["missing"]]
    teacher = folder.parent / "teacher"
    assert f"relinear eval {folder / 'export'} --suite core" in commands
    assert f"relinear bench model {folder / 'export'} --against {teacher}" in commands


def test_without_the_teacher_the_rest_is_shown(sample, tmp_path, unrendered):
    folder = sample.whole(tmp_path / "moved")
    shutil.rmtree(folder.parent / "teacher")
    report = pages.report([folder])
    text, checked = read(report)
    assert checked.faults == [] and "no such folder" in text
    assert report["runs"]["moved"]["verdict"]["Perplexity / teacher's"] == "1.1506 ± 0.0071"
    assert report["runs"]["moved"]["verdict"]["Decode cache smaller"] == "–"


def test_a_damaged_file_hides_no_other(sample, tmp_path, unrendered):
    folder = sample.whole(tmp_path / "torn")
    (folder / "eval" / "core.json").write_text('{"tasks": {', encoding="utf-8")
    sample.write(folder / "eval" / "long.json", {"suite": "long", "positions": "none"})
    report = pages.report([folder])
    _, checked = read(report)
    assert checked.faults == []
    assert "eval/core.json: cannot be read" in checked.text["happened"]
    assert "cannot be shown" in checked.text["position"]
    assert row(checked, "Student against teacher", "exported, at the run's end")


def test_suites_of_different_weights_are_a_warning(sample, tmp_path, unrendered):
    folder = sample.whole(tmp_path / "mixed")
    core = json.loads((folder / "eval" / "core.json").read_text())
    sample.write(folder / "eval" / "core.json", core | {"checkpoints": {"student": "cc" * 32, "teacher": None}})
    assert any("different weights" in text for text in pages.report([folder])["runs"]["mixed"]["warnings"])


def test_several_runs_stand_beside_each_other(sample, tmp_path, unrendered):
    for name in ("one", "two"):
        sample.whole(tmp_path / "all" / name)
    rows = [{"name": "teacher", "perplexity": {"value": 3.5, "stderr": 0.1}, "ratio": None, "kl": None}]
    rows += [{"name": "one", **{key: {"value": 1.25, "stderr": 0.01} for key in ("perplexity", "ratio", "kl")}}]
    for entry in rows:
        entry |= {"agreement": None, "recall": {"0": {"value": 0.9, "stderr": 0.1}}, "cache_bytes": {"1024": 2048}}
        entry |= {"tokens": 5000, "seconds": 70.0}
    sample.write(tmp_path / "all" / "summary.json", {"rows": rows})
    report = pages.report([tmp_path / "all"])
    _, checked = read(report)
    assert checked.faults == []
    assert report["report"] == str(tmp_path / "all" / "report" / "index.html")
    assert row(checked, "Runs beside each other", "Perplexity / teacher's")[1:] == ["1.1506 ± 0.0071"] * 2
    assert row(checked, "What was lost and what was won", "perplexity / teacher's")[1:] == ["–", "1.2500 ± 0.0100"]
    assert {"one/align.png", "two/align.png", "recall.png"} <= set(report["files"])
    with pytest.raises(UserError, match="--out"):
        pages.report([tmp_path / "all" / "one", tmp_path / "all" / "two"])


def test_again_replaces_its_own_folder_and_no_other(sample, tmp_path, unrendered):
    folder = sample.begin(tmp_path / "twice")
    pages.report([folder])
    sample.transferred(folder)
    pages.report([folder])
    assert sorted(path.name for path in folder.iterdir()) == ["recipe.yaml", "report", "run.json", "transfer.json"]
    (folder / "report" / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"mine\.txt"):
        pages.report([folder])
    assert (folder / "report" / "mine.txt").read_text() == "keep me"
    with pytest.raises(UserError, match="no report wrote"):
        pages.report([folder], out=folder)


def test_command(sample, tmp_path, unrendered, capsys):
    folder = sample.begin(tmp_path / "mine")
    sample.ended(folder)
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "page")]) == 0
    out, talk = capsys.readouterr()
    assert out == f"{tmp_path / 'page' / 'index.html'}\n" and talk.splitlines()[-1].startswith("Next: relinear ")
    assert cli.main(["report", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"]["mine"]["state"] == "complete"
    (tmp_path / "empty").mkdir()
    for wrong, said in ((tmp_path / "empty", "not a run folder"), (tmp_path / "nothing", "no such folder")):
        assert cli.main(["report", str(wrong)]) == 2
        assert said in capsys.readouterr().err


def test_it_needs_no_torch(sample, tmp_path):
    folder = sample.begin(tmp_path / "light")
    sample.trained(folder, ("align",))
    code = (
        "import sys\nfrom relinear.launch.main import main\n"
        f"assert main(['report', {str(folder)!r}]) == 0\n"
        "assert not {'torch', 'transformers', 'datasets'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def browse(page: Path, picture: Path, *flags: str) -> list[str]:
    """Take a picture of a page in a browser without a network; what the browser complains of."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    command = [
        *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0", "--window-size=1400,2400"),
        *(f"--user-data-dir={picture.parent / 'profile'}", f"--screenshot={picture}", *flags, page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert picture.exists(), done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def colours(picture: Path) -> int:
    from PIL import Image

    with Image.open(picture) as image:
        return len(image.convert("RGB").getcolors(2**24) or [])


def test_a_browser_shows_it_without_complaint(whole, tmp_path):
    assert browse(Path(whole[1]["report"]), tmp_path / "shot.png") == []
    assert colours(tmp_path / "shot.png") > 50


@pytest.mark.slow
def test_the_browser_would_complain(whole, tmp_path):
    text = Path(whole[1]["report"]).read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace("<header>", '<header><img src="http://a.example/x.png" alt="x">'), encoding="utf-8")
    assert browse(broken, tmp_path / "shot.png") != []
    broken.write_text("<!doctype html><title>x</title>", encoding="utf-8")
    browse(broken, tmp_path / "blank.png")
    assert colours(tmp_path / "blank.png") < 50
