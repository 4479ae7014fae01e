"""Where Prometheus finds the replicas: its HTTP service discovery document (`http_sd_config`).

A replica is scraped at its own port, because the port that an application's replicas share answers
for one of them at random. Several doors answer alike, and Prometheus scrapes a target that several
documents name once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

import msgspec

PATH = "/targets"
CONTENT_TYPE = "application/json"


def http_sd(
    addresses: Mapping[str, Sequence[str]], models: Mapping[str, str] | None = None
) -> bytes:
    """The document, in one order whatever the order of `addresses`.

    addresses: application -> base URLs of its replicas, as sources report them. models:
    application -> the name that clients use, where there is one.
    """
    groups = []
    for application in sorted(addresses):
        for url in sorted(set(addresses[application])):
            parts = urlsplit(url)
            labels = {
                "application": application,
                "replica": parts.netloc,
                "__scheme__": parts.scheme,
                "__metrics_path__": parts.path.rstrip("/") + "/metrics",
            }
            if model := (models or {}).get(application):
                labels["model"] = model
            groups.append({"targets": [parts.netloc], "labels": labels})
    return msgspec.json.encode(groups)
