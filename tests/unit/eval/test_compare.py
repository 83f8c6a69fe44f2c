"""`compare` from folders and text files: what it reads, the window it takes, what it refuses, what it says."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from relinear.distill.errors import UserError
from relinear.eval.fidelity import compare, vocabulary_hash

FIDELITY = [
    "student",
    "teacher",
    "perplexity_ratio",
    "perplexity_ratio_stderr",
    "kl",
    "kl_stderr",
    "top1_agreement",
    "top1_agreement_stderr",
    "tokens",
    "documents",
]


@pytest.fixture(scope="module")
def student(llama, tmp_path_factory) -> Path:
    """The teacher with other norms, in a folder of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("student")
    model = AutoModelForCausalLM.from_pretrained(llama)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def few(story_file, tmp_path_factory) -> Path:
    """The first 12 stories."""
    path = tmp_path_factory.mktemp("few") / "few.txt"
    path.write_text("\n<|endoftext|>\n".join(story_file.read_text().split("\n<|endoftext|>\n")[:12]))
    return path


def by_hand(folder: Path, text: Path, window: int) -> tuple[float, int]:
    """(loss, targets) of one model in fp64, every window on its own, without our data code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).double(), AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for document in text.read_text().split("<|endoftext|>"):
        ids = tokenizer(document.strip())["input_ids"]
        assert ids[0] == tokenizer.bos_token_id != ids[1]
        for start in range(0, len(ids) - 1, window - 1):
            piece = torch.tensor([ids[start : start + window]])
            with torch.no_grad():
                log_q = model(input_ids=piece).logits.log_softmax(-1)
            total -= float(log_q[0, :-1].gather(-1, piece[0, 1:, None]).sum())
            count += piece.shape[1] - 1
    return total / count, count


@pytest.mark.parametrize("seq_len", [None, 16])
def test_figures_equal_those_made_by_hand(llama, student, few, seq_len):
    found = compare(student, llama, few, seq_len=seq_len, batch=3)
    window = seq_len or 256
    for name, folder in (("student", student), ("teacher", llama)):
        loss, count = by_hand(folder, few, window)
        assert found[name]["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["tokens"] == count
    assert found["perplexity_ratio"] == pytest.approx(
        math.exp(found["student"]["loss"] - found["teacher"]["loss"]), rel=1e-9
    )
    assert found["documents"] == 12


def test_keys_and_provenance(llama, student, few):
    found = compare(student, str(llama), [few])
    assert list(found) == [*FIDELITY, "seq_len", "text", "models", "dtype", "versions"]
    inner = ["perplexity", "perplexity_stderr", "loss", "loss_stderr"]
    assert list(found["student"]) == list(found["teacher"]) == inner
    assert found["seq_len"] == 256
    assert found["text"] == [str(few)]
    assert found["models"] == {"student": str(student), "teacher": str(llama)}
    assert found["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(found)) == found


def test_the_window_is_the_shorter_context(llama, few, tmp_path):
    shorter = shutil.copytree(llama, tmp_path / "shorter")
    config = json.loads((shorter / "config.json").read_text())
    (shorter / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    assert compare(shorter, llama, few)["seq_len"] == 32
    assert compare(llama, shorter, few)["seq_len"] == 32
    assert compare(llama, shorter, few, seq_len=64)["seq_len"] == 32
    assert compare(llama, shorter, few, seq_len=8)["seq_len"] == 8
    assert compare(llama, None, few)["seq_len"] == 256


def test_max_tokens_reads_so_many_and_cuts_the_last_document(llama, few):
    whole = compare(llama, None, few)
    for limit in (50, 51, 120):
        part = compare(llama, None, few, max_tokens=limit)
        # Every document loses its BOS as a target; nothing else is lost.
        assert part["tokens"] == limit - part["documents"]
    assert compare(llama, None, few, max_tokens=10**9) | {"text": []} == whole | {"text": []}


def test_result_does_not_depend_on_the_batch(llama, student, few):
    one, many = (compare(student, llama, few, batch=batch) for batch in (1, 64))
    assert one["kl"] == pytest.approx(many["kl"], rel=1e-5)
    assert one["kl_stderr"] == pytest.approx(many["kl_stderr"], rel=1e-4)


def test_progress_ends_at_the_total(llama, few):
    calls: list[tuple[int, Any]] = []
    found = compare(llama, None, few, batch=1, progress=lambda done, total: calls.append((done, total)))
    assert len(calls) > 1
    assert calls[-1] == (found["tokens"], found["tokens"])


def retokenised(llama: Path, folder: Path, change: Any) -> Path:
    shutil.copytree(llama, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def swap_two(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def drop_merges(content: dict[str, Any]) -> None:
    content["model"]["merges"] = content["model"]["merges"][:5]


@pytest.mark.parametrize(
    ("change", "message"), [(swap_two, "its tokenizer differs from that of"), (drop_merges, "splits text differently")]
)
def test_another_tokenizer_is_refused(llama, few, tmp_path, change, message):
    other = retokenised(llama, tmp_path / "other", change)
    with pytest.raises(UserError, match=message) as error:
        compare(other, llama, few)
    assert str(other) in str(error.value) and str(llama) in str(error.value)


def test_families_with_other_tokenizers_are_refused(llama, qwen2, few):
    with pytest.raises(UserError, match="320 and 320 tokens, BOS 1 and None"):
        compare(llama, qwen2, few)


def test_families_with_the_same_tokenizer_are_compared(llama, mistral, qwen2, qwen3, few):
    for student, teacher in ((mistral, llama), (qwen3, qwen2)):
        found = compare(student, teacher, few, max_tokens=200)
        assert found["kl"] > 0.01
        assert 0 <= found["top1_agreement"] < 1


def test_vocabulary_hash_is_of_the_content(llama, mistral, qwen2):
    from transformers import AutoTokenizer

    first, same, other = (vocabulary_hash(AutoTokenizer.from_pretrained(f)) for f in (llama, mistral, qwen2))
    assert first == same != other


def test_bad_input_is_named(llama, few, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    for text, message in (
        (tmp_path / "nowhere.txt", "nowhere.txt: no such file"),
        ("some/dataset", "evaluation reads local text"),
        (tmp_path / "empty.txt", "empty.txt: no token to predict"),
    ):
        with pytest.raises(UserError, match=message):
            compare(llama, None, text)
    with pytest.raises(UserError, match="seq_len: expected at least 2"):
        compare(llama, None, few, seq_len=1)
    with pytest.raises(UserError, match="max_tokens: expected at least 2"):
        compare(llama, None, few, max_tokens=1)
