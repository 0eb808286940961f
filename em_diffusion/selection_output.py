"""Show a comparison of autoencoders: a table for the terminal, and a picture."""

import io

import numpy as np

from em_data.files import printable, write_atomically

ERROR_SCALE = 0.25  # an absolute error of a quarter of the grey range is drawn white
GAP_PX = 2
LONGEST_NAME = 28


def say_interval(metric) -> str:
    return f"{metric['value']:.4g} [{metric['low']:.4g}, {metric['high']:.4g}]"


def say_codes(candidate) -> str:
    if candidate["num_codes"] is None:
        return "none"
    return f"{candidate['codes_used']:,}/{candidate['num_codes']:,}"


def say_perplexity(candidate) -> str:
    return "none" if candidate["perplexity"] is None else f"{candidate['perplexity']:,.0f}"


COLUMNS = (
    # title, unit, cell of a candidate
    ("Frechet distance", "95 % interval", lambda c: say_interval(c["frechet_distance"])),
    ("PSNR", "dB", lambda c: f"{c['psnr_db']:.2f}"),
    ("SSIM", "", lambda c: f"{c['ssim']:.3f}"),
    ("spectrum", "error, dB", lambda c: f"{c['spectrum_error_db']:.2f}"),
    ("codes used", "of all", say_codes),
    ("perplexity", "", say_perplexity),
    ("parameters", "millions", lambda c: f"{c['num_parameters'] / 1e6:.2f}"),
    ("f", "", lambda c: f"{c['downsampling_factor']:g}"),
    ("latent", "C x h x w", lambda c: "x".join(map(str, c["latent_shape"]))),
    ("encode", "images/s", lambda c: f"{c['encode_images_per_second']:.3g}"),
    ("decode", "images/s", lambda c: f"{c['decode_images_per_second']:.3g}"),
)


def format_table(selection) -> str:
    """Return the candidates as aligned lines, best first, with published values below them."""
    titles, units, cells = zip(*COLUMNS)
    rows = [["autoencoder", *titles], ["", *units]]
    rows += [[c["name"], *(cell(c) for cell in cells)] for c in selection["candidates"]]
    for each in selection["study"] or []:
        empty = [""] * (len(COLUMNS) - 1)
        rows.append([f"published: {each['name']}", f"{each['frechet_distance']}", *empty])
    widths = [max(map(len, column)) for column in zip(*rows)]
    signs = "<<" + ">" * (len(widths) - 2)
    lines = [
        "  ".join(f"{cell:{s}{w}}" for cell, s, w in zip(row, signs, widths)).rstrip()
        for row in rows
    ]
    lines.insert(2, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    lines += [
        printable(f"{each['name']}  not judged: {each['error']}") for each in selection["failed"]
    ]
    if selection["study"]:
        lines.append("The published values are of other micrographs: for orientation only.")
    protocol = selection["protocol"]
    head = (
        f"\nReconstructions of {protocol['tiles']}, {protocol['resolution']} px, "
        f"{protocol['extractor'].split(',')[0]} features"
    )
    return "\n".join([head, "", *lines, "", *selection["conclusion"]])


def draw_selection(selection, originals, reconstructions, path, num_columns):
    """Draw the first tiles, each candidate's reconstructions and their absolute errors as a PNG.

    A pixel of a tile is a whole number of pixels of the picture; nothing is smoothed.

    Args:
        originals: Uint8 [N, 1, H, W].
        reconstructions: {name: uint8 [N, 1, H, W]}.
        num_columns: Tiles in a row at most.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = originals.shape[-2:]
    num_columns = min(num_columns, len(originals), max(3, 1024 // width))
    zoom = max(1, 96 // width)
    tiles = originals[:num_columns, 0]
    label_px, head_px, between_px, dpi = 230, 34, 16, 100
    strip_width = num_columns * (width * zoom + GAP_PX) - GAP_PX
    row_height = height * zoom + 8
    figure_width = label_px + 2 * strip_width + between_px + 8
    figure_height = head_px + row_height * (1 + len(selection["candidates"]))
    figure = Figure(figsize=(figure_width / dpi, figure_height / dpi), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)

    def place(levels, left, top):
        strip = join(levels, zoom)
        bottom = 1 - (top + strip.shape[0]) / figure_height
        size = (strip.shape[1] / figure_width, strip.shape[0] / figure_height)
        axes = figure.add_axes((left / figure_width, bottom, *size))
        axes.imshow(strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
        axes.set_axis_off()

    def write(text, left, top, **style):
        x, y = left / figure_width, 1 - top / figure_height
        figure.text(x, y, text, va="top", parse_math=False, **style)

    def label(name, facts, top):
        short = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
        write(short, 10, top, fontsize=10, fontweight="bold")
        write(facts, 10, top + 20, fontsize=8)

    error_left = label_px + strip_width + between_px
    errors = f"absolute errors (white: {100 * ERROR_SCALE:.0f} % of the grey range or more)"
    write("images", label_px, 8, fontsize=9)
    write(errors, error_left, 8, fontsize=9)
    label("originals", f"{selection['protocol']['side'].replace('_', '-')} tiles", head_px)
    place(tiles, label_px, head_px)
    for i, candidate in enumerate(selection["candidates"], start=1):
        top = head_px + i * row_height
        distance = say_interval(candidate["frechet_distance"])
        facts = f"distance {distance}\nPSNR {candidate['psnr_db']:.1f} dB"
        label(candidate["name"], facts, top)
        levels = reconstructions[candidate["name"]][:num_columns, 0]
        place(levels, label_px, top)
        error = np.abs(levels.astype(np.float32) - tiles) / (255 * ERROR_SCALE)
        place((error.clip(0, 1) * 255).round().astype(np.uint8), error_left, top)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    write_atomically(path, buffer.getvalue())


def join(levels, zoom):
    """Return images uint8 [N, H, W] side by side, each pixel `zoom` wide, with white gaps."""
    levels = levels.repeat(zoom, axis=1).repeat(zoom, axis=2)
    padded = np.pad(levels, ((0, 0), (0, 0), (0, GAP_PX)), constant_values=255)
    return padded.transpose(1, 0, 2).reshape(levels.shape[1], -1)[:, :-GAP_PX]
