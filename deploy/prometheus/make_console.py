"""Makes the console that Prometheus itself serves of the dashboard of Grafana: the same panels and the same queries.

python deploy/prometheus/make_console.py        writes consoles/rnnserve.html
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DASHBOARD = HERE.parent / "grafana" / "dashboards" / "rnnserve.json"
CONSOLE = HERE / "consoles" / "rnnserve.html"

_VALUES = {"s": "humanizeDuration", "bytes": "humanize1024"}

_PAGE = """<!doctype html>
<!-- Made by make_console.py of Grafana's dashboard. Prometheus serves it at /consoles/rnnserve.html when it is started
     with --web.console.templates=deploy/prometheus/consoles; ?seconds= and &rate= say how far it looks back. -->
<html lang="en">
<head>
<meta charset="utf-8">
<title>rnnserve</title>
{{ $rate := or .Params.rate "1m" }}
<link rel="stylesheet" href="{{ pathPrefix }}/classic/static/rickshaw/rickshaw.min.css">
<link rel="stylesheet" href="{{ pathPrefix }}/classic/static/css/prom_console.css">
<script src="{{ pathPrefix }}/classic/static/d3/d3.min.js"></script>
<script src="{{ pathPrefix }}/classic/static/vendor/rickshaw/vendor/d3.layout.min.js"></script>
<script src="{{ pathPrefix }}/classic/static/rickshaw/rickshaw.min.js"></script>
<script>var PATH_PREFIX = "{{ pathPrefix }}";</script>
<script src="{{ pathPrefix }}/classic/static/js/prom_console.js"></script>
<style>
body { font: 13px/1.4 system-ui, sans-serif; margin: 16px; color: #222; background: #fff; }
h1 { font-size: 18px; margin: 0 0 8px; }
h2 { font-size: 14px; margin: 12px 0 4px; grid-column: 1 / -1; }
.grid { display: grid; grid-template-columns: repeat(24, minmax(0, 1fr)); gap: 8px; }
.panel { border: 1px solid #ddd; border-radius: 3px; padding: 6px 8px; overflow: hidden; }
.panel h3 { font-size: 12px; margin: 0 0 4px; }
.panel .value { font-size: 24px; color: #1f60c4; }
.prom_graph_table { width: 100%; table-layout: fixed; }
.prom_graph_table tr > td:first-child, .prom_graph_xtitle { display: none; }
.rickshaw_legend { padding: 2px !important; background: none !important; max-height: 56px; overflow: hidden; }
.rickshaw_legend, .rickshaw_legend .line { color: #444 !important; font-size: 11px !important; }
.rickshaw_legend .line { display: inline-block; padding: 0 8px 0 0 !important; }
.rickshaw_legend .action { display: none !important; }
</style>
</head>
<body>
<h1>rnnserve</h1>
<div class="grid">
@PANELS@
</div>
<script>
var RATE = "{{ $rate }}", SECONDS = +"{{ or .Params.seconds "900" }}", NOW = Date.now() / 1000;
var FORMATS = {
  s: function (v) { return v === null ? "" : v >= 1 ? +v.toPrecision(3) + " s" : +(v * 1e3).toPrecision(3) + " ms"; },
  percentunit: function (v) { return v === null ? "" : +(v * 100).toPrecision(3) + "%"; },
  bytes: PromConsole.NumberFormatter.humanize1024,
};
function named(legend) {
  return function (labels) {
    return legend.replace(/\\[\\[(\\w+)\\]\\]/g, function (_, label) { return labels[label]; });
  };
}
@GRAPHS@.forEach(function (panel) {
  var unit = FORMATS[panel.unit] || PromConsole.NumberFormatter.humanize;
  var format = function (v) { return v === 0 ? "0" : unit(v); };
  new PromConsole.Graph({
    node: document.getElementById("panel" + panel.id),
    expr: panel.expressions.map(function (each) { return each.split("$__rate_interval").join(RATE); }),
    name: panel.legends.map(named),
    renderer: panel.stack ? "area" : "line",
    height: 130, min: 0, yAxisTicks: 4, duration: SECONDS, endTime: NOW, xTitle: "",
    yAxisFormatter: format, yHoverFormatter: format,
  });
});
</script>
</body>
</html>
"""


def console(dashboard: dict[str, Any]) -> str:
    """The page. Heatmaps are left out: Prometheus cannot draw them."""
    variables = {each["name"]: each["allValue"] for each in dashboard["templating"]["list"]}
    panels: list[str] = []
    graphs: list[dict[str, Any]] = []
    for panel in dashboard["panels"]:
        title, width = escape(panel["title"]), panel["gridPos"]["w"]
        if panel["type"] == "row":
            panels.append(f"<h2>{title}</h2>")
            continue
        if panel["type"] == "heatmap":
            continue
        expressions = [_filled(target["expr"], variables) for target in panel["targets"]]
        legends = [target["legendFormat"].replace("{{", "[[").replace("}}", "]]") for target in panel["targets"]]
        inside = ""
        unit = panel["fieldConfig"]["defaults"]["unit"]
        if panel["type"] == "stat":
            query = f'query (reReplaceAll "\\\\$__rate_interval" $rate `{expressions[0]}`)'
            value = _VALUES.get(unit, "humanize")
            inside = f'<div class="value">{{{{ with {query} }}}}{{{{ . | first | value | {value} }}}}'
            inside += "{{ else }}-{{ end }}</div>"
        else:
            graphs.append(
                {
                    "id": panel["id"],
                    "unit": unit,
                    "expressions": expressions,
                    "legends": legends,
                    "stack": "stacking" in panel["fieldConfig"]["defaults"]["custom"],
                }
            )
        about = escape(panel["description"], quote=True)
        panels.append(
            f'<div class="panel" style="grid-column: span {width}" title="{about}"><h3>{title}</h3>'
            f'<div id="panel{panel["id"]}">{inside}</div></div>'
        )
    return _PAGE.replace("@PANELS@", "\n".join(panels)).replace("@GRAPHS@", json.dumps(graphs, indent=1))


def _filled(expression: str, variables: dict[str, str]) -> str:
    for name, value in variables.items():
        expression = expression.replace(f"${name}", value)
    return expression


if __name__ == "__main__":
    CONSOLE.write_text(console(json.loads(DASHBOARD.read_text(encoding="utf-8"))), encoding="utf-8")
