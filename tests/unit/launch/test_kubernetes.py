"""The PyTorchJob manifest: its structure, and the command in it, executed by the shell."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from relinear.distill.errors import UserError
from relinear.launch import main as cli
from relinear.launch.kubernetes import RECIPE, Job, manifest, name_of
from relinear.recipes import loader

JOB = Job("mine", "registry.example.com/relinear:0.1.0", nodes=3, gpus=8, nproc=8, namespace="team")


def parts(job: Job = JOB, *changes: str) -> dict[str, dict[str, Any]]:
    documents = list(yaml.safe_load_all(manifest(job, loader.load("quickstart", list(changes)))))
    return {document["kind"]: document for document in documents}


def test_the_three_objects_belong_together():
    made = parts()
    assert list(made) == ["PersistentVolumeClaim", "ConfigMap", "PyTorchJob"]
    assert all(part["metadata"]["namespace"] == "team" for part in made.values())
    assert made["PyTorchJob"]["apiVersion"] == "kubeflow.org/v1"
    assert made["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    replicas = made["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]
    assert {name: replica["replicas"] for name, replica in replicas.items()} == {"Master": 1, "Worker": 2}
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    # The operator counts exit codes below 128 as final under ExitCode; a stopped run's is 75.
    assert {replica["restartPolicy"] for replica in replicas.values()} == {"OnFailure"}
    assert made["PyTorchJob"]["spec"]["runPolicy"]["backoffLimit"] == 300, "the pods' restarts count together"
    pod = replicas["Master"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch" and container["ports"][0]["name"] == "pytorchjob-port"
    assert pod["terminationGracePeriodSeconds"] == 600
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert container["resources"]["requests"].keys() == {"cpu", "memory", "nvidia.com/gpu"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == made["PersistentVolumeClaim"]["metadata"]["name"]
    assert volumes["recipe"]["configMap"]["name"] == made["ConfigMap"]["metadata"]["name"]
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"/dev/shm", "/runs", str(Path(RECIPE).parent)} and container["workingDir"] == "/runs"


def test_the_recipe_travels_with_its_changes(tmp_path):
    text = parts(JOB, "seed=7", "stages.glue.tokens=12k")["ConfigMap"]["data"]["recipe.yaml"]
    (tmp_path / "recipe.yaml").write_text(text)
    again = loader.load(str(tmp_path / "recipe.yaml"))
    assert again == loader.load("quickstart", ["seed=7", "stages.glue.tokens=12k"])


def test_an_existing_claim_and_one_node_without_gpus():
    made = parts(dataclasses.replace(JOB, nodes=1, gpus=0, nproc=2, claim="shared", namespace=None))
    assert list(made) == ["ConfigMap", "PyTorchJob"]
    replicas = made["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]
    assert list(replicas) == ["Master"]
    pod = replicas["Master"]["template"]["spec"]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "shared"
    assert "nvidia.com/gpu" not in pod["containers"][0]["resources"]["limits"]
    assert "namespace" not in made["PyTorchJob"]["metadata"]


def test_the_command_is_relinear_with_the_operators_variables(tmp_path):
    """The shell of the container runs it; relinear takes the shell's place, so that SIGTERM reaches it."""
    (tmp_path / "relinear").write_text(
        f"#!{sys.executable}\nimport json, os, sys\njson.dump([os.getpid(), *sys.argv[1:]], open('said.json', 'w'))\n"
    )
    (tmp_path / "relinear").chmod(0o755)
    container = parts()["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    assert "$(" not in container["command"][-1], "Kubernetes would replace it itself"
    given = {"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "mine-master-0", "MASTER_PORT": "23456"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = subprocess.Popen(container["command"], cwd=tmp_path, env=path | given)
    assert process.wait(timeout=30) == 0
    pid, *arguments = json.loads((tmp_path / "said.json").read_text())
    assert pid == process.pid
    assert arguments == [
        *("run", RECIPE, "--nproc", "8", "--nodes", "3", "--node-rank", "2"),
        *("--rendezvous", "mine-master-0:23456", "--resume"),
    ]
    from relinear.launch.processes import Place, place

    assert place("8", 3, 2, "mine-master-0:23456") == Place(8, 3, 2, "mine-master-0", 23456)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"name": "Mine"}, "--name Mine"),
        ({"claim": "a b"}, "--claim"),
        ({"namespace": "-"}, "--namespace"),
        ({"memory": "lots"}, "--memory lots"),
        ({"shm": "1 Gi"}, "--shm"),
        ({"image": ""}, "--image"),
        ({"image": "a b"}, "--image"),
        ({"mount": "runs"}, "--mount runs"),
    ],
    ids=str,
)
def test_what_kubernetes_would_refuse_is_refused_here(wrong, words):
    with pytest.raises(UserError, match=words):
        manifest(dataclasses.replace(JOB, **wrong), loader.load("quickstart"))


@pytest.mark.parametrize(
    ("text", "name"), [("qwen2.5-7b-rwkv7", "qwen2-5-7b-rwkv7"), ("My_Recipe!", "my-recipe"), ("_", "relinear")]
)
def test_names(text, name):
    assert name_of(text) == name


def test_the_command_writes_a_new_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["kubernetes", "quickstart", "--image", "relinear:1", "--gpus-per-node", "1"]
    assert cli.main(given) == 0
    out, err = capsys.readouterr()
    assert out == "quickstart.job.yaml\n" and "Next: kubectl apply -f quickstart.job.yaml" in err
    assert [part["kind"] for part in yaml.safe_load_all(Path("quickstart.job.yaml").read_text())][-1] == "PyTorchJob"
    assert cli.main(given) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*given[:-1], "2", "--out", "other"]) == 2
    assert "engine.parallel" in capsys.readouterr().err
