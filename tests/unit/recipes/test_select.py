"""Scores of layers: names, rankings, agreement, and files that `layers.keep` reads back. No model here."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from relinear.distill.errors import UserError
from relinear.recipes import layers
from relinear.recipes.select import report, simple
from relinear.recipes.select.methods import COMBINED, METHODS, check_keep, ordered, parse
from relinear.recipes.select.scores import Scores, agreement, kendall, mean_ranks, ranked, spearman


def test_names_are_read_in_order_each_once() -> None:
    assert parse("restore-kl, Lazy,restore-kl") == ["restore-kl", "lazy"]
    everything = parse("all")
    assert everything[0] == "combined" and set(METHODS) - set(everything) == {"kl-guided"}
    assert parse("lazy,all")[0] == "lazy"


@pytest.mark.parametrize(("text", "words"), [("restor-kl", "restore-kl"), ("recal", "recall"), ("x", "greedy-kl")])
def test_an_unknown_method_names_the_nearest(text: str, words: str) -> None:
    with pytest.raises(UserError, match=f"--by: there is no method '{text}'.*{words}"):
        parse(f"lazy,{text}")


def test_uniform_and_the_parts_of_combined_run_beside_what_is_named() -> None:
    assert ordered(["lazy"]) == ["uniform", "lazy"]
    assert ordered(["combined"]) == ["uniform", *(name for name in METHODS if name in COMBINED), "combined"]


@pytest.mark.parametrize("keep", [0, -1, 5, 9])
def test_what_cannot_be_kept_is_refused(keep: int) -> None:
    with pytest.raises(UserError, match="Give 1 to 4"):
        check_keep(keep, 5)
    check_keep(4, 5)


@pytest.mark.parametrize("layer_count", [2, 5, 12, 31])
def test_by_place_keeps_what_layers_keep_says(layer_count: int, tmp_path: Path) -> None:
    for keep, place in itertools.product((1, layer_count // 2, layer_count - 1), ("uniform", "lower", "upper")):
        scores = simple.by_place(place, layer_count, keep)
        wanted = layers.select({"ratio": keep / layer_count, "place": place}, layer_count)
        assert scores.chosen(keep) == wanted, (place, keep)
        assert read_back(scores, keep, tmp_path) == wanted


def read_back(scores: Scores, keep: int, folder: Path) -> list[int]:
    path = folder / "scores.json"
    path.write_text(json.dumps(scores.to_dict(keep)))
    return layers.select({"scores": str(path), "top": keep}, len(scores.values))


@pytest.mark.parametrize("method", ["restore-kl", "replace-kl", "recall", "lazy", "greedy-kl", "combined"])
def test_a_scores_file_gives_the_chosen_layers_back(method: str, tmp_path: Path) -> None:
    """Ties too, on both sides of `higher_is`; and the file holds all that a Scores has."""
    rng = random.Random(3)
    values = [float(rng.randrange(4)) for _ in range(9)]
    scores = Scores(method, values, [0.1] * 9, [(0.0, 0.1)] * 8, 3, ["said"], False, {"a": [1]}, 2.0, 1.5, 4)
    for keep in range(1, 9):
        assert read_back(scores, keep, tmp_path) == scores.chosen(keep)
    assert Scores.from_dict(json.loads(json.dumps(scores.to_dict(3)))) == scores


def test_ranks_share_places_where_scores_are_equal() -> None:
    assert ranked([1.0, 3.0, 3.0, 2.0], "keep") == [1, 2, 3, 0]
    assert mean_ranks([1.0, 3.0, 3.0, 2.0], "keep") == [3.0, 0.5, 0.5, 2.0]
    assert mean_ranks([1.0, 3.0, 3.0, 2.0], "convert") == [0.0, 2.5, 2.5, 1.0]


def test_rank_correlations_are_those_of_the_definitions() -> None:
    rng = random.Random(1)
    first = [float(rng.randrange(5)) for _ in range(12)]
    second = [float(rng.randrange(5)) for _ in range(12)]
    pairs = list(itertools.combinations(range(12), 2))
    agree = sum((first[i] - first[j]) * (second[i] - second[j]) > 0 for i, j in pairs)
    against = sum((first[i] - first[j]) * (second[i] - second[j]) < 0 for i, j in pairs)
    untied = [sum(x[i] != x[j] for i, j in pairs) for x in (first, second)]
    assert kendall(first, second) == pytest.approx((agree - against) / (untied[0] * untied[1]) ** 0.5)
    assert kendall([0.0, 1.0, 2.0], [0.0, 1.0, 2.0]) == kendall([2.0, 1.0, 0.0], [5.0, 4.0, 1.0]) == 1.0
    assert kendall([0.0, 1.0], [1.0, 1.0]) is None and spearman([0.5, 0.5], [0.0, 1.0]) is None
    assert spearman([0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]) == pytest.approx(-1.0)
    # Σ d² = 6 over four layers: 1 - 6 · 6 / (4 · 15)
    assert spearman([0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 3.0, 2.0]) == pytest.approx(1 - 6 * 4 / 60)


def test_agreement_compares_what_speaks_for_keeping() -> None:
    low = Scores("restore-kl", [0.1, 0.4, 0.2])
    high = Scores("replace-kl", [9.0, 1.0, 2.0])
    (row,) = agreement([low, high], 2)
    assert row["kendall"] == row["spearman"] == pytest.approx(1.0)
    assert row["shared"] == [0, 2] and row["overlap"] == 1.0


def test_combined_averages_places_and_knows_its_noise() -> None:
    sure = Scores("restore-kl", [0.1, 0.2, 0.3], [1e-6] * 3)
    other = Scores("replace-kl", [5.0, 6.0, 1.0], [1e-6] * 3)
    made = simple.combined([sure, other])
    assert made.values == [0.5, 0.5, 2.0] and made.chosen(1) == [0] and made.higher_is == "convert"
    assert made.errors == [0.0, 0.0, 0.0] and "same score" in str(made.close_call(1))
    vague = simple.combined([Scores("restore-kl", [0.10, 0.11, 9.0], [0.1, 0.1, 0.1])])
    assert vague.errors is not None and vague.errors[0] > 0.3 and vague.errors[2] < 0.1
    assert "less than a standard error" not in str(vague.close_call(2))
    assert vague.values == simple.combined([Scores("restore-kl", [0.10, 0.11, 9.0], [0.1, 0.1, 0.1])]).values


def test_a_close_call_is_said() -> None:
    scores = Scores("restore-kl", [0.1, 0.2, 0.3], [0.01] * 3, [(0.1, 0.2), (0.1, 0.05)])
    assert scores.close_call(1) == "layers 0 and 1 differ by 0.1, less than a standard error (0.2)"
    assert scores.close_call(2) is None and scores.close_call(3) is None


def test_the_report_marks_chosen_layers_and_says_a_sentence_once() -> None:
    recall = Scores("recall", [0.0, 0.5, 0.1], [0.01] * 3, [(0.4, 0.01), (0.1, 0.2)], notes=["noise"], signal=False)
    heads = Scores("retrieval-heads", [0.0, 3.0, 0.1], None, notes=["noise"], signal=False)
    shown = [recall, heads, simple.by_place("uniform", 3, 1)]
    result: dict[str, Any] = {
        "keep": 1,
        "decides": "recall",
        "chosen": [1],
        "methods": {scores.method: scores.to_dict(1) for scores in shown},
        "sets": [
            {
                **{"methods": ["recall", "uniform"], "layers": [1], "kl": 0.25, "kl_stderr": 0.01},
                **{"against_uniform": 0.0, "against_uniform_stderr": 0.0},
            }
        ],
        "agreement": agreement([recall, heads], 1),
        "notes": [],
    }
    text = report.text(result)
    assert text.startswith("1 of 3 layers keep their attention: 1 by recall")
    assert "0.500 ± 0.010*" in text and "3.000*" in text and text.count("noise") == 1
    assert "recall, retrieval-heads: noise" in text and "0.2500 ± 0.0100" in text and "+1.00" in text
    assert max(map(len, text.splitlines())) < 110
