"""The configuration of Datadog's OpenMetrics check, for an Agent that scrapes replicas itself."""

from __future__ import annotations

from typing import Any

from headrace.observability.families import FAMILIES, PREFIX

NAMESPACE = "headrace"


def openmetrics() -> dict[str, Any]:
    """`conf.d/openmetrics.d/conf.yaml`. The Agent measures hosts itself, so those families stay
    out."""
    wanted = [family for family in FAMILIES if not family.name.startswith("host_")]
    return {
        "init_config": {},
        "instances": [
            {
                "openmetrics_endpoint": "http://localhost:8000/metrics",
                "namespace": NAMESPACE,
                # The check knows counters by their name without the ending.
                "metrics": [
                    {PREFIX + raw: raw}
                    for raw in (family.name.removesuffix("_total") for family in wanted)
                ],
                # As distributions, so that Datadog has their percentiles.
                "histogram_buckets_as_distributions": True,
                # Datadog has a meaning of its own for `version`.
                "rename_labels": {"version": "headrace_version"},
            }
        ],
    }
