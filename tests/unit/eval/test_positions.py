"""Perplexity by position: every bucket equals a plain forward over the same window, whatever the pieces."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from relinear.distill.errors import UserError
from relinear.distill.student import assemble, transfer
from relinear.distill.teacher import load_teacher
from relinear.eval import positions
from relinear.eval.position_plots import perplexity_by_position
from relinear.eval.positions import long_suite, position_limit


@pytest.fixture(scope="module")
def teacher(make_teacher):
    return load_teacher(make_teacher("llama", num_hidden_layers=2, max_position_embeddings=64))


@pytest.fixture(scope="module")
def student(teacher):
    torch.manual_seed(0)
    return assemble(teacher, transfer(teacher, {0: ("gated_deltanet", {})})[0])


@pytest.fixture(scope="module")
def books(tmp_path_factory, story_file):
    """Four documents; two of them are long."""
    folder = tmp_path_factory.mktemp("books")
    words = story_file.read_text().replace("<|endoftext|>", " ")
    for number, size in enumerate((1500, 1400, 300, 10)):
        (folder / f"book{number}.txt").write_text(words[number * 5000 :][:size])
    return folder


def by_hand(model, teacher, ids, low, high):
    """(losses, KL, agreement) of the targets at low ≤ position < high of windows (B, T), from one forward pass."""
    with torch.no_grad():
        ours, theirs = (one(input_ids=ids).logits.log_softmax(-1) for one in (model, teacher))
    at = slice(max(low, 1) - 1, high - 1)
    losses = [-log[:, :-1].gather(-1, ids[:, 1:, None])[:, at, 0] for log in (ours, theirs)]
    kl = (theirs.exp() * (theirs - ours)).sum(-1)[:, at]
    return losses, kl, (ours.argmax(-1) == theirs.argmax(-1))[:, at].double()


def test_every_bucket_is_what_one_forward_pass_gives(teacher, student, books, monkeypatch):
    monkeypatch.setattr(positions, "PIECE", 24)  # borders in the middle of buckets
    monkeypatch.setattr(positions.fidelity, "_CHUNK_ELEMENTS", {"cpu": 7 * 320})
    found = long_suite(student, teacher.tokenizer, teacher.model, text=books, lengths=[100, 17, 64])
    assert found["lengths"] == [17, 64, 100]
    assert [(row["from"], row["to"]) for row in found["positions"]] == [(0, 17), (17, 64), (64, 100)]
    assert [row["beyond_context"] for row in found["positions"]] == [False, False, True]
    assert found["documents"] == 3 and found["too_short"]["documents"] == 1
    assert sum("made for 64 tokens" in note for note in found["notes"]) == 2

    ids = []
    for number in range(3):
        text = (books / f"book{number}.txt").read_text().strip()
        whole = [1, *teacher.tokenizer(text, add_special_tokens=False)["input_ids"]]
        ids += [(number, whole[start : start + 100]) for start in range(0, len(whole) - 99, 99)]
    assert found["windows"] == len(ids)
    rows = torch.tensor([window for _, window in ids])
    documents = np.array([number for number, _ in ids])
    for row in found["positions"]:
        (ours, theirs), kl, same = by_hand(student, teacher.model, rows, row["from"], row["to"])
        assert row["tokens"] == ours.numel()
        assert row["student"]["loss"] == pytest.approx(float(ours.mean()), rel=1e-4)
        assert row["teacher"]["perplexity"] == pytest.approx(math.exp(float(theirs.mean())), rel=1e-4)
        assert row["kl"] == pytest.approx(float(kl.mean()), rel=1e-3)
        assert row["top1_agreement"] == pytest.approx(float(same.mean()))
        sums = np.array([float(kl[documents == d].sum() - kl.mean() * kl[documents == d].numel()) for d in range(3)])
        assert row["kl_stderr"] == pytest.approx(math.sqrt((sums**2).sum() * 3 / 2) / kl.numel(), rel=1e-2)


def test_defaults_reach_beyond_the_context_as_far_as_two_documents_do(teacher, books, monkeypatch):
    monkeypatch.setattr(positions, "SHORTEST", 16)
    seen = []
    found = long_suite(
        teacher.model.train(), teacher.tokenizer, text=books, max_tokens=300, progress=lambda *a: seen.append(a)
    )
    assert teacher.model.training
    teacher.model.eval()
    assert found["lengths"] == [16, 32, 64, 128]
    assert found["windows"] == 2 and found["documents"] == 2  # one of each document first
    assert seen[-1] == (256, 256)
    assert all(row["kl"] is None and row["teacher"] is None for row in found["positions"])
    single = long_suite(teacher.model, teacher.tokenizer, text=books / "book0.txt", lengths=[64])
    assert single["positions"][0]["student"]["loss_stderr"] is None
    assert "one document: no standard errors" in single["notes"]


class Learned(torch.nn.Module):
    """A stock model whose positions are a table."""

    def __new__(cls):
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=16, n_layer=1, n_head=2)).eval()


def test_a_teacher_with_learned_positions_is_measured_as_far_as_they_go(teacher, student, books):
    learned = Learned()
    assert position_limit(learned) == 64 and position_limit(teacher.model) is None
    found = long_suite(student, teacher.tokenizer, learned, text=books, lengths=[16, 64, 100], max_tokens=400)
    assert [row["teacher"] is None for row in found["positions"]] == [False, False, True]
    assert [row["kl"] is None for row in found["positions"]] == [False, False, True]
    assert found["positions"][2]["student"]["perplexity"] > 1
    with pytest.raises(UserError, match="64 learned positions"):
        long_suite(learned, teacher.tokenizer, text=books, lengths=[100])


def test_what_is_too_short_is_said(teacher, books):
    with pytest.raises(UserError, match=r"no document of 4096 tokens among 4 \(the longest has \d+\).*--lengths \d+"):
        long_suite(teacher.model, teacher.tokenizer, text=books, lengths=[4096])
    with pytest.raises(UserError, match="less than one window of 100"):
        long_suite(teacher.model, teacher.tokenizer, text=books, lengths=[100], max_tokens=50)
    with pytest.raises(UserError, match="expected numbers of tokens"):
        long_suite(teacher.model, teacher.tokenizer, text=books, lengths=[1])
    with pytest.raises(UserError, match="no such file"):
        long_suite(teacher.model, teacher.tokenizer, text=books / "none.txt")


def test_memory_does_not_hold_logits_of_the_whole_window(teacher, books, monkeypatch):
    """No tensor of vocabulary times window comes out of the head."""
    monkeypatch.setattr(positions, "PIECE", 16)
    monkeypatch.setattr(positions.fidelity, "_CHUNK_ELEMENTS", {"cpu": 5 * 320})
    rows = []
    head = teacher.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, out: rows.append(out.numel() // out.shape[-1]))
    try:
        long_suite(teacher.model, teacher.tokenizer, text=books, lengths=[128], max_tokens=256)
    finally:
        hook.remove()
    assert max(rows[2:]) <= 5  # but for the first 16 tokens, which show that the head is all


def test_plot(teacher, student, books, tmp_path):
    both = long_suite(student, teacher.tokenizer, teacher.model, text=books, lengths=[16, 32, 64, 100], max_tokens=300)
    alone = long_suite(student, teacher.tokenizer, text=books, lengths=[32], max_tokens=300)
    for number, result in enumerate((both, alone)):
        path = perplexity_by_position(result, tmp_path / f"{number}.png")
        assert path.read_bytes().startswith(b"\x89PNG")
