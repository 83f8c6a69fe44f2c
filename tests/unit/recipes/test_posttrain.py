"""Recipes for training after conversion: their keys, their examples, what is held out, and rewards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from relinear.distill.errors import UserError
from relinear.recipes import loader
from relinear.recipes.posttrain import arithmetic, examples, reference, rewards, schema
from relinear.recipes.posttrain.schema import ArithmeticSection, GrpoSection, load

GIVEN = ["model=runs/mine/export", "data.source=arithmetic"]


@pytest.mark.parametrize("name", loader.posttrain())
def test_shipped_recipes_load_and_say_what_they_do(name: str) -> None:
    recipe = load(name, GIVEN)
    assert recipe.method == name.removeprefix("posttrain/") and recipe == load(recipe.method, GIVEN)
    assert recipe.save.dir == f"runs/{recipe.method}-mine"
    assert len(loader.summary(name)) > 40
    assert (recipe.dpo is not None, recipe.grpo is not None) == (recipe.method == "dpo", recipe.method == "grpo")


def test_a_recipe_written_out_is_read_back_equal(tmp_path: Path) -> None:
    recipe = load("grpo", [*GIVEN, "train=lora", "grpo.beta=0.1"])
    path = tmp_path / "again.yaml"
    path.write_text(loader.dump(recipe))
    assert load(str(path)).to_dict() == recipe.to_dict()


def test_a_file_extends_a_shipped_one_and_names_its_own_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: sft\nmodel: m\ndata: {source: arithmetic}\nbatch: 6\n")
    assert (load(str(path)).batch, load(str(path)).lr) == (6, load("sft", GIVEN).lr)
    path.write_text(
        "extends: sft\nmodel: m\ndata: {source: arithmetic, share: 2}\nbatch: 6\nmicro_batch: 4\nlora: {}\n"
    )
    with pytest.raises(UserError) as caught:
        load(str(path))
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        [f"{path}:3", "data.share"],
        [f"{path}:5", "micro_batch"],
        [f"{path}:6", "lora"],
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("learning_rate=1", "Did you mean lr?"),
        ("train=ffn", "expected one of all, no-ffn"),
        ("grpo.beta=1", "the method is sft, so nothing reads this"),
        ("data.arithmetic.low=20", "20 is not below high"),
        ("data.valid=more.jsonl", "a share of the problems"),
        ("max_length=1", "at least 2"),
    ],
)
def test_mistakes_are_named(change: str, said: str) -> None:
    with pytest.raises(UserError, match=f"command line: {change}"[:24]) as caught:
        load("sft", [*GIVEN, change])
    assert said in str(caught.value)


def test_the_two_kinds_of_recipes_are_not_mixed_up() -> None:
    with pytest.raises(UserError, match="Type: relinear posttrain posttrain/sft"):
        loader.load("posttrain/sft")
    with pytest.raises(UserError, match="Type: relinear run rwkv7"):
        load("rwkv7")
    assert schema.is_posttrain("posttrain/dpo") and not schema.is_posttrain("rwkv7")


def test_the_reference_page_is_made_from_the_schema(root: Path) -> None:
    page = (root / "docs/reference/posttrain.md").read_text(encoding="utf-8")
    assert page == reference.markdown(), (
        "run: python -m relinear.recipes.posttrain.reference > docs/reference/posttrain.md"
    )


def test_problems_are_distinct_right_and_a_function_of_the_seed() -> None:
    settings = ArithmeticSection(low=3, high=40, operations=["+", "-", "*"], problems=500)
    made = arithmetic.problems(settings, 1)
    assert len(set(made)) == len(made) == 500 and made == arithmetic.problems(settings, 1)
    assert made != arithmetic.problems(settings, 2)
    assert {operation for _, operation, _ in made} == {"+", "-", "*"}
    assert {min(min(a, b) for a, _, b in made), max(max(a, b) for a, _, b in made)} == {3, 40}
    for record, (a, operation, b) in zip(arithmetic.examples("grpo", settings, 1), made, strict=True):
        assert record == {"prompt": f"{a} {operation} {b} =", "answer": str(eval(f"{a}{operation}{b}"))}
    assert len(arithmetic.problems(ArithmeticSection(low=0, high=3, problems=500), 0)) == 16, "all that there are"


def test_of_a_pair_one_answer_is_right_and_the_other_is_not() -> None:
    for record in arithmetic.examples("dpo", ArithmeticSection(), 0):
        a, b = (int(part) for part in record["prompt"].removesuffix(" =").split(" + "))
        assert record["chosen"] == f" {a + b}." and record["rejected"] != record["chosen"]
    chat = arithmetic.examples("sft", ArithmeticSection(chat=True), 0)[0]
    assert [chat["prompt"][0]["role"], chat["completion"][0]["role"]] == ["user", "assistant"]


def test_what_is_held_out_depends_on_the_prompts_alone() -> None:
    records = [{"prompt": f"p{i // 2}", "completion": str(i)} for i in range(100)]
    train, held = examples.split(records, 0.2)
    assert len(held) == 20 and not {r["prompt"] for r in train} & {r["prompt"] for r in held}
    again = examples.split(records[::-1], 0.2)[1]
    assert sorted(r["completion"] for r in again) == sorted(r["completion"] for r in held)


@pytest.mark.parametrize(
    ("text", "right", "read", "value"),
    [
        (" 22.", "22", "last", 1.0),
        (" 22.\n3 + 4 = 7.", "22", "line", 1.0),
        (" 22.\n3 + 4 = 7.", "22", "last", 0.0),
        ("\n\n so 7 + 15 = 22\nUser:", "22", "line", 1.0),
        ("It costs $1,024.00 in all", "1024", "last", 1.0),
        ("-3", "3", "last", 0.0),
        ("no idea", "22", "last", 0.0),
        ("", "22", "line", 0.0),
        (" Paris \n", "Paris", "last", 1.0),
        ("Paris or Rome", "Paris", "last", 0.0),
        ("infinity", "Infinity", "last", 0.0),
        ("nan", "nan", "last", 1.0),
    ],
)
def test_exact_reward(text: str, right: str, read: Any, value: float) -> None:
    assert rewards.reward(text, right, GrpoSection(read=read)) == value


def test_near_reward_falls_with_the_distance() -> None:
    near = GrpoSection(reward="near")
    assert [rewards.reward(f"{n}", "10", near) for n in (10, 11, 13)] == [1.0, 0.25, 0.125]
    called = rewards.reward_function(near)
    messages = [[{"role": "assistant", "content": "It is 10."}], " 9"]
    assert called(completions=messages, answer=["10", "10"], prompts=None) == [1.0, 0.25]
    assert called.__name__ == "near"


def data(tmp_path: Path, *lines: Any) -> list[str]:
    path = tmp_path / "data.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return ["model=m", f"data.source={path}", "data.valid=0.5"]


CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("method", "lines", "said"),
    [
        ("sft", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "data.jsonl:2: no field completion; sft reads"),
        ("sft", [{"prompt": "a", "completion": CHAT}], "prompt is texts, completion is messages"),
        ("sft", [{"messages": CHAT}, {"prompt": "a", "completion": "b"}], ":2: holds texts, the examples before it"),
        ("dpo", [{"prompt": "a", "chosen": "b", "rejected": 3}], "rejected is '3', expected a text"),
        ("grpo", [{"prompt": "a", "answer": ["b"]}], "answer is ['b'], expected a number or a text"),
        ("grpo", [{"prompt": [{"content": "a"}], "answer": 1}], "expected a list of {role, content}"),
        ("grpo", [{"prompt": "a", "answer": 1}, "{"], "data.jsonl:2: not valid JSON"),
        ("grpo", [{"prompt": "a", "answer": 1}], "1 examples, none of them to train on"),
    ],
)
def test_records_that_do_not_fit_are_named(tmp_path: Path, method: str, lines: list[Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        examples.open_examples(load(method, data(tmp_path, *lines)))
    assert said in str(caught.value)


def test_records_are_read(tmp_path: Path) -> None:
    lines = [{"prompt": CHAT, "answer": i, "source": "x"} for i in range(3)] + [
        {"prompt": [*CHAT, *CHAT], "answer": "b"}
    ]
    found = examples.open_examples(load("grpo", data(tmp_path, *lines)))
    assert found.chat and {record["answer"] for record in found.train + found.valid} == {"0", "1", "2", "b"}
    assert all(record.keys() == {"prompt", "answer"} for record in found.train)
    with pytest.raises(UserError, match=r"data.source: .*no such file"):
        examples.open_examples(load("sft", ["model=m", "data.source=./none.jsonl"]))
