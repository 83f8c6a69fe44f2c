"""Proof that an exported folder works for somebody who never heard of relinear."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import files, verify_child
from .errors import RunFailed, UserError
from .hub import proof
from .manifest import renew
from .probe import probe_ids
from .teacher import load_model, read_config


def verify(folder: str | Path, timeout: float = 3600.0, *, interpreters: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Load and use an export in a fresh process: offline, from a moved folder, with no code cache and no relinear.

    The child loads strictly and compares logits with those of the installed classes and with those that the student
    gave when it was exported; cached generation with uncached (greedy, sampling, beam), a left-padded batch with single
    rows, prefill in pieces with one forward; it saves and loads again, checks tied weights, that decays stay fp32 in a
    bf16 load, tokenizer, generation settings and a training step, and executes the code of README.md.

    What it saw is written into the folder: verify.json (see `hub.proof`), and into config.json the range of versions of
    transformers, no others than were tried. Earlier proofs of the same bytes under other versions count on.

    Args:
        folder: as `export_student` wrote it.
        timeout: seconds that a child may take.
        interpreters: further Pythons, each with torch and another version of transformers, to repeat everything with.

    Returns:
        {"ok": bool, "folder": str, "checks": {name: {"ok": bool, "detail": str}}, "transformers": the version that is
        installed, "others": {version: checks} of `interpreters`, "verified": {"min", "max"} or None}.

    Raises:
        UserError: not an export of relinear, or an interpreter that is none.
        RunFailed: a child died before it could report, or took too long.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give an export, e.g. RUN/export")
    if read_config(folder).get("model_type") != "relinear":
        raise UserError(f"{folder}/config.json: model_type is not relinear. `relinear export RUN` writes such a folder")
    pythons = [sys.executable, *map(_interpreter, interpreters)]
    before = proof.read(folder)
    known = before["transformers"] if before is not None and _same_bytes(folder, before) else {}
    seen: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="relinear-verify-") as temporary:
        work = Path(temporary)
        _write_reference(folder, work)
        for number, python in enumerate(pythons):
            run = _run_child(folder, python, work / str(number), work / "reference.safetensors", timeout)
            seen[run.pop("transformers")] = run
    installed = next(iter(seen))
    verified = proof.claim({**known, **seen})
    _record(folder, {**known, **seen}, verified)
    return {
        "ok": all(check["ok"] for run in seen.values() for check in run["checks"].values()),
        "folder": str(folder),
        "checks": seen[installed]["checks"],
        "transformers": installed,
        "others": {version: run["checks"] for version, run in seen.items() if version != installed},
        "verified": verified,
    }


def _interpreter(python: str | Path) -> str:
    found = shutil.which(str(python))
    if found is None:
        raise UserError(
            f"--transformers {python}: no such program. Give the Python of an environment with torch and the wanted "
            "transformers, e.g. --transformers other/bin/python"
        )
    return found


def _same_bytes(folder: Path, before: dict[str, Any]) -> bool:
    """The folder is the one that was proved, but for the card's words."""
    return before["files"] == proof.hashes(folder)


def _write_reference(folder: Path, work: Path) -> None:
    """What the installed classes give for the probe's input; the model is not kept."""
    import torch
    from safetensors.torch import save_file

    model, _ = load_model(folder)
    ids = probe_ids(model.config.vocab_size)
    with torch.no_grad():
        reference = {"input_ids": ids, "logits": model(ids, use_cache=False).logits.contiguous()}
    save_file(reference, work / "reference.safetensors")


def _run_child(folder: Path, python: str, work: Path, reference: Path, timeout: float) -> dict[str, Any]:
    """One child's report, from a copy of the folder that is gone afterwards."""
    work.mkdir()
    try:
        shutil.copytree(folder, work / "moved")
        shutil.copyfile(reference, work / reference.name)
        # An empty home for caches: what an earlier load left behind must not help.
        env = {**os.environ, "HF_HOME": str(work / "hf"), "HF_MODULES_CACHE": str(work / "modules"),
               "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
        command = [python, "-I", verify_child.__file__, str(work / "moved"), str(work)]
        child = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True, timeout=timeout, check=False)
        if child.returncode != 0:
            other = "" if python == sys.executable else f" of {python}"
            raise RunFailed(f"{folder}: does not load in a fresh process{other}:\n{child.stderr.strip()[-2000:]}")
        return json.loads((work / "results.json").read_text(encoding="utf-8"))
    except subprocess.TimeoutExpired:
        raise RunFailed(
            f"{folder}: the fresh process took longer than {timeout:.0f} s. Give it more: --timeout SECONDS"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _record(folder: Path, transformers: dict[str, dict[str, Any]], verified: dict[str, str] | None) -> None:
    """Write config.json's claim and verify.json; a run's manifest learns of both."""
    config = read_config(folder)
    if config.get("verified_transformers") != verified:
        config["verified_transformers"] = verified
        files.write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    proof.write(folder, transformers, verified)
    renew([folder / "config.json", folder / proof.PROOF])
