"""The command line of `stare-megatron launch`."""

from __future__ import annotations

import argparse

from stare_megatron.host import paths

ABOUT = "start a run on Slurm, Kubernetes, a Ray cluster or this machine, with the nodes that its layout takes"
EXAMPLES = (
    "launch slurm run.toml --dry-run",
    "launch slurm run.toml --time 24:00:00 --sbatch=--partition=gpu --container stare-megatron.sqsh",
    "launch k8s run.toml --image registry/stare-megatron:gpu --claim shared:/data",
    "launch ray-job run.toml --address http://HEAD:8265",
    "launch local run.toml",
    "launch slurm sft.toml",
)
TARGETS = ("slurm", "k8s", "ray-job", "local")


def add_launch(parser: argparse.ArgumentParser) -> None:
    """The options of `launch`."""
    add = parser.add_argument
    add("target", choices=TARGETS, metavar="TARGET", help="slurm, k8s (KubeRay), ray-job or local")
    add(
        "settings",
        nargs="+",
        metavar="run.toml key.sub=value",
        help="TOML file of a run, of train or sft, and overrides",
    )
    add("--dry-run", action="store_true", help="print what would be submitted, and write and submit nothing")
    add("--folder", type=paths.argument, metavar="FOLDER", help="for job and logs (default: RUN.DIR-launch/RUN.NAME)")

    layout = parser.add_argument_group("nodes")
    add = layout.add_argument
    add("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a node; 0: a run on CPUs (default: 8)")
    add("--cpus-per-node", type=int, default=0, metavar="N", help="CPUs of a node (default: all)")
    add("--nodes", type=int, default=0, metavar="N", help="more nodes than the layout takes")
    sandbox = "CPU nodes for sandbox.node_resource (default: one an actor); 0: its actors share the run's nodes"
    add("--sandbox-nodes", type=int, default=-1, metavar="N", help=sandbox)
    variable = "environment variable of every node; may be given again"
    add("--env", action="append", default=[], metavar="NAME=VALUE", help=variable)
    grace = "before the time limit, or after SIGTERM, to end the step and save (default: 600)"
    add("--grace", type=int, default=600, metavar="SECONDS", help=grace)

    slurm = parser.add_argument_group("slurm")
    add = slurm.add_argument
    add("--time", default="", metavar="LIMIT", help="time limit of a job, which is then queued again, e.g. 24:00:00")
    option = "an option of sbatch, e.g. --sbatch=--partition=gpu; may be given again"
    add("--sbatch", action="append", default=[], metavar="OPTION", help=option)
    add("--sandbox-sbatch", action="append", default=[], metavar="OPTION", help="the same, for the sandbox's nodes")
    add("--container", default="", metavar="IMAGE", help="run in a container")
    add("--runtime", choices=("pyxis", "apptainer"), default="pyxis", help="which runs it (default: pyxis)")
    mount = "a further folder that the container sees, SOURCE or SOURCE:TARGET; may be given again"
    add("--mount", action="append", default=[], metavar="FOLDER", help=mount)
    add("--python", default="", metavar="FILE", help="the interpreter (default: this one; of the image's environment)")
    add("--port", type=int, default=6379, metavar="N", help="Ray's port on the first node (default: 6379)")

    k8s = parser.add_argument_group("k8s")
    add = k8s.add_argument
    add("--image", default="", help="image that the pods run, made of tools/docker")
    claim = "a PersistentVolumeClaim and where pods see it, e.g. shared:/data; may be given again"
    add("--claim", action="append", default=[], metavar="NAME:FOLDER", help=claim)
    add("--namespace", default="", help="namespace (default: kubectl's)")
    add("--memory", default="", metavar="SIZE", help="memory of a pod, e.g. 1500Gi (default: no limit)")
    add("--shm", default="64Gi", metavar="SIZE", help="/dev/shm of a pod (default: 64Gi)")
    add("--retries", type=int, default=10, metavar="N", help="new starts after an end that is not done (default: 10)")

    ray = parser.add_argument_group("ray-job")
    address = "the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)"
    ray.add_argument("--address", default="", metavar="URL", help=address)
