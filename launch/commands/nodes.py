"""The commands that write what a cluster takes: `slurm` and `kubernetes`. Neither imports torch."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ...distill.errors import MachineError, UserError
from .. import kubernetes as pods
from .. import slurm as batch
from ..output import data, talk
from .common import Overrides, Recipe, check_engine, examples

Nodes = Annotated[int, typer.Option("--nodes", min=1, metavar="N", help="How many nodes.")]
Gpus = Annotated[int, typer.Option(min=0, metavar="G", help="GPUs of a node; 0 for none.")]
Nproc = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Processes on a node; one per GPU.", show_default=False)
]


def register(app: typer.Typer) -> None:
    """Add the commands to the console command."""
    app.command(
        epilog=examples(
            "relinear slurm my.yaml engine.parallel=fsdp2 --nodes 4 --gpus-per-node 8 --time 48:00:00",
            "relinear slurm my.yaml engine.parallel=ddp --nodes 1 --partition gpu --account ours --out job.sbatch",
            then="relinear doctor my.yaml",
        )
    )(slurm)
    app.command(
        epilog=examples(
            "relinear kubernetes my.yaml engine.parallel=fsdp2 --nodes 2 --image registry.example.com/relinear:0.1.0",
            "relinear kubernetes my.yaml engine.parallel=ddp --image relinear:0.1.0 --claim shared --out job.yaml",
            then="relinear doctor my.yaml",
        )
    )(kubernetes)


def slurm(
    recipe: Recipe,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus_per_node: Gpus = 8,
    nproc: Nproc = None,
    cpus_per_node: Annotated[
        int | None,
        typer.Option(min=1, metavar="C", help="Cores of a node; four per process.", show_default=False),
    ] = None,
    time: Annotated[str, typer.Option(metavar="LIMIT", help="Time limit of a job; it requeues itself.")] = "24:00:00",
    grace: Annotated[int, typer.Option(min=1, metavar="S", help="Seconds before the limit to save in.")] = 120,
    partition: Annotated[str | None, typer.Option(help="As the site names it.", show_default=False)] = None,
    account: Annotated[str | None, typer.Option(help="As the site names it.", show_default=False)] = None,
    qos: Annotated[str | None, typer.Option(help="As the site names it.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What to write; RECIPE.sbatch.", show_default=False)
    ] = None,
) -> None:
    """Write an sbatch file: several nodes, requeued until done.

    The recipe is checked now. Its run folder must be seen by all nodes: save.dir=DIR.
    """
    from ...recipes import loader

    changes, count = overrides or [], _nproc(gpus_per_node, nproc)
    check_engine(loader.load(recipe, changes), recipe, changes, nodes * count)
    name = _name(recipe)
    cores = 4 * count if cpus_per_node is None else cpus_per_node
    job = batch.Job(name, nodes, gpus_per_node, count, cores, time, grace, partition, account, qos)
    given = ["--nodes", str(nodes), "--gpus-per-node", str(gpus_per_node)]
    text = batch.script(job, recipe, changes, ["relinear", "slurm", recipe, *changes, *given])
    _write(out or Path(f"{name}.sbatch"), text, "sbatch")


def kubernetes(
    recipe: Recipe,
    image: Annotated[str, typer.Option(metavar="IMAGE", help="Container image with relinear inside.")],
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus_per_node: Gpus = 8,
    nproc: Nproc = None,
    cpus: Annotated[str, typer.Option(metavar="Q", help="Cores of a pod.")] = "32",
    memory: Annotated[str, typer.Option(metavar="Q", help="Memory of a pod.")] = "256Gi",
    shm: Annotated[str, typer.Option(metavar="Q", help="Of it shared between processes.")] = "16Gi",
    claim: Annotated[
        str | None, typer.Option(metavar="NAME", help="Existing volume claim; made if not given.", show_default=False)
    ] = None,
    storage: Annotated[str, typer.Option(metavar="Q", help="Size of the claim that is made.")] = "500Gi",
    mount: Annotated[str, typer.Option(metavar="DIR", help="Where the volume lies; relative paths begin there.")] = (
        "/runs"
    ),
    grace: Annotated[int, typer.Option(min=1, metavar="S", help="Seconds to save in when a pod is stopped.")] = 600,
    name: Annotated[str | None, typer.Option(help="Of the job; the recipe's.", show_default=False)] = None,
    namespace: Annotated[str | None, typer.Option(help="Your own.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What to write; NAME.yaml.", show_default=False)
    ] = None,
) -> None:
    """Write a PyTorchJob manifest: several pods, until done.

    The resolved recipe travels inside. Teacher and text must be on the volume, on the Hub, or in the image.
    """
    from ...recipes import loader

    changes, count = overrides or [], _nproc(gpus_per_node, nproc)
    loaded = loader.load(recipe, changes)
    check_engine(loaded, recipe, changes, nodes * count)
    named = pods.name_of(_name(recipe)) if name is None else name
    volume = {"claim": claim, "storage": storage, "mount": mount}
    size = {"cpus": cpus, "memory": memory, "shm": shm}
    job = pods.Job(named, image, nodes, gpus_per_node, count, **size, **volume, grace=grace, namespace=namespace)
    text = pods.manifest(job, loaded)
    model = loaded.teacher.model
    if Path(model).expanduser().exists():
        talk(f"teacher.model: {model} is a folder of this machine; it must lie in the pods too, below {mount}")
    _write(out or Path(f"{named}.job.yaml"), text, "kubectl apply -f")


def _name(recipe: str) -> str:
    """A recipe's own name: a file's without its ending, a shipped one's as it is (`qwen2.5-7b-rwkv7`)."""
    path = Path(recipe)
    return path.stem if path.suffix in (".yaml", ".yml") else path.name


def _nproc(gpus: int, nproc: int | None) -> int:
    if nproc is None and gpus == 0:
        raise UserError("--gpus-per-node 0: then say how many processes a node runs: --nproc N")
    return gpus if nproc is None else nproc


def _write(path: Path, text: str, submit: str) -> None:
    """Write a new file; one that is there stays as it is."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path}: exists already. Choose another file: --out FILE") from None
    except OSError as error:
        raise MachineError(f"{path}: cannot be written ({error.strerror}). Choose another file: --out FILE") from None
    data(str(path))
    talk(f"Next: {submit} {shlex.quote(str(path))}")
