"""The report: one self-contained page and the JSON that all of its numbers come from."""

import base64
import io
import json
import math
from pathlib import Path

import jinja2
import numpy as np
import PIL.Image

from em_data.files import write_atomically
from em_evaluation.charts import draw_curves, draw_distances, draw_overview
from em_evaluation.conclusion import format_number
from em_evaluation.memorisation_report import view_memorisation
from em_evaluation.metrics import METRICS
from em_evaluation.microscopy_report import view_microscopy
from em_evaluation.quiz import make_quiz

GAP_PX = 1  # between the tiles of a grid


def write_report(report, pictures, out_dir) -> Path:
    """Write `report.json`, `report.html` and `report.png` (the grids side by side) into `out_dir`; return the page's path.

    report, pictures: what `evaluate_models` returns. The JSON is strict (no NaN); the page is rendered from it, refers
    to nothing outside itself, and reads on a phone, on paper, in light and dark. Both are written atomically.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False)
    page = render_page(json.loads(text), pictures)
    write_atomically(out_dir / "report.json", (text + "\n").encode())
    write_atomically(out_dir / "report.html", page.encode())
    if pictures:
        write_atomically(out_dir / "report.png", draw_overview(json.loads(text), pictures))
    return out_dir / "report.html"


def render_page(report, pictures) -> str:
    """Render the page from the JSON's content and the grids."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("em_evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pixel_size_nm = report["dataset"].get("pixel_size_nm")
    environment.filters |= {
        "number": format_number,
        "duration": format_duration,
        "count": format_count,
    }
    return environment.get_template("report.html.j2").render(
        report=report,
        pictures=[
            make_figure(picture, pixel_size_nm) for picture in pictures if "section" not in picture
        ],
        quiz=make_quiz(
            [picture for picture in pictures if "section" not in picture],
            report["protocol"]["seed"],
        ),
        metrics=METRICS,
        distances_svg=draw_distances(report),
        microscopy=view_microscopy(report),
        memorisation=view_memorisation(report),
        closest_pairs=[
            make_figure(picture, pixel_size_nm, len(picture["levels"]) // 2)
            for picture in pictures
            if picture.get("section") == "memorisation"
        ],
        curves=[
            {"model": model["name"], "stage": stage, "svg": draw_curves(lines)}
            for model in report["models"]
            for stage, lines in model["curves"].items()
            if lines
        ],
    )


def make_figure(picture, pixel_size_nm, num_columns=4) -> dict:
    """Return a picture's grid as a data URI with its width in pixels and a scale bar where the pixel size is known."""
    levels = picture["levels"]  # uint8 [N, H, W]
    num, height, width = levels.shape
    num_columns = min(num, num_columns)
    num_rows = math.ceil(num / num_columns)
    step_y, step_x = height + GAP_PX, width + GAP_PX
    grid = np.zeros(
        (num_rows * step_y - GAP_PX, num_columns * step_x - GAP_PX, 2), np.uint8
    )  # transparent gaps
    for i, image in enumerate(levels):
        top, left = (i // num_columns) * step_y, (i % num_columns) * step_x
        grid[top : top + height, left : left + width, 0] = image
        grid[top : top + height, left : left + width, 1] = 255
    buffer = io.BytesIO()
    PIL.Image.fromarray(grid, "LA").save(buffer, "PNG", optimize=True)
    return {
        **{key: picture[key] for key in ("key", "title", "caption")},
        "uri": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(),
        "width": grid.shape[1],
        "height": grid.shape[0],
        "alt": f"{num} images of {height} by {width} pixels: {picture['title']}, {picture['caption']}",
        "scale_bar": make_scale_bar(pixel_size_nm, width, grid.shape[1]),
    }


def make_scale_bar(pixel_size_nm, tile_px, grid_px):
    """Return the label of a round length near half a tile and its width in percent of the grid; None for an unknown
    pixel size.
    """
    if not pixel_size_nm:
        return None
    longest = pixel_size_nm * tile_px * 0.75
    power = 10.0 ** math.floor(math.log10(longest))
    length_nm = next(factor * power for factor in (5, 2, 1) if factor * power <= longest)
    label = f"{length_nm:g} nm" if length_nm < 1000 else f"{length_nm / 1000:g} µm"
    return {"label": label, "percent": round(100 * length_nm / pixel_size_nm / grid_px, 3)}


def format_duration(seconds) -> str:
    """Return seconds as a person would say them: 42 s, 3.5 min, 6 h, 2.1 days."""
    if seconds is None:
        return "–"
    for limit, unit, name in (
        (90, 1, "s"),
        (5400, 60, "min"),
        (172_800, 3600, "h"),
        (math.inf, 86_400, "days"),
    ):
        if seconds < limit:
            return f"{float(f'{seconds / unit:.3g}'):g} {name}"
    raise ValueError(f"not a duration: {seconds}")


def format_count(number) -> str:
    return "–" if number is None else f"{number:,}"
