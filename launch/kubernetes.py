"""A Kubeflow PyTorchJob for a recipe: the same command on every node, its run folder on a shared volume."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from ..distill.errors import UserError
from ..recipes import loader
from ..recipes.schema import Recipe

RECIPE = "/etc/relinear/recipe.yaml"
PORT = 23456
"""On which the operator has the first node listen."""
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_QUANTITY = re.compile(r"\d+(\.\d+)?([kMGTP]i?)?")


@dataclass(frozen=True)
class Job:
    """What Kubernetes is asked for.

    Attributes:
        name: of the job and of what belongs to it.
        image: with relinear inside.
        nodes: how many pods.
        gpus: per pod; 0 for none.
        nproc: processes per pod.
        cpus, memory, shm: per pod, as Kubernetes writes quantities.
        claim: an existing volume claim for run folders and the Hub's cache; None makes one.
        storage: size of the claim that is made.
        mount: where the volume lies in the pod; the run's relative paths begin there.
        grace: seconds between SIGTERM and SIGKILL.
        retries: how often stopped or failed pods are started again.
        namespace: the user's own if None.
    """

    name: str
    image: str
    nodes: int
    gpus: int
    nproc: int
    cpus: str = "16"
    memory: str = "128Gi"
    shm: str = "16Gi"
    claim: str | None = None
    storage: str = "500Gi"
    mount: str = "/runs"
    grace: int = 600
    retries: int = 100
    namespace: str | None = None


def name_of(text: str) -> str:
    """A name that Kubernetes takes, out of a recipe's."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-") or "relinear"


def manifest(job: Job, recipe: Recipe) -> str:
    """The manifest: a volume claim where none is named, the resolved recipe, the job.

    Args:
        job: what is asked for.
        recipe: loaded; it travels inside the manifest with every change made.

    Raises:
        UserError: a value that Kubernetes would refuse.
    """
    for option, value in (("name", job.name), ("claim", job.claim), ("namespace", job.namespace)):
        if value is not None and not (_NAME.fullmatch(value) and len(value) <= 63):
            raise UserError(f"--{option} {value}: expected small letters, digits and -, at most 63")
    for option in ("cpus", "memory", "shm", "storage"):
        if not _QUANTITY.fullmatch(getattr(job, option)):
            raise UserError(f"--{option} {getattr(job, option)}: expected a quantity, for example 128Gi")
    if not job.image or not job.image.isprintable() or " " in job.image:
        raise UserError(f"--image {job.image!r}: expected an image, for example registry.example.com/relinear:0.1.0")
    if not job.mount.startswith("/"):
        raise UserError(f"--mount {job.mount}: expected an absolute path, for example /runs")
    parts = [] if job.claim else [_claim(job)]
    parts += [_recipe(job, recipe), _job(job)]
    return "---\n".join(yaml.dump(part, Dumper=_Dumper, sort_keys=False, width=120) for part in parts)


def _claim(job: Job) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": _metadata(job, "-runs"),
        "spec": {
            "accessModes": ["ReadWriteMany" if job.nodes > 1 else "ReadWriteOnce"],
            "resources": {"requests": {"storage": job.storage}},
        },
    }


def _recipe(job: Job, recipe: Recipe) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, "-recipe"),
        "data": {"recipe.yaml": loader.dump(recipe)},
    }


def _job(job: Job) -> dict[str, Any]:
    # Every pod runs the same replica; the operator numbers them in RANK, which is the node's number here.
    replicas = {"Master": _replica(job, 1)} | ({"Worker": _replica(job, job.nodes - 1)} if job.nodes > 1 else {})
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(job, ""),
        "spec": {
            # The operator adds the restarts of all pods up.
            "runPolicy": {"backoffLimit": job.retries * job.nodes, "cleanPodPolicy": "Running"},
            "pytorchReplicaSpecs": replicas,
        },
    }


def _replica(job: Job, count: int) -> dict[str, Any]:
    # OnFailure, not ExitCode: the operator takes every code below 128 for a final one, and a stopped run's is 75.
    return {
        "replicas": count,
        "restartPolicy": "OnFailure",
        "template": {"spec": _pod(job)},
    }


def _pod(job: Job) -> dict[str, Any]:
    requests: dict[str, Any] = {"cpu": job.cpus, "memory": job.memory}
    limits: dict[str, Any] = {"memory": job.memory}
    if job.gpus:
        requests["nvidia.com/gpu"] = limits["nvidia.com/gpu"] = job.gpus
    # exec: relinear itself gets the pod's SIGTERM.
    command = (
        f"exec relinear run {RECIPE} --nproc {job.nproc} --nodes {job.nodes} "
        '--node-rank "$RANK" --rendezvous "$MASTER_ADDR:$MASTER_PORT" --resume'
    )
    token = {"secretKeyRef": {"name": "hf-token", "key": "token", "optional": True}}
    return {
        "terminationGracePeriodSeconds": job.grace,
        "containers": [
            {
                "name": "pytorch",  # the operator looks for a container of this name
                "image": job.image,
                "command": ["/bin/sh", "-c", command],
                "workingDir": job.mount,
                "env": [
                    {"name": "HF_HOME", "value": f"{job.mount.rstrip('/')}/huggingface"},
                    {"name": "HF_TOKEN", "valueFrom": token},
                ],
                "ports": [{"name": "pytorchjob-port", "containerPort": PORT}],
                "resources": {"requests": requests, "limits": limits},
                "volumeMounts": [
                    {"name": "runs", "mountPath": job.mount},
                    {"name": "recipe", "mountPath": RECIPE.rpartition("/")[0], "readOnly": True},
                    {"name": "shm", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": job.claim or f"{job.name}-runs"}},
            {"name": "recipe", "configMap": {"name": f"{job.name}-recipe"}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": job.shm}},
        ],
    }


def _metadata(job: Job, suffix: str) -> dict[str, Any]:
    place = {} if job.namespace is None else {"namespace": job.namespace}
    return {"name": f"{job.name}{suffix}", **place, "labels": {"app.kubernetes.io/name": "relinear"}}


def _text(dumper: Any, data: str) -> yaml.ScalarNode:
    """A string; one with line breaks as a literal block."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


class _Dumper(yaml.SafeDumper):
    """Several lines as a block, and no anchors: the pods' template is written out for each kind."""

    yaml_representers: ClassVar[dict[Any, Any]] = {**yaml.SafeDumper.yaml_representers, str: _text}

    def ignore_aliases(self, data: Any) -> bool:
        """Never an alias."""
        return True
