"""The RayJob: of KubeRay's shape, with the layout's pods, and what pods see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from stare_megatron import config
from stare_megatron.errors import UserError
from stare_megatron.launch import drain, k8s
from stare_megatron.launch.check import check_seen
from stare_megatron.launch.job import Job
from tests.unit.launch.cases import MARKED, job_of
from tests.unit.launch.kuberay import ConfigMap, Container, Pod, RayJob


def rendered(job: Job, **options: object) -> tuple[ConfigMap, RayJob]:
    made = k8s.Options(image="here/stare-megatron:gpu", claims={"shared": job.config.run.dir.parent}, **options)  # type: ignore[arg-type]
    settings, ray_job = yaml.safe_load_all(k8s.render(job, made))
    return ConfigMap.model_validate(settings), RayJob.model_validate(ray_job)


def container(pod: Pod) -> Container:
    [only] = pod.containers
    return only


def test_pods_are_the_layout_s_nodes(tmp_path: Path) -> None:
    _, made = rendered(job_of(tmp_path, "k8s"))
    cluster = made.spec.rayClusterSpec
    [workers] = cluster.workerGroupSpecs
    assert workers.replicas == workers.minReplicas == workers.maxReplicas == 1  # the head is the other
    for template in (cluster.headGroupSpec.template, workers.template):
        assert container(template.spec).resources.limits == {"nvidia.com/gpu": "8"}
    _, alone = rendered(job_of(tmp_path, "k8s", "trainer.world_size=8", "inference.engines=8"))
    assert alone.spec.rayClusterSpec.workerGroupSpecs == []


def test_the_sandbox_has_pods_of_its_own_that_ray_knows(tmp_path: Path) -> None:
    _, made = rendered(job_of(tmp_path, "k8s", *MARKED))
    extra = made.spec.rayClusterSpec.workerGroupSpecs[1]
    assert (extra.groupName, extra.replicas) == ("sandbox", 4)
    assert container(extra.template.spec).resources.limits == {"cpu": "16"}
    # What the shell of KubeRay's `ray start` line leaves of it.
    said = subprocess.run(
        ["bash", "-c", f"printf %s {extra.rayStartParams['resources']}"], capture_output=True, text=True, check=True
    )
    assert json.loads(said.stdout) == {"sandbox": 1}


def test_what_is_run_is_the_run_resolved(tmp_path: Path) -> None:
    job = job_of(tmp_path, "k8s", "run.steps=9")
    settings, made = rendered(job, namespace="team")
    assert config.parse(tomllib.loads(settings.data["run.toml"]), "map") == job.config
    assert settings.metadata.model_dump() == made.metadata.model_dump()
    assert (made.metadata.name, made.metadata.namespace) == ("launched-1", "team")
    words = made.spec.entrypoint.split()
    mounted = {
        mount.mountPath for mount in container(made.spec.rayClusterSpec.headGroupSpec.template.spec).volumeMounts
    }
    assert words[:3] == ["exec", "stare-megatron", "train"]
    assert str(Path(words[3]).parent) in mounted
    assert {"run.resume=auto", "cluster.address=auto"} <= set(words)


def test_a_pod_s_end_leaves_time_to_save(tmp_path: Path) -> None:
    _, made = rendered(job_of(tmp_path, "k8s", "--grace=300"), retries=3)
    pod = made.spec.rayClusterSpec.headGroupSpec.template.spec
    assert pod.terminationGracePeriodSeconds > 300
    assert made.spec.backoffLimit == 3
    assert pod.securityContext.runAsNonRoot
    assert "stare_megatron.launch.drain" in container(pod).lifecycle.preStop.exec.command
    assert {v.name: v.value for v in container(pod).env}["RAY_JOB_STOP_WAIT_TIME_S"] == "300"


def test_the_shape_refuses_what_kuberay_would_not_know(tmp_path: Path) -> None:
    job = job_of(tmp_path, "k8s")
    _, made = k8s.objects(job, k8s.Options("image", {}))
    made["spec"]["backOffLimit"] = made["spec"].pop("backoffLimit")
    with pytest.raises(ValidationError, match="backOffLimit"):
        RayJob.model_validate(made)


@pytest.mark.parametrize("name", ["_", "a" * 41, "0.5b", "-7b"])
def test_a_name_that_kubernetes_does_not_take(name: str) -> None:
    with pytest.raises(UserError, match=r"run\.name = "):
        k8s.name_of(name)


def test_claims() -> None:
    assert k8s.claims_of(["a:/data", "b:/x"]) == {"a": Path("/data"), "b": Path("/x")}
    with pytest.raises(UserError, match="want NAME:FOLDER"):
        k8s.claims_of(["a"])


def test_a_path_that_no_pod_sees_is_refused(tmp_path: Path) -> None:
    job = job_of(tmp_path, "k8s", "model.path=/elsewhere/m")
    with pytest.raises(UserError, match=r"model\.path = '/elsewhere/m': pods see the folders of --claim alone"):
        check_seen(job, {"shared": tmp_path})
    check_seen(job, {"shared": tmp_path, "models": Path("/elsewhere")})


def test_before_a_pod_ends_its_run_is_told_and_waited_for(tmp_path: Path) -> None:
    """A process that is called as a run is; others are let be."""
    code = (
        "import signal, sys, time, pathlib\n"
        "def told(*_):\n    time.sleep(0.5)\n    pathlib.Path(sys.argv[3]).write_text('saved')\n    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, told)\n"
        "pathlib.Path(sys.argv[3] + '.up').touch()\ntime.sleep(900)"
    )
    script = tmp_path / f"stare-megatron-{os.getpid()}"
    script.mkdir()
    (script / "stare-megatron").write_text(code)
    saved = tmp_path / "saved"
    mine = [sys.executable, str(script / "stare-megatron"), "train", "run.toml", str(saved)]
    logs = tmp_path / "ray/session_latest/logs"
    logs.mkdir(parents=True)
    (logs / "raylet.out").write_text("a line")
    (logs / "worker-1.out").write_text("the run's own logs have it")
    run = subprocess.Popen(mine)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)", "training"])
    try:
        deadline = time.monotonic() + 300
        while not saved.with_name("saved.up").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        found = [p for p in drain.drivers() if p.pid in (run.pid, other.pid)]  # there may be runs of other tests
        assert [p.pid for p in found] == [run.pid]
        drain.drain(found, tmp_path / "ray", tmp_path / "kept")
        assert saved.read_text() == "saved"
        assert other.poll() is None
    finally:
        run.kill()
        other.kill()
        run.wait()
        other.wait()
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["raylet.out"]
