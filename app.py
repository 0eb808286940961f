"""A demo in the browser: an LDM and a StyleGAN side by side, their images and walks, and the files to keep.

python app.py --ldm runs/demo/ldm --stylegan runs/demo/stylegan2
EM_LDM="you/em-ldm" EM_STYLEGAN="you/em-gan" python app.py          (a Space sets such variables)
"""

import argparse
import os
import tempfile
import time

from em_generation import demo
from em_training.cli import run_command

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
BUTTONS = ["download", "fullscreen"]  # of a picture: without gradio's "share", which uploads it
CSS = ".picture img {image-rendering: pixelated}"


def import_gradio():
    try:
        import gradio
    except ImportError as error:
        raise ValueError("the demo needs gradio: pip install 'em-synthesis[demo]'") from error
    return gradio


def build_interface(ldms, stylegans, out):
    """Build the page, a `gradio.Blocks`: `launch()` opens it.

    ldms, stylegans: lists of `DemoModel` to choose from, one of the two may be empty. out: a folder for pictures and downloads.
    """
    gr = import_gradio()
    with gr.Blocks(
        title="EM Synthesis", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        gr.Markdown("# EM Synthesis\nImages that models have drawn, none of a real specimen.")
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
            num_images = gr.Slider(1, demo.MAX_IMAGES, 4, step=1, label="Images")
            frames = gr.Slider(
                2, demo.MAX_FRAMES // demo.NUM_KEYS, 8, step=1, label="Frames of a walk, per image"
            )
            format = gr.Radio(
                list(demo.FORMATS), value="8-bit PNG", label="Download as", elem_id="format"
            )
        compare = gr.Button("Compare: both of this seed", variant="primary", elem_id="compare")
        shared = (seed, num_images, frames, format)
        with gr.Row():
            columns = [
                make(gr, models, shared, out)
                for make, models in ((_add_ldm, ldms), (_add_stylegan, stylegans))
                if models
            ]
        for draw, inputs, outputs in columns:
            compare.click(draw, inputs, outputs)
        if len(columns) < 2:
            compare.visible = False
    return page


def _add_ldm(gr, models, shared, out):
    by_source = {model.source: model for model in models}
    with gr.Column():
        choice = gr.Dropdown(list(by_source), value=models[0].source, label="LDM")
        sampler = gr.Dropdown(
            models[0].list_samplers(), value=demo.SAVED_SAMPLER, label="Sampler", elem_id="sampler"
        )
        steps = gr.Slider(
            1,
            max(demo.MAX_STEPS, *(each.num_steps for each in models)),
            models[0].num_steps,
            step=1,
            label="Steps",
        )

        def adapt(source):
            model = by_source[source]
            return gr.Dropdown(model.list_samplers(), value=demo.SAVED_SAMPLER), gr.Slider(
                value=model.num_steps
            )

        def draw(seed, num_images, source, sampler, steps, progress):
            return demo.draw_ldm_images(
                by_source[source], int(seed), int(num_images), sampler, int(steps), progress
            )

        def walk(seed, frames, source, sampler, steps, progress):
            return demo.walk_ldm(
                by_source[source], int(seed), int(frames), sampler, int(steps), progress
            )

        choice.change(adapt, choice, [sampler, steps])
        return _add_results(gr, "ldm", draw, walk, [choice, sampler, steps], shared, out)


def _add_stylegan(gr, models, shared, out):
    by_source = {model.source: model for model in models}
    with gr.Column():
        choice = gr.Dropdown(list(by_source), value=models[0].source, label="StyleGAN")
        psi = gr.Slider(0, 1.5, 1, step=0.05, label="Truncation (1: the whole distribution)")
        with gr.Row():
            mix_seed = gr.Textbox(
                "", label="Seed of a second style (empty: none)", elem_id="mix-seed"
            )
            mix_layers = gr.Radio(
                list(demo.MIX_LAYERS), value="coarse", label="Layers that take it"
            )

        def draw(seed, num_images, source, psi, mix_seed, mix_layers, progress):
            second = demo.read_optional_seed(mix_seed)
            return demo.draw_stylegan_images(
                by_source[source], int(seed), int(num_images), psi, second, mix_layers
            )

        def walk(seed, frames, source, psi, mix_seed, mix_layers, progress):
            return demo.walk_stylegan(by_source[source], int(seed), int(frames), psi, progress)

        return _add_results(
            gr, "stylegan", draw, walk, [choice, psi, mix_seed, mix_layers], shared, out
        )


def _add_results(gr, name, draw, walk, settings, shared, out):
    """Add buttons, pictures and the download of a model; return (function, inputs, outputs) of its drawing, for the comparison."""
    seed, num_images, frames, format = shared
    with gr.Row():
        generate = gr.Button("Generate", elem_id=f"{name}-generate")
        wander = gr.Button("Latent walk", elem_id=f"{name}-walk")
    picture = gr.Image(
        label="Images",
        type="filepath",
        format="png",
        elem_classes="picture",
        elem_id=f"{name}-picture",
        buttons=BUTTONS,
    )
    caption = gr.Markdown(elem_id=f"{name}-caption")
    download = gr.DownloadButton("Download", interactive=False, elem_id=f"{name}-download")
    film = gr.Image(
        label="Walk (GIF)",
        type="filepath",
        elem_classes="picture",
        elem_id=f"{name}-film",
        buttons=BUTTONS,
    )
    drawn = gr.State()

    def offer(drawing, format):
        if drawing is None:
            return gr.DownloadButton(interactive=False)
        folder = demo.make_result_folder(out, time.time_ns(), name, "download")
        return gr.DownloadButton(
            value=str(demo.save_download(drawing, folder, format)), interactive=True
        )

    def show(seed, num_images, format, *values, progress=gr.Progress()):  # noqa: B008 (gradio finds it there)
        with _errors(gr):
            began = time.monotonic()
            drawing = draw(seed, num_images, *values, progress)
            seconds = time.monotonic() - began
            path = demo.make_result_folder(out, time.time_ns(), name) / "images.png"
            demo.save_grid_with_scale_bar(drawing, path)
            return (
                str(path),
                f"{drawing.describe()}; {seconds:.1f} s",
                drawing,
                offer(drawing, format),
            )

    def show_walk(seed, frames, *values, progress=gr.Progress()):  # noqa: B008
        with _errors(gr):
            path = demo.make_result_folder(out, time.time_ns(), name, "walk") / "walk.gif"
            return str(demo.save_walk(walk(seed, frames, *values, progress), path))

    inputs, outputs = [seed, num_images, format, *settings], [picture, caption, drawn, download]
    generate.click(show, inputs, outputs)
    wander.click(show_walk, [seed, frames, *settings], film)
    format.change(offer, [drawn, format], download)
    return show, inputs, outputs


class _errors:
    """A mistake of the visitor's becomes a message on the page."""

    def __init__(self, gr):
        self.gr = gr

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, ValueError | TypeError):
            raise self.gr.Error(str(error)) from error


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for family in ("ldm", "stylegan"):
        variable = f"EM_{family.upper()}"
        given = os.environ.get(variable, "").split()
        text = f"runs' folders or Hub ids (owner/name@revision) to choose from; default: the variable {variable}"
        parser.add_argument(f"--{family}", nargs="+", default=given, metavar="MODEL", help=text)
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    arguments = parser.parse_args(argv)
    if not arguments.ldm and not arguments.stylegan:
        raise ValueError(
            "the demo needs a model: --ldm MODEL, --stylegan MODEL, or the variables EM_LDM and EM_STYLEGAN"
        )
    return arguments


def main():
    arguments = parse_arguments()
    import_gradio()  # before the models are loaded
    ldms = [demo.load_demo_model(source, "ldm") for source in arguments.ldm]
    stylegans = [demo.load_demo_model(source, "stylegan") for source in arguments.stylegan]
    with tempfile.TemporaryDirectory(prefix="em-demo-") as out:
        build_interface(ldms, stylegans, out).launch(server_port=arguments.port, css=CSS)


if __name__ == "__main__":
    run_command(main)
