"""Students in flash-linear-attention's own formats: its model classes give our logits, with and without cache."""

from __future__ import annotations

import pytest
import torch

from relinear.distill.formats.pairs import FORMATS
from relinear.distill.formats.run import export_as
from relinear.distill.formats.write import convert
from relinear.distill.teacher import load_model

pytestmark = pytest.mark.kernels

GLA = {"rope": False, "qk_norm": "none", "balance": False, "temperature": 16.0, "out_norm": "rms", "qkv_bias": False}
GDN = {"rope": False, "activation": "silu", "beta_bias": False, "out_norm": "rms", "qkv_bias": False}
CASES = [
    ("llama", "fla-gla", {**GLA, "gate": "silu"}),
    ("qwen2", "fla-gla", {**GLA, "gate": "none", "expand_kv": True, "decay_rank": 5}),
    ("llama", "fla-gated_deltanet", {**GDN, "gate": "silu", "conv": 4}),
    ("qwen2", "fla-gated_deltanet", {**GDN, "expand_kv": True}),
    ("llama", "fla-gated_deltanet", {**GDN, "gate": "sigmoid", "conv": 2}),
    ("llama", "fla-gated_deltanet", {**GDN, "gate": "none"}),
]


@pytest.mark.parametrize(("name", "options"), [("fla-gla", {**GLA, "gate": "silu"}), ("fla-gated_deltanet", GDN)])
def test_a_real_conversion(name, options, real_conversion, measured, monkeypatch):
    """stories260k with every layer converted: the probabilities of a text, and greedy decoding."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("RELINEAR_KERNELS", "torch")  # interpreted kernels are for checks, not for a run
    plain = ", ".join(f"{key}: {str(value).lower()}" for key, value in options.items())
    run = real_conversion(FORMATS[name].mixer, f"{{{plain}}}")
    folder, _ = export_as(run, name)
    ours, tokenizer = load_model(run / "export")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer("Once upon a time, there was a little girl.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = ours(ids).logits
        error = float((theirs(ids, use_cache=False).logits - expected).abs().max() / expected.std())
    measured(error)
    assert error < 1e-4
    made = [model.generate(ids, max_new_tokens=3, do_sample=False).tolist() for model in (ours, theirs)]
    assert made[0] == made[1]


@pytest.mark.parametrize(("family", "name", "options"), CASES)
def test_its_own_classes_give_our_logits(family, name, options, make_teacher, scattered, tmp_path, measured):
    """Every new parameter moved at random. A row longer than fla's switch to one step at a time; then a cache."""
    from transformers import AutoModelForCausalLM

    shape = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    export = scattered(make_teacher(family, **shape), FORMATS[name].mixer, options)
    record = convert(export, name, tmp_path / name)
    ours, _ = load_model(export)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
    assert type(theirs).__name__ == record["architecture"] and type(theirs).__module__.startswith("fla.")
    ids = torch.randint(3, 320, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ours(ids).logits
        error = float((theirs(ids, use_cache=False).logits - expected).abs().max() / expected.std())
        first = theirs(ids[:, :5], use_cache=True)
        steps = [first.logits]
        cache = first.past_key_values
        for t in range(5, 9):
            step = theirs(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            steps.append(step.logits)
        cached = float((torch.cat(steps, 1) - expected[:, :9]).abs().max() / expected.std())
    measured(max(error, cached))
    assert max(error, cached) < 1e-4
