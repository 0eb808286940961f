"""Charts as inline SVG that take the page's colours, in light, dark and on paper."""

import hashlib
import html
import io
import re

import numpy as np

from em_evaluation.numbers import format_interval
from em_evaluation.repeats import DISTANCE, name_group
from em_evaluation.wording import find_level, find_metric, name_reference

INK = "#010203"  # becomes the colour of the page's text
ACCENTS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
PANEL_INCHES = (3.9, 2.6)
HIDDEN = ("num_images_seen", "train_seconds", "images_per_second")  # of a log: no curves
CURVES = {  # key: title, unit
    "loss": ("Training loss", ""),
    "l1": ("Reconstruction error (L1)", "grey levels in [-1, 1]"),
    "l2": ("Reconstruction error (L2)", "grey levels squared"),
    "perceptual": ("Perceptual error", ""),
    "kl": ("KL divergence of the latents", "nats"),
    "commitment": ("Commitment loss", ""),
    "learning_rate": ("Learning rate", ""),
    "gradient_norm": ("Norm of the gradient", ""),
    "held_out_loss": ("Loss on held-out images", ""),
    "held_out_loss_q1": ("Held-out loss, least noise", ""),
    "held_out_loss_q2": ("Held-out loss, little noise", ""),
    "held_out_loss_q3": ("Held-out loss, much noise", ""),
    "held_out_loss_q4": ("Held-out loss, most noise", ""),
    "held_out_l1": ("Held-out reconstruction error (L1)", "grey levels in [-1, 1]"),
    "held_out_psnr": ("Held-out reconstruction (PSNR)", "dB"),
    "held_out_ssim": ("Held-out reconstruction (SSIM)", "1 is perfect"),
    "held_out_spectrum_error_db": ("Held-out error of the power spectrum", "dB"),
    "held_out_frechet_distance": ("Frechet distance to held-out images", ""),
    "codebook_usage": ("Share of codes in use", ""),
    "codebook_perplexity": ("Codes in even use (perplexity)", "codes"),
    "codes_revived": ("Unused codes that were replaced", "codes"),
    "loss_G": ("Loss of the generator", ""),
    "loss_D": ("Loss of the discriminator", ""),
    "scores_real": ("Discriminator on real images", "logit"),
    "scores_fake": ("Discriminator on generated images", "logit"),
    "gradient_norm_G": ("Norm of the generator's gradient", ""),
    "gradient_norm_D": ("Norm of the discriminator's gradient", ""),
    "learning_rate_G": ("Learning rate of the generator", ""),
    "learning_rate_D": ("Learning rate of the discriminator", ""),
    "r1": ("Gradient penalty (R1)", ""),
    "path_length": ("Path length of the generator", ""),
    "path_length_penalty": ("Path length penalty", ""),
    "class_weight": ("Weight of the classes", ""),
    "augmentation_probability": ("Probability of augmentation", ""),
}


def colour_of(number: int) -> str:
    """Return the colour of a set in a chart; number 0 is the real images."""
    return INK if number == 0 else ACCENTS[(number - 1) % len(ACCENTS)]


def draw_distances(report: dict) -> str:
    """Draw the Frechet distances of models and levels with intervals, on a logarithmic axis.

    Groups of trainings have the range over seeds in place of an interval.
    """
    names = [(model["name"], model["name"], "o") for model in report["models"]]
    names += [(level["key"], level["title"], "D") for level in report["levels"]]
    rows = [(title, find_metric(report, key), marker) for key, title, marker in names]
    rows += [
        (name_group(group), group["measurements"][0]["held_out"][DISTANCE], "s")
        for group in report["repeats"]
    ]
    rows.sort(key=lambda row: -row[1]["value"])
    least = min([row[1]["value"] for row in rows if row[1]["value"] > 0], default=1.0)
    with _style():
        figure, axes = _new_figure(4.6, 0.9 + 0.5 * len(rows))
        for y, (title, metric, marker) in enumerate(rows):
            is_model = marker != "D"
            value, low, high = (max(metric[key], least / 3) for key in ("value", "low", "high"))
            colour = ACCENTS[0] if is_model else ACCENTS[1]
            axes.plot(
                [low, high], [y, y], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt"
            )
            axes.plot([value], [y], marker, color=colour, markersize=7)
            axes.annotate(
                title, (0, y), (0, 9), xycoords=("axes fraction", "data"),
                textcoords="offset points", fontweight="bold" if is_model else "normal",
            )  # fmt: skip
        axes.set_yticks([])
        axes.set_ylim(-0.5, len(rows) - 0.2)
        _use_log_axis(axes, numticks=9)
        axes.set_xlabel("Frechet distance (lower is closer to real)")
        axes.grid(axis="x", which="major", alpha=0.2)
        axes.spines["left"].set_visible(False)
        return _to_svg(figure, "Frechet distance of each model and reference level, with intervals")


def draw_curves(lines: list[dict]) -> list[str]:
    """Draw each quantity of a training log against the images seen, one SVG each."""
    names = [
        name
        for name in dict.fromkeys(key for line in lines for key in line)
        if name not in HIDDEN and any(isinstance(line.get(name), int | float) for line in lines)
    ]
    charts = []
    for name in names:
        points = [(line.get("num_images_seen", i), line.get(name)) for i, line in enumerate(lines)]
        points = [(x, y) for x, y in points if isinstance(y, int | float)]
        title, unit = CURVES.get(name, (name.replace("_", " ").capitalize(), ""))
        x, y = np.array(points, float).T
        # an axis from zero shows truly a curve that changes little
        from_zero = bool(y.min() >= 0 and y.max() > 0 and y.min() > 0.5 * y.max())
        charts.append(
            draw_panel(
                [("", x, y, {"color": ACCENTS[0]})], title=title, y_label=unit,
                x_label="training images seen", from_zero=from_zero, label=title,
            )
        )  # fmt: skip
    return charts


def draw_panel(
    lines,
    *,
    title,
    x_label,
    y_label="",
    label="",
    log_x=False,
    from_zero=False,
    mark_x=None,
    bands=(),
) -> str:
    """Draw lines (name, x, y, style) into one small chart, with a legend if they have names.

    bands: (x, y, colour) of wide, pale lines, such as intervals of points.
    """
    from matplotlib import ticker

    with _style():
        figure, axes = _new_figure(*PANEL_INCHES)
        for name, x, y, style in lines:
            axes.plot(x, y, label=name or None, linewidth=1.4, **style)
        for x, y, colour in bands:
            axes.plot(x, y, color=colour, linewidth=3.5, alpha=0.3, solid_capstyle="butt")
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.2)
        if log_x:
            _use_log_axis(axes)
        else:
            axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
            axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}")
        if from_zero:
            axes.set_ylim(bottom=0)
        if mark_x is not None:
            axes.set_xlim(left=0)
            axes.axvline(mark_x, color=INK, linewidth=0.8, linestyle=":")
        if any(name for name, *_ in lines):
            axes.legend(frameon=False, fontsize=8)
        return _to_svg(figure, label)


def _use_log_axis(axes, **options):
    from matplotlib import ticker

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), **options))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def draw_overview(report: dict, pictures: list[dict], num_columns=4) -> bytes:
    """Draw real images and each model's images side by side, with their distances, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    distances = {model["name"]: find_metric(report, model["name"]) for model in report["models"]}
    real = find_level(report, "real")
    distances["held_out"] = find_metric(report, real["key"]) if real else None
    shown = [picture for picture in pictures if picture["role"] in ("real", "model")]
    with _style():
        size = (3.3 * len(shown), 3.9)
        figure = Figure(figsize=size, dpi=120, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        for axes, picture in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
            grid = _join_tiles(picture["levels"][: num_columns**2], num_columns)
            axes.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_axis_off()
            axes.set_title(picture["title"], fontsize=12, fontweight="bold")
            metric = distances[picture["key"]]
            if metric is not None:
                who = "real images: " if picture["role"] == "real" else ""
                text = f"{who}{format_interval(metric)}"
                axes.text(
                    0.5, -0.03, text, transform=axes.transAxes, ha="center", va="top", fontsize=9
                )
        figure.supxlabel(
            f"Frechet distance to {name_reference(report)} with 95 % interval (lower is closer)",
            fontsize=9,
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _join_tiles(tiles, num_columns):
    """Return tiles [N, H, W] as one picture with white gaps."""
    gaps = ((0, -len(tiles) % num_columns), (1, 1), (1, 1))
    tiles = np.pad(tiles, gaps, constant_values=255)
    rows = tiles.reshape(-1, num_columns, *tiles.shape[1:]).transpose(0, 2, 1, 3)
    return rows.reshape(rows.shape[0] * rows.shape[1], -1)


def _style():
    import matplotlib

    inked = ("text.", "axes.label", "axes.edge", "xtick.", "ytick.", "grid.")
    ink = {f"{name}color": INK for name in inked}
    return matplotlib.rc_context(
        {
            **ink,
            "svg.fonttype": "none",
            "svg.hashsalt": "em",
            "text.parse_math": False,  # names may hold dollar signs
            "font.family": "sans-serif",
            "font.size": 10,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )


def _new_figure(width, height):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _to_svg(figure, label) -> str:
    """Return the figure as an SVG element with ids of its own and the ink as `currentColor`."""
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
    points = re.search(r'width="([\d.]+)pt"', svg)
    assert points is not None  # matplotlib writes it
    width = float(points[1]) * 4 / 3  # points to CSS pixels
    size = f'role="img" aria-label="{html.escape(label)}" style="max-width:{width:.0f}px"'
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', lambda _: size, svg, count=1)
