"""What relinear says of a family from config.json alone is what transformers builds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from relinear.distill.errors import UserError
from relinear.distill.families import FAMILIES
from relinear.distill.family import Family, lost
from relinear.distill.student import transfer
from relinear.distill.teacher import load_teacher, split_attention
from relinear.mixers import registry
from relinear.mixers.specs.base import Geometry
from relinear.recipes import loader
from relinear.recipes import plan as planner


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def real(family: Family, **values: Any) -> Any:
    import transformers

    return getattr(transformers, family.config_class)(**values)


def test_defaults_are_those_of_transformers(family: Family) -> None:
    made = real(family)
    for key, value in family.defaults.items():
        if key == "sliding_window" and getattr(made, "use_sliding_window", True) is False:
            continue  # transformers drops the window where sliding is off
        assert getattr(made, key) == value, key


def test_a_config_of_bare_sizes_is_read_as_transformers_reads_it(family: Family) -> None:
    sizes = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 64, "intermediate_size": 64}
    made = real(family, **sizes, vocab_size=320).to_dict()
    bare = {**sizes, "vocab_size": 320}
    assert family.layer_types(bare) == family.layer_types(made)
    for layer in range(8):
        assert family.geometry(bare, layer) == family.geometry(made, layer)
        assert family.experts(bare, layer) == family.experts(made, layer)
    assert family.logits(bare) == family.logits(made)
    assert family.has_mlp_bias(bare) == family.has_mlp_bias(made)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("gemma3_text", {"sliding_window_pattern": 3}),
        ("cohere2", {"sliding_window_pattern": 2}),
        ("smollm3", {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 5}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 16, "decoder_sparse_step": 2}),
        ("mistral", {"sliding_window": None}),
        ("phi3", {"sliding_window": 16}),
    ],
)
def test_keys_that_shape_layers(name: str, keys: dict[str, Any]) -> None:
    family = FAMILIES[name]
    sizes = {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 64}
    config = {**sizes, "vocab_size": 320, "num_key_value_heads": 4, **keys}
    made = real(family, **config)
    expected = getattr(made, "layer_types", None)
    if expected is None:
        expected = ["full_attention" if made.sliding_window is None else "sliding_attention"] * 8
    assert family.layer_types(config) == expected
    if name == "smollm3":
        assert [family.geometry(config, layer).rope for layer in range(8)] == [bool(r) for r in made.no_rope_layers]
        assert "sliding_attention" in expected
    if name == "cohere2":
        assert [family.geometry(config, layer).rope for layer in range(8)] == [True, False] * 4


def test_geometry_equals_the_modules(family: Family, make_teacher: Callable[..., Path]) -> None:
    teacher = load_teacher(make_teacher(family.name))
    for layer in range(4):
        shape, state = teacher.geometry(layer), teacher.attention_tensors(layer)
        widths = {"q": shape.inner_size, "k": shape.kv_size, "v": shape.kv_size}
        expected = {f"{part}_proj.weight": (width, shape.hidden_size) for part, width in widths.items()}
        expected["o_proj.weight"] = (shape.hidden_size, shape.inner_size)
        if shape.qkv_bias:
            expected |= {f"{part}_proj.bias": (width,) for part, width in widths.items()}
        if shape.o_bias:
            expected["o_proj.bias"] = (shape.hidden_size,)
        if shape.qk_norm:
            full = shape.qk_norm == "full"
            expected |= {f"{part}_norm.weight": (widths[part] if full else shape.head_dim,) for part in "qk"}
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
        path = teacher.attention_path(layer)
        assert teacher.model.get_submodule(path) is teacher.attention(layer)


def test_fused_projections_are_split_by_hand_made_rows() -> None:
    """Two heads of three channels, width one: row numbers are values."""
    sizes = {"hidden_size": 6, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 4}
    neox = FAMILIES["gpt_neox"]
    rows = torch.arange(18.0)[:, None].expand(18, 6)
    state = {"query_key_value.weight": rows, "query_key_value.bias": rows[:, 0], "dense.weight": torch.ones(6, 6)}
    split = split_attention(state, neox, neox.geometry(sizes, 0))
    assert split["q_proj.weight"][:, 0].tolist() == [0, 1, 2, 9, 10, 11]
    assert split["k_proj.weight"][:, 0].tolist() == [3, 4, 5, 12, 13, 14]
    assert split["v_proj.bias"].tolist() == [6, 7, 8, 15, 16, 17]
    assert split["o_proj.weight"] is state["dense.weight"]
    phi = FAMILIES["phi3"]
    grouped = {**sizes, "hidden_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2}
    state = {"qkv_proj.weight": torch.arange(24.0)[:, None].expand(24, 12), "o_proj.weight": torch.ones(12, 12)}
    split = split_attention(state, phi, phi.geometry(grouped, 0))
    assert split["q_proj.weight"][:, 0].tolist() == list(range(12))
    assert split["k_proj.weight"][:, 0].tolist() == list(range(12, 18))
    assert split["v_proj.weight"][:, 0].tolist() == list(range(18, 24))


def test_counts_are_those_of_the_real_model(family: Family, make_teacher: Callable[..., Path]) -> None:
    folder = make_teacher(family.name)
    recipe = loader.load(
        "rwkv7", [f"teacher.model={folder}", "layers.keep=1", "layers.mixer=gated_deltanet", "data.source=x"]
    )
    plan = planner.plan(recipe)
    model = load_teacher(folder).model
    assert plan.counts.teacher == sum(p.numel() for p in model.parameters())
    named = dict(model.named_parameters())
    assert plan.counts.ffn == sum(p.numel() for name, p in named.items() if f".{family.mlp}." in name)
    attention = f".layers.0.{family.attention}."
    assert plan.counts.attention == sum(p.numel() for name, p in named.items() if attention in name)
    norms = [p for n, p in named.items() if "norm" in n.rsplit(".", 2)[-2] and f".{family.attention}." not in n]
    assert plan.counts.norms == sum(p.numel() for p in norms)
    # The origins are the family's own names.
    rows = {row.name: row.origin for row in plan.tensors[0].rows}
    assert rows["o_proj.weight"] == family.origin("o_proj.weight")
    assert any("caps its scores" in note for note in plan.notes) == (family.name == "gemma2")


@pytest.mark.parametrize(
    ("mixer", "options", "said"),
    [
        ("gated_deltanet", {}, "has no softmax and no such cap"),
        ("gated_deltanet", {"window": 16}, "does so in its window, its linear part has no such cap"),
        ("swa", {}, None),
    ],
)
def test_a_cap_on_scores_is_never_dropped_silently(mixer: str, options: dict[str, Any], said: str | None) -> None:
    spec = registry.spec(mixer)
    capped = Geometry(32, 4, 2, 8, softcap=50.0)
    notes = lost(spec, capped, spec.options.parse(options))
    assert len(notes) == (said is not None)
    assert not said or (said in notes[0] and "caps its scores at 50" in notes[0] and mixer in notes[0])
    assert not lost(spec, Geometry(32, 4, 2, 8), spec.options.parse(options))


def test_a_mixer_that_cannot_serve_is_refused_before_work(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = registry.spec("gated_deltanet")
    monkeypatch.setattr(spec, "refusal", staticmethod(lambda geometry, options: "its heads are odd; take swa"))
    message = "layer 1: gated_deltanet cannot replace this attention: its heads are odd; take swa"
    with pytest.raises(UserError, match=message):
        transfer(load_teacher(llama), {1: ("gated_deltanet", {})})
    with pytest.raises(UserError, match=message):
        planner.plan(loader.load("gated_deltanet", [f"teacher.model={llama}", "data.source=x", "layers.convert=[1]"]))


def test_experts_cost_memory_all_and_flops_by_the_active_ones(make_teacher: Callable[..., Path]) -> None:
    def planned(**config: Any) -> Any:
        folder = make_teacher("mixtral", **config)
        return planner.plan(loader.load("rwkv7", [f"teacher.model={folder}", "data.source=x"]))

    few, many = planned(num_local_experts=4), planned(num_local_experts=8)
    expert, router = 3 * 32 * 64, 32
    assert many.counts.teacher - few.counts.teacher == 4 * 4 * (expert + router)
    tokens = few.stage("align").settings["tokens"]
    below = 3  # feed-forward blocks that align passes: it leaves the teacher after the last layer's attention
    assert many.stage("align").flops - few.stage("align").flops == tokens * below * 2 * 4 * router
    wide = planned(num_local_experts=4, num_experts_per_tok=3)
    assert wide.stage("align").flops - few.stage("align").flops == tokens * below * 2 * expert
