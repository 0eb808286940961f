"""What the recipes share: scales, the measurement, result files, tables and pictures.

A result file, results/EXPERIMENT_SCALE.json, holds the settings that must not change between two
starts (`facts`) and a list of points: {"settings", "study", "ours", "low", "high", "difference",
"comparable", ...}. `ours` is a Frechet distance with the 95 % interval [low, high]; `study` is the
study's FID, None if it reports none; `difference` is ours - study. EXPERIMENT_SCALE.md holds the
same as a table, and the conclusions. Both are written after every point.
"""

import argparse
import io
import json
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from em_data import load_data
from em_data.files import write_atomically
from em_evaluation import compute_features, frechet_distance_interval, get_extractor
from em_evaluation.environment import describe_environment
from em_evaluation.images import read_images

STUDY = json.loads(Path(__file__).with_name("study.json").read_text())  # the published numbers


@dataclass(frozen=True)
class GANScale:
    """How much of the study's StyleGAN experiments a scale trains; the preset decides the rest."""

    preset: str
    images_per_kimg: float  # images of training for each thousand of the study's
    channel_share: float  # of the study's feature maps
    # the same two for the experiment with StyleGAN3, which takes far longer
    slow_images_per_kimg: float
    slow_channel_share: float


@dataclass(frozen=True)
class LDMScale:
    """How much of the study's LDM experiments a scale trains; the preset decides the rest."""

    preset: str
    num_reconstructions: int  # tiles of Table 1
    autoencoder_images: int | None  # of an autoencoder's training; None for the preset's
    denoiser_images: int | None  # of a denoiser's
    num_curve_images: int  # compared while a denoiser trains


@dataclass(frozen=True)
class Scale:
    """How much of the study a scale trains and measures."""

    resolution: int
    num_images: int  # compared with as many held-out tiles
    gan: GANScale
    ldm: LDMScale


SCALES = {
    "study": Scale(
        256, 50_000, GANScale("paper", 1000, 1, 1000, 1), LDMScale("paper", 1000, None, None, 2000)
    ),
    "small": Scale(
        64, 300, GANScale("demo", 10, 1 / 16, 3, 1 / 64), LDMScale("demo", 300, 800, 2_400, 100)
    ),
    # two steps each: that everything runs
    "test": Scale(32, 8, GANScale("test", 0, 1 / 64, 0, 1 / 64), LDMScale("test", 8, 16, 16, 8)),
}
FAMILIES = ("gan", "ldm")
CAVEATS = (
    "Intervals hold the scatter of images, not that of trainings: each point is one training.",
    "The study's numbers are of other images (256 px, Inception features): ours tell our points "
    "from each other only.",
)


def create_parser(description, default_scale="small"):
    """Create the parser with the flags of every recipe."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=SCALES, default=default_scale)
    parser.add_argument(
        "--data",
        default="synthetic",
        help='"synthetic", a folder of micrographs, or "damaged-alloys:FOLDER"',
    )
    parser.add_argument(
        "--extractor", default="efficientnet-lite0", choices=("efficientnet-lite0", "inception")
    )
    parser.add_argument("--runs", default="runs/2024_gan_vs_ldm", help="folder of the trainings")
    parser.add_argument("--results", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--cache-dir", help="of the tiles")
    return parser


def choose_tiles(tiles, arguments) -> dict:
    """Return the fields of `DataConfig` that a scale and the command line decide."""
    cache = {} if arguments.cache_dir is None else {"cache_dir": arguments.cache_dir}
    return {**vars(tiles), "resolution": SCALES[arguments.scale].resolution, **cache}


def name_data(data: str) -> str:
    """Return the name of the micrographs for a result file, without a local path."""
    return data.partition(":")[0] if ":" in data else Path(data).name


class Reference:
    """Held-out tiles that images are compared with; their features are computed once."""

    def __init__(self, arguments, tiles, device="cpu"):
        held_out = load_data(arguments.data, tiles, log=lambda text: None).held_out
        num_images = min(SCALES[arguments.scale].num_images, len(held_out))
        self.images = read_images(held_out, num_images)
        self.extractor = get_extractor(
            arguments.extractor, resolution=tiles.resolution, device=device
        )
        self.features = compute_features(self.images, self.extractor, cache_dir=tiles.cache_dir)

    def measure(self, images) -> dict:
        """Measure the Frechet distance of as many images as the reference has.

        Returns {"ours", "low", "high", "num_images_compared"}.
        """
        features = compute_features(images, self.extractor, use_cache=False)
        interval = frechet_distance_interval(features, self.features, groups_b=self.images.groups)
        distance = {"ours": interval.value, "low": interval.low, "high": interval.high}
        return distance | {"num_images_compared": len(images)}


class Results:
    """The result file of an experiment, which can be resumed.

    Args:
        title: First line of the table.
        columns: {key of a point: (heading, format)} of the table's last columns.
        families: Families that the experiment trains; only a file with equal sizes is resumed.

    Raises:
        ValueError: If the file is of another experiment, or of other sizes, data or extractor.
    """

    def __init__(self, arguments, experiment, title, columns=None, families=FAMILIES):
        self.path = Path(arguments.results) / f"{experiment}_{arguments.scale}.json"
        self.title, self.columns = title, columns or {}
        sizes = asdict(SCALES[arguments.scale])
        self.facts = {
            "experiment": experiment,
            "scale": arguments.scale,
            "sizes": {
                name: size
                for name, size in sizes.items()
                if name not in FAMILIES or name in families
            },
            "data": name_data(arguments.data),
            "extractor": arguments.extractor,
        }
        self.points, self.notes = read_points(self.path, self.facts), []

    def find(self, settings):
        """Return the point of these settings, or None."""
        return next((point for point in self.points if point["settings"] == settings), None)

    def add(self, settings, study, measured: dict) -> dict:
        """Add a point with what was `measured`, which includes "ours", and write the file."""
        difference = None if study is None or measured["ours"] is None else measured["ours"] - study
        point = {
            "settings": settings,
            "study": study,
            "difference": difference,
            "comparable": False,
            **measured,
        }
        self.points.append(point)
        self.write()
        return point

    def write(self):
        """Write the file and its table."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            **self.facts,
            "points": self.points,
            "notes": self.conclude(),
            "environment": describe_environment(),
        }
        write_atomically(self.path, json.dumps(content, indent=1) + "\n")
        write_atomically(self.path.with_suffix(".md"), self.format_table())

    def conclude(self) -> list[str]:
        """Return sentences on the best point, those close to it, and the study's order."""
        points = [point for point in self.points if point["ours"] is not None]
        if not points:
            return self.notes
        names = name_points(points)
        best = min(range(len(points)), key=lambda i: points[i]["ours"])
        near = [
            name
            for name, point in zip(names, points)
            if not are_apart(point, points[best]) and point is not points[best]
        ]
        sentence = f"Least distance: {names[best]}, {say_interval(points[best])}"
        sentence += (
            f"; intervals that overlap with its own: {'; '.join(near)}."
            if near
            else "; no other's interval overlaps."
        )
        return [sentence, *compare_order(points), *self.notes]

    def format_table(self) -> str:
        """Return the points as Markdown."""
        headings = [
            "point",
            "study",
            "ours [95 % interval]",
            "difference",
            *(name for name, _ in self.columns.values()),
        ]
        data, extractor = self.facts["data"], self.facts["extractor"]
        facts = f"{data}, {extractor} features, scale {self.facts['scale']}."
        lines = [
            f"# {self.title}",
            "",
            facts,
            "",
            f"| {' | '.join(headings)} |",
            "|" + "---|" * len(headings),
        ]
        for name, point in zip(name_points(self.points), self.points):
            cells = [
                name,
                say(point["study"]),
                say_interval(point),
                say(point["difference"], "+,.2f"),
            ]
            cells += [say(point.get(key), style) for key, (_, style) in self.columns.items()]
            lines.append(f"| {' | '.join(cells)} |")
        notes = [*self.conclude(), *CAVEATS]
        return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def read_points(path, facts) -> list:
    """Return the points of a result file; `ValueError` if it is of another experiment."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    other = [name for name, value in facts.items() if found.get(name) != value]
    if other:
        raise ValueError(f"{path} was made with other {', '.join(other)}: give another --results")
    return found["points"]


def compare_order(points) -> list[str]:
    """Say how many pairs of points have separate intervals, and how many have the study's order."""
    pairs = list(combinations(points, 2))
    apart = sum(are_apart(a, b) for a, b in pairs)
    sentences = (
        [f"Our intervals hold {apart} of the {len(pairs)} pairs of points apart."] if pairs else []
    )
    if apart < len(pairs) / 2:
        sentences.append(
            "So these trainings are too short, or their images too few, for an order that could be "
            "relied on."
        )
    ranked = [(a, b) for a, b in pairs if None not in (a["study"], b["study"])]
    alike = [
        pair
        for pair in ranked
        if (pair[0]["study"] - pair[1]["study"]) * (pair[0]["ours"] - pair[1]["ours"]) > 0
    ]
    if ranked:
        sentences.append(
            f"Of the {len(ranked)} pairs that the study ranks, ours are in the same order in "
            f"{len(alike)}, of which our intervals hold "
            f"{sum(are_apart(*pair) for pair in alike)} apart."
        )
    return sentences


def are_apart(a, b) -> bool:
    """Return True if the intervals of two points do not overlap."""
    return a["high"] < b["low"] or b["high"] < a["low"]


def name_points(points) -> list[str]:
    """Return each point's name, or the settings in which the points differ."""
    settings = [point["settings"] for point in points]
    if all("name" in each for each in settings):
        return [each["name"] for each in settings]
    differ = [
        key for key in settings[0] if any(each[key] != settings[0][key] for each in settings)
    ] or settings[0]
    return [", ".join(f"{key} {each[key]}" for key in differ) for each in settings]


def say(value, style=",.2f") -> str:
    return "-" if value is None else str(value) if isinstance(value, str) else format(value, style)


def say_interval(point) -> str:
    return (
        "-"
        if point["ours"] is None
        else f"{point['ours']:.2f} [{point['low']:.2f}, {point['high']:.2f}]"
    )


def save_figure(figure, path):
    """Write a matplotlib figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(Path(path), buffer.getvalue())


def create_figure(**options):
    """Create a matplotlib figure without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **options)
    FigureCanvasAgg(figure)
    return figure


def draw_points(points, labels, path):
    """Draw our distances with intervals on the left and the study's on the right, each to scale."""
    figure = create_figure(figsize=(max(8, 1 + 1.1 * len(points)), 3.8))
    left, right = figure.subplots(1, 2)
    x = np.arange(len(points))
    ours = np.array([[point[key] for point in points] for key in ("ours", "low", "high")])
    left.errorbar(
        x, ours[0], [ours[0] - ours[1], ours[2] - ours[0]], marker="o", linestyle="", capsize=3
    )
    known = [i for i, point in enumerate(points) if point["study"] is not None]
    right.plot(
        known, [points[i]["study"] for i in known], marker="s", linestyle="", color="tab:orange"
    )
    for axes, title in (
        (left, "ours, with 95 % intervals"),
        (right, "the study's FID, of other images"),
    ):
        axes.set_xticks(x, labels, rotation=30 if len(points) > 4 else 0, fontsize=8)
        axes.set(
            title=title, ylabel="Frechet distance", ylim=(0, None), xlim=(-0.5, len(points) - 0.5)
        )
        axes.grid(axis="y", alpha=0.3)
    save_figure(figure, path)
