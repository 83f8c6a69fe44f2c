"""Figures: that they are written, the same every time, and show the numbers that they were given."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from relinear.eval import plots
from relinear.eval.tables import Row

ROWS = [
    Row("teacher", (3.7, 0.04), recall={0: (1.0, 0.0), 640: (0.97, 0.02)}, cache_bytes={1024: 2**21, 32768: 2**26}),
    Row(
        "all-linear",
        (3.9, 0.04),
        ratio=(1.05, 0.0012),
        kl=(0.025, 0.0007),
        recall={0: (0.9, 0.03), 640: (0.1, 0.02)},
        cache_bytes={1024: 2**17, 32768: 2**17},
    ),
    Row("hybrid", (3.74, 0.04), ratio=(0.99, None), kl=(0.005, 0.0003), recall={0: (1.0, 0.0)}),
]


def metrics(layers: int = 5, terms: tuple[str, ...] = ("kl",), steps: int = 120) -> list[dict[str, Any]]:
    def record(stage: str, i: int, losses: dict[str, float]) -> dict[str, Any]:
        return {"stage": stage, "step": i, "tokens": 1000 * i, "loss": 1.0 / i, "losses": losses}

    numbers = range(1, steps + 1)
    align = [record("align", i, {f"layer {k}": 2.0 / (i + k) for k in range(layers)}) for i in numbers]
    glue = [record("glue", i, dict.fromkeys(terms, 0.5 / i)) for i in numbers]
    held_out = [{"stage": "glue", "step": steps, "tokens": 1000 * steps, "eval": {"score": 0.1, "kl": 0.06}}]
    return align + glue + held_out


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were written."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig

    def savefig(self: Any, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


DRAW = {
    "loss": lambda path: plots.loss_curves(metrics(), path),
    "loss, many layers": lambda path: plots.loss_curves(metrics(layers=28, terms=("kl", "ce")), path),
    "recall": lambda path: plots.recall_by_distance(ROWS, path),
    "cache": lambda path: plots.cache_over_length(ROWS, path),
    "fidelity": lambda path: plots.fidelity_bars(ROWS, path),
}


@pytest.mark.parametrize("name", DRAW)
def test_writes_the_same_png_whatever_the_users_style(name, tmp_path):
    import matplotlib

    first = DRAW[name](tmp_path / "new folder" / "a.png")
    with matplotlib.rc_context({"figure.facecolor": "red", "font.size": 30, "savefig.dpi": 40}):
        second = DRAW[name](str(tmp_path / "b.png"))
        assert matplotlib.rcParams["font.size"] == 30
    content = first.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000
    assert content == second.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert 600 < width < 2000 and 250 < height < 1000


def test_recall_shows_every_model_in_its_colour(drawn, tmp_path):
    plots.recall_by_distance(ROWS, tmp_path / "a.png")
    plots.recall_by_distance(ROWS[:1] + ROWS[2:], tmp_path / "b.png")
    (axes,) = drawn[0].axes
    lines = {c.get_label(): c.lines[0] for c in axes.containers}
    assert list(lines) == ["teacher", "all-linear", "hybrid"]
    assert list(lines["all-linear"].get_ydata()) == pytest.approx([90, 10])
    assert list(lines["all-linear"].get_xdata()) == [0, 640]  # the middle of three stands on the spot
    assert len(lines["hybrid"].get_xdata()) == 1
    assert len({line.get_color() for line in lines.values()}) == 3
    assert list(axes.get_xticks()) == [0, 640]
    assert "(tokens)" in axes.get_xlabel() and "(%)" in axes.get_ylabel()


def test_cache_is_logarithmic_and_labelled_in_bytes(drawn, tmp_path):
    plots.cache_over_length(ROWS, tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [list(line.get_ydata()) for line in axes.lines] == [[2**21, 2**26], [2**17, 2**17]]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1k", "32k"]
    assert sorted(text.get_text() for text in axes.texts) == ["131 kB", "67.1 MB"]


def test_labels_of_curves_that_end_together_do_not_overlap(drawn, tmp_path):
    near = [Row(f"model {i}", cache_bytes={1024: 100_000 + 2000 * i, 8192: 100_000 + 2000 * i}) for i in range(5)]
    plots.cache_over_length(near, tmp_path / "a.png")
    boxes = sorted((text.get_window_extent() for text in drawn[0].axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 5
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))


def test_a_long_legend_stays_inside_the_figure(drawn, tmp_path):
    many = [Row(f"a rather long name of a model, number {i}", recall={0: (0.5, 0.1), 9: (0.4, 0.1)}) for i in range(9)]
    plots.recall_by_distance(many, tmp_path / "a.png")
    (figure,) = drawn
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert box.y0 >= figure.axes[0].get_window_extent().y1


def test_fidelity_leaves_out_the_teacher(drawn, tmp_path):
    plots.fidelity_bars(ROWS, tmp_path / "a.png")
    ratio, kl = drawn[0].axes
    assert [tick.get_text() for tick in ratio.get_yticklabels()] == ["all-linear", "hybrid"]
    assert [bar.get_width() for bar in ratio.patches] == pytest.approx([5.0, -1.0])
    assert [bar.get_width() for bar in kl.patches] == pytest.approx([0.025, 0.005])
    assert [text.get_text() for text in ratio.texts] == ["5.00 ± 0.12", "-1.00"]
    for axes in (ratio, kl):
        right = axes.get_window_extent().x1
        assert all(text.get_window_extent().x1 <= right for text in axes.texts)


def test_losses_by_layer_and_by_term(drawn, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in metrics()) + '{"stage": "glue", "cut')
    plots.loss_curves(path, tmp_path / "a.png")
    align, glue = drawn[0].axes
    assert (align.get_title(loc="left"), glue.get_title(loc="left")) == ("align", "glue")
    assert [line.get_label() for line in align.lines] == [f"layer {i}" for i in range(5)]
    assert len(align.lines[0].get_xdata()) == 120
    assert [text.get_text() for text in glue.get_legend().get_texts()] == ["KL, training", "KL, held-out text"]
    assert list(glue.lines[-1].get_ydata()) == [0.06]
    assert align.get_yscale() == glue.get_yscale() == "log"


def test_many_layers_get_a_colour_scale_and_a_mix_its_terms(drawn, tmp_path):
    plots.loss_curves(metrics(layers=28, terms=("kl", "ce")), tmp_path / "a.png")
    align, glue, scale = drawn[0].axes
    assert len(align.lines) == 28 and align.get_legend() is None
    assert scale.get_ylabel() == "layer"
    names = [text.get_text() for text in glue.get_legend().get_texts()]
    assert names == ["loss, training", "KL, training", "cross-entropy, training", "KL, held-out text"]


def test_a_loss_that_was_not_finite_leaves_a_gap(tmp_path):
    records = metrics()
    records[3]["losses"]["layer 2"] = None
    assert plots.loss_curves(records, tmp_path / "a.png").stat().st_size > 10_000


def test_one_step_of_one_layer_is_a_visible_point(drawn, tmp_path):
    plots.loss_curves(metrics(layers=1, steps=1), tmp_path / "a.png")
    assert [line.get_marker() for line in drawn[0].axes[0].lines] == ["o"]


def test_losses_that_are_all_zero_are_drawn_without_a_warning(drawn, tmp_path):
    zeros = [record | {"loss": 0.0, "losses": {"kl": 0.0}} for record in metrics()[120:240]]
    plots.loss_curves(zeros, tmp_path / "a.png")
    assert drawn[0].axes[0].get_yscale() == "linear"


def test_calibration_follows_every_layer(drawn, tmp_path):
    rows = {
        str(layer): {"random": 1.0, "transfer": 0.9, "calibrated": 0.5 + 0.1 * layer, "aligned": None}
        | {"distance": [0.0, 4.0, 60.0]}
        for layer in (1, 3)
    }
    plots.calibration_errors(rows, tmp_path / "before.png")
    plots.calibration_errors({k: row | {"aligned": 0.2} for k, row in rows.items()}, tmp_path / "after.png")
    errors, distances = drawn[0].axes
    assert [line.get_label() for line in errors.lines] == ["random", "transfer", "calibrated"]
    assert [list(line.get_ydata()) for line in errors.lines][2] == [0.6, 0.8]
    assert [list(line.get_xdata()) for line in distances.lines] == [[1] * 3, [3] * 3]
    assert [line.get_label() for line in drawn[1].axes[0].lines][-1] == "aligned"
    with pytest.raises(ValueError, match="no layer was calibrated"):
        plots.calibration_errors({}, tmp_path / "none.png")


def test_smoothing_keeps_level_and_start():
    smooth = plots._smooth([8.0, *[4.0] * 399])
    assert len(smooth) == 400
    assert smooth[0] == 8.0 and smooth[-1] == 4.0
    assert max(smooth[20:]) == 4.0


def test_nothing_to_draw(tmp_path):
    bare = [Row("x")]
    for draw in (plots.recall_by_distance, plots.cache_over_length, plots.fidelity_bars):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw(bare, tmp_path / "a.png")
    with pytest.raises(ValueError, match="no training step"):
        plots.loss_curves([], tmp_path / "a.png")
    assert not list(Path(tmp_path).iterdir())
