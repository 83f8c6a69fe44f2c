"""The embedded teacher's text and folder: deterministic, torch-free, disjoint splits, documents that fit."""

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import relinear
from relinear.eval import recall as R
from relinear.recipes.embedded import text

TEACHER = Path(relinear.__file__).parent / "recipes" / "embedded" / "teacher"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TEACHER)


def pairs_shown(documents):
    """Every adjacent (key, value) in the documents."""
    keys, values = set(R.KEYS), set(R.VALUES)
    words = [re.findall(r"[A-Za-z]+", document) for document in documents]
    return {(a, b) for document in words for a, b in pairwise(document) if a in keys and b in values}


def test_documents_are_a_function_of_seed_and_split():
    first = list(text.documents(1, 30))
    assert first == list(text.documents(1, 30))
    assert first[:10] == list(text.documents(1, 10))
    assert not set(first) & set(text.documents(2, 30))
    assert not set(first) & set(text.documents(1, 30, split="valid"))


def test_importing_the_text_needs_no_torch():
    code = (
        "import sys, relinear.recipes.embedded.text; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_training_text_shows_no_held_out_pair():
    kinds = {"recall": 1.0, "copy": 1.0}
    train = pairs_shown(text.documents(0, 400, "train", kinds))
    valid = pairs_shown(text.documents(0, 100, "valid", kinds)) | pairs_shown(text.held_out_recall(0, 20, pairs=64))
    assert len(train) > 4000
    assert len(valid) > 1000
    assert not any(R.is_held_out(*pair) for pair in train)
    assert all(R.is_held_out(*pair) for pair in valid)
    assert not pairs_shown(text.documents(0, 300, "train", {"story": 1, "chat": 1, "sums": 1}))


def test_held_out_recall_varies_pairs_and_filler():
    near, far = (next(text.held_out_recall(0, 1, pairs=32, sentences=n)) for n in (0, 40))
    assert near.startswith(R.REMEMBER)
    assert len(pairs_shown([near])) == len(pairs_shown([far])) == 32
    assert far.count(".") - near.count(".") == 40


def test_sums_are_right_and_answers_follow_from_the_story():
    for document in text.documents(3, 200, kinds={"sums": 1, "chat": 1, "story": 1}):
        for a, b, c in re.findall(r"(\d+) \+ (\d+) = (\d+)", document):
            assert int(a) + int(b) == int(c)
        for said, again in re.findall(r"Digits: ([\d ]+)\. Again: ([\d ]+)\.", document):
            assert said == again
        for who, age in re.findall(r"How old was (\w+)\? \w+ was (\d+)\.", document):
            assert f"{who} was {age} years old." in document
        for what, who in re.findall(r"Who had the (\w+)\? It was (\w+)\.", document):
            assert re.search(rf"{who} had a \w+ {what}\.", document)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="split must be"):
        next(text.documents(0, 1, split="test"))
    with pytest.raises(ValueError, match=r"unknown kinds \['poem'\]"):
        next(text.documents(0, 1, kinds={"poem": 1}))


def test_every_document_fits_the_context_and_survives_the_tokenizer(tokenizer):
    documents = list(text.documents(11, 400)) + list(text.held_out_recall(1, 20, pairs=128, sentences=60))
    ids = tokenizer(documents, add_special_tokens=False)["input_ids"]
    assert max(map(len, ids)) + 2 <= text.CONTEXT
    assert tokenizer.batch_decode(ids) == documents
    odd = "Ünicode, tabs\tand\r\n  spaces  , '92 don't.\n\n\n"
    assert tokenizer.decode(tokenizer(odd, add_special_tokens=False)["input_ids"]) == odd


def test_words_and_digits_are_single_tokens_and_bos_is_left_to_the_caller(tokenizer):
    for word in [" " + w for w in R.KEYS + R.VALUES] + list("0123456789"):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word
    assert len(tokenizer("1234", add_special_tokens=False)["input_ids"]) == 4
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert 1 not in tokenizer("Tom went home.")["input_ids"]


def test_chat_template_is_the_form_of_the_text_and_marks_answers(tokenizer):
    turns = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "2 + 3 = 5."}]
    done = tokenizer.apply_chat_template(turns, tokenize=False)
    assert done == "<s>User: What is 2 + 3?\nAssistant: 2 + 3 = 5.\n"
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert done.startswith(asked)
    marked = tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
    kept = [i for i, m in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(kept) == " 2 + 3 = 5.\n"


def test_training_that_was_stopped_resumes_to_the_same_weights(tokenizer, tmp_path, monkeypatch):
    from relinear.recipes.embedded import train

    monkeypatch.setattr(train, "train_tokenizer", lambda seed: tokenizer)
    whole = {"tokens": 3000, "climb": 2000, "polish": 2000, "seed": 3, "lr": 1e-3}
    train.train(tmp_path / "once", minutes=60, **whole)
    for _ in range(4):
        train.train(tmp_path / "stopped", minutes=0, **whole)
    once, stopped = ((tmp_path / name / "teacher" / "model.safetensors").read_bytes() for name in ("once", "stopped"))
    assert once == stopped
    assert once != (TEACHER / "model.safetensors").read_bytes()


def test_the_folder_is_small_and_complete():
    assert sum(path.stat().st_size for path in TEACHER.parent.rglob("*") if path.is_file()) < 4_000_000
    config = json.loads((TEACHER / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (8, 4)
    assert (config["max_position_embeddings"], config["tie_word_embeddings"]) == (1024, True)
    assert {p.name for p in TEACHER.iterdir()} >= {"model.safetensors", "tokenizer.json", "generation_config.json"}
    from safetensors import safe_open

    with safe_open(TEACHER / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_teacher_answers_held_out_pairs_far_away(tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TEACHER)
    cells = [R.RecallCell(128, 0), R.RecallCell(64, 384)]
    assert min(c["accuracy"] for c in R.recall(model, tokenizer, cells, n_per_cell=64)["cells"]) >= 0.95
    cut = R.recall(model, tokenizer, cells[1:], n_per_cell=64, window=32)
    assert cut["accuracy"] <= 0.3
