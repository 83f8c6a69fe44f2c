"""The page: chapters of sections, drawn, written out as HTML with everything inside it, put in place at once."""

from __future__ import annotations

import base64
import contextlib
import json
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ... import __version__
from ...distill import files
from ...distill.errors import UserError
from . import lost, made, origin, together, trained, verdict, won
from .blocks import Block, Chapter, Missing, Notice, Section, Tiles
from .read import Run, find_runs, read_run

INDEX = "index.html"
RECORD = "report.json"
"""What the page says, for programs: and which files are the report's own."""
_UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError)


def report(given: Sequence[Path], out: Path | None = None, price: float | None = None) -> dict[str, Any]:
    """Write the report of one run, or of several beside each other.

    Args:
        given: run folders, or folders with runs directly inside them.
        out: where to; by default `report` in the folder given. An earlier report there is replaced.
        price: of an hour of one device.

    Returns:
        What report.json holds, and `report`: the page's path.

    Raises:
        UserError: no run there; several folders and no `out`; `out` holds other files than a report's.
        MachineError: it cannot be written.
    """
    folders = find_runs(list(given))
    if out is None:
        if len(given) > 1:
            raise UserError("--out: several runs need a folder for their report, e.g. --out report")
        out = given[0] / "report"
    before = _own_files(out)
    runs = [(key, read_run(folder)) for key, folder in zip(_keys(folders), folders, strict=True)]
    chapters = [_chapter(key, run, price, single=len(runs) == 1) for key, run in runs]
    if len(runs) > 1:
        summary = given[0] / "summary.json" if len(given) == 1 else None
        chapters.insert(0, together.chapter(runs, summary))
    record: dict[str, Any] = {}
    names = {
        chapter.key: "" if len(runs) == 1 or chapter.key == together.KEY else f"{chapter.key}/" for chapter in chapters
    }

    def write(folder: Path) -> None:
        pages = [_drawn(chapter, folder, names[chapter.key]) for chapter in chapters]
        files.write_text(folder / INDEX, render(chapters, pages, _title(runs)))
        record.update(_record(runs, chapters))
        record["files"] = sorted([RECORD, *_inside(folder)])
        files.write_json(folder / RECORD, files.finite(record))

    if before is None:
        out.parent.mkdir(parents=True, exist_ok=True)
    files.commit_directory(out, write)
    return record | {"report": str(out / INDEX)}


def _inside(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def _own_files(out: Path) -> set[str] | None:
    """Files of the report that stands there, None where there is nothing.

    Raises:
        UserError: others stand there too: replacing the folder would lose them.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"{out}: a file, and the report is a folder. Choose another: --out DIR")
    own = set()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        own = set(json.loads((out / RECORD).read_text(encoding="utf-8"))["files"])
    others = [name for name in _inside(out) if name not in own]
    if others:
        some = ", ".join(others[:3]) + (" …" if len(others) > 3 else "")
        raise UserError(f"{out}: holds files that no report wrote ({some}). Move them, or choose another: --out DIR")
    return own


def _keys(folders: Sequence[Path]) -> list[str]:
    """A name for each run, for links and folders: its own where no other has the same."""
    names = [
        "".join(c if c.isascii() and c.isalnum() else "-" for c in f.resolve().name).strip("-") or "run"
        for f in folders
    ]
    return [
        name if names.count(name) == 1 and name != together.KEY else f"{name}-{i + 1}" for i, name in enumerate(names)
    ]


def _title(runs: Sequence[tuple[str, Run]]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs beside each other"
    return _what(runs[0][1])


def _what(run: Run) -> str:
    """Teacher and mixers, in a few words."""
    mixers = sorted({name for name, _ in run.record["layers"].values()})
    source = str(run.record["teacher"]["source"])
    teacher = source if run.record["teacher"].get("revision") else Path(source).name
    return f"{teacher}, converted to {' and '.join(mixers) or 'nothing'}"


SECTIONS: tuple[tuple[str, str, Callable[[Run], Iterator[Block]]], ...] = (
    ("layers", "Layers", made.layers),
    ("parameters", "Where parameters came from", made.parameters),
    ("calibrate", "Calibrate", made.calibrate),
    ("align", "Align: every layer for itself", trained.align),
    ("losses", "Loss curves and stages", trained.losses),
    ("fidelity", "Fidelity on held-out text", lost.fidelity),
    ("recall", "Recall", lost.recall),
    ("benchmarks", "Benchmarks", lost.core),
    ("position", "Perplexity by position", lost.position),
    ("generation", "Generated text", lost.generation),
    ("speed", "Speed and memory over length", won.speed),
)


def _chapter(key: str, run: Run, price: float | None, *, single: bool) -> Chapter:
    rest = (
        ("cost", "Cost", lambda run: won.cost(run, price)),
        ("happened", "What happened on the way", origin.happened),
        ("recipe", "The recipe", origin.recipe),
        ("versions", "Versions and environment", origin.versions),
        ("again", "How to make it again", origin.again),
    )
    sections = [_section("verdict", "Verdict", lambda run: iter([*_state(run), verdict.tiles(run)]), run)]
    sections += [_section(name, title, build, run) for name, title, build in (*SECTIONS, *rest)]
    converted = len(run.record["layers"])
    made_of = made.layer_map(run)
    layers = f"{converted} of {made_of.num_layers} layers" if made_of is not None else f"{converted} layers"
    lead = f"{layers} converted. Run {run.folder}, teacher {run.record['teacher']['source']}; {verdict.state(run)}."
    return Chapter(key, _what(run) if single else f"{key}: {_what(run)}", lead, sections)


def _state(run: Run) -> list[Block]:
    """That a run has not ended; how many warnings there are."""
    found: list[Block] = []
    if run.result is None:
        written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.written))
        found.append(
            Notice(f"{verdict.state(run).capitalize()}; its figures are those so far (last written {written}).")
        )
    number = len(origin.warnings(run))
    if number:
        found.append(Notice(f"{number} {'warning' if number == 1 else 'warnings'}: see “What happened on the way”."))
    return found


def _section(name: str, title: str, build: Callable[[Run], Iterator[Block]], run: Run) -> Section:
    """A section; where a file holds something else than its writer leaves there, that is said in its stead."""
    blocks: list[Block] = []
    try:
        blocks.extend(build(run))
    except _UNREADABLE as error:
        blocks.append(Notice(f"The rest cannot be shown: a file of the run is not as relinear writes it ({error!r})."))
    return Section(name, title, blocks)


def _drawn(chapter: Chapter, folder: Path, below: str) -> dict[str, dict[str, Any]]:
    """Every picture of a chapter, written to `folder` and ready to be put into the page; by name."""
    found: dict[str, dict[str, Any]] = {}
    for picture in (picture for section in chapter.sections for picture in section.pictures):
        path = folder / below / picture.name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            picture.draw(path)
        except _UNREADABLE as error:
            found[picture.name] = {"problem": f"{picture.name} cannot be drawn ({error!r})."}
            continue
        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        shown = {"file": f"{below}{picture.name}", "width": width, "height": height}
        found[picture.name] = shown | {"data": base64.b64encode(data).decode("ascii")}
    return found


def render(chapters: Sequence[Chapter], pictures: Sequence[dict[str, dict[str, Any]]], title: str) -> str:
    """The page.

    Args:
        chapters: in order.
        pictures: of each chapter, by name: as `_drawn` gives them.
        title: of the page; every text is escaped.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html").render(
        chapters=list(zip(chapters, pictures, strict=True)),
        title=title,
        version=__version__,
        read=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        single=len(chapters) == 1,
    )


def _template(name: str) -> str:
    return (resources.files(str(__package__)) / name).read_text(encoding="utf-8")


def _record(runs: Sequence[tuple[str, Run]], chapters: Sequence[Chapter]) -> dict[str, Any]:
    """The page's figures as plain values."""
    told = {chapter.key: chapter for chapter in chapters}
    return {
        "relinear": __version__,
        "runs": {
            key: {
                "run": str(run.folder),
                "state": verdict.state(run),
                "verdict": _tiles(told[key]),
                "warnings": origin.warnings(run),
                "missing": [
                    {"section": section.name, "text": block.text, "command": block.command}
                    for section in told[key].sections
                    for block in section.blocks
                    if isinstance(block, Missing)
                ],
            }
            for key, run in runs
        },
    }


def _tiles(chapter: Chapter) -> dict[str, str]:
    blocks = [block for section in chapter.sections for block in section.blocks if isinstance(block, Tiles)]
    return {tile.label: tile.value for block in blocks for tile in block.tiles}
