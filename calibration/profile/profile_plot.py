"""A profile as a plot: what each layer keeps, and how far the samples differ."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lvlm.core.errors import ExportError
from lvlm.export.budgets.prefix_profiles import PrefixProfile


def draw_profile(profile: PrefixProfile, path: Path) -> None:
    """Bars of the budgets at the profile's keep, a dot for every sample's own. ExportError."""
    layers = range(profile.layers)
    figure = Figure(figsize=(max(5.0, 1.5 + 0.28 * profile.layers), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    highest = max(x for row in (profile.row().fractions, *profile.spread.fractions) for x in row)
    axes.bar(layers, profile.row().fractions, color="#7aa6d6", label="budget", zorder=1)
    dots = profile.spread.fractions
    axes.scatter(
        [layer for _ in dots for layer in layers],
        [x for row in dots for x in row],
        s=9,
        color="#1d3557",
        alpha=0.45,
        label="samples",
    )
    axes.axhline(profile.keep, color="#c1440e", linestyle="--", linewidth=1, label="mean")
    axes.set(
        title=f"{profile.model.source}: {profile.keep:.0%} of the cache, by layer",
        xlabel="layer",
        ylabel="entries kept",
        xlim=(-0.8, profile.layers - 0.2),
        ylim=(0, min(1.05, 1.15 * highest)),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(fontsize="small")
    try:
        figure.savefig(path, format="png", dpi=144)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from None
