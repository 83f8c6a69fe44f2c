"""The recipe `convert` carries a teacher to every mixer: run, export, load, decode; and, slow, in a fresh process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from relinear.distill.teacher import load_model
from relinear.distill.verify import verify
from relinear.mixers import registry
from relinear.recipes import loader, runner


@pytest.fixture(scope="module", params=registry.names())
def run(request, make_teacher, story_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / request.param
    given = [
        f"layers.mixer={request.param}",
        f"teacher.model={make_teacher('llama', num_hidden_layers=2)}",
        f"data.source={story_file}",
        f"save.dir={out}",
        "data.seq_len=64",
        "stages.calibrate.tokens=1k",
        "stages.align.tokens=3k",
        "stages.glue.tokens=1k",
        "eval.tokens=1k",
    ]
    runner.run(loader.load("convert", given))
    return out


def test_align_brings_the_student_nearer(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["stage"] == "align" and "loss" in line]
    if losses[0] < 1e-5:
        return  # these documents fit into the mixer's window: it is, nearly, the attention itself from the start
    assert len(losses) > 2 and losses[-1] < losses[0]
    measured = json.loads((run / "result.json").read_text())["measured"]
    assert measured["align"]["kl"] < measured["transfer"]["kl"]


def test_the_export_decodes_as_it_reads(run):
    model, tokenizer = load_model(run / "export")
    ids = tokenizer("Once upon a time Tom went to the park.", return_tensors="pt").input_ids
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        logits = model(made).logits[:, ids.shape[1] - 1 : -1]
    assert torch.equal(logits.argmax(-1), made[:, ids.shape[1] :])


@pytest.mark.slow
def test_the_export_is_verified(run):
    found = verify(run / "export")
    assert found["ok"], found["checks"]
