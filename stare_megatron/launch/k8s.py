"""A RayJob for KubeRay's operator, with the run's file as a ConfigMap beside it.

Each start of the job is a Ray cluster of its own, whose pods have the nodes of the layout; the head is one of them, so
that the driver has what its ranks have. A start that does not end with code 0 is followed by another, which goes on
from the newest checkpoint.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stare_megatron.errors import UserError
from stare_megatron.host import packages
from stare_megatron.launch.job import Job, Nodes

MANIFEST = "rayjob.yaml"
USER = 1000  # of the images in tools/docker
_SETTINGS = Path("/etc/stare_megatron")
_LONGEST = 40  # KubeRay makes longer names of it, of which Kubernetes takes 63 characters
_LINES = 100


@dataclass(frozen=True)
class Options:
    """`claims`: PersistentVolumeClaims, and where pods see them. `retries`: starts after the first one."""

    image: str
    claims: Mapping[str, Path]
    namespace: str = ""
    memory: str = ""
    shm: str = "64Gi"
    retries: int = 10


def claims_of(given: list[str]) -> dict[str, Path]:
    """NAME:FOLDER -> the two.

    Raises:
        UserError: another form.
    """
    found = {}
    for item in given:
        name, _, folder = item.partition(":")
        if not name or not folder.startswith("/"):
            raise UserError(f"--claim {item}: want NAME:FOLDER, the folder from / on")
        found[name] = Path(folder)
    return found


def render(job: Job, options: Options) -> str:
    """The two objects, as YAML.

    Raises:
        UserError: the run's name cannot become one of Kubernetes.
    """
    return yaml.dump_all(objects(job, options), Dumper=_Dumper, sort_keys=False, width=_LINES)


class _Dumper(yaml.SafeDumper):
    """Text of several lines as it is."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def objects(job: Job, options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """ConfigMap and RayJob. Raises: UserError: as `render`."""
    name = name_of(job.name)
    about = {"name": name} | ({"namespace": options.namespace} if options.namespace else {})
    settings = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": {"run.toml": job.settings}}
    workers = [_workers(job, options, "main", job.main, job.main.count - 1)] if job.main.count > 1 else []
    workers += [_workers(job, options, "sandbox", job.extra, job.extra.count)] if job.extra else []
    spec = {
        "entrypoint": shlex.join(job.entrypoint(str(_SETTINGS / "run.toml"))),
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "backoffLimit": options.retries,
        "rayClusterSpec": {
            "rayVersion": packages.version("ray"),
            "headGroupSpec": {
                "rayStartParams": _start(job.main) | {"dashboard-host": "0.0.0.0"},
                "template": {"spec": _pod(job, options, job.main)},
            },
            "workerGroupSpecs": workers,
        },
    }
    return settings, {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": about, "spec": spec}


def name_of(run: str) -> str:
    """A run's name as KubeRay takes it: a label by RFC 1035, which begins with a letter.

    Raises:
        UserError: it is longer, begins with a digit, or nothing is left.
    """
    name = run.lower().replace("_", "-").replace(".", "-").strip("-")
    if not name or len(name) > _LONGEST or not name[0].isalpha():
        what = f"a RayJob's name has 1 to {_LONGEST} letters and digits, a letter first"
        raise UserError(f"run.name = {run!r}: {what}; choose another")
    return name


def _workers(job: Job, options: Options, group: str, nodes: Nodes, count: int) -> dict[str, Any]:
    return {
        "groupName": group,
        "replicas": count,
        "minReplicas": count,
        "maxReplicas": count,
        "rayStartParams": _start(nodes),
        "template": {"spec": _pod(job, options, nodes)},
    }


def _start(nodes: Nodes) -> dict[str, str]:
    """Options of `ray start`; KubeRay finds CPUs and GPUs in the pod's limits."""
    # A string within a string: KubeRay writes it into a shell's line as it is.
    return {"resources": json.dumps(json.dumps({nodes.resource: 1}))} if nodes.resource else {}


def _pod(job: Job, options: Options, nodes: Nodes) -> dict[str, Any]:
    claims = [(f"claim-{n}", name, folder) for n, (name, folder) in enumerate(options.claims.items())]
    limits = {"nvidia.com/gpu": str(nodes.gpus)} if nodes.gpus else {}
    limits |= {"cpu": str(nodes.cpus)} if nodes.cpus else {}
    limits |= {"memory": options.memory} if options.memory else {}
    drain = ["python", "-m", "stare_megatron.launch.drain", str(job.folder / "logs")]
    # The driver's time to stop: by `ray job stop`, and by the end of the pod.
    variables = dict(job.environment) | {"RAY_JOB_STOP_WAIT_TIME_S": str(job.grace)}
    mounts = [{"name": volume, "mountPath": str(folder)} for volume, _, folder in claims]
    mounts += [{"name": "settings", "mountPath": str(_SETTINGS)}, {"name": "shm", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [
        {"name": volume, "persistentVolumeClaim": {"claimName": name}} for volume, name, _ in claims
    ]
    volumes += [
        {"name": "settings", "configMap": {"name": name_of(job.name)}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": options.shm}},
    ]
    return {
        "terminationGracePeriodSeconds": job.grace + 60,
        "securityContext": {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER},
        "containers": [
            {
                "name": "ray",
                "image": options.image,
                "env": [{"name": name, "value": value} for name, value in variables.items()],
                "resources": {"limits": limits, "requests": limits},
                "lifecycle": {"preStop": {"exec": {"command": drain}}},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
