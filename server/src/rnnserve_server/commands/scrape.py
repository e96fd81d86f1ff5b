"""What a server tells Prometheus, read and reckoned with here."""

from __future__ import annotations

import math
import urllib.request
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

Labels = frozenset[tuple[str, str]]


@dataclass(slots=True)
class Scrape:
    """Samples by name and labels, at a time.

    Attributes:
        at: monotonic seconds.
        samples: the values.
    """

    at: float
    samples: dict[str, dict[Labels, float]] = field(default_factory=lambda: defaultdict(dict))

    @classmethod
    def parse(cls, text: str, at: float) -> Scrape:
        """Reads Prometheus's text format.

        Raises:
            ValueError: it is something else.
        """
        scrape = cls(at)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                scrape.samples[sample.name][frozenset(sample.labels.items())] = sample.value
        return scrape

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples of a name that have these labels; 0 if there are none."""
        wanted = set(labels.items())
        return sum([value for each, value in self.samples.get(name, {}).items() if wanted <= each])

    def values(self, name: str, label: str) -> list[str]:
        """The values that a label has, sorted."""
        return sorted({value for each in self.samples.get(name, {}) for key, value in each if key == label})

    def buckets(self, name: str, **labels: str) -> dict[float, float]:
        """A histogram's counts up to each bound, of all samples that have these labels."""
        wanted, found = set(labels.items()), defaultdict[float, float](float)
        for each, value in self.samples.get(f"{name}_bucket", {}).items():
            if wanted <= each:
                found[float(dict(each)["le"])] += value
        return dict(found)


@dataclass(frozen=True, slots=True)
class Interval:
    """What happened between two scrapes of one server."""

    before: Scrape
    after: Scrape

    @property
    def seconds(self) -> float:
        """How long it was."""
        return max(self.after.at - self.before.at, 1e-9)

    def rise(self, name: str, **labels: str) -> float:
        """By how much a counter rose. A server that was started again counts from 0."""
        before, after = self.before.total(name, **labels), self.after.total(name, **labels)
        return after - before if after >= before else after

    def rate(self, name: str, **labels: str) -> float:
        """The same in a second."""
        return self.rise(name, **labels) / self.seconds

    def buckets(self, name: str, **labels: str) -> dict[float, float]:
        """By how much a histogram's counts up to each bound rose."""
        before, after = self.before.buckets(name, **labels), self.after.buckets(name, **labels)
        if after.get(math.inf, 0) < before.get(math.inf, 0):
            before = {}
        return {bound: count - before.get(bound, 0) for bound, count in after.items()}


@dataclass(frozen=True, slots=True)
class Joined:
    """What happened at several servers, taken together."""

    servers: Sequence[Interval]

    def total(self, name: str, **labels: str) -> float:
        """A gauge, now."""
        return sum([each.after.total(name, **labels) for each in self.servers])

    def rate(self, name: str, **labels: str) -> float:
        """By how much a counter rises in a second."""
        return sum([each.rate(name, **labels) for each in self.servers])

    def values(self, name: str, label: str) -> list[str]:
        """The values that a label has, sorted."""
        return sorted({value for each in self.servers for value in each.after.values(name, label)})

    def mean(self, name: str, **labels: str) -> float:
        """The mean of what a histogram saw; NaN if it saw nothing."""
        count = sum([each.rise(f"{name}_count", **labels) for each in self.servers])
        total = sum([each.rise(f"{name}_sum", **labels) for each in self.servers])
        return total / count if count else math.nan

    def quantile(self, share: float, name: str, **labels: str) -> float:
        """A quantile of what a histogram saw; NaN if it saw nothing."""
        rises = defaultdict[float, float](float)
        for each in self.servers:
            for bound, rise in each.buckets(name, **labels).items():
                rises[bound] += rise
        return quantile(share, rises)


def quantile(share: float, buckets: Mapping[float, float]) -> float:
    """A quantile of a histogram, as Prometheus's histogram_quantile: values lie evenly within a bucket.

    Args:
        share: from 0 to 1.
        buckets: counts up to each bound, infinity among them.

    Returns:
        NaN if nothing was counted; the largest finite bound for what is beyond it.
    """
    bounds = sorted(buckets)
    if not bounds or not buckets[bounds[-1]]:
        return math.nan
    wanted = share * buckets[bounds[-1]]
    below, counted = 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= wanted and buckets[bound] > counted:
            if bound == math.inf:
                return below
            return below + (bound - below) * max(0.0, wanted - counted) / (buckets[bound] - counted)
        below, counted = bound, buckets[bound]
    return below


def fetch(address: str, timeout: float) -> str:
    """GET /metrics.

    Args:
        address: host:port, or a URL.
        timeout: seconds.

    Raises:
        OSError: there is no answer, or no good one.
    """
    url = address if "://" in address else f"http://{address}/metrics"
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        text: bytes = answer.read()
    return text.decode()
