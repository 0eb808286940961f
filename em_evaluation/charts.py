"""Charts as inline SVG that take the page's colours, in light, dark and on paper."""

import hashlib
import io
import re

import numpy as np

from em_evaluation.conclusion import format_number

INK, ACCENTS = (
    "#010203",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7"),
)  # the ink becomes the page's text colour
RATES = (
    "num_images_seen",
    "train_seconds",
    "images_per_second",
)  # of a log line, not worth a curve


def draw_distances(report) -> str:
    """Draw the Frechet distances of models and floors with their intervals, sorted, on a logarithmic axis."""
    from matplotlib import ticker

    rows = [
        (model["name"], model["metrics"]["frechet_distance"], True) for model in report["models"]
    ]
    rows += [
        (floor["name"], floor["metrics"]["frechet_distance"], False)
        for floor in report["floors"].values()
    ]
    rows.sort(key=lambda row: -row[1]["value"])
    least = min([row[1]["value"] for row in rows if row[1]["value"] > 0], default=1.0)
    with _style():
        figure, axes = _new_figure(7.2, 0.5 + 0.36 * len(rows))
        for y, (_, metric, is_model) in enumerate(rows):
            value, low, high = (max(metric[key], least / 3) for key in ("value", "low", "high"))
            colour = ACCENTS[0] if is_model else ACCENTS[1]
            axes.plot(
                [low, high], [y, y], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt"
            )
            axes.plot([value], [y], "o" if is_model else "D", color=colour, markersize=7)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_xlabel("Frechet distance to held-out micrographs (lower is closer)")
        axes.grid(axis="x", which="both", alpha=0.2)
        return _to_svg(figure, "Frechet distance of every model and floor, with intervals")


def draw_curves(lines) -> str:
    """Draw every quantity of a stage's log against the number of images seen, one small panel each."""
    names = [
        name
        for name in dict.fromkeys(
            key for line in lines for key in line
        )  # some are logged now and then only
        if name not in RATES and any(isinstance(line.get(name), int | float) for line in lines)
    ]
    if not names:
        return ""
    num_columns = min(3, len(names))
    num_rows = -(-len(names) // num_columns)
    with _style():
        figure, panels = _new_figure(
            2.5 * num_columns + 0.4, 1.75 * num_rows + 0.2, num_rows, num_columns
        )
        for axes, name in zip(panels.flat, names):
            points = [
                (line.get("num_images_seen", i), line.get(name)) for i, line in enumerate(lines)
            ]
            points = [(x, y) for x, y in points if isinstance(y, int | float)]
            axes.plot(*zip(*points), color=ACCENTS[0], linewidth=1.4)
            axes.set_title(name.replace("_", " "), loc="left")
            axes.grid(alpha=0.2)
            axes.xaxis.set_major_locator(_locator())
            axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}")
        for axes in panels.flat[len(names) :]:
            axes.remove()
        return _to_svg(figure, "training curves against images seen")


def _locator():
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)


def _style():
    import matplotlib

    ink = {
        key: INK
        for key in (
            "text.color",
            "axes.labelcolor",
            "axes.edgecolor",
            "xtick.color",
            "ytick.color",
            "grid.color",
        )
    }
    return matplotlib.rc_context(
        {
            **ink,
            "svg.fonttype": "none",
            "svg.hashsalt": "em",
            "font.family": "sans-serif",
            "font.size": 10,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.unicode_minus": True,
        }
    )


def _new_figure(width, height, num_rows=None, num_columns=None):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if num_rows is None:
        return figure, figure.subplots()
    return figure, figure.subplots(num_rows, num_columns, squeeze=False)


def _to_svg(figure, label) -> str:
    """Return the figure as an SVG element: no declaration, no metadata, ids of its own, the ink as `currentColor`."""
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\s(xmlns(:xlink)?)="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href").replace(INK, "currentColor")
    prefix = "c" + hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    width = float(re.search(r'width="([\d.]+)pt"', svg).group(1)) * 4 / 3  # points to CSS pixels
    size = f'role="img" aria-label="{label}" style="max-width:{width:.0f}px"'
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', size, svg, count=1)


def draw_overview(report, pictures, num_columns=4) -> bytes:
    """Draw held-out tiles and each model's images side by side, with their distances, as a PNG: the report at a glance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    distances = {model["name"]: model["metrics"]["frechet_distance"] for model in report["models"]}
    distances["held_out"] = (
        report["floors"].get("real", {}).get("metrics", {}).get("frechet_distance")
    )
    shown = [picture for picture in pictures if picture["key"] in distances]
    figure = Figure(
        figsize=(3.3 * len(shown), 3.9), dpi=120, layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    for axes, picture in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        tiles = picture["levels"][: num_columns**2]
        tiles = np.pad(
            tiles, ((0, -len(tiles) % num_columns), (1, 1), (1, 1)), constant_values=255
        )  # [N, H, W]
        rows = tiles.reshape(-1, num_columns, *tiles.shape[1:]).transpose(0, 2, 1, 3)
        grid = rows.reshape(rows.shape[0] * rows.shape[1], -1)
        axes.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(picture["title"], fontsize=12, fontweight="bold")
        metric = distances[picture["key"]]
        if metric is not None:
            who = "training tiles against them: " if picture["key"] == "held_out" else ""
            text = f"{who}{format_number(metric['value'])} [{format_number(metric['low'])}, {format_number(metric['high'])}]"
            axes.text(0.5, -0.03, text, transform=axes.transAxes, ha="center", va="top", fontsize=9)
    figure.supxlabel(
        "Frechet distance to held-out micrographs, 95 % interval (lower is closer)", fontsize=9
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
