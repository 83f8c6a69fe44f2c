"""Proof that an exported folder works for somebody who never heard of relinear."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import verify_child
from .errors import RunFailed, UserError
from .teacher import load_model, read_config


def verify(folder: str | Path, timeout: float = 600.0) -> dict[str, Any]:
    """Load and use an export in a fresh process: offline, from a moved folder, with no code cache and no relinear.

    The child loads strictly and compares logits with those of the installed classes; cached generation with uncached
    (greedy, sampling, beam), a left-padded batch with single rows, prefill in pieces with one forward; it saves and
    loads again, checks tied weights, that decays stay fp32 in a bf16 load, the tokenizer's round trip and a training
    step.

    Args:
        folder: as `export_student` wrote it.
        timeout: seconds that the child may take.

    Returns:
        {"ok": bool, "folder": str, "checks": {name: {"ok": bool, "detail": str}}}.

    Raises:
        UserError: not an export of relinear.
        RunFailed: the child died before it could report.
    """
    import torch
    from safetensors.torch import save_file

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give an export, e.g. RUN/export")
    if read_config(folder).get("model_type") != "relinear":
        raise UserError(f"{folder}/config.json: model_type is not relinear. `relinear export RUN` writes such a folder")
    with tempfile.TemporaryDirectory(prefix="relinear-verify-") as temporary:
        work = Path(temporary)
        moved = work / "moved"
        shutil.copytree(folder, moved)
        model, _ = load_model(folder)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, model.config.vocab_size, (2, 37), generator=generator)
        with torch.no_grad():
            reference = {"input_ids": ids, "logits": model(ids, use_cache=False).logits.contiguous()}
        save_file(reference, work / "reference.safetensors")
        # An empty home for caches: what an earlier load left behind must not help.
        env = {**os.environ, "HF_HOME": str(work / "hf"), "HF_MODULES_CACHE": str(work / "modules"),
               "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
        command = [sys.executable, "-I", verify_child.__file__, str(moved), str(work)]
        child = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True, timeout=timeout, check=False)
        if child.returncode != 0:
            raise RunFailed(f"{folder}: does not load in a fresh process:\n{child.stderr.strip()[-2000:]}")
        checks = json.loads((work / "results.json").read_text(encoding="utf-8"))
    return {"ok": all(check["ok"] for check in checks.values()), "folder": str(folder), "checks": checks}
