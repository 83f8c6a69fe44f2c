"""What models generate: agreement and repetition by hand, exact-match rules, and that the batch changes nothing."""

from __future__ import annotations

import json

import pytest
import torch

from relinear.distill.errors import UserError
from relinear.distill.student import assemble, transfer
from relinear.distill.teacher import load_teacher
from relinear.eval import completions, exact, generation
from relinear.eval.completions import agreement, complete, distinct, loops, repetition, until_end
from relinear.eval.exact import FileTask, Record, file_task, is_right, made_documents, read_task
from relinear.eval.generation import generation_suite


@pytest.fixture(scope="module")
def teacher(make_teacher):
    return load_teacher(make_teacher("llama", num_hidden_layers=2))


@pytest.fixture(scope="module")
def student(teacher):
    torch.manual_seed(0)
    return assemble(teacher, transfer(teacher, {0: ("gated_deltanet", {}), 1: ("rwkv7", {})})[0])


def greedy(model, ids, count, ends):
    """Token by token, without cache, without padding."""
    ids = list(ids)
    made = []
    while len(made) < count and not (made and made[-1] in ends):
        with torch.no_grad():
            made.append(int(model(input_ids=torch.tensor([ids + made]), use_cache=False).logits[0, -1].argmax()))
    return made


def test_the_batch_changes_nothing(teacher, student):
    prompts = [[1, *range(10, 10 + n)] for n in (3, 9, 5, 14, 2)]
    for model in (student, teacher.model):
        alone = complete(model, teacher.tokenizer, prompts, 12, batch_size=1)
        assert complete(model, teacher.tokenizer, prompts, 12, batch_size=5) == alone
        assert alone == [greedy(model, prompt, 12, (2,)) for prompt in prompts]


def test_a_completion_ends_at_its_end_token(teacher, student, monkeypatch):
    plain = complete(student, teacher.tokenizer, [[1, 20, 30], [1, 40]], 10)
    end = plain[0][4]
    monkeypatch.setattr(completions, "end_ids", lambda model, tokenizer: [end])
    made = complete(student, teacher.tokenizer, [[1, 20, 30], [1, 40]], 10)
    assert made == [until_end(ids, [end]) for ids in plain]
    assert made[0][-1] == end and len(made[0]) <= 5
    before = student.generation_config
    complete(student, teacher.tokenizer, [[1, 20]], 2)
    assert student.generation_config is before


def test_agreement_by_hand():
    found = agreement([[1, 2, 3, 4], [5, 6], [7]], [[1, 2, 9, 4], [5, 6], [8, 7, 7]], [0, 1, 1])
    assert found["common_prefix"]["value"] == pytest.approx((2 + 2 + 0) / 3)
    assert found["agreement"]["value"] == pytest.approx((3 + 2 + 0) / (4 + 2 + 3))
    assert found["identical"]["value"] == pytest.approx(1 / 3)
    # two documents: sums 2 and 2 over counts 1 and 2, mean 4/3
    assert found["common_prefix"]["stderr"] == pytest.approx((2 * ((2 - 4 / 3) ** 2 + (2 - 8 / 3) ** 2)) ** 0.5 / 3)


@pytest.mark.parametrize(
    ("ids", "looping"),
    [
        ([3, 1, 2, 1, 2, 1, 2, 1, 2], True),
        ([9, 8, 7, 5, 5, 5, 5, 5, 5, 5, 5], True),
        ([9, 8, 5, 5, 5], False),  # three dots are no loop
        ([1, 2, 3, 4, 1, 2, 3, 4], False),  # twice is none
        ([1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4], True),
        ([1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 0], False),  # it left the loop
        ([], False),
    ],
)
def test_loops(ids, looping):
    assert loops(ids) is looping


def test_distinct_and_repetition():
    assert distinct([1, 1, 1, 2], 1) == 0.5 and distinct([1, 1, 1, 2], 2) == pytest.approx(2 / 3)
    found = repetition([[1, 2, 3, 4], [5], [6] * 8], [0, 1, 2])
    assert found["distinct_1"] == pytest.approx((1 + 1 + 1 / 8) / 3)
    assert found["distinct_2"] == pytest.approx((1 + 1 / 7) / 2)  # a single token has no pair
    assert found["loops"] == pytest.approx(1 / 3) and found["loops_stderr"] > 0


@pytest.mark.parametrize(
    ("form", "right", "said", "verdict"),
    [
        ("gsm8k", ["72"], " 48/2 = 24, so 48+24 = 72.\n\nQuestion: 5?", True),
        ("gsm8k", ["1,000"], "that is $1000.00 in all", True),
        ("gsm8k", ["72"], "#### 72\nThen there were 9", True),
        ("gsm8k", ["72"], "72 minus 1 is 71", False),
        ("gsm8k", ["72"], "many", False),
        ("number", ["8"], "\n 8 \n9", True),
        ("number", ["8"], " 3 + 5", False),
        ("text", ["Onion", "Bulb onion"], " the bulb-onion!\nNext", False),
        ("text", ["Onion", "Bulb onion"], " The bulb onion.\nNext", True),
        ("text", ["Onion"], " Onions", False),
    ],
)
def test_what_counts_as_right(form, right, said, verdict):
    assert is_right(form, right, said) is verdict


def test_a_file_says_its_form_and_its_lines_are_checked(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text(json.dumps({"question": "How many?", "answer": "2+2 = <<2+2=4>>4\n#### 4"}) + "\n\n")
    task = read_task(path)
    assert (task.name, task.form, task.records[0].right) == ("sums", "gsm8k", ("4",))
    path.write_text('{"context": "3-1?", "answer": 2}\n{"prompt": "1,000+1?", "answer": "1,001"}\n')
    assert read_task(path).form == "number"
    path.write_text('{"prompt": "Who?", "answer": "Onion", "aliases": ["Bulb onion", ""]}\n')
    assert read_task(path).form == "text" and read_task(path).records[0].right == ("Onion", "Bulb onion")
    for text, words in (("", "no record"), ("{", "sums.jsonl:1: not JSON"), ('\n{"answer": "x"}', "sums.jsonl:2")):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            read_task(path)
    with pytest.raises(UserError, match="copy, key-recall"):
        read_task("no-such-task")


class Script(torch.nn.Module):
    """Generates, after any prompt, the tokens that `say` gives for the prompt's text."""

    def __init__(self, tokenizer, say) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer, self.say, self.config, self.generation_config, self.prompts = tokenizer, say, None, None, []

    def generate(self, input_ids, attention_mask, max_new_tokens):
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            text = self.tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
            self.prompts.append(text)
            said = self.tokenizer(self.say(text), add_special_tokens=False)["input_ids"][:max_new_tokens]
            rows.append([*ids.tolist(), *said, *[2] * (max_new_tokens - len(said))])
        return torch.tensor(rows)


def test_records_are_asked_behind_shots_and_counted(byte_tokenizer):
    tokenizer = byte_tokenizer()
    records = [Record(f"{i} + {i}?", str(2 * i), (str(2 * i),)) for i in range(12)]
    model = Script(tokenizer, lambda text: " " + str(2 * int(text.rpartition("Question: ")[2].split()[0])))
    settings = {"seed": 3, "limit": None, "count": 8, "batch_size": 4}
    found = file_task(FileTask("sums", "number", records), {"student": model}, tokenizer, 6, **settings)
    assert found["student"] == {"value": 1.0, "stderr": 0.0}
    assert (found["n"], found["shots"], found["too_long"]) == (6, 4, 0)
    assert all(text.count("Answer: ") == 4 and text.endswith("Answer:") for text in model.prompts)
    asked = [text.rpartition("Question: ")[2] for text in model.prompts]
    assert not any(one in text.rpartition("Question: ")[0] for one in asked for text in model.prompts)

    wrong = Script(tokenizer, lambda text: " 7")
    settings["limit"] = 34  # room for BOS, a question of 24 bytes (i < 10) and 8 new ones; none for a shot
    found = file_task(FileTask("sums", "number", records), {"student": wrong}, tokenizer, 6, **settings)
    assert found["shots"] == 0 and found["n"] + found["too_long"] == 6 and found["n"] >= 4
    settings["limit"] = 10
    found = file_task(FileTask("sums", "number", records), {"student": wrong}, tokenizer, 6, **settings)
    assert found["student"] is None and found["too_long"] == 6


def test_made_tasks_can_be_done(byte_tokenizer):
    tokenizer = byte_tokenizer()
    for name in exact.MADE:
        documents = made_documents(name, tokenizer, 3, seed=1)
        assert documents == made_documents(name, tokenizer, 3, seed=1) != made_documents(name, tokenizer, 3, seed=2)
        texts = {}
        for one in documents:
            (answer,) = one.answers
            texts[tokenizer.decode(one.ids[: answer.start], skip_special_tokens=True)] = tokenizer.decode(
                one.ids[answer.start : answer.end]
            )
        model = Script(tokenizer, texts.__getitem__)
        found = exact.made_task(name, {"student": model}, tokenizer, 3, 1, None, 2)
        assert found["student"]["value"] == 1.0 and found["n"] == 3
        found = exact.made_task(name, {"student": Script(tokenizer, lambda text: " x")}, tokenizer, 3, 1, None, 2)
        assert found["student"]["value"] == 0.0
    assert "key-recall" in exact.MADE and found["chance"] == 0.25


def test_the_suite(teacher, student, story_file, tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}+1?", "answer": f"#### {i + 1}"}) + "\n" for i in range(9)))
    seen = []
    settings = {"text": story_file, "samples": 6, "max_new_tokens": 10, "tasks": ["copy", "key-recall", str(path)]}
    found = generation_suite(
        student, teacher.tokenizer, teacher.model, **settings, progress=lambda *at: seen.append(at)
    )
    assert seen[-1] == (48, 48) and seen == sorted(seen)
    assert list(found["tasks"]) == ["copy", "key-recall", "sums"]
    for task in found["tasks"].values():
        assert task["metric"] == "exact_match" and 0 <= task["student"]["value"] <= 1
        assert set(task["teacher"]) == {"value", "stderr"}
    assert found["completion"]["n"] == 6 and 0 < found["completion"]["new_tokens"] <= 10
    assert set(found["repetition"]) == {"student", "teacher", "text"}
    assert found["repetition"]["text"]["loops"] == 0
    assert len(found["examples"]) == 3 and set(found["examples"][0]) == {"prompt", "student", "teacher", "text"}
    # the same again, with one prompt at a time
    monkey = pytest.MonkeyPatch()
    monkey.setattr(generation, "BATCH_TOKENS", 1)
    try:
        again = generation_suite(student, teacher.tokenizer, teacher.model, **settings)
    finally:
        monkey.undo()
    assert again == found
    same = generation_suite(teacher.model, teacher.tokenizer, teacher.model, text=story_file, samples=4, tasks=["copy"])
    assert same["completion"]["identical"] == {"value": 1.0, "stderr": 0.0}
    assert same["completion"]["common_prefix"]["value"] == same["completion"]["new_tokens"]


def test_without_teacher_or_text(teacher, student):
    found = generation_suite(student, teacher.tokenizer, samples=2, tasks=["copy"])
    assert found["completion"] is None and found["repetition"] is None
    assert found["tasks"]["copy"]["teacher"] is None and "no text was given" in found["notes"][0]


def test_prompts_come_from_as_many_documents_as_there_are(teacher, story_file):
    prompts = generation._Prompts(story_file, teacher.tokenizer, 6, 16)
    assert len(set(prompts.documents)) == 6 and all(len(ids) == generation.PROMPT for ids in prompts.ids)
    assert all(len(rest) == 16 for rest in prompts.rest) and {ids[0] for ids in prompts.ids} == {1}
    text = teacher.tokenizer.decode(prompts.ids[0][1:] + prompts.rest[0])
    assert text in story_file.read_text()


def test_wrong_input(teacher, student, tmp_path):
    with pytest.raises(UserError, match="context of 256 tokens; at most 224"):
        generation_suite(student, teacher.tokenizer, max_new_tokens=300)
    short = tmp_path / "short.txt"
    short.write_text("Hello.")
    with pytest.raises(UserError, match="no document of 96 tokens"):
        generation_suite(student, teacher.tokenizer, text=short)
