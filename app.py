"""A demo in the browser: models side by side, their images and walks, and files to download.

python app.py                                            the models in the package
python app.py --models runs/demo/ldm runs/demo/stylegan2
EM_MODELS="you/em-ldm you/em-gan" python app.py          (a Space sets such a variable)
"""

import argparse
import inspect
import os
import tempfile
import time

import em_pretrained
from em_generation import demo
from em_training.cli import run_command
from em_training.family import Control

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
BUTTONS = ["download", "fullscreen"]  # of a picture: without gradio's "share", which uploads it
CSS = ".picture img {image-rendering: pixelated}"
INTRODUCTION = """# EM Synthesis
Images drawn by models that learned from electron micrographs. They show no real specimen.
"""
COMPARISON = """The seed is each model's own starting point: the same seed gives the same images \
again, but the images of two models with one seed have nothing in common."""


def import_gradio():
    try:
        import gradio
    except ImportError as error:
        raise ValueError("The demo needs gradio: pip install 'em-synthesis[demo]'") from error
    return gradio


def build_interface(models, out, real=None):
    """Build the page, a `gradio.Blocks`; `launch()` opens it.

    models: `DemoModel`s; those of one family share a column. out: a folder for pictures and
    downloads. real: a `Drawing` of real micrographs to show beside, or None.
    """
    gr = import_gradio()
    families = list({id(each.model.family): each.model.family for each in models}.values())
    with gr.Blocks(
        title="EM Synthesis", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            # a text field: a number field would turn an empty one into 0 and round 1.5
            seed = gr.Textbox("0", label="Seed", info="A whole number from 0 on.", elem_id="seed")
            count = gr.Slider(1, demo.MAX_IMAGES, 4, step=1, label="Images")
            frames = gr.Slider(
                2,
                demo.MAX_FRAMES // demo.WALK_KEYS,
                8,
                step=1,
                label="Frames of a walk per image",
                info=f"A walk passes images 0 to {demo.WALK_KEYS - 1} of the seed and returns.",
            )
            format = gr.Radio(
                list(demo.FORMATS), value="8-bit PNG", label="Download as", elem_id="format"
            )
        shared = {"seed": seed, "num_images": count, "frames_per_image": frames, "format": format}
        compare = gr.Button("Generate with every model", variant="primary", elem_id="compare")
        if len(families) > 1:
            gr.Markdown(COMPARISON)
        compare.visible = len(families) > 1
        with gr.Row():
            if real is not None:
                _add_real_images(gr, real, out)
            columns = [
                _add_family(
                    gr, [each for each in models if each.model.family is family], shared, out
                )
                for family in families
            ]
        for show, inputs, outputs in columns:
            compare.click(show, inputs, outputs, api_visibility="private")
    return page


def _add_real_images(gr, real, out):
    path = demo.make_result_folder(out, "real") / "images.png"
    demo.save_grid_with_scale_bar(real, path)
    with gr.Column():
        gr.Markdown(f"### {real.name}")
        _add_picture(gr, "Held-out tiles", "real-picture", str(path))
        gr.Markdown(real.describe())


def _add_family(gr, models, shared, out):
    """Add a column; return (function, inputs, outputs) of its drawing, for the comparison."""
    family = models[0].model.family
    by_source = {model.source: model for model in models}
    with gr.Column():
        gr.Markdown(f"### {models[0].model.title}")
        choice = gr.Dropdown(list(by_source), value=models[0].source, label="Model")
        controls: dict[str, Control] = {}
        for control in (each for model in models for each in model.controls):
            controls.setdefault(control.name, control)
        shown = {control.name for control in models[0].controls}
        inputs = {name: _make_input(gr, each, name in shown) for name, each in controls.items()}
        _connect_controls(gr, choice, by_source, inputs)
        return _add_results(gr, family, by_source, choice, inputs, shared, out)


def _make_input(gr, control, visible=True):
    options = {"label": control.label, "info": control.help or None, "elem_id": control.name}
    options["visible"] = visible
    if control.kind == "slider":
        return gr.Slider(
            control.minimum, control.maximum, control.value, step=control.step, **options
        )
    if control.kind == "integer":
        return gr.Textbox("" if control.value is None else str(control.value), **options)
    choices = list(control.choices)
    if len(choices) <= 4:
        return gr.Radio(choices, value=control.value, **options)
    return gr.Dropdown(choices, value=control.value, **options)


def _connect_controls(gr, choice, by_source, inputs):
    """Let another model reset the controls, and a control set those that depend on it.

    Controls that the chosen model does not have are hidden.
    """

    def reset(source):
        controls = {control.name: control for control in by_source[source].controls}
        updates = []
        for name, component in inputs.items():
            if name not in controls:
                updates.append(type(component)(visible=False))
                continue
            control = controls[name]
            update = {"value": "" if control.value is None else control.value, "visible": True}
            if control.kind == "choice":
                update["choices"] = list(control.choices)
            elif control.kind == "slider":
                update["maximum"] = control.maximum
            updates.append(type(component)(**update))
        return updates

    choice.change(reset, choice, list(inputs.values()), api_visibility="private")
    setters: dict[str, set[str]] = {}
    for control in (each for model in by_source.values() for each in model.controls):
        for values in control.sets.values():
            setters.setdefault(control.name, set()).update(values)
    for name, targets in ((name, sorted(targets)) for name, targets in setters.items()):

        def follow(source, value, name=name, targets=targets):
            found = next(each for each in by_source[source].controls if each.name == name)
            new = found.sets.get(value, {})
            values = [new.get(target, gr.skip()) for target in targets]
            return values[0] if len(values) == 1 else values

        inputs[name].input(
            follow,
            [choice, inputs[name]],
            [inputs[target] for target in targets],
            api_visibility="private",
        )


def _add_results(gr, family, by_source, choice, inputs, shared, out):
    """Add buttons, pictures and the download of one family."""
    name = family.name
    with gr.Row():
        generate = gr.Button("Generate", elem_id=f"{name}-generate")
        wander = gr.Button("Latent walk", elem_id=f"{name}-walk", visible=bool(family.walk_help))
    picture = _add_picture(gr, "Images", f"{name}-picture")
    caption = gr.Markdown(elem_id=f"{name}-caption")
    download = gr.DownloadButton("Download", interactive=False, elem_id=f"{name}-download")
    film = _add_picture(gr, "Walk (GIF)", f"{name}-film", visible=bool(family.walk_help))
    if family.walk_help:
        gr.Markdown(family.walk_help)
    drawn = gr.State()

    def offer(drawing, format):
        if drawing is None:
            return gr.DownloadButton(interactive=False)
        folder = demo.make_result_folder(out, time.time_ns(), name, "download")
        path = demo.save_download(drawing, folder, format)
        return gr.DownloadButton(value=str(path), interactive=True)

    def show(seed, num_images, format, source, *values):
        *values, progress = values
        with _Errors(gr):
            began = time.monotonic()
            settings = dict(zip(inputs, values, strict=True))
            drawing = demo.draw(
                by_source[source], demo.read_seed(seed), int(num_images), settings, progress
            )
            seconds = time.monotonic() - began
            path = demo.make_result_folder(out, time.time_ns(), name) / "images.png"
            demo.save_grid_with_scale_bar(drawing, path)
            text = f"{drawing.describe()}; {seconds:.1f} s"
            return str(path), text, drawing, offer(drawing, format)

    def show_walk(seed, frames_per_image, source, *values):
        *values, progress = values
        with _Errors(gr):
            settings = dict(zip(inputs, values, strict=True))
            drawing = demo.walk(
                by_source[source], demo.read_seed(seed), int(frames_per_image), settings, progress
            )
            path = demo.make_result_folder(out, time.time_ns(), name, "walk") / "walk.gif"
            return str(demo.save_walk(drawing, path))

    _sign(gr, show, ["seed", "num_images", "format", "model", *inputs])
    _sign(gr, show_walk, ["seed", "frames_per_image", "model", *inputs])
    own = [choice, *inputs.values()]
    sources = [shared[key] for key in ("seed", "num_images", "format")] + own
    outputs = [picture, caption, drawn, download]
    generate.click(show, sources, outputs, api_name=f"{name}_generate")
    if family.walk_help:
        walk_sources = [shared["seed"], shared["frames_per_image"], *own]
        wander.click(show_walk, walk_sources, film, api_name=f"{name}_walk")
    shared["format"].change(offer, [drawn, shared["format"]], download, api_visibility="private")
    return show, sources, outputs


def _add_picture(gr, label, elem_id, value=None, visible=True):
    return gr.Image(
        value,
        label=label,
        type="filepath",
        elem_classes="picture",
        elem_id=elem_id,
        buttons=BUTTONS,
        visible=visible,
    )


def _sign(gr, function, names):
    """Give a function of any number of values named parameters, which the API then shows."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in names]
    parameters.append(inspect.Parameter("progress", kind, default=gr.Progress()))
    function.__signature__ = inspect.Signature(parameters)


class _Errors:
    """Turns a visitor's mistake into a message on the page."""

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
    parser.add_argument(
        "--models",
        nargs="+",
        default=os.environ.get("EM_MODELS", "").split(),
        metavar="MODEL",
        help="runs' folders, models in the package or Hub ids (owner/name@revision); default: the "
        "variable EM_MODELS, else all models in the package",
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    arguments = parser.parse_args(argv)
    arguments.models = arguments.models or em_pretrained.list_models()
    if not arguments.models:
        raise ValueError("The demo needs a model: use --models MODEL ..., or set EM_MODELS.")
    return arguments


def main():
    arguments = parse_arguments()
    import_gradio()  # before the models are loaded
    models = [demo.load_demo_model(source) for source in arguments.models]
    real = next(filter(None, (demo.load_real_images(each.model) for each in models)), None)
    with tempfile.TemporaryDirectory(prefix="em-demo-") as out:
        build_interface(models, out, real).launch(server_port=arguments.port, css=CSS)


if __name__ == "__main__":
    run_command(main)
