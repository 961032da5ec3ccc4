"""The part of KubeRay's RayJob (ray.io/v1) and of Kubernetes' pods that a launch writes, as types that refuse the rest.

After ray-operator/apis/ray/v1/rayjob_types.go and raycluster_types.go of ray-project/kuberay, and the core/v1 API.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?$")]
Count = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Absolute = Annotated[str, Field(pattern=r"^/")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Variable(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: str


class Resources(Strict):
    limits: dict[Literal["cpu", "memory", "nvidia.com/gpu"], Quantity]
    requests: dict[Literal["cpu", "memory", "nvidia.com/gpu"], Quantity]


class Exec(Strict):
    command: Annotated[list[str], Field(min_length=1)]


class Handler(Strict):
    exec: Exec


class Lifecycle(Strict):
    preStop: Handler


class Mount(Strict):
    name: Name
    mountPath: Absolute


class Container(Strict):
    name: Name
    image: Annotated[str, Field(min_length=1)]
    env: list[Variable]
    resources: Resources
    lifecycle: Lifecycle
    volumeMounts: list[Mount]


class Claim(Strict):
    claimName: Name


class Map(Strict):
    name: Name


class Empty(Strict):
    medium: Literal["", "Memory"]
    sizeLimit: Quantity


class Volume(Strict):
    name: Name
    persistentVolumeClaim: Claim | None = None
    configMap: Map | None = None
    emptyDir: Empty | None = None


class Security(Strict):
    runAsNonRoot: bool
    runAsUser: Count
    runAsGroup: Count
    fsGroup: Count


class Pod(Strict):
    terminationGracePeriodSeconds: Count
    securityContext: Security
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume]


class Template(Strict):
    spec: Pod


class HeadGroup(Strict):
    rayStartParams: dict[str, str]
    template: Template


class WorkerGroup(Strict):
    groupName: Name
    replicas: Count
    minReplicas: Count
    maxReplicas: Count
    rayStartParams: dict[str, str]
    template: Template


class Cluster(Strict):
    rayVersion: str
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class JobSpec(Strict):
    entrypoint: Annotated[str, Field(min_length=1)]
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Count
    backoffLimit: Count
    rayClusterSpec: Cluster


class Metadata(Strict):
    name: Name
    namespace: Name | None = None


class JobMetadata(Metadata):
    """KubeRay refuses other names than labels by RFC 1035 (`ValidateRayJobMetadata`, 2026-08)."""

    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)]


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: JobMetadata
    spec: JobSpec


class ConfigMap(Strict):
    apiVersion: Literal["v1"]
    kind: Literal["ConfigMap"]
    metadata: Metadata
    data: dict[Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$")], str]
