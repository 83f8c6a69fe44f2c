"""What `doctor` checks: each thing is found wrong where it is, and the fix is said."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import importlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from relinear.distill import files
from relinear.launch import checks, checks_recipe
from relinear.launch import main as cli
from relinear.mixers.ops import gated_delta
from relinear.recipes import loader


@pytest.fixture
def quickstart(tmp_path):
    """quickstart(*changes) -> the recipe with its run folder below the test's own."""
    return lambda *changes: loader.load("quickstart", [f"save.dir={tmp_path / 'a' / 'run'}", *changes])


def by_name(found) -> dict[str, checks.Check]:
    return {check.name: check for check in found}


def test_a_sound_machine_passes_and_nothing_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor", "quickstart", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [check["name"] for check in found["checks"]]
    expected = ["python", "libraries", "torch", "cuda", "processes", "kernels", "writing", "locks", "clock"]
    assert names == [*expected, "device", "teacher", "memory", "disk"]
    assert found["ok"] and {check["state"] for check in found["checks"]} == {"ok"}
    assert all(check["fix"] == "" for check in found["checks"])
    assert list(tmp_path.iterdir()) == []


def test_text_has_a_fix_for_every_failure_and_code_3(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    known = checks.version
    monkeypatch.setattr(checks, "version", lambda name: "0.1" if name == "transformers" else known(name))
    assert cli.main(["doctor"]) == 3
    out, err = capsys.readouterr()
    assert "libraries  failure  transformers 0.1, needed <5.25,>=5.23" in out
    assert "failure: libraries" in err and "  fix: pip install 'transformers<5.25,>=5.23" in err


def test_a_wrong_recipe_is_the_users(capsys):
    assert cli.main(["doctor", "quickstart", "stages.glue.tokns=1"]) == 2
    assert "tokns" in capsys.readouterr().err


def test_libraries_out_of_bounds(monkeypatch):
    (sound,) = checks.libraries()
    assert sound.state == "ok"
    versions = {"torch": None, "pydantic": "1.10", "wandb": "0.1"}
    monkeypatch.setattr(checks, "version", lambda name: versions.get(name))
    found = {check.found.split()[0]: check for check in checks.libraries()}
    assert found["torch"].state == "failure" and "is not installed" in found["torch"].found
    assert found["pydantic"].state == "failure" and found["pydantic"].fix.startswith("pip install 'pydantic>=")
    assert found["wandb"].state == "warning", "an extra that is too old stops no run without it"


def test_python_too_old(monkeypatch):
    monkeypatch.setattr(checks.platform, "python_version", lambda: "3.8.1")
    assert checks.python().state == "failure"


def test_gpus_that_torch_does_not_see(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert checks.cuda().state == "ok"
    monkeypatch.setattr(checks, "_nvidia", lambda: 8)
    found = checks.cuda()
    assert found.state == "failure" and found.found.startswith("8 GPUs, but torch") and found.fix


def test_a_wrong_form_fails_the_self_test(monkeypatch):
    rows = [{"recurrence": "gated_delta", "train": "torch", "prefill": "torch", "decode": "torch", "why": ""}]
    assert checks.chosen_kernels(rows).state == "ok"

    def halved(*inputs, **where):
        out, state = gated_delta.chunked(*inputs, **where)
        return 0.5 * out, state

    monkeypatch.setattr(gated_delta, "OP", gated_delta.OP._replace(chunked=halved))
    found = checks.chosen_kernels(rows)
    assert found.state == "failure" and found.found.startswith("gated_delta: largest error")


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    def refuse(*args, **given):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checks.tempfile, "mkdtemp", refuse)
    for check in (checks.writing, checks.locks, checks.clock):
        found = check(tmp_path)
        assert found.state == "failure" and str(tmp_path) in found.found and found.fix


def test_a_full_disk(monkeypatch, tmp_path):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    found = checks.writing(tmp_path)
    assert found.state == "failure" and "no space left" in found.found
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_whose_locks_do_nothing(monkeypatch, tmp_path):
    assert checks.locks(tmp_path).state == "ok"
    with monkeypatch.context() as patched:
        patched.setattr(checks.fcntl, "flock", lambda file, how: None)
        found = checks.locks(tmp_path)
    assert found.state == "failure" and "flock lets two processes in" in found.found and found.fix

    def without(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", without)
    assert checks.locks(tmp_path).state == "warning"


@pytest.mark.parametrize("shift", [-3600.0, 3600.0])
def test_a_file_system_with_another_clock(tmp_path, shift):
    assert checks.clock(tmp_path).state == "ok"
    found = checks.clock(tmp_path, now=lambda: time.time() + shift)
    assert found.state == "warning" and "3600 s" in found.found.replace("3598", "3600") and "ntp" in found.fix


def test_extras_that_a_recipe_needs(monkeypatch, quickstart):
    assert list(checks_recipe.extras(quickstart())) == []
    wanted = quickstart(
        *("engine.parallel=deepspeed-zero2", "stages.glue.train=lora", "track.wandb=mine", "track.tensorboard=true")
    )
    monkeypatch.setattr(checks_recipe, "installed", lambda module: module == "wandb")
    found = by_name(checks_recipe.extras(wanted))
    assert found.keys() == {"[deepspeed]", "[lora]", "[wandb]", "[tensorboard]"}
    assert found["[wandb]"].state == "ok"
    assert found["[deepspeed]"].state == "failure" and found["[deepspeed]"].fix == "pip install 'relinear[deepspeed]'"
    assert "stages.glue.train=lora" in found["[lora]"].found


def test_disk_and_memory_against_the_plan(monkeypatch, quickstart):
    found = by_name(checks_recipe.recipe(quickstart()))
    assert found["disk"].state == found["memory"].state == "ok"
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(checks_recipe.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(checks_recipe, "available_memory", lambda: 1_000_000)
    found = by_name(checks_recipe.recipe(quickstart()))
    assert found["disk"].state == "failure" and "save.keep=1" in found["disk"].fix
    assert found["memory"].state == "failure" and "micro_batch=1" in found["memory"].fix


def test_planned_disk_is_of_the_right_size(quickstart):
    """At least the weights and moments of every saved step, and not a multiple of them."""
    from relinear.recipes.plan import plan

    recipe = quickstart("save.keep=1")
    made = plan(recipe)
    student, mixers = made.counts.student, made.counts.all_mixers
    # Glue, all of it training: three times weights and two moments; align's last step; export in fp32.
    glue = 3 * 12 * student
    least, most = glue + 4 * mixers + 4 * student, glue + 4 * mixers + 8 * student
    assert least <= checks_recipe.disk_bytes(recipe, made) <= most
    assert checks_recipe.disk_bytes(quickstart("save.keep=3"), made) > most


def test_a_teacher_on_the_hub(monkeypatch, quickstart):
    from huggingface_hub import HfApi, constants, errors
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    http = importlib.import_module(errors.Response.__module__.split(".")[0])  # whichever client the Hub's library has

    recipe = quickstart("teacher.model=someone/gated", "data.source=x.txt")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    offline = checks_recipe.teacher(recipe)
    assert offline.state == "warning" and "could not be checked" in offline.found
    assert "hf download someone/gated" in offline.fix
    found = by_name(checks_recipe.recipe(recipe))
    assert found["plan"].state == "warning", "what could not be asked for is not known to be wrong"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    response = http.Response(403, request=http.Request("GET", "https://huggingface.co"))

    def answer(error):
        def check(self, model):
            if error is not None:
                raise error

        monkeypatch.setattr(HfApi, "auth_check", check)
        return checks_recipe.teacher(recipe)

    gated = answer(GatedRepoError("gated", response=response))
    assert gated.state == "failure" and "https://huggingface.co/someone/gated" in gated.fix
    assert answer(RepositoryNotFoundError("none", response=response)).state == "failure"
    assert answer(ConnectionError("no route")).state == "warning"
    fine = answer(None)
    assert fine.state == "ok" and "a token is set" in fine.found and "hf_secret" not in str(dataclasses.asdict(fine))


def test_processes_and_batches(quickstart):
    found = checks_recipe.device(quickstart("engine.parallel=ddp"), 3, 1)
    assert found.state == "failure" and found.fix == "stages.align.batch=3"
    assert checks_recipe.device(quickstart("engine.parallel=ddp"), 2, 1).state == "warning", "no GPU"
    assert checks_recipe.device(quickstart("engine.device=cuda"), None, 1).fix == "engine.device=auto"


def test_a_check_that_breaks_is_a_finding():
    def broken():
        raise RuntimeError("boom\nmore")

    found = checks.guarded("mine", broken)
    assert (found.state, found.found) == ("failure", "RuntimeError: boom") and found.fix


def test_the_nearest_folder_that_is_there(tmp_path):
    assert checks.existing(tmp_path / "a" / "b") == tmp_path
    assert checks.existing(Path("~")) == Path(os.path.expanduser("~"))
