"""The recall tasks' documents: from a seed, exact in length, held out, and asking for what they tell."""

import hashlib
import random
import re

import pytest

from relinear.distill.errors import UserError
from relinear.eval import recall as R
from relinear.eval.tasks.document import TooShort, Writer
from relinear.eval.tasks.needles import all_needles, all_values, needle
from relinear.eval.tasks.tasks import TASKS, task_documents
from relinear.eval.tasks.words import is_held_out

LENGTHS = (900, 1200)  # tokens, most of them one byte
PUBLISHED = (
    "33b7b539bfe607bbf056304237909d164ebd055576caf5307e8ff59ac60f789d"  # of the documents behind published figures
)


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    return byte_tokenizer(R.KEYS + R.VALUES)


@pytest.fixture(scope="module", params=["bytes", "words"])
def writer(request, tokenizer, byte_tokenizer):
    return Writer(byte_tokenizer() if request.param == "bytes" else tokenizer)


def text(writer, document):
    return writer.tokenizer.decode(document.ids[len(writer.first) :])


def said(writer, document):
    return [writer.tokenizer.decode(document.ids[answer.start : answer.end]).strip() for answer in document.answers]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "pairs"])
def test_documents_have_their_length_and_come_from_the_seed(writer, name):
    made = task_documents(TASKS[name], writer, LENGTHS, 2, seed=1)
    assert {length for length, _ in made} == set(LENGTHS)
    assert {second for _, second in made} == set(TASKS[name].seconds)
    for (length, _), documents in made.items():
        assert [len(document.ids) for document in documents] == [length] * 2
        assert documents[0].ids != documents[1].ids
        assert all(0 < a.start < a.end <= length for d in documents for a in d.answers)
        assert all(d.answers[-1].end == length for d in documents)
    assert made == task_documents(TASKS[name], writer, LENGTHS, 2, seed=1)
    alone = task_documents(TASKS[name], writer, LENGTHS[1:], 2, seed=1)
    assert alone == {cell: made[cell] for cell in alone}
    assert made != task_documents(TASKS[name], writer, LENGTHS, 2, seed=2)


@pytest.mark.parametrize("name", TASKS)
def test_rivals_are_other_answers_and_the_question_follows_the_fact(writer, name):
    for documents in task_documents(TASKS[name], writer, (1800,), 1).values():
        for document in documents:
            for answer in document.answers:
                own = tuple(document.ids[answer.start : answer.end])
                assert own not in answer.rivals and not set(answer.also) & set(answer.rivals)
                assert len(set(answer.rivals)) == len(answer.rivals)
                assert 0 < answer.chance <= 1
                before = writer.tokenizer.decode(document.ids[: answer.start])
                assert writer.tokenizer.decode(list(own)).strip() in before


def test_pairs_are_the_published_documents(tokenizer):
    cases = [(case.ids, case.answers) for case in R.make_cases(tokenizer, R.DEFAULT_CELLS, 64, 3)]
    assert hashlib.sha256(repr(cases).encode()).hexdigest() == PUBLISHED
    made = task_documents(TASKS["pairs"], Writer(tokenizer), (4096,), 4, seed=3)
    assert {cell for cell in made if cell[0] <= 640} == {(c.distance, c.pairs) for c in R.DEFAULT_CELLS}
    assert {distance for distance, _ in made} == {0, 128, 384, 640, 4096 - 384}
    for cell in R.DEFAULT_CELLS:
        assert [d.ids for d in made[cell.distance, cell.pairs]] == [
            case.ids for case in R.make_cases(tokenizer, [cell], 64, 3)
        ]


def test_a_needle_stands_at_its_depth_at_the_end_of_a_sentence(writer):
    at = []
    for depth in (0.0, 0.5, 1.0):
        whole = text(writer, needle(writer, random.Random(0), 1500, depth))
        key, value = re.findall(r" Remember: (\w+) (\w+)\.", whole)[0]
        assert whole.endswith(f"\nRecall: {key} {value}")
        assert is_held_out(key, value)
        before, after = whole.split(f" Remember: {key} {value}.")
        assert before == "" or before.endswith(".") or after.startswith("\nRecall:")
        at.append(len(before) / len(before + after))
    assert at[0] == 0 and abs(at[1] - 0.5) < 0.05 and at[2] > 0.9


def test_several_needles(writer):
    whole = text(writer, needle(writer, random.Random(0), 1500, 0.5, number=True, others=3))
    told = dict(re.findall(r" Remember: (\w+) (\d{5})\.", whole))
    key, value = whole.rsplit("\nRecall: ", 1)[1].split()
    assert len(told) == 4 and told[key] == value
    document = all_needles(writer, random.Random(0), 1500, 3)
    told = dict(re.findall(r" Remember: (\w+) (\w+)\.", text(writer, document)))
    asked = text(writer, document).rsplit("\nRecall: ", 1)[1].split()
    assert [told[key] for key in asked[::2]] == asked[1::2] == said(writer, document)
    document = all_values(writer, random.Random(0), 1500, 3)
    told = re.findall(r" Remember: (\w+) (\w+)\.", text(writer, document))
    assert len({key for key, _ in told}) == 1 and [value for _, value in told] == said(writer, document)
    assert [len(answer.also) for answer in document.answers] == [2, 1, 0]
    assert all(is_held_out(*pair) for pair in told)


def test_phone_book_variables_and_common_word_ask_for_what_they_tell(writer):
    for depth, place in ((0.0, 0), (1.0, -1)):
        (document,) = task_documents(TASKS["phone-book"], writer, (1500,), 1)[1500, depth]
        lines = re.findall(r"\n(\w+ \w+): (\d{5})", text(writer, document))
        assert lines[-1] == lines[:-1][place]
        assert len(dict(lines)) == len(lines) - 1
    (document,) = task_documents(TASKS["variables"], writer, (1500,), 1)[1500, 3]
    told = dict(re.findall(r" VAR (\w+) = (\w+)\.", text(writer, document)))
    value = re.findall(r"The value of (\w+) is", text(writer, document))[0]
    for _ in range(4):
        value = told[value]
    assert [value] == said(writer, document)
    (document,) = task_documents(TASKS["common-word"], writer, (2500,), 1)[2500, 0.5]
    words = re.findall(r"Words: ([\w ]+)\w", text(writer, document))[0].split()
    assert [max(set(words), key=words.count)] == said(writer, document)


def test_filler_from_a_file(tokenizer, tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("One thing is here. Another thing is there! " * 9)
    writer = Writer(tokenizer, path)
    document = needle(writer, random.Random(0), 900, 0.5)
    assert len(document.ids) == 900
    assert "thing is here. Another thing" in text(writer, document)
    assert not any(f" {name} " in text(writer, document) for name in R.NAMES)
    with pytest.raises(UserError, match=r"--filler .*missing.txt: cannot be read"):
        Writer(tokenizer, tmp_path / "missing.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="has no text"):
        Writer(tokenizer, tmp_path / "empty.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        Writer(tokenizer, tmp_path / "binary")


def test_what_does_not_fit_is_said_or_left_out(tokenizer):
    writer = Writer(tokenizer)
    with pytest.raises(TooShort, match="length must be at least"):
        needle(writer, random.Random(0), 20, 0.5)
    with pytest.raises(ValueError, match="depth must be between 0 and 1"):
        needle(writer, random.Random(0), 900, 1.5)
    cells = task_documents(TASKS["multi-query"], writer, (90, 900), 1)
    assert (900, 8) in cells and (90, 8) not in cells
    assert task_documents(TASKS["needle"], writer, (900,), 1, limit=500) == {}
