"""The layer grammar: what each form chooses, and what each mistake is told."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from relinear.distill.errors import UserError
from relinear.recipes import layers

RIGHT = [
    ("all", 3, [0, 1, 2]),
    ("none", 3, []),
    (2, 3, [2]),
    ([2, 0], 3, [0, 2]),
    ("1", 3, [1]),
    ("0-2,5", 6, [0, 1, 2, 5]),
    (" 4 , 0 - 1 ", 6, [0, 1, 4]),
    ({"every": 4, "offset": 3}, 12, [3, 7, 11]),
    ({"every": 4}, 12, [3, 7, 11]),
    ({"every": 4, "offset": 0}, 10, [0, 4, 8]),
    ({"every": 1}, 3, [0, 1, 2]),
    ({"ratio": 0.75, "place": "lower"}, 8, [0, 1, 2, 3, 4, 5]),
    ({"ratio": 0.25, "place": "upper"}, 8, [6, 7]),
    ({"ratio": 0.25}, 28, [2, 6, 10, 14, 18, 22, 26]),
    ({"ratio": 0.25, "place": "uniform"}, 12, [2, 6, 10]),
    ({"ratio": 0.5}, 5, [0, 2, 4]),  # 2.5 rounds up to 3
    ({"ratio": 0.5, "place": "lower"}, 7, [0, 1, 2, 3]),  # 3.5 rounds up to 4
    ({"ratio": 0.29, "place": "lower"}, 50, list(range(15))),  # 14.5; in floats 14.499999999999998
    ({"ratio": 0.24, "place": "lower"}, 6, [0]),  # 1.44
    ({"ratio": 1}, 3, [0, 1, 2]),
    ({"ratio": 0}, 3, []),
]

FORMS = 'all, none, a list such as [3, 9], a text such as "0-15,18", {every, offset}, {ratio, place} or {scores, top}'

WRONG = [
    (12, "layer 12 does not exist: the teacher has 12 layers, 0 to 11"),
    ("3,12", "layer 12 does not exist: the teacher has 12 layers, 0 to 11"),
    ([3, -1], "layer -1 is negative; layers are counted from 0 at the bottom, write the number itself"),
    ("-1", "layer -1 is negative; layers are counted from 0 at the bottom, write the number itself"),
    ([3, 3], "layer 3 is named twice; name each layer once"),
    ("0-5,3", "layer 3 is named twice; name each layer once"),
    ("5-3", "the range 5-3 is empty; write 3-5"),
    ("0-999999999", "the range 0-999999999 is longer than any model"),
    ("first", f"'first' in 'first' is not a layer or a range; expected {FORMS}"),
    ("1,,2", f"'' in '1,,2' is not a layer or a range; expected {FORMS}"),
    ([], "an empty list chooses no layer; write none"),
    ([1, "2-3"], "a list holds layer numbers, found '2-3'; ranges are written as a text: \"0-15,18\""),
    ([1, True], 'a list holds layer numbers, found True; ranges are written as a text: "0-15,18"'),
    (True, f"expected {FORMS}, found True"),
    (0.5, f"expected {FORMS}, found 0.5"),
    ({"each": 4}, "expected {every, offset}, {ratio, place} or {scores, top}, found the keys ['each']"),
    ({"every": 0}, "every: expected a whole number, at least 1, found 0"),
    ({"every": 4, "offset": 4}, "offset 4 must lie below every (4): layers with l % 4 == offset"),
    ({"every": 20}, "{every: 20, offset: 19} chooses none of 12 layers, 0 to 11; write none"),
    (
        {"every": 4, "place": "lower"},
        "'every' goes with 'offset' only, found 'place'; write {every: ..., offset: ...}",
    ),
    ({"ratio": 75}, "ratio: expected a number from 0 to 1, found 75"),
    ({"ratio": 0.5, "place": "middle"}, "place: expected one of lower, upper, uniform, found 'middle'"),
    ({"ratio": 0.01}, "ratio 0.01 of 12 layers rounds to no layer; write none or a higher ratio"),
    ({"scores": "s.json"}, "a score file needs top, the number of layers to take: {scores: FILE, top: 5}"),
    ({"scores": "s.json", "top": -1}, "top: expected a whole number, at least 0, found -1"),
    ({"scores": 3, "top": 1}, "scores: expected the path of a JSON file, found 3"),
    ({"scores": "s.json", "top": 13}, "top 13 is more than the teacher has: 12 layers, 0 to 11"),
]


def section(**keys: Any) -> SimpleNamespace:
    """A `layers:` section."""
    keys["overrides"] = {text: SimpleNamespace(mixer=name) for text, name in keys.get("overrides", {}).items()}
    return SimpleNamespace(**{"mixer": "rwkv7", "keep": None, "convert": None} | keys)


@pytest.mark.parametrize(("form", "num_layers", "chosen"), RIGHT, ids=str)
def test_right_forms(form: Any, num_layers: int, chosen: list[int]):
    assert layers.select(form, num_layers) == chosen
    assert layers.check_form(form) is form
    kept = layers.resolve(section(keep=form), num_layers)
    assert kept.kept == chosen
    converted = layers.resolve(section(convert=form), num_layers)
    assert list(converted.converted) == chosen
    assert sorted([*converted.kept, *chosen]) == list(range(num_layers))


@pytest.mark.parametrize(("form", "message"), WRONG, ids=str)
def test_wrong_forms(form: Any, message: str):
    with pytest.raises(UserError) as error:
        layers.resolve(section(keep=form), 12, place=lambda path: f"mine.yaml:7: {path}")
    assert str(error.value) == f"mine.yaml:7: layers.keep: {message}"


def test_one_layer_teacher_is_named_so():
    with pytest.raises(ValueError, match="layer 1 does not exist: the teacher has 1 layer, 0"):
        layers.select(1, 1)


def write_scores(path: Any, scores: Any, higher_is: str = "keep") -> str:
    path.write_text(json.dumps({"scores": scores, "higher_is": higher_is, "made_by": "a test"}))
    return str(path)


@pytest.mark.parametrize(
    ("higher_is", "wanted", "chosen"),
    [
        ("keep", "keep", [1, 3]),
        ("convert", "convert", [1, 3]),
        ("keep", "convert", [0, 2]),
        ("convert", "keep", [0, 2]),
    ],
)
def test_scores_rank_by_what_a_high_one_speaks_for(tmp_path: Any, higher_is: str, wanted: str, chosen: list[int]):
    file = write_scores(tmp_path / "s.json", {"0": 0.1, "1": 0.9, "2": 0.2, "3": 0.8}, higher_is)
    assert layers.select({"scores": file, "top": 2}, 4, wanted) == chosen


def test_equal_scores_go_to_the_lower_layer(tmp_path: Any):
    file = write_scores(tmp_path / "s.json", {str(layer): 1.0 for layer in (3, 2, 1, 0)})
    assert layers.select({"scores": file, "top": 2}, 4) == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[1]", "has no scores"),
        ('{"scores": {"0": 1, "1": 2}}', "higher_is is None"),
        ('{"scores": {"0": 1}, "higher_is": "keep"}', "no score for layer 1"),
        ('{"scores": {"0": 1, "1": 2, "2": 3}, "higher_is": "keep"}', "scores layer 2, but the teacher has 2 layers"),
        ('{"scores": {"0": 1, "1": NaN}, "higher_is": "keep"}', "'1': nan is not a layer with a finite score"),
        ('{"scores": {"0": 1, "one": 2}, "higher_is": "keep"}', "'one': 2 is not a layer with a finite score"),
        ('{"scores": {"0": 1, "1": 2, "01": 2}, "higher_is": "keep"}', "layer 1 is scored twice"),
    ],
)
def test_wrong_score_files(tmp_path: Any, content: str | None, message: str):
    file = tmp_path / "s.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError) as error:
        layers.select({"scores": str(file), "top": 1}, 2)
    assert message in str(error.value)
    assert str(file) in str(error.value)


def test_overrides_put_another_mixer_in_converted_layers():
    found = layers.resolve(section(keep=[3], overrides={"0-1": "gdn", "4": "gated_deltanet"}), 6)
    assert found.drawing == "LLMALM"  # L is the mixer that takes most layers
    assert {layer: name for layer, (name, _) in found.converted.items()} == {
        0: "gated_deltanet",
        1: "gated_deltanet",
        2: "rwkv7",
        4: "gated_deltanet",
        5: "rwkv7",
    }
    assert found.layers_of("rwkv7") == [2, 5]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"0,3": "gated_deltanet"},
            "at layers.overrides.0,3: layer 3 keeps its attention, so gated_deltanet cannot stand there. "
            "Converted layers are 0-2,4-5: name some of them, or convert layer 3",
        ),
        (
            {"0-2": "gated_deltanet", "2-2": "rwkv7"},
            "at layers.overrides.2-2: layer 2 is already overridden by '0-2'. "
            "Each layer may be named once: shorten one of the two ranges",
        ),
        ({"6": "rwkv7"}, "at layers.overrides.6: layer 6 does not exist: the teacher has 6 layers, 0 to 5"),
    ],
)
def test_wrong_overrides(overrides: dict[str, str], message: str):
    with pytest.raises(UserError) as error:
        layers.resolve(section(keep=[3], overrides=overrides), 6, place=lambda path: f"at {path}")
    assert str(error.value) == message


def test_drawing_and_legend():
    found = layers.resolve(section(keep="2"), 4)
    assert (found.drawing, found.legend) == ("LLAL", "A attention, L rwkv7")
    mixed = layers.resolve(section(keep="none", overrides={"0": "gated_deltanet"}), 4)
    assert (mixed.drawing, mixed.legend) == ("MLLL", "A attention, L rwkv7, M gated_deltanet")
    assert layers.resolve(section(keep="all"), 4).drawing == "AAAA"


def test_options_are_complete_and_each_layers_own():
    found = layers.resolve(section(convert="all"), 2, {"rwkv7": {"group_norm": True}})
    options = found.converted[0][1]
    assert options["group_norm"] is True and "balance_state" in options
    options["group_norm"] = False
    assert found.converted[1][1]["group_norm"] is True


def test_ranges_are_written_as_they_are_read():
    for chosen in ([], [0], [0, 1, 2, 5], [1, 3, 4]):
        text = layers.ranges(chosen)
        assert chosen == (layers.select(text, 6) if text else [])
