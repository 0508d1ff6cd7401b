"""Grafana dashboards as code: `python -m scripts.dashboards` writes their JSON into the chart."""
