"""Students as GGUF: llama.cpp's converter reads our folders, and its CPU code gives our logits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from relinear.distill.formats.pairs import FORMATS
from relinear.distill.formats.run import export_as
from relinear.distill.formats.write import convert
from relinear.distill.teacher import load_model
from relinear.mixers import linear, rwkv6

CHILD = Path(__file__).parent / "gguf_child.py"
LENGTHS = (1, 2, 3, 7, 16, 40)


def gguf(llama_cpp: Path, folder: Path) -> Path:
    out = folder.parent / f"{folder.name}.gguf"
    ran = subprocess.run(
        [sys.executable, CHILD, llama_cpp, folder, out], capture_output=True, text=True, check=False, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return out


class Server:
    """llama.cpp's server in this process; its answers hold the logarithms of all probabilities."""

    def __init__(self, model: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(model), 256, 1, False
        params.cpuparams.n_threads = 1
        self.server = xllamacpp.Server(params)

    def ask(self, ids: list[int], **more: Any) -> list[dict[str, Any]]:
        asked = {"prompt": ids, "temperature": 0, "cache_prompt": False, "ignore_eos": True, **more}
        return self.server.handle_completions(asked)["choices"][0]["logprobs"]["content"]

    def log_probabilities(self, ids: list[int], size: int, readable: int) -> torch.Tensor:
        """Of the next token. What is then chosen is a token with a text, as others are not answered with figures."""
        content = self.ask(ids, n_predict=1, n_probs=size, logit_bias=[[readable, 1000.0]])
        found = torch.full((size,), float("nan"))
        for entry in content[0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found


def largest_difference(model: Path, export: Path, form: str = "auto") -> float:
    """Between the two models' log-probabilities, over the vocabulary, behind prompts of several lengths."""
    student, tokenizer = load_model(export)
    for mixer in student.mixers().values():
        mixer.options = replace(mixer.options, form=form)
    size = student.config.vocab_size
    ids = torch.randint(3, size, (max(LENGTHS),), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        expected = student(torch.tensor([ids])).logits[0].log_softmax(-1)
    server = Server(model)
    readable = tokenizer.convert_tokens_to_ids("e")
    assert isinstance(readable, int)
    found = torch.stack([server.log_probabilities(ids[:length], size, readable) for length in LENGTHS])
    assert found.isfinite().all()
    return float((found - expected[[length - 1 for length in LENGTHS]]).abs().max())


def test_a_real_conversion_runs_in_llama_cpp(
    llama_cpp: Path, real_conversion: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """stories260k with every layer RAD-RWKV6: the probabilities, and the text that greedy decoding writes.

    Its decays pass our floor now and then; that this is all of the difference shows when the floor is taken away.
    """
    run = real_conversion("rwkv6", "{rope: false, qk_norm: none}")
    folder, record = export_as(run, "rwkv6qwen2")
    assert record["architecture"] == "RWKV6Qwen2ForCausalLM"
    model = gguf(llama_cpp, folder)
    assert largest_difference(model, run / "export") < 2e-2
    student, tokenizer = load_model(run / "export")
    ids = tokenizer("Once upon a time")["input_ids"]
    made = student.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
    assert [entry["id"] for entry in Server(model).ask(ids, n_predict=24, n_probs=1)] == made
    for module in (linear, rwkv6):
        monkeypatch.setattr(module, "LOG_DECAY_FLOOR", -80.0)
    assert record["notes"] and largest_difference(model, run / "export", form="recurrent") < 1e-4


CASES = [
    ("qwen2", "rwkv6qwen2", {"rope": False, "qk_norm": "none"}),
    ("qwen2", "rwkv6qwen2", {"rope": False, "qk_norm": "none", "gate": "sigmoid", "qkv_bias": False, "shift_rank": 8}),
    ("llama", "rwkv6qwen2", {"rope": False, "qk_norm": "none", "expand_kv": True, "decay_rank": 24}),
    ("llama", "arwkv7", {}),
    ("qwen2", "arwkv7", {"group_norm": True, "gate_init": "paper", "gate_rank": 128, "expand_kv": True}),
    ("qwen2", "arwkv7", {"value_residual": False, "gate_rank": 20, "decay_rank": 16}),
]
ARWKV7 = {"rope": False, "balance_state": False, "unit_keys": False, "qkv_bias": False, "value_rank": 32}


@pytest.mark.parametrize(("family", "name", "options"), CASES)
def test_every_option_of_a_pair(family, name, options, llama_cpp, make_teacher, scattered, tmp_path):
    """Tiny teachers, every new parameter moved at random; decays stay above the floor that the format has not."""
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    if name == "arwkv7":
        options = {**ARWKV7, "gate_rank": 127, **options}
    export = scattered(make_teacher(family, **shape), FORMATS[name].mixer, options)
    record = convert(export, name, tmp_path / name)
    assert record["notes"] == []
    assert largest_difference(gguf(llama_cpp, tmp_path / name), export) < 1e-4
