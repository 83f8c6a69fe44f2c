"""Documents to ids: BOS exactly once, nothing lost, and in conversations only the assistant's tokens counted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from relinear.distill.data.documents import Document
from relinear.distill.data.tokenise import Tokens, tokenise
from relinear.distill.errors import UserError

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
FORGETFUL = (  # writes the last message only, as templates do that drop earlier reasoning
    "{% for m in messages %}<{{ m['role'] }}>{% if loop.last %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [
    {"role": "user", "content": "Where is the ball?"},
    {"role": "assistant", "content": "In the park, \u00e9\u4e2d."},
    {"role": "user", "content": "And Tom?"},
    {"role": "assistant", "content": "At the lake."},
]


def documents(*contents: Any) -> list[Document]:
    return [Document(content, f"a.jsonl:{number}") for number, content in enumerate(contents, 1)]


def styled(folder: Path, single: str | None) -> Any:
    """The tokenizer of a folder, with another post-processor."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    specials = [("<s>", 1), ("</s>", 2)]
    pair = None if single is None else f"{single} $B"
    tokenizer.backend_tokenizer.post_processor = (
        processors.ByteLevel(trim_offsets=False)
        if single is None
        else processors.TemplateProcessing(single=single, pair=pair, special_tokens=specials)
    )
    return tokenizer


TEXTS = ["Tom went to the park.", "  two spaces\nand a line", "\u00e9\u4e2d\U0001f600 x"]


@pytest.mark.parametrize("single", ["<s> $A", None, "<s> $A </s>", "$A </s>"])
def test_bos_once_and_no_eos_however_the_tokenizer_is_set_up(llama: Path, single: str | None) -> None:
    tokenizer = styled(llama, single)
    plain = styled(llama, None)
    tokens = tokenise(documents(*TEXTS, "<s>already there"), tokenizer)
    for number, text in enumerate([*TEXTS, "already there"]):
        assert tokens.document(number).tolist() == [1, *plain(text)["input_ids"]]
    assert (tokens.ids == 1).sum() == len(tokens) == 4
    assert tokens.scored.tolist() == (tokens.ids != 1).tolist()


def test_no_bos_where_the_tokenizer_has_none(qwen2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(qwen2)
    assert tokenizer.bos_token_id is None
    tokens = tokenise(documents(*TEXTS), tokenizer)
    assert [tokenizer.decode(tokens.document(number)) for number in range(3)] == TEXTS
    assert tokens.scored.all()


def test_texts_come_back(llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokens = tokenise(documents(*TEXTS), tokenizer)
    assert [tokenizer.decode(tokens.document(number)[1:]) for number in range(3)] == TEXTS


@pytest.mark.parametrize("teacher", ["stories260k", "tinystories-656k", "babyllama-char105"])
def test_real_teachers_are_fed_as_their_tokenizer_would(shared: Path, teacher: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "teachers" / teacher)
    stories = (shared / "corpora/tinystories/valid.txt").read_text(encoding="utf-8").split("<|endoftext|>")[:40]
    tokens = tokenise(documents(*stories), tokenizer)
    for number, story in enumerate(stories):
        assert tokens.document(number).tolist() == tokenizer(story, verbose=False)["input_ids"]


def test_batches_do_not_show(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    contents: list[Any] = [f"Tom {number}" for number in range(50)]
    contents[7:7] = [TALK, TALK]
    whole = tokenise(documents(*contents), tokenizer)
    monkeypatch.setattr("relinear.distill.data.tokenise._BATCH_DOCUMENTS", 7)
    parts = tokenise(documents(*contents), tokenizer)
    for name in ("ids", "offsets", "scored"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))
    assert whole.ids.dtype == np.int32 and len(whole) == 52


def counted(tokens: Tokens, tokenizer: Any) -> str:
    return tokenizer.decode(tokens.ids[tokens.scored])


@pytest.mark.parametrize("marked", [True, False], ids=["generation marks", "prefixes"])
def test_only_completions_are_counted(llama: Path, marked: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    if not marked:
        tokenizer.chat_template = CHATML
    tokens = tokenise(documents(TALK), tokenizer)
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(tokens.ids) == "<s>" + text
    end = "</s>" if marked else "</s>\n"
    assert counted(tokens, tokenizer) == "In the park, \u00e9\u4e2d." + end + "At the lake." + end
    assert not tokens.scored[0]


def test_bos_of_the_template_is_not_doubled(llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    tokens = tokenise(documents(TALK), tokenizer)
    assert tokens.ids[0] == 1 and (tokens.ids == 1).sum() == 1
    assert counted(tokens, tokenizer).startswith("In the park")


def test_other_spelling_and_conversations_without_a_reply(llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = CHATML
    other = [{"from": "human", "value": TALK[0]["content"]}, {"from": "gpt", "value": TALK[1]["content"]}]
    same = tokenise(documents(TALK[:2]), tokenizer)
    assert np.array_equal(tokenise(documents(TALK[:1], other), tokenizer).ids, same.ids)


def test_mixed_with_texts(llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokens = tokenise(documents("one", TALK, "two"), tokenizer)
    assert tokenizer.decode(tokens.document(0)) == "<s>one" and tokenizer.decode(tokens.document(2)) == "<s>two"
    start, stop = tokens.offsets[1:3]
    assert 0 < tokens.scored[start:stop].sum() < stop - start


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (None, TALK, "has no chat template"),
        (FORGETFUL, TALK, "a.jsonl:1: the chat template writes the conversation up to message 2 differently"),
        (CHATML, [{"role": "user"}], "a.jsonl:1: message 1 is {'role': 'user'}, expected {role, content}"),
        (CHATML, ["hello"], "a.jsonl:1: message 1 is hello, expected"),
        ("{{ raise_exception('roles must alternate') }}", TALK, "a.jsonl:1: .* refuses .*roles must alternate"),
    ],
)
def test_messages_that_cannot_be_marked(llama: Path, template: str | None, messages: Any, expected: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=expected):
        tokenise(documents(copy.deepcopy(messages)), tokenizer)


def test_tokens_select_join_head() -> None:
    tokens = Tokens(np.arange(10, dtype=np.int32), np.array([0, 3, 4, 10]), np.arange(10) % 2 == 0)
    assert tokens.select(np.array([2, 0])).ids.tolist() == [4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert tokens.select(np.array([], np.int64)).offsets.tolist() == [0]
    both = Tokens.join([tokens, tokens.select(np.array([1]))])
    assert both.offsets.tolist() == [0, 3, 4, 10, 11] and both.ids[-1] == 3 and both.scored.sum() == 5
    assert [len(tokens.head(count)) for count in (0, 1, 3, 4, 5, 10, 99)] == [0, 1, 1, 2, 3, 3, 3]
