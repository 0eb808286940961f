"""The page of a look at micrographs: one file that refers to nothing outside itself."""

from collections import defaultdict

import jinja2
import numpy as np

from em_data.config import DataConfig
from em_data.cutting import average_area, find_tile_positions
from em_data.data import merge_notices
from em_data.figures import make_data_uri, make_figure
from em_data.look import text as look_text
from em_data.look.pixels import to_display
from em_data.look.recommendation import Advice, list_pixel_sizes
from em_data.look.survey import HISTOGRAM_BINS, Survey

MOST_SHOWN = 24  # micrographs of the contact sheet
MOST_ROWS = 30  # of a table
GRID_PX = 768  # side of a picture of tiles, about
COMPARED = ((DataConfig().resolution, 1, "the default"), (64, 1, "preset demo"))


def render_page(survey: Survey, advice: Advice, source: str, command: str) -> str:
    """Return the HTML of the page. command: the next command, with the recommended flags."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("em_data"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("look.html.j2").render(
        survey=survey,
        advice=advice,
        source=source,
        command=command,
        text=look_text,
        notices=merge_notices(survey.micrographs),
        tiles=draw_settings(survey, advice),
        folders=list_folders(survey.micrographs),
        most_rows=MOST_ROWS,
        bars=draw_histogram(survey.histogram),
        sizes=list_sizes(survey),
        sheet=make_sheet(survey),
        kinds=survey.labels.list_kinds(),
        outlines=survey.labels.draw_pictures(),
    )


def draw_settings(survey: Survey, advice: Advice) -> list[dict]:
    """Return figures of sample tiles: at the recommended setting, then at others."""
    chosen = advice.flags["resolution"], advice.flags["downsample"]
    settings = [(*chosen, "recommended")]
    settings += [each for each in COMPARED if each[:2] != chosen]
    return list(filter(None, (draw_tiles(survey, *setting) for setting in settings)))


def draw_tiles(survey: Survey, resolution: int, downsample: int, title: str) -> dict | None:
    """Return a figure of tiles spread over the micrographs whose pixels were kept."""
    most = min(16, max(4, (GRID_PX // resolution) ** 2))
    places = []
    for sample in survey.samples:
        if sample.image is not None:
            positions = find_tile_positions(sample.image.shape, resolution, downsample)
            places += [(sample, position) for position in positions]
    if not places:
        return None
    tiles = []
    for i in np.unique(np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(int)):
        sample, (row, col) = places[i]
        side = resolution * downsample
        tile = average_area(sample.image[row : row + side, col : col + side], downsample)
        tiles.append(to_display(tile, sample.levels))
    sizes = list_pixel_sizes(survey.micrographs)
    size = sizes[0][0] if len(sizes) == 1 else None
    picture = {
        "levels": np.stack(tiles),
        "key": title,
        "title": f"{resolution} px, downsample {downsample}: {title}",
        "caption": f"Each shows {resolution * downsample} px of a micrograph",
    }
    columns = int(np.ceil(np.sqrt(len(tiles))))
    return make_figure(picture, size and size * downsample, columns)


def list_folders(micrographs: list[dict]) -> list[dict]:
    """Return a row per folder: its name, number of micrographs, sides, bits and pixel sizes."""
    by_folder = defaultdict(list)
    for each in micrographs:
        by_folder[each["folder"]].append(each)
    rows = []
    for folder, members in sorted(by_folder.items()):
        shapes = sorted({f"{h} x {w}" for h, w in (each["shape"] for each in members)})
        sizes = [f"{size:.4g}" if size else "unknown" for size, _ in list_pixel_sizes(members)]
        bits = sorted({each["bits"] for each in members})
        rows.append(
            {
                "folder": folder,
                "num": len(members),
                "shapes": ", ".join(shapes[:4]) + (" ..." if len(shapes) > 4 else ""),
                "bits": ", ".join(map(str, bits)),
                "sizes": ", ".join(sizes[:6]) + (" ..." if len(sizes) > 6 else ""),
            }
        )
    return rows


def draw_histogram(histogram) -> list[dict]:
    """Return bars in a drawing of 640 x 160: left edge, width, top and height."""
    width, most = 640 / HISTOGRAM_BINS, max(float(histogram.max()), 1e-9)
    heights = [round(150 * float(share) / most, 2) for share in histogram]
    return [
        {
            "x": round(i * width, 2),
            "width": round(width - 1, 2),
            "y": 150 - height,
            "height": height,
        }
        for i, height in enumerate(heights)
    ]


def list_sizes(survey: Survey) -> list[dict]:
    """Return a row per measured micrograph: name, diameter and correlation length."""
    rows = []
    for sample in survey.samples:
        facts = survey.micrographs[sample.number]
        pixel, size = facts["pixel_size_nm"], sample.size
        row = {"name": facts["name"], "diameter": "none", "correlation": "–", "nm": "–"}
        if size is not None:
            row |= {
                "diameter": f"{size.diameter_px:.3g}",
                "correlation": f"{size.correlation_px:.3g}",
            }
            if pixel:
                row["nm"] = f"{size.diameter_px * pixel:.3g}"
        rows.append(row)
    return rows


def make_sheet(survey: Survey) -> list[dict]:
    """Return thumbnails of micrographs that are spread over the source."""
    step = -(-len(survey.samples) // MOST_SHOWN)
    return [
        {
            "uri": make_data_uri(sample.thumbnail),
            "height": sample.thumbnail.shape[0],
            "width": sample.thumbnail.shape[1],
            "name": survey.micrographs[sample.number]["name"],
        }
        for sample in survey.samples[::step]
    ]
