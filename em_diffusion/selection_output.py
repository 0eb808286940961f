"""The choice among autoencoders for the eye: a table for the terminal, and a picture of originals and reconstructions."""

import io

import numpy as np

from em_data.files import write_atomically

ERROR_SCALE = 0.25  # an absolute error of a quarter of the grey range is drawn white
GAP_PX = 2
COLUMNS = (
    # title, unit, cell of a candidate
    ("Frechet distance", "95 % interval", lambda c: say_interval(c["frechet_distance"])),
    ("PSNR", "dB", lambda c: f"{c['psnr_db']:.2f}"),
    ("SSIM", "", lambda c: f"{c['ssim']:.3f}"),
    ("spectrum", "error, dB", lambda c: f"{c['spectrum_error_db']:.2f}"),
    (
        "codes used",
        "of all",
        lambda c: "none" if c["num_codes"] is None else f"{c['codes_used']:,}/{c['num_codes']:,}",
    ),
    ("perplexity", "", lambda c: "none" if c["perplexity"] is None else f"{c['perplexity']:,.0f}"),
    ("parameters", "millions", lambda c: f"{c['num_parameters'] / 1e6:.2f}"),
    ("f", "", lambda c: f"{c['downsampling_factor']:g}"),
    ("latent", "C x h x w", lambda c: "x".join(map(str, c["latent_shape"]))),
    ("encode", "images/s", lambda c: f"{c['encode_images_per_second']:.3g}"),
    ("decode", "images/s", lambda c: f"{c['decode_images_per_second']:.3g}"),
)


def say_interval(metric) -> str:
    return f"{metric['value']:.4g} [{metric['low']:.4g}, {metric['high']:.4g}]"


def format_table(selection) -> str:
    """Return the candidates as aligned lines, best first, with published values below them."""
    protocol = selection["protocol"]
    rows = [
        ["autoencoder", *(title for title, _, _ in COLUMNS)],
        ["", *(unit for _, unit, _ in COLUMNS)],
    ]
    rows += [[c["name"], *(cell(c) for _, _, cell in COLUMNS)] for c in selection["candidates"]]
    num_head = 2
    for each in selection["study"] or []:
        rows.append(
            [
                f"published: {each['name']}",
                f"{each['frechet_distance']}",
                *[""] * (len(COLUMNS) - 1),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        name, *cells = (
            f"{cell:<{w}}" if i < 2 else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(row, widths))
        )
        lines.append("  ".join([name, *cells]).rstrip())
        if number == num_head - 1:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
    lines += [f"{each['name']}  not judged: {each['error']}" for each in selection["failed"]]
    extractor = protocol["extractor"].split(",")[0]
    head = f"\nReconstructions of {protocol['tiles']}, {protocol['resolution']} px, {extractor} features"
    if selection["study"]:
        lines.append(
            "The published values were measured on other micrographs: for orientation only."
        )
    return "\n".join([head, "", *lines, "", *selection["conclusion"]])


def draw_selection(selection, originals, reconstructions, path, num_columns):
    """Draw the first tiles, each candidate's reconstructions with name and distance, and their absolute errors, as a PNG.

    originals, and `reconstructions` by name: uint8 [N, 1, H, W]. One pixel of a tile is a whole number of pixels of the
    picture; nothing is smoothed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = originals.shape[-2:]
    num_columns = min(num_columns, len(originals), max(3, 1024 // width))
    zoom = max(1, 96 // width)
    tiles = originals[:num_columns, 0]
    rows = [("originals", f"{selection['protocol']['side'].replace('_', '-')} tiles", tiles, None)]
    for candidate in selection["candidates"]:
        levels = reconstructions[candidate["name"]][:num_columns, 0]
        error = np.abs(levels.astype(np.float32) - tiles) / (255 * ERROR_SCALE)
        facts = f"distance {say_interval(candidate['frechet_distance'])}\nPSNR {candidate['psnr_db']:.1f} dB"
        rows.append(
            (candidate["name"], facts, levels, (error.clip(0, 1) * 255).round().astype(np.uint8))
        )

    label_px, head_px, between_px, dpi = 230, 34, 16, 100
    strip_width = num_columns * (width * zoom + GAP_PX) - GAP_PX
    row_height = height * zoom + 8
    figure_width = label_px + 2 * strip_width + between_px + 8
    figure_height = head_px + row_height * len(rows)
    figure = Figure(figsize=(figure_width / dpi, figure_height / dpi), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)

    def place(strip, left, top):
        axes = figure.add_axes(
            (
                left / figure_width,
                1 - (top + strip.shape[0]) / figure_height,
                strip.shape[1] / figure_width,
                strip.shape[0] / figure_height,
            )
        )
        axes.imshow(strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
        axes.set_axis_off()

    def write(text, left, top, **style):
        figure.text(left / figure_width, 1 - top / figure_height, text, va="top", **style)

    error_left = label_px + strip_width + between_px
    write("images", label_px, 8, fontsize=9)
    write(
        f"absolute errors (white: {100 * ERROR_SCALE:.0f} % of the grey range or more)",
        error_left,
        8,
        fontsize=9,
    )
    for i, (name, facts, levels, errors) in enumerate(rows):
        top = head_px + i * row_height
        write(shorten(name), 10, top, fontsize=10, fontweight="bold")
        write(facts, 10, top + 20, fontsize=8)
        place(join(levels, zoom), label_px, top)
        if errors is not None:
            place(join(errors, zoom), error_left, top)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    write_atomically(path, buffer.getvalue())


def join(levels, zoom):
    """Return images uint8 [N, H, W] side by side, each pixel `zoom` wide: [H zoom, ...], white between them."""
    levels = levels.repeat(zoom, axis=1).repeat(zoom, axis=2)
    padded = np.pad(levels, ((0, 0), (0, 0), (0, GAP_PX)), constant_values=255)
    return padded.transpose(1, 0, 2).reshape(levels.shape[1], -1)[:, :-GAP_PX]


def shorten(name, longest=28):
    return name if len(name) <= longest else name[: longest - 1] + "…"
