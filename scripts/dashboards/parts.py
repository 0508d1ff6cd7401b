"""What the dashboards are put together from: panels of three kinds, variables, annotations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import prometheus as prometheus_model
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
    VariableSort,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
# The grid of a dashboard is 24 wide.
_STAT_WIDTH, _STAT_HEIGHT = 4, 4
_LINES_WIDTH, _LINES_HEIGHT = 12, 8


def board(uid: str, title: str, description: str) -> dashboard.Dashboard:
    """An empty dashboard, with the choice of a data source."""
    return (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["gradwatch"])
        .editable()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("utc")
        .link(
            dashboard.DashboardLink("Gradwatch")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["gradwatch"])
            .as_dropdown(as_dropdown=True)
            .include_vars(include_vars=True)
            .keep_time(keep_time=True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )


def variable(name: str, label: str, query: str, *, several: bool = False) -> dashboard.QueryVariable:
    """A variable whose values are those of a label."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.NATURAL_ASC)
        .multi(multi=several)
        .include_all(include_all=several)
    )


def annotation(name: str, color: str, expr: str) -> dashboard.AnnotationQuery:
    """A mark on every graph while the expression has a value."""
    return (
        dashboard.AnnotationQuery()
        .name(name)
        .datasource(SOURCE)
        .enable(enable=True)
        .icon_color(color)
        .expr(expr)
    )


def figure(
    title: str,
    expr: str,
    description: str,
    *,
    unit: str = "none",
    bad_above: float | None = None,
    legend: str = "",
    width: int = _STAT_WIDTH,
) -> stat.Panel:
    """One number as it is now.

    Args:
        title: of the panel.
        expr: the query.
        description: what it tells, a sentence.
        unit: as Grafana names it.
        bad_above: red from there on; None for no colours.
        legend: the series' name, where the query gives several.
        width: of the 24 that a row has.
    """
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .with_target(_query(expr, legend).instant())
        .unit(unit)
        .span(width)
        .height(_STAT_HEIGHT)
        .color_mode(
            common_model.BigValueColorMode.NONE
            if bad_above is None
            else common_model.BigValueColorMode.BACKGROUND
        )
        .graph_mode(common_model.BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    if bad_above is not None:
        steps = [Threshold(value=None, color="green"), Threshold(value=bad_above, color="red")]
        panel = panel.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    return panel


def lines(
    title: str,
    queries: Mapping[str, str],
    description: str,
    *,
    unit: str = "none",
    exemplars: bool = False,
) -> timeseries.Panel:
    """Values over time.

    Args:
        title: of the panel.
        queries: by legend; a legend takes labels as `{{label}}`.
        description: what it tells, a sentence.
        unit: as Grafana names it.
        exemplars: show them, as links to what they name.
    """
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .span(_LINES_WIDTH)
        .height(_LINES_HEIGHT)
        .fill_opacity(8)
        .show_points(common_model.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .show_legend(show_legend=True)
            .display_mode(common_model.LegendDisplayMode.LIST)
            .placement(common_model.LegendPlacement.BOTTOM)
        )
    )
    for legend, expr in queries.items():
        panel = panel.with_target(_query(expr, legend).range().exemplar(exemplar=exemplars))
    return panel


def rows(title: str, queries: Mapping[str, str], description: str, *, width: int = 24) -> table.Panel:
    """A table: one row for each set of labels, one column for each query.

    Args:
        title: of the panel.
        queries: by the column's head.
        description: what it tells, a sentence.
        width: of the 24 that a row has.
    """
    panel = (
        table.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .span(width)
        .height(_LINES_HEIGHT)
    )
    renamed = {}
    for index, (head, expr) in enumerate(queries.items()):
        ref = chr(ord("A") + index)
        renamed[f"Value #{ref}"] = head
        query = _query(expr, "").instant().format(prometheus_model.PromQueryFormat.TABLE).ref_id(ref)
        panel = panel.with_target(query)
    hidden = dict.fromkeys(("Time", *(f"Time {number}" for number in range(1, len(queries) + 1))), True)
    return panel.transformations(
        [
            DataTransformerConfig("merge", options={}),
            DataTransformerConfig("organize", options={"excludeByName": hidden, "renameByName": renamed}),
        ]
    )


def _query(expr: str, legend: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().datasource(SOURCE).expr(expr).legend_format(legend or "__auto")
