"""The shared fixtures keep what they promise."""

from __future__ import annotations

import os
import socket

import pytest


def test_teachers_load_with_tokenizer(any_teacher):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(any_teacher)
    tokenizer = AutoTokenizer.from_pretrained(any_teacher)
    ids = tokenizer("Once upon a time Tom went to the lake.")["input_ids"]
    assert len(tokenizer) == model.config.vocab_size == 320
    assert max(ids) < 320
    assert (ids[0] == model.config.bos_token_id) == (model.config.model_type in ("llama", "mistral"))
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Once upon a time Tom went to the lake."
    assert all(p.float().std() > 0.01 for p in model.parameters()), "a weight stands at its default"


def test_chat_template_marks_completions(llama):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]
    out = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    kept = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(kept) == "Hello there</s>"


def test_teacher_is_made_once(make_teacher, llama):
    assert make_teacher("llama") == llama
    assert make_teacher("llama", num_hidden_layers=2) != llama


def test_network_is_blocked():
    with pytest.raises(RuntimeError, match="offline"), socket.socket() as s:
        s.connect(("192.0.2.1", 80))


def test_environment_is_offline_and_single_threaded():
    import torch

    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert torch.get_num_threads() == 1


def test_uninitialised_memory_reads_as_nan(nan_empty):
    import torch

    assert torch.empty(3).isnan().all()
