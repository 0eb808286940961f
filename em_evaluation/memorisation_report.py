"""The report's section "Memorisation": sentences, a chart and the gallery of the closest pairs."""

import numpy as np

from em_evaluation.charts import ACCENTS, INK, _new_figure, _style, _to_svg
from em_evaluation.conclusion import format_number

RELATED = (
    0.25  # median distance (correlation 0.97) below which held-out tiles are copies themselves
)


def view_memorisation(report) -> dict | None:
    """Return what the page's section shows of a report, None where it has none."""
    section = report.get("memorisation")
    if section is None:
        return None
    models = [model["name"] for model in report["models"]]
    spaces = [("pixels", "pixels"), ("features", "features")]
    return {
        "section": section,
        "models": models,
        "names": {"held_out": "held-out micrographs"} | {name: name for name in models},
        "shown": ["held_out", *models],
        "spaces": [(key, title) for key, title in spaces if key in section],
        "sentences": conclude_memorisation(section, models),
        "svg": draw_memorisation(section, models),
    }


def conclude_memorisation(section, models) -> list[str]:
    """Return what the numbers allow to say, in plain sentences."""
    pixels = section["pixels"]
    if pixels["scale"] < RELATED:
        return [
            f"Memorisation cannot be judged: the held-out tiles themselves are copies of training tiles (median distance "
            f"{format_number(pixels['scale'])} where unrelated images have 1 or more), as after a leaky split or with duplicates. "
            "Train again with whole micrographs held out (--tiles.split micrograph)."
        ]
    sentences = [_say_model(section, name) for name in models]
    if bare := [name for name in section.get("without_grain", ()) if name in models]:
        sentences.append(
            f"Of {' and '.join(bare)} the images were searched as they are before the grain is added, which would hide copies."
        )
    halves = ""
    if "partial" in section:
        sentences += [_say_partial(section["partial"], name) for name in models]
        halves = "Halves are sought in their place, as turned or flipped. "
    held_out = pixels["sets"]["held_out"]
    sentences.append(
        f"By the same rule {held_out['num_copies']:,} of {held_out['num_images']:,} held-out tiles, never trained on, would "
        f"count as copies. What is found: whole images under turns, flips and shifts of up to {section['max_shift_px']} pixels, "
        f"also with noise or blurred; not a single defect copied into a new image. {halves}".rstrip()
    )
    return sentences


def _say_model(section, name):
    row = section["pixels"]["sets"][name]
    copies, nearer = (
        {key: 100 * value for key, value in row[part].items()} for part in ("copies", "nearer")
    )
    if row["num_copies"]:
        start = (
            f"{name} copies: {row['num_copies']:,} of {row['num_images']:,} images ({copies['value']:.1f} %, "
            f"{copies['low']:.1f} to {copies['high']:.1f} %) lie nearer to a training tile than half of the median distance "
            "of held-out tiles"
        )
    else:
        start = (
            f"No image of {name} among {row['num_images']:,} is a copy of a training tile (at most {copies['high']:.2g} % "
            "of its images are)"
        )
    interval = f"{nearer['value']:.0f} % ({nearer['low']:.0f} to {nearer['high']:.0f} %) of pairs"
    if nearer["low"] > 50:
        then = f"they are nearer to the training tiles than unseen micrographs in {interval}: learnt by heart, or smoother"
    elif nearer["high"] < 50:
        then = f"they are nearer to the training tiles than unseen micrographs in only {interval}: no sign of copying"
    else:
        then = f"they are as near to the training tiles as unseen micrographs are (nearer in {interval})"
    return f"{start}; {then}."


def _say_partial(section, name):
    row, held_out = section["sets"][name], section["sets"]["held_out"]
    copies = {key: 100 * value for key, value in row["copies"].items()}
    return (
        f"Partial copies: {row['num_copies']:,} of {row['num_images']:,} images of {name} ({copies['value']:.1f} %, "
        f"{copies['low']:.1f} to {copies['high']:.1f} %) share a half with a training tile, whole copies included; "
        f"by the same rule, a false alarm, {held_out['num_copies']:,} of {held_out['num_images']:,} held-out tiles do."
    )


def draw_memorisation(section, models) -> str:
    """Draw the distribution of distances to the nearest training view, of held-out tiles and each model, as SVG."""
    spaces = [space for space in ("pixels", "features") if space in section]
    with _style():
        figure, panels = _new_figure(3.8 * len(spaces), 2.9, 1, len(spaces))
        for axes, space in zip(panels.flat, spaces):
            part = section[space]
            for i, key in enumerate(["held_out", *models]):
                shares = np.array(part["curves"][key]).reshape(-1, 5).sum(1)
                x = (np.arange(len(shares)) + 0.5) / len(shares) * part["highest"] / part["scale"]
                colour = INK if key == "held_out" else ACCENTS[(i - 1) % len(ACCENTS)]
                label = "held-out micrographs" if key == "held_out" else key
                axes.plot(
                    x,
                    shares,
                    drawstyle="steps-mid",
                    color=colour,
                    linestyle="-" if i == 0 else "--",
                    linewidth=1.4,
                    label=label,
                )
            axes.axvline(section["copy_ratio"], color=INK, linewidth=0.8, linestyle=":")
            axes.set_title(f"In {space}, share of images", loc="left")
            axes.set_xlabel("nearest training view / held-out median")
            axes.set_xlim(left=0)
            axes.grid(alpha=0.2)
        panels.flat[0].legend(frameon=False, fontsize=8)
        return _to_svg(
            figure,
            "distances to the nearest training view; the dotted line is the limit for copies",
        )


def make_gallery(pairs, section) -> list[dict]:
    """Return a picture of each set's closest pairs, images above and their training tiles, turned alike, below."""
    pictures, scale = [], section["pixels"]["scale"]
    for key in dict.fromkeys(pair["set"] for pair in pairs):
        mine = [pair for pair in pairs if pair["set"] == key]
        ratios = ", ".join(format_number(pair["distance"] / scale) for pair in mine)
        pictures.append(
            {
                "key": f"closest_{key}",
                "section": "memorisation",
                "title": "Held-out micrographs" if key == "held_out" else key,
                "caption": f"above the set's images, below the nearest training view of each; distance over the held-out median: {ratios}",
                "levels": np.concatenate(
                    [np.stack([pair["levels"][row] for pair in mine]) for row in (0, 1)]
                ),
            }
        )
    return pictures
