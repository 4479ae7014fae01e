"""The panels as a Grafana dashboard: the JSON that Grafana imports or is provisioned with."""

from __future__ import annotations

from typing import Any

from headrace.monitoring.panels import NEEDS, ROWS, VARIABLES, Panel
from headrace.monitoring.promql import series

SCHEMA_VERSION = 39  # Grafana 10.4; later ones migrate it themselves
WIDTH, HEIGHT, COLUMNS = 8, 7, 3

_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> dict[str, Any]:
    """The whole dashboard; the same at every call."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row in ROWS:
        place = {"x": 0, "y": y, "w": WIDTH * COLUMNS, "h": 1}
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": row.title, "collapsed": False}
            | {"gridPos": place, "panels": []}
        )
        y += 1
        for index, panel in enumerate(row.panels):
            column = index % COLUMNS
            place = {"x": column * WIDTH, "y": y, "w": WIDTH, "h": HEIGHT}
            panels.append(_time_series(panel, len(panels) + 1, place))
            if column == COLUMNS - 1 or index == len(row.panels) - 1:
                y += HEIGHT
    return {
        "uid": "headrace",
        "title": "Headrace",
        "description": "Models served by Headrace: requests, latency, engines, resources.",
        "tags": ["headrace", "llm"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "",
        "templating": {"list": [_datasource_variable(), *map(_variable, VARIABLES)]},
        "annotations": {"list": []},
        "links": [],
        "panels": panels,
    }


def _time_series(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    notes = [panel.description, f"Needs {NEEDS[panel.needs]}." if panel.needs else ""]
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": " ".join(note for note in notes if note),
        "datasource": _DATASOURCE,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": {"lineWidth": 1}},
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _DATASOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
            }
            for index, query in enumerate(panel.queries)
        ],
    }


def _datasource_variable() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "includeAll": False,
        "multi": False,
        "hide": 0,
        "refresh": 1,
    }


def variable_query(name: str) -> str:
    """The values that a variable can have, given the variables before it."""
    label = {"model": "model_name", "replica": "instance"}
    before = VARIABLES[: VARIABLES.index(name)]
    matchers = (f'{label.get(other, other)}=~"${other}"' for other in before)
    return f"label_values({series('model_info', *matchers)}, {label.get(name, name)})"


def _variable(name: str) -> dict[str, Any]:
    query = variable_query(name)
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": _DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": "StandardVariableQuery"},
        "includeAll": True,
        # Also matches series that lack the label: a server of its own has no application.
        "allValue": ".*",
        "multi": True,
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "hide": 0,
        "refresh": 2,
        "sort": 1,
    }
