"""The manifests, checked with Kubernetes' own schemas; their probe, with a server that drains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # it has no types
import pytest
import yaml

from tests.deploy.places import DEPLOY, LAST_WORDS, option, refuses, serving
from tests.support import eventually

MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def manifest(name: str) -> Any:
    return yaml.safe_load((DEPLOY / "kubernetes" / f"{name}.yaml").read_text())


def container() -> Any:
    (only,) = manifest("deployment")["spec"]["template"]["spec"]["containers"]
    return only


@pytest.mark.parametrize("version", ["1.29", "1.33", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_is_what_kubernetes_takes(path: Path, version: str) -> None:
    """Strictly: a misspelt key, which Kubernetes would ignore, is an error."""
    for document in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(document, version, strict=True)


def test_a_misspelt_key_would_be_found() -> None:
    wrong = manifest("deployment")
    wrong["spec"]["template"]["spec"]["terminationGracePeriod"] = 30
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(wrong, "1.33", strict=True)


def test_all_parts_mean_the_same_pods_and_the_same_port() -> None:
    deployment = manifest("deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels
    assert manifest("service")["spec"]["selector"] == labels
    assert manifest("poddisruptionbudget")["spec"]["selector"]["matchLabels"] == labels
    (port,) = manifest("service")["spec"]["ports"]
    (named,) = container()["ports"]
    assert port["targetPort"] == named["name"]
    assert container()["readinessProbe"]["tcpSocket"]["port"] == named["name"]
    assert f"tcp://:{named['containerPort']}" in container()["args"]
    assert deployment["replicas"] > manifest("poddisruptionbudget")["spec"]["maxUnavailable"]


def test_a_pod_has_time_to_drain_before_it_is_killed() -> None:
    pause = float(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = option(container()["args"], "--drain-timeout")
    granted = manifest("deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert granted > pause + drain + LAST_WORDS


def test_a_pod_leaves_before_it_closes_its_port() -> None:
    """The probe notices within its period, and the pause is longer."""
    probe = container()["readinessProbe"]
    pause = float(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    assert probe["failureThreshold"] == 1
    assert probe["periodSeconds"] + probe["timeoutSeconds"] < pause


@pytest.mark.parametrize("more", [[], ["--workers", "2"]])
def test_readiness_turns_off_when_draining_starts(tmp_path: Path, more: list[str]) -> None:
    """With the arguments of the manifest: the port is closed while a client is still served."""
    with serving(tmp_path, [*container()["args"], *more]) as service:
        assert not refuses(service.port)
        with service.draining():
            eventually(lambda: refuses(service.port), "the probe fails")
            assert service.process.poll() is None
