"""Which student a published architecture can express, and what is said of every other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from relinear.distill.errors import UserError
from relinear.distill.families import FAMILIES
from relinear.distill.formats import pairs
from relinear.mixers import registry

BASE = {
    "num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 256, "rms_norm_eps": 1e-6, "vocab_size": 320, "hidden_act": "silu",
}  # fmt: skip
TAKEN = ("llama", "mistral", "qwen2")


def student(family: str, mixer: str, options: dict[str, Any], **config: Any) -> pairs.Student:
    return pairs.Student(family, {**BASE, **config}, dict.fromkeys(range(2), (mixer, options)))


def chosen(wanted: pairs.Format) -> dict[str, Any]:
    """The options that a format's recipe line names."""
    return yaml.safe_load(wanted.recipe)["mixers"][wanted.mixer]


@pytest.mark.parametrize("name", pairs.FORMATS)
@pytest.mark.parametrize("family", TAKEN)
def test_the_recipe_that_a_refusal_names_is_exact(name: str, family: str) -> None:
    wanted = pairs.FORMATS[name]
    assert pairs.obstacles(wanted, student(family, wanted.mixer, chosen(wanted))) == []
    assert pairs.possible(student(family, wanted.mixer, chosen(wanted))) == [name]


@pytest.mark.parametrize("name", pairs.FORMATS)
def test_every_demand_refuses_every_other_value(name: str) -> None:
    wanted = pairs.FORMATS[name]
    fields = registry.spec(wanted.mixer).options.__dataclass_fields__
    for demand in wanted.demands:
        choices = fields[demand.option].metadata["choices"] or (
            (True, False) if fields[demand.option].type == "bool" else (demand.values[0] + 3,)
        )
        for other in (value for value in choices if value not in demand.values):
            given = {**chosen(wanted), demand.option: other}
            if other == "gated_rms":
                given["gate"] = "identity"
            found = student("qwen2", wanted.mixer, given)
            assert any(f".{demand.option} is " in problem for problem in pairs.obstacles(wanted, found)), demand.option


@pytest.mark.parametrize("name", registry.names())
def test_defaults_are_refused_with_the_options_in_the_way(name: str) -> None:
    for wanted in pairs.FORMATS.values():
        with pytest.raises(UserError) as refused:
            pairs.check(wanted, student("llama", name, {}), "runs/mine")
        text = str(refused.value)
        assert text.startswith(f"runs/mine: {wanted.name}") and wanted.recipe in text
        if name == wanted.mixer:
            assert "mixers." in text and "rope is true" in text
        else:
            assert f"holds {name}" in text


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in (*TAKEN, "smollm3")])
def test_other_families_are_refused(family: str) -> None:
    wanted = pairs.FORMATS["rwkv6qwen2"]
    config = {"layer_types": ["full_attention"] * 2, "query_pre_attn_scalar": 64, "attn_logit_softcapping": None}
    found = pairs.obstacles(wanted, student(family, "rwkv6", chosen(wanted), **config))
    assert any(f"family {family}: " in problem or "normalised" in problem for problem in found)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act: gelu"),
        ({"attention_bias": True}, "the output projection has a bias"),
        ({"head_dim": 32}, "are not the width"),
    ],
)
def test_what_is_outside_the_mixer(config: dict[str, Any], said: str) -> None:
    wanted = pairs.FORMATS["rwkv6qwen2"]
    assert said in " ".join(pairs.obstacles(wanted, student("llama", "rwkv6", chosen(wanted), **config)))


def test_kept_layers_and_unlike_layers() -> None:
    wanted = pairs.FORMATS["rwkv6qwen2"]
    options = chosen(wanted)
    kept = pairs.Student("llama", BASE, {0: ("rwkv6", options)})
    assert pairs.obstacles(wanted, kept) == ["layer 1: keeps its attention; the format has linear layers only"]
    unlike = pairs.Student("llama", BASE, {0: ("rwkv6", options), 1: ("rwkv6", {**options, "decay_rank": 8})})
    assert "layer 1: decay_rank differ" in pairs.obstacles(wanted, unlike)[0]


def test_ranks_and_heads_of_arwkv7() -> None:
    wanted = pairs.FORMATS["arwkv7"]
    options = chosen(wanted)
    wide = {"hidden_size": 4096, "num_attention_heads": 64, "num_key_value_heads": 8}
    large = student("qwen2", "rwkv7", {**options, "gate_rank": None, "decay_rank": None}, **wide)
    text = " ".join(pairs.obstacles(wanted, large))
    assert "gate_rank is" in text and "decay_rank is 128; at most 64" in text
    small = student("llama", "rwkv7", options, num_attention_heads=8)
    assert "heads of 16" in " ".join(pairs.obstacles(wanted, small))


@pytest.mark.parametrize(
    ("name", "said"), [("fla-mamba2", "no feed-forward"), ("fla-rwkv7", "LayerNorms"), ("gguf", "unknown")]
)
def test_names_that_no_student_can_have(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        pairs.find(name)


def test_an_exported_folder_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="relinear export RUN"):
        pairs.read_student(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="students of relinear's own"):
        pairs.read_student(tmp_path)


def test_the_page_lists_every_pair(root: Path) -> None:
    page = (root / "docs/reference/doors.md").read_text(encoding="utf-8")
    for wanted in pairs.FORMATS.values():
        line = next(line for line in page.splitlines() if line.startswith(f"| `{wanted.name}`"))
        for part in (wanted.mixer, wanted.architecture, wanted.recipe.removeprefix("mixers: ")):
            assert part in line, (wanted.name, part)
    for name in pairs.IMPOSSIBLE:
        assert re.search(rf"`{name}`", page)
