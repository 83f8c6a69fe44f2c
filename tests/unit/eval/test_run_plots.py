"""The report's own figures: that they show what they were given, and that letters can be read on their colours."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from relinear.eval import run_plots

NAMES = {"A": "attention", "L": "rwkv7", "M": "gated_deltanet"}


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


def steps(rates: list[Any], groups: list[str]) -> list[dict[str, Any]]:
    shared = {"stage": "glue", "loss": 1.0, "losses": {"kl": 0.5}, "grad_norm": dict.fromkeys(groups, 1.0)}
    return [{**shared, "step": i, "tokens": 1000 * i, "lr": rate} for i, rate in enumerate(rates, 1)]


def test_layer_map_has_a_letter_and_a_number_for_every_layer(drawn, tmp_path):
    path = run_plots.layer_map("LLMA" * 10, NAMES, tmp_path / "a.png")
    (axes,) = drawn[0].axes
    words = [text.get_text() for text in axes.texts]
    assert words[0::2] == list("LLMA" * 10) and words[1::2] == [str(layer) for layer in range(40)]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [f"{k}  {v}" for k, v in NAMES.items()]
    assert run_plots.layer_map("LLMA" * 10, NAMES, tmp_path / "b.png").read_bytes() == path.read_bytes()


def test_letters_can_be_read_on_every_colour():
    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in (run_plots.KEPT, *run_plots.MIXERS):
        low, high = sorted((luminance(colour), luminance(run_plots.ink(colour))))
        assert (high + 0.05) / (low + 0.05) >= 4.5, colour


def test_learning_rates_by_group(drawn, tmp_path):
    run_plots.stage_curves(steps([[1e-2, 1e-4], [5e-3, 1e-5]], ["mixers", "the rest"]), tmp_path / "a.png")
    rates = drawn[0].axes[1]
    assert {line.get_label(): list(line.get_ydata()) for line in rates.lines} == {
        "mixers": [1e-2, 5e-3],
        "the rest": [1e-4, 1e-5],
    }
    run_plots.stage_curves(steps([1e-3, 1e-4], ["all"]), tmp_path / "b.png")
    assert [list(line.get_ydata()) for line in drawn[1].axes[1].lines] == [[1e-3, 1e-4]]
    with pytest.raises(ValueError, match="no training step"):
        run_plots.stage_curves([], tmp_path / "c.png")


def test_bars_stand_at_the_scores(drawn, tmp_path):
    tasks = {
        "easy": {"student": {"value": 0.4, "stderr": 0.1}, "teacher": {"value": 0.5, "stderr": None}, "chance": 0.25},
        "hard": {"student": {"value": 0.1, "stderr": 0.1}, "teacher": None, "chance": None},
    }
    run_plots.task_bars(tasks, tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert [round(bar.get_width(), 6) for bar in axes.patches] == [0.5, 0.4, 0.1]


def test_what_was_not_measured_over_length_has_no_panel(drawn, tmp_path):
    lengths = [
        {"length": n, "student": {"decode_tokens_per_second": 80.0, "peak_bytes": None}, "teacher": None}
        for n in (1024, 2048)
    ]
    path = run_plots.over_length(lengths, tmp_path / "a.png")
    assert [axes.get_title("left") for axes in drawn[0].axes if axes.get_visible()] == ["writing (tokens/s)"]
    assert struct.unpack(">II", path.read_bytes()[16:24])[0] > 600
    with pytest.raises(ValueError, match="no length"):
        run_plots.over_length([{"length": 8, "student": {}, "teacher": None}], tmp_path / "b.png")
