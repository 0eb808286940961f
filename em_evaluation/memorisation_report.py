"""The report's section on memorisation: its verdict in words, charts and the closest pairs."""

from typing import Literal

import numpy as np

from em_evaluation.charts import colour_of, draw_panel
from em_evaluation.numbers import format_number, format_percent, format_share

RELATED = 0.25  # median distance below which held-out tiles are copies themselves
SPACES = ("pixels", "features")
Finding = Literal["copies", "nearer", "nothing"]


def view_memorisation(report: dict) -> dict | None:
    """Return what the page shows of the section; None if the report has none."""
    section = report["memorisation"]
    if section is None:
        return None
    models = [model["name"] for model in report["models"]]
    spaces = [space for space in SPACES if space in section]
    return {
        "section": section,
        "names": {"held_out": "held-out micrographs"} | {name: name for name in models},
        "shown": ["held_out", *models],
        "spaces": spaces,
        "sentences": conclude_memorisation(section, models),
        "charts": [draw_distances(section, models, space) for space in spaces],
    }


def judge_copies(section: dict, model: str) -> Finding:
    """Return what both spaces together show: copies, images nearer than unseen ones, or nothing."""
    rows = [section[space]["sets"][model] for space in SPACES if space in section]
    if any(row["num_copies"] for row in rows):
        return "copies"
    return "nearer" if any(row["nearer"]["low"] > 0.5 for row in rows) else "nothing"


def conclude_memorisation(section: dict, models: list[str]) -> list[str]:
    """Return the sentences on the models of a section."""
    pixels = section["pixels"]
    if pixels["scale"] < RELATED:
        return [
            "Memorisation cannot be judged: the held-out tiles themselves are copies of training "
            f"tiles (median distance {format_number(pixels['scale'])}; unrelated images have 1 or "
            "more), as after a leaky split or with duplicates. Train again with whole micrographs "
            "held out (--tiles.split micrograph)."
        ]
    sentences = [say_model(section, name) for name in models]
    if bare := [name for name in section.get("without_grain", ()) if name in models]:
        sentences.append(
            f"The images of {' and '.join(bare)} were searched before grain is added, which would "
            "hide copies."
        )
    if section.get("partial"):
        sentences += [say_partial(section["partial"], name) for name in models]
    held_out = pixels["sets"]["held_out"]
    sentences.append(
        f"By the same rule, {held_out['num_copies']:,} of {held_out['num_images']:,} held-out "
        "tiles, never trained on, would count as copies in pixels. The search finds whole images "
        f"that are turned, flipped, shifted by up to {section['max_shift_px']} pixels, noisy or "
        "blurred, but not single defects copied into new images."
    )
    return sentences


def say_model(section: dict, name: str) -> str:
    """Say what was found for a model, in pixels and in features."""
    findings = {
        "copies": f"{name} copies training tiles: look at the closest pairs below",
        "nearer": f"{name} shows no copies, but lies nearer to the training tiles than unseen "
        "micrographs do: partly memorised, or smoother",
        "nothing": f"{name} shows no sign of copying",
    }
    parts = [findings[judge_copies(section, name)]]
    for space in SPACES:
        if space in section:
            row = section[space]["sets"][name]
            parts.append(
                f"In {space}, {row['num_copies']:,} of {row['num_images']:,} images count as "
                f"copies ({format_share(row['copies'])}), and images are nearer to the training "
                f"tiles than held-out tiles are in {format_percent(row['nearer'])} of the pairs; "
                "50 % is chance"
            )
    return ". ".join(parts) + "."


def say_partial(section: dict, name: str) -> str:
    """Say how many images of a model share one half with a training tile."""
    row, held_out = section["sets"][name], section["sets"]["held_out"]
    return (
        f"Partial copies: {row['num_copies']:,} of {row['num_images']:,} images of {name} "
        f"({format_share(row['copies'])}) share one half with a training tile, whole copies "
        f"included; of held-out tiles, as false alarms, {held_out['num_copies']:,} of "
        f"{held_out['num_images']:,} do."
    )


def draw_distances(section: dict, models: list[str], space: str) -> str:
    """Draw the distribution of distances to the nearest training tile in one space, as SVG."""
    part, lines = section[space], []
    for i, key in enumerate(["held_out", *models]):
        shares = np.array(part["curves"][key]).reshape(-1, 5).sum(1)
        x = (np.arange(len(shares)) + 0.5) / len(shares) * part["highest"] / part["scale"]
        label = "held-out micrographs" if key == "held_out" else key
        style = {"drawstyle": "steps-mid", "color": colour_of(i), "linestyle": "--" if i else "-"}
        lines.append((label, x, shares, style))
    return draw_panel(
        lines,
        title=f"In {space}",
        x_label="distance to the nearest training tile / held-out median",
        y_label="share of images",
        mark_x=section["copy_ratio"],
        from_zero=True,
        label=f"distances to the nearest training tile in {space}; the dotted line is the limit "
        "for copies",
    )


def make_gallery(pairs: list[dict]) -> list[dict]:
    """Return a picture of the closest pairs of each set: images above, training tiles below."""
    pictures = []
    for key in dict.fromkeys(pair["set"] for pair in pairs):
        mine = [pair for pair in pairs if pair["set"] == key]
        ratios = ", ".join(format_number(pair["ratio"]) for pair in mine)
        rows = [np.stack([pair["levels"][row] for pair in mine]) for row in (0, 1)]
        pictures.append(
            {
                "key": f"closest_{key}",
                "role": "pairs",
                "title": "Held-out micrographs" if key == "held_out" else key,
                "caption": "above images, below the nearest training tile of each; distance over "
                f"the held-out median: {ratios}",
                "levels": np.concatenate(rows),
            }
        )
    return pictures
