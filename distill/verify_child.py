"""Proves an exported folder in a process that knows only torch and transformers. Run as a script by `verify`.

usage: python -I verify_child.py FOLDER WORK

WORK/results.json is then {"transformers", "torch", "python", "checks": {check: {"ok", "detail"}}}.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import platform
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class _Refuse:
    """Makes `import relinear` fail even where it is installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "relinear" or name.startswith("relinear."):
            raise ModuleNotFoundError(f"{name}: the folder must load without it")


def main(folder: str, work: str) -> None:
    """Run every check and write the results."""
    sys.meta_path.insert(0, _Refuse())  # pyright: ignore[reportArgumentType]
    import numpy
    import torch
    import transformers
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    results: dict[str, Any] = {}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = load_file(Path(work) / "reference.safetensors")
    ids = reference["input_ids"]
    stored = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("dtype", "float32")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def generate(input_ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        mask = torch.ones_like(input_ids) if mask is None else mask
        settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": pad, **kwargs}
        return model.generate(input_ids, attention_mask=mask, **settings)

    def check(name: str, run: Callable[[], tuple[bool, str]]) -> None:
        try:
            ok, detail = run()
        except (Exception, SystemExit):
            ok, detail = False, traceback.format_exc(limit=-3)
        results[name] = {"ok": bool(ok), "detail": detail}

    def loads() -> tuple[bool, str]:
        bad = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys") if info.get(kind)}
        return not bad and type(model).__name__ == "RelinearForCausalLM", json.dumps(bad) if bad else "strict"

    def logits() -> tuple[bool, str]:
        error = (model(ids, use_cache=False).logits - reference["logits"]).abs().max().item()
        return error <= 1e-4 * max(1.0, reference["logits"].abs().max().item()), f"largest difference {error:.1e}"

    def run_logits() -> tuple[bool, str]:
        file = Path(folder) / "probe.npz"
        if not file.exists():
            return True, "skipped: the model was never whole in memory"
        with numpy.load(file, allow_pickle=False) as held:
            probe = {name: torch.from_numpy(held[name]) for name in held.files}
        whole = model(probe["input_ids"], use_cache=False).logits
        got, wanted = whole[..., probe["vocabulary"]], probe["logits"]
        spread = (wanted - probe["logsumexp"][..., None]).std()
        shift = ((got - wanted) ** 2).mean().sqrt() / spread
        total = (whole.logsumexp(-1) - probe["logsumexp"]).abs().max() / spread
        # Rounded weights give rounded logits: by 8 bits of mantissa in bfloat16, by 11 in float16.
        limit = {"bfloat16": 5e-2, "float16": 1e-2}.get(stored, 1e-3)
        return max(shift, total).item() <= limit, f"{shift:.1e} of their spread from the run's (at most {limit:g})"

    def greedy() -> tuple[bool, str]:
        same = torch.equal(generate(ids), generate(ids, use_cache=False))
        return same, "cached = uncached, 12 tokens"

    def beam() -> tuple[bool, str]:
        return torch.equal(generate(ids, num_beams=3), generate(ids, num_beams=3, use_cache=False)), "3 beams"

    def sampling() -> tuple[bool, str]:
        torch.manual_seed(1)
        cached = generate(ids, do_sample=True)
        torch.manual_seed(1)
        return torch.equal(cached, generate(ids, do_sample=True, use_cache=False)), "same seed, same tokens"

    def left_padding() -> tuple[bool, str]:
        width = ids.shape[1] - 5
        padded = torch.cat([torch.full((1, 5), pad), ids[:1, :width]], 1)
        mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones(1, width, dtype=torch.long)], 1)
        batch, masks = torch.cat([padded, ids[1:2]]), torch.cat([mask, torch.ones_like(mask)])
        alone = generate(ids[:1, :width])[0, width:]
        together = generate(batch, masks)[0, ids.shape[1] :]
        single = generate(padded, mask)[0, ids.shape[1] :]
        return torch.equal(alone, together) and torch.equal(alone, single), "batch of 2 and of 1 = alone"

    def chunked_prefill() -> tuple[bool, str]:
        whole = model(ids, use_cache=False).logits
        cut = ids.shape[1] // 2 + 1
        first = model(ids[:, :cut], use_cache=True)
        held = "cache" if "cache" in first else "past_key_values"  # renamed in transformers 5.24
        second = model(ids[:, cut:], **{held: first[held]}, use_cache=True)
        error = (torch.cat([first.logits, second.logits], 1) - whole).abs().max().item()
        return error <= 1e-4 * max(1.0, whole.abs().max().item()), f"largest difference {error:.1e}"

    def round_trip() -> tuple[bool, str]:
        again = Path(work) / "again"
        model.save_pretrained(again)
        other = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True, dtype=torch.float32).eval()
        return torch.equal(other(ids, use_cache=False).logits, model(ids, use_cache=False).logits), "save_pretrained"

    def tied() -> tuple[bool, str]:
        same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        return same == bool(model.config.tie_word_embeddings), f"tie_word_embeddings={same}"

    def half() -> tuple[bool, str]:
        low = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
        keep = tuple(low._keep_in_fp32_modules_strict or ())
        wrong = [n for n, p in low.named_parameters() if n.endswith(keep) and p.dtype != torch.float32] if keep else []
        finite = bool(torch.isfinite(low(ids, use_cache=False).logits).all())
        return not wrong and finite, f"fp32 kept: {', '.join(keep)}" if not wrong else f"cast: {wrong}"

    def text() -> tuple[bool, str]:
        sample = "Once upon a time there was a cat."
        first = tokenizer(sample, add_special_tokens=False)["input_ids"]
        second = tokenizer(tokenizer.decode(first), add_special_tokens=False)["input_ids"]
        tokenizer.save_pretrained(Path(work) / "tokenizer")
        again = AutoTokenizer.from_pretrained(Path(work) / "tokenizer")
        same = (
            again(sample)["input_ids"] == tokenizer(sample)["input_ids"] and again.get_vocab() == tokenizer.get_vocab()
        )
        templates = again.chat_template == tokenizer.chat_template
        good = first == second and max(first) < model.config.vocab_size and same and templates
        return good, f"{len(first)} tokens, saved and loaded the same" + (
            ", chat template too" if tokenizer.chat_template else ""
        )

    def generation_settings() -> tuple[bool, str]:
        file = Path(folder) / "generation_config.json"
        wanted = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        wanted.pop("transformers_version", None)
        lost = [key for key, value in wanted.items() if getattr(model.generation_config, key, None) != value]
        return not [
            key for key in lost if not key.startswith("_")
        ], f"lost: {lost}" if lost else f"{len(wanted)} carried"

    def quick_start() -> tuple[bool, str]:
        file = Path(folder) / "README.md"
        card = file.read_text(encoding="utf-8") if file.exists() else ""
        code = re.search(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
        if code is None:
            return True, "skipped: README.md has no Python code"
        here = re.sub(r"^model_id = .*$", lambda _: f"model_id = {folder!r}", code[1], flags=re.MULTILINE)
        with contextlib.redirect_stdout(io.StringIO()) as said, torch.enable_grad():
            exec(compile(here, "README.md", "exec"), {"__name__": "quick_start"})
        return bool(
            said.getvalue().strip()
        ), f"executed README.md's code: {len(said.getvalue().strip())} characters printed"

    def alone() -> tuple[bool, str]:
        try:
            importlib.import_module("relinear")
        except ModuleNotFoundError:
            return True, "relinear cannot be imported; offline"
        return False, "relinear is importable"

    def training() -> tuple[bool, str]:
        model.train()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        model.zero_grad()
        model.eval()
        return bool(torch.isfinite(loss)) and not missing, f"loss {loss.item():.3f}" + (
            f", {missing}" if missing else ""
        )

    with torch.no_grad():
        for run in (
            alone, loads, logits, run_logits, greedy, beam, sampling, left_padding, chunked_prefill, round_trip, tied,
            half, text, generation_settings, quick_start,
        ):  # fmt: skip
            check(run.__name__, run)
    check(training.__name__, training)
    versions = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    (Path(work) / "results.json").write_text(json.dumps({**versions, "checks": results}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
