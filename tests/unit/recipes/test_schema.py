"""The schema itself: everything described, nothing lax, and the reference page made from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from relinear.recipes import loader, reference, rules
from relinear.recipes.schema import STAGES, Recipe, Section

MINIMAL = {
    "schema": 1,
    "teacher": {"model": "a/b"},
    "layers": {"mixer": "rwkv7", "convert": "all"},
    "data": {"source": "x.txt"},
    "stages": [{"transfer": {}}, {"glue": {"tokens": 1000}}],
}


def sections() -> list[type[Section]]:
    """Every section of the schema."""
    found: list[type[Section]] = []
    waiting: list[type[Section]] = [Recipe, *STAGES.values()]
    while waiting:
        section = waiting.pop()
        if section not in found:
            found.append(section)
            waiting += [below for below in loader._sections(section).values() if below is not None]
    return found


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_key_is_described_and_none_is_lax(section: type[Section]):
    assert section.model_config["extra"] == "forbid" and section.model_config["strict"]
    assert section.__doc__
    for name, info in section.model_fields.items():
        assert info.description, f"{section.__name__}.{name}"


def test_sections_are_not_overgrown():
    for section in sections():
        assert len(section.model_fields) <= 22, section.__name__


def test_a_recipe_from_python():
    recipe = Recipe.model_validate(MINIMAL)
    assert recipe.stage("glue").loss.kl == 1.0
    assert recipe.stage("glue").final_lr == pytest.approx(1e-7)
    assert recipe.place("layers.keep") == "layers.keep"
    assert Recipe.model_validate(recipe.to_dict()) == recipe
    assert list(recipe.to_dict())[:3] == ["schema", "teacher", "layers"]
    with pytest.raises(KeyError):
        recipe.stage("align")


def test_rules_hold_without_the_loader():
    with pytest.raises(ValidationError, match="neither keep nor convert"):
        Recipe.model_validate(MINIMAL | {"layers": {"mixer": "rwkv7"}})
    with pytest.raises(ValidationError, match="does not divide batch, which is 32"):
        Recipe.model_validate(MINIMAL | {"stages": [{"transfer": {}}, {"glue": {"tokens": 9, "micro_batch": 5}}]})


def test_changing_kept_attention_needs_a_stage_that_trains_it():
    layers = {"mixer": "rwkv7", "keep": [1], "attention": {"window": 64}}
    assert Recipe.model_validate(MINIMAL | {"layers": layers}).layers.attention.changes() == {
        **{"rope": True, "logit_scale": None, "window": 64}
    }
    short = {"layers": layers, "stages": [{"transfer": {}}, {"align": {"tokens": 9}}]}
    with pytest.raises(ValidationError, match="changed when glue begins, and there is no glue stage"):
        Recipe.model_validate(MINIMAL | short)
    same = {"layers": {**layers, "attention": {"rope": True, "window": None}}, "stages": short["stages"]}
    assert Recipe.model_validate(MINIMAL | same).layers.attention.changes() is None
    for wrong in ({"logit_scale": 1.0}, {"window": 1}, {"rope": None}, {"nope": True}):
        with pytest.raises(ValidationError):
            Recipe.model_validate(MINIMAL | {"layers": {**layers, "attention": wrong}})


def test_rules_skip_what_is_malformed():
    for raw in (
        None,
        {"layers": {"attention": 3}, "stages": [None]},
        [],
        {"layers": 3, "data": [], "stages": {}},
        {"stages": [None, {}, {"glue": 3}, {"a": 1, "b": 2}]},
    ):
        rules.check(raw)


def test_a_recipe_does_not_change():
    recipe = Recipe.model_validate(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 3


def test_mixer_aliases_become_names():
    raw = MINIMAL | {"layers": {"mixer": "goose", "convert": "all", "overrides": {"0": "GDN"}}, "mixers": {"gdn": {}}}
    recipe = Recipe.model_validate(raw)
    assert recipe.layers.mixer == "rwkv7" and recipe.layers.overrides["0"].mixer == "gated_deltanet"
    assert list(recipe.mixers) == ["gated_deltanet"] and "conv" in recipe.mixers["gated_deltanet"]


def test_stage_settings_exist_for_every_kind():
    for kind, stage in STAGES.items():
        assert stage.kind == kind
        required = {"tokens": 5, "seq_len": 64} if kind == "extend" else {} if kind == "transfer" else {"tokens": 5}
        assert stage.model_validate(required).name == kind


def test_keys_below_follows_sections_and_stages():
    assert "ce" in loader.keys_below(("stages", 0, "extend", "loss"))
    assert "revision" in loader.keys_below(("teacher",))
    assert loader.keys_below(("mixers", "rwkv7")) == {}
    assert loader.keys_below(("nowhere", "at all")) == {}


def test_other_words_lead_to_keys_that_exist():
    known = {key for section in sections() for key in loader._sections(section)}
    assert set(loader.OTHER_WORDS.values()) <= known
    assert not set(loader.OTHER_WORDS) & known


def test_the_reference_page_is_made_from_the_schema(root: Path):
    page = (root / "docs/reference/recipe.md").read_text(encoding="utf-8")
    assert page == reference.markdown(), "run: python -m relinear.recipes.reference > docs/reference/recipe.md"


def test_the_reference_page_names_every_key():
    page = reference.markdown()
    for section in sections():
        for name, info in section.model_fields.items():
            assert f"| `{info.alias or name}` |" in page, f"{section.__name__}.{name}"


def test_the_example_of_the_reference_page_loads(tmp_path: Path):
    for i, block in enumerate(reference.markdown().split("```yaml\n")[1:]):
        file = tmp_path / f"{i}.yaml"
        file.write_text(block.split("```")[0])
        loader.load(str(file), ["teacher.model=a/b", "data.source=f"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": {"kl": 1.0, "reverse_kl": 0.1}}, "does not hold what loss.reverse_kl needs"),
        ({"loss": {"kl": 1.0, "align": 0.1}}, "does not hold what loss.align needs, its layers"),
        ({"loss": {"ce": 1.0}}, "loss.kl is 0"),
        ({"temperature": 2.0, "teacher_logits": {"temperature": 1.0}}, "kept at temperature 1, the stage's is 2"),
    ],
)
@pytest.mark.parametrize("kind", ["glue", "extend"])
def test_what_a_cache_of_logits_cannot_give_is_refused(kind: str, settings: dict, message: str):
    wanted = {"tokens": 1000, "seq_len": 64, "teacher_logits": {}, **settings}
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate({**MINIMAL, "stages": [{"transfer": {}}, {kind: wanted}]})
    allowed = {**wanted, "loss": {"kl": 1.0, "ce": 0.1}, "temperature": 2.0, "teacher_logits": {"temperature": 2.0}}
    stage = Recipe.model_validate({**MINIMAL, "stages": [{"transfer": {}}, {kind: allowed}]}).stages[1]
    assert stage.teacher_logits.top_k == 64
