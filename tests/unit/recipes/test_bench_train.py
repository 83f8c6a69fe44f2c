"""`bench train`: what its ratios are made of, on a teacher small enough for a test."""

from __future__ import annotations

import pytest

from relinear.distill.families import FAMILIES
from relinear.launch.bench_text import train_text
from relinear.recipes import bench_train as bench
from relinear.recipes import costs
from relinear.recipes.layers import LayerMap
from relinear.recipes.teacher_config import TeacherConfig

SMALL = bench.Settings(hidden=64, layers=2, vocab=2048, batch=2, seq_len=64, repeats=2, depths=(2, 4), stream=3000)


def test_every_case_gives_a_ratio_and_what_it_is_of():
    found = bench.measure(SMALL._replace(cases=("align", "glue", "memory", "loader")))
    assert [row["case"] for row in found["rows"]] == ["align", "glue", "memory", "memory", "loader"]
    for row in found["rows"]:
        assert row["value"] > 0 and row["target"] == bench.TARGETS[row["case"]]
        over = row["case"] in ("memory", "loader")
        assert row["reached"] is (row["value"] <= row["target"] if over else row["value"] >= row["target"])
    assert len(bench.failures(found)) == [row["reached"] for row in found["rows"]].count(False)
    align, glue, _, _, loader = found["rows"]
    assert align["value_min"] <= align["value"] <= align["value_max"] and glue["turns"] == 2
    assert loader["tokens"] >= SMALL.stream
    text = train_text(found)
    assert "≥ 0.6" in text and "≤ 1.5" in text and "4 layers" in text


def test_the_limit_is_the_plans_count_of_a_step():
    config = bench.teacher_config(SMALL, 3)
    forward, added = bench.align_flops(config, "rwkv7", 64)
    teacher = TeacherConfig("random weights", FAMILIES["llama"], config)
    layers = LayerMap(3, [], {layer: ("rwkv7", {}) for layer in range(3)})
    last = 2 * 3 * config["hidden_size"] * config["intermediate_size"]  # align ends before the last feed-forward block
    assert costs.flops_per_token(teacher, layers, "align", 64, True) == pytest.approx(forward - last + added)


def test_aligns_memory_does_not_grow_with_depth():
    rows = [bench.align_memory(SMALL, depth) for depth in (1, 3, 6)]
    assert rows[2]["peak_bytes"] == pytest.approx(rows[1]["peak_bytes"], rel=0.01)
    assert rows[2]["gradient_bytes"] == 6 * rows[0]["gradient_bytes"]
    assert all(row["value"] < 2 for row in rows)


def test_other_mixers_are_reported_and_not_judged():
    found = bench.measure(SMALL._replace(cases=("align",), mixers=("lightning",)))
    assert found["rows"][0]["target"] is None and found["rows"][0]["reached"] is None
    assert "identity" not in bench.names()
