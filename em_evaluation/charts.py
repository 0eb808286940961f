"""Charts as inline SVG that take the page's colours, in light, dark and on paper."""

import hashlib
import io
import re

INK, ACCENTS = "#010203", ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # the ink becomes the page's text colour
RATES = ("num_images_seen", "train_seconds", "images_per_second")  # of a log line, not worth a curve


def draw_distances(report) -> str:
    """Draw the Frechet distances of models and floors with their intervals, sorted, on a logarithmic axis."""
    rows = [(model["name"], model["metrics"]["frechet_distance"], True) for model in report["models"]]
    rows += [(floor["name"], floor["metrics"]["frechet_distance"], False) for floor in report["floors"].values()]
    rows.sort(key=lambda row: -row[1]["value"])
    least = min([row[1]["value"] for row in rows if row[1]["value"] > 0], default=1.0)
    with _style():
        figure, axes = _new_figure(7.2, 0.5 + 0.36 * len(rows))
        for y, (_, metric, is_model) in enumerate(rows):
            value, low, high = (max(metric[key], least / 3) for key in ("value", "low", "high"))
            colour = ACCENTS[0] if is_model else ACCENTS[1]
            axes.plot([low, high], [y, y], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
            axes.plot([value], [y], "o" if is_model else "D", color=colour, markersize=7)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_xscale("log")
        axes.set_xlabel("Frechet distance to held-out micrographs (lower is closer)")
        axes.grid(axis="x", which="both", alpha=0.2)
        return _to_svg(figure, "Frechet distance of every model and floor, with intervals")


def draw_curves(lines) -> str:
    """Draw every quantity of a stage's log against the number of images seen, one small panel each."""
    names = [
        name
        for name in lines[-1]
        if name not in RATES and any(isinstance(line.get(name), int | float) for line in lines)
    ]
    if not names:
        return ""
    num_columns = min(3, len(names))
    num_rows = -(-len(names) // num_columns)
    with _style():
        figure, panels = _new_figure(2.5 * num_columns + 0.4, 1.75 * num_rows + 0.2, num_rows, num_columns)
        for axes, name in zip(panels.flat, names):
            points = [(line.get("num_images_seen", i), line.get(name)) for i, line in enumerate(lines)]
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
        for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
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
        buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
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
