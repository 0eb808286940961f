"""The study's comparison of its models (its Table 3) and their images (its Figure 7).

    python experiments/2024_gan_vs_ldm/comparison.py --scale small
    python experiments/2024_gan_vs_ldm/comparison.py --scale study \\
        --data damaged-alloys:FOLDER --extractor inception --autoencoder CHECKPOINT

It measures the distance to held-out tiles, the time to train and the time for 50,000 images of the
LDM, StyleGAN2, StyleGAN3-T and StyleGAN3-R, and gives the difference to the study's numbers. Table
3 is results/comparison_SCALE.json and .md; Figure 7 is results/comparison_SCALE.png. The study does
not say what Figure 7 shows. Here, it is the first images of each model in a row, below real images
that no model was trained on.

The models are those of the other recipes, and are trained if they are missing: the LDM with the
preset's U-Net (ldm.py batch_size), the last point of gan.py kimg, and 3-T and 3-R with a mapping
depth of 2, the study's best (gan.py mapping_depth). The study has no times for 3-T and 3-R. The
LDM's time to train is without its autoencoder's, which the study took pretrained. The LDM samples
with DDIM in 200 steps, as in the study, and with the sampler that our runs are saved with.

`--scale study` generates the study's 50,000 images. `--scale small` generates 300 and multiplies
their time. Its models differ in images seen and in feature maps (see the recipes), as the table
says: it shows that the comparison runs, not which method is better.
"""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import gan
import ldm
from recipe import (
    SCALES,
    STUDY,
    Reference,
    Results,
    create_figure,
    create_parser,
    save_figure,
)

from em_data import read_image_folder
from em_diffusion.selection_output import join
from em_evaluation.images import read_images
from em_generation.generate import GenerationConfig, generate_images
from em_generation.loading import read_model
from em_training.cli import run_command

STUDY_MODELS = {model["family"]: model for model in STUDY["models"]}
NUM_STUDY_IMAGES = 50_000
NUM_COLUMNS = 10


@dataclass(frozen=True)
class Model:
    """A row of the table: the recipe's family, experiment and point, and the study's numbers."""

    name: str
    family: str
    experiment: str
    point: gan.Point | ldm.Point
    study: dict
    scheduler: str | None = None
    num_inference_steps: int | None = None


def find_depth_2(architecture):
    return next(
        point
        for point in gan.EXPERIMENTS["mapping_depth"]
        if (point.architecture, point.mapping_depth) == (architecture, 2)
    )


def list_models(scale) -> tuple[Model, ...]:
    """Return the rows of the table; the LDM's batch size is the preset's."""
    batch_size = ldm.make_ldm(SCALES[scale].ldm.preset).denoiser.batch_size
    point = ldm.Point(batch_size=batch_size)
    alias_free = [
        Model(name, architecture, "mapping_depth", depth_2, {"frechet_distance": depth_2.study_fid})
        for name, architecture in (("StyleGAN3-T", "stylegan3-t"), ("StyleGAN3-R", "stylegan3-r"))
        for depth_2 in (find_depth_2(architecture),)
    ]
    return (
        Model("LDM, DDIM 200 steps", "ldm", "batch_size", point, STUDY_MODELS["ldm"], "ddim", 200),
        Model("LDM, our default sampler", "ldm", "batch_size", point, {}),
        Model(
            "StyleGAN2", "stylegan2", "kimg", gan.EXPERIMENTS["kimg"][-1], STUDY_MODELS["stylegan2"]
        ),
        *alias_free,
    )


COLUMNS = {
    "train_text": ("training, s (study)", ""),
    "sample_text": ("50,000 images, s (study)", ""),
    "num_images_seen": ("images trained on", ",d"),
    "num_parameters": ("parameters", ",d"),
}


def train(model: Model, arguments) -> tuple:
    """Train a model unless it is trained; return its folder, tiles' configuration and run.json."""
    arguments = argparse.Namespace(**{**vars(arguments), "experiment": model.experiment})
    if model.family != "ldm":
        config, run = gan.train(model.point, arguments)
        return Path(config.out), config.tiles, run
    config, run, pipeline = ldm.train(model.point, arguments)
    folder = Path(config.out) / "last"  # not the weights that the held-out tiles have chosen
    pipeline.save_pretrained(folder)
    return folder, config.tiles, run


def generate(model: Model, folder, arguments, num_images) -> tuple:
    """Generate a model's images unless they exist; return them and the record of their time."""
    out = (
        Path(arguments.runs)
        / f"comparison_{arguments.scale}"
        / model.name.replace(" ", "_").replace(",", "")
    )
    found = read_model(str(folder))
    sampling = {"scheduler": model.scheduler, "num_inference_steps": model.num_inference_steps}
    known = {field.name for field in dataclasses.fields(found.family.options)}
    options = found.family.options(**{key: sampling[key] for key in sampling if key in known})
    precision = "auto" if arguments.scale == "study" else "no"
    config = GenerationConfig(
        str(folder), str(out), num_images, precision=precision, options=options
    )
    record = generate_images(config, found)
    return read_image_folder(out), record


def compare_times(model: Model, run, record) -> dict:
    """Return the seconds of the training and of 50,000 images, as numbers and as text."""
    ours = {
        "train_seconds": run["train_seconds"],
        "sample_seconds_50000": NUM_STUDY_IMAGES / record["sample_images_per_second"],
    }
    times = {}
    for name, seconds in ours.items():
        study = model.study.get(name)
        times[name] = {
            "study": study,
            "ours": seconds,
            "difference": None if study is None else seconds - study,
        }
    texts = {}
    for key, name in (("train_text", "train_seconds"), ("sample_text", "sample_seconds_50000")):
        study = times[name]["study"]
        texts[key] = f"{times[name]['ours']:,.0f} ({'-' if study is None else format(study, ',d')})"
    return {"times": times, **texts, "num_images_timed": record["timed_images"]}


def run_experiment(arguments) -> Path:
    """Train and measure every missing model, draw the picture, and return the JSON's path."""
    results = Results(arguments, "comparison", "Table 3: the models", COLUMNS)
    reference, rows = None, []
    for model in list_models(arguments.scale):
        folder, tiles, run = train(model, arguments)
        reference = reference or Reference(arguments, tiles)
        images, record = generate(model, folder, arguments, len(reference.images))
        rows.append((model.name, read_images(images, min(NUM_COLUMNS, len(images)))))
        settings = {"name": model.name}
        if results.find(settings) is None:
            measured = reference.measure(images) | compare_times(model, run, record)
            measured["num_images_seen"] = run["num_images_seen"]
            measured["num_parameters"] = count_parameters(folder)
            results.add(settings, model.study.get("frechet_distance"), measured)
    if len(reference.images) < NUM_STUDY_IMAGES:
        results.notes = [
            f"The time for 50,000 images is that of {len(reference.images):,}, multiplied."
        ]
    results.notes.append("The LDM's training is without its autoencoder's.")
    if arguments.scale == "small":
        results.notes.append(
            "The trainings differ in images seen and in feature maps, and shared their core with "
            "other programs."
        )
    results.write()
    draw_rows([("held-out tiles", reference.images), *rows], results.path.with_suffix(".png"))
    print(results.format_table())
    return results.path


def count_parameters(folder) -> int:
    """Parameters of what generates: the U-Net and the autoencoder, or the generator."""
    pipeline = (
        gan.EMStyleGANPipeline if (folder / "pipeline").is_dir() else ldm.EMLatentDiffusionPipeline
    )
    folder = folder / "pipeline" if (folder / "pipeline").is_dir() else folder
    models = [
        each
        for each in pipeline.from_pretrained(folder).components.values()
        if hasattr(each, "parameters")
    ]
    return sum(parameter.numel() for model in models for parameter in model.parameters())


def draw_rows(rows, path):
    """Draw the first images of each set [(name, ImageSet)] in a row, without interpolation."""
    zoom = max(1, 96 // rows[0][1].resolution[1])
    strips = [(name, join(images.levels[:NUM_COLUMNS, 0], zoom)) for name, images in rows]
    height, width = strips[0][1].shape
    label_px, gap_px, dpi = 190, 6, 110
    size = (label_px + width, len(strips) * (height + gap_px))
    figure = create_figure(figsize=(size[0] / dpi, size[1] / dpi), dpi=dpi)
    figure.set_layout_engine("none")
    for i, (name, strip) in enumerate(strips):
        bottom = 1 - ((i + 1) * (height + gap_px) - gap_px / 2) / size[1]
        axes = figure.add_axes(
            (label_px / size[0], bottom, strip.shape[1] / size[0], height / size[1])
        )
        axes.imshow(strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        figure.text(8 / size[0], bottom + height / size[1] / 2, name, va="center", fontsize=9)
    save_figure(figure, path)


def parse_arguments(argv=None):
    parser = create_parser(__doc__)
    parser.add_argument(
        "--autoencoder",
        help="of the LDM: what load_autoencoder reads (default: the f8 of autoencoders.py)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: print(run_experiment(parse_arguments())))
