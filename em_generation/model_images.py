"""The images of the models that evaluate.py judges, generated where they are missing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from em_data import read_image_folder
from em_data.files import make_folder_name
from em_evaluation import ModelImages
from em_generation.candidates import Candidate
from em_generation.class_images import draw_class_images
from em_generation.families import make_options
from em_generation.generate import GenerationConfig, generate_images
from em_generation.loading import Model, read_model
from em_training import read_stats

WITHOUT_GRAIN = "images-without-grain"
STARTS = {"untrained": "untrained", "transferred": "start"}  # kind of level: folder of a run


def make_models(config, candidates: Sequence[Candidate], classes, device) -> list[ModelImages]:
    """Return the images of all candidates, generated if they are missing.

    classes: Those of the micrographs.
    """
    families = [each.model.family for each in candidates if each.model is not None]
    options = make_options(families, config.sampling)
    if any(getattr(each, "size", None) is not None for each in options.values()):
        raise ValueError(
            "--sampling has a size, but models are judged by tiles. Leave it out. Judge larger "
            "images as a folder beside the model, which is cut into tiles: generate.py --size ... "
            "--out FOLDER, then --models MODEL FOLDER."
        )
    return [
        ModelImages(each.name, each.images, family_title="images of a folder")
        if each.model is None
        else make_model(config, each, each.model, options[each.model.family.name], classes, device)
        for each in candidates
    ]


def make_model(config, candidate: Candidate, model: Model, options, classes, device) -> ModelImages:
    """Return the images of a model, and what its run and its family bring."""
    name, family = candidate.name, model.family
    bare = None
    if config.memorisation and family.without_grain:
        bare = make_config(config, name, model, family.without_grain(options), WITHOUT_GRAIN)
    images, record = generate(config, name, model, options, bare=bare)
    without_grain = None
    if bare is not None and record["settings"].get("grain"):
        without_grain, _ = generate(config, name, model, bare.options, WITHOUT_GRAIN)
    reconstructions: Mapping[str, Callable] = {}
    if "reconstruction" in config.levels:
        reconstructions = family.reconstructions(model.load(device=device), options, config.seed)
    starts = {}
    for kind, start in STARTS.items():
        if model.folder is not None and (model.folder / start / "model_index.json").exists():
            first = read_model(str(model.folder / start))
            starts[kind], _ = generate(config, name, first, options, kind=f"images-{start}")
    draw = partial(draw_for_classes, config, name, model)
    stages = [model.folder / stage for stage in family.stages] if model.folder else []
    return ModelImages(
        name,
        images,
        family=model.kind,
        family_title=model.title,
        train_seconds=model.train_seconds,
        num_images_seen=model.num_images_seen,
        sample_seconds=record.get("sample_seconds"),
        sample_images_per_second=record.get("sample_images_per_second"),
        curves={stage.name: read_stats(stage) for stage in stages if stage.exists()},
        info={key: value for key, value in record["settings"].items() if key != "format"}
        | model.about,
        without_grain=without_grain,
        reconstructions=reconstructions,
        repeat_of=candidate.repeat_of,
        training_seed=candidate.training_seed,
        of_classes=draw_class_images(
            model, options, classes, config.guidance_scales, draw, config.num_images
        ),
        **starts,
    )


def draw_for_classes(config, name: str, model: Model, options, kind: str, num_images: int):
    """Return images of a model's classes."""
    config = replace(config, num_images=num_images)
    return generate(config, name, model, options, f"images-{kind}")[0]


def make_config(config, name: str, model: Model, options, kind: str) -> GenerationConfig:
    """Return how the images of a model are generated; `kind` names their folder."""
    return GenerationConfig(
        model=model.source,
        out=str(Path(config.out) / kind / make_folder_name(name)),
        num_images=config.num_images,
        seed=config.seed,
        batch_size=config.batch_size,
        precision=config.precision,
        options=options,
    )


def generate(config, name, model: Model, options, kind: str = "images", bare=None) -> tuple:
    """Return the images of a model and the record of their generation."""
    made = make_config(config, name, model, options, kind)
    record = generate_images(made, model, bare)
    return read_image_folder(made.out), record
