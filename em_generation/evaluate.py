"""Models and micrographs -> one report: what joins the model families to the evaluation, which knows images only."""

import dataclasses
import json
from pathlib import Path

from em_data import DataConfig, load_data, read_image_folder
from em_data.files import make_folder_name
from em_evaluation import ModelImages, evaluate_models, write_report
from em_evaluation.compare import compare_reports
from em_generation.extractors import create_extractors
from em_generation.families import make_options
from em_generation.generate import GenerationConfig, generate_images
from em_generation.loading import Model, read_model
from em_training import config_from_dict, create_process_state, read_stats


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Judge one or more trained models by the same protocol and write report.html and report.json."""

    models: tuple[str, ...] = ()
    """Runs, saved pipelines or Hub ids (owner/name, owner/name@revision); NAME=MODEL gives one a name of its own in the report."""
    out: str = "runs/evaluation"
    """Folder for report.html and report.json; generated images go to images/ in it and are kept for the next time."""
    num_images: int = 1000
    """Images of every set: of each model, of each floor, and of the reference."""
    data: str | None = None
    """Micrographs to compare with, as in training; left out, those of the models' own run."""
    tiles: tuple[str, ...] = ()
    """KEY=VALUE of what differs from the tiling of the models' own run, such as resolution=64 split=specimen."""
    extractors: tuple[str, ...] = ("efficientnet-lite0",)
    """One or more of efficientnet-lite0 (offline), inception (clean-fid's), dinov2, clip, timm:NAME, transformers:NAME; the first one's
    Frechet distance carries the conclusion."""
    metrics: tuple[str, ...] = ()
    """Some of frechet_distance (always), frechet_distance_infinite, kernel_distance, cmmd (with clip), precision, recall, density,
    coverage; left out, all that apply."""
    resize_mode: str | None = None
    """inception only: clean or legacy_pytorch."""
    input_px: int | None = None
    """efficientnet-lite0 only: side that tiles are resized to; left out, 128 for tiles of up to 128 px, else 224."""
    weights: tuple[str, ...] = ()
    """EXTRACTOR=PATH of local weights instead of the published ones: a file, for dinov2 and clip a folder; PATH alone where there is one
    extractor."""
    feature_precision: str = "no"
    """Of the extractors: no (float32) or bf16, on hardware that has it; a report of one is not compared with one of the other."""
    floors: tuple[str, ...] = ("real", "reconstruction", "surrogates", "noise")
    """What is measured beside the models: real, reconstruction (of each LDM's autoencoder), surrogates, noise."""
    microscopy: bool = True
    """Measure spectrum, noise, two-point correlation and defects, as a microscopist would."""
    memorisation: bool = True
    """Seek the nearest training view of every generated image; an LDM with grain is sampled a second time for it, without its grain."""
    seed: int = 0
    """Seed of generated images, of drawn tiles and of intervals."""
    batch_size: int = 50
    """Images at once."""
    sampling: tuple[str, ...] = ()
    """KEY=VALUE of sampling options as generate.py has them, such as num-inference-steps=20
    scheduler=ddim grain=false; each model takes those of its family."""
    precision: str = "auto"
    """auto (bf16 where the hardware has it), bf16 or no (float32): of sampling."""
    compare: tuple[str, ...] = ()
    """Two or more report.json to put beside each other instead of evaluating; refused where their protocols differ."""


def evaluate_runs(config: EvaluationConfig) -> Path | None:
    """Generate what is missing, measure all of it, write the report; return the page's path, None on all but the main process.

    With `compare`, print the reports' models beside each other instead. Raises `ValueError` when the models were trained on other
    micrographs, or on another split of them, than they would be judged by.
    """
    if config.compare:
        if config.models:
            raise ValueError(
                "--compare reads reports that are there; evaluate --models in a call of its own"
            )
        print(compare_reports(config.compare))
        return None
    state = create_process_state()
    models = name_models(config.models)
    source, tiles = find_data(config, models)
    with state.main_process_first():
        data = load_data(source, tiles, log=state.print)
    refuse_other_splits(models, data.summary)

    with state.main_process_first():
        extractors = create_extractors(config, data.summary, state)
    generated = {name: generate(config, name, model) for name, model in models.items()}
    without_grain = {
        name: generate(config, name, model, with_grain=False)[0]
        if config.memorisation and generated[name][1]["settings"].get("grain")
        else None
        for name, model in models.items()
    }
    starts = {start: generate_starts(config, models, start) for start in ("untrained", "start")}

    evaluated = evaluate_models(
        [
            describe(name, info, *generated[name], without_grain[name])
            for name, info in models.items()
        ],
        data.summary,
        data.held_out,
        data.train,
        extractor=extractors,
        metrics=config.metrics,
        floors=config.floors,
        num_images=config.num_images,
        seed=config.seed,
        reconstruct=make_reconstructions(config, models, state.device),
        untrained=starts["untrained"],
        transferred=starts["start"],
        batch_size=config.batch_size,
        microscopy=config.microscopy,
        memorisation=config.memorisation,
        reproduce=list_commands(config, models),
        state=state,
        log=state.print,
    )
    if evaluated is None:
        state.wait_for_everyone()
        return None
    report, pictures = evaluated
    page = write_report(report, pictures, config.out)
    print_summary(report, page)
    state.wait_for_everyone()
    return page


def name_models(models: tuple[str, ...]) -> dict[str, Model]:
    """Return {name in the report: model}; a family's name where it is the only one, else the folder's."""
    if not models:
        raise ValueError(
            "no model was named; give at least one run, pipeline or Hub id with --models"
        )
    found = []
    for text in models:
        name, _, source = ("", "", text) if Path(text).exists() else text.rpartition("=")
        found.append((name, read_model(source)))
    titles = [model.title for _, model in found]
    named = {}
    for name, model in found:
        name = name or (model.title if titles.count(model.title) == 1 else model.name)
        if name in named:
            raise ValueError(
                f"two models are called {name}; tell them apart with --models NAME={model.source}"
            )
        named[name] = model
    return named


def find_data(config: EvaluationConfig, models: dict) -> tuple[str, DataConfig]:
    """Return source and tiling: what the flags say, else what the first model with a run was trained on."""
    runs = [info for info in models.values() if info.config]
    told = [
        info.config["data"] for info in runs if info.config.get("data")
    ]  # not of a private folder's on the Hub
    if config.data is None and not told:
        raise ValueError(
            "these models do not say what they were trained on; name the micrographs with --data FOLDER"
        )
    source = config.data if config.data is not None else told[0]
    values = dict(runs[0].config["tiles"]) if runs else dataclasses.asdict(DataConfig())
    return source, config_from_dict(DataConfig, values | parse_pairs(config.tiles))


def parse_pairs(pairs: tuple[str, ...]) -> dict:
    """Return {key: value} of KEY=VALUE texts; a value is read as JSON where it is JSON (64, true, null), else as it stands."""
    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--tiles takes KEY=VALUE, such as resolution=64, not {pair!r}")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text
    return values


def refuse_other_splits(models: dict, summary: dict) -> None:
    """Refuse to judge a model by micrographs that it may have been trained on, or by tiles cut or scaled in another way."""
    for name, info in models.items():
        trained = info.data.get("split_hash")
        if trained is not None and trained != summary["split_hash"]:
            raise ValueError(
                f"{name} was trained on another split ({info.data.get('name')}, {trained}) than it would be judged by "
                f"({summary['name']}, {summary['split_hash']}): some of the held-out micrographs may have been trained on. "
                "Evaluate with the --data and --tiles of its training, and compare only models of one split."
            )
        cut = info.data.get("fingerprint")
        if cut is not None and cut != summary["fingerprint"]:
            raise ValueError(
                f"{name} was trained on tiles cut or scaled in another way (resolution, downsample, intensity) than those it would be "
                "judged by; evaluate it with the --tiles of its training, and compare only models of one tiling"
            )


def generate(config: EvaluationConfig, name: str, model: Model, with_grain: bool = True):
    """Return (images, record) of a model; generate those that are missing."""
    options = make_options([model.family], config.sampling)[model.family.name]
    images = "images"
    if not with_grain:
        options, images = model.family.without_grain(options), "images-without-grain"
    folder = Path(config.out) / images / make_folder_name(name)
    generation = GenerationConfig(
        model=model.source,
        out=str(folder),
        num_images=config.num_images,
        seed=config.seed,
        batch_size=config.batch_size,
        precision=config.precision,
        options=options,
    )
    record = generate_images(generation, model)
    return read_image_folder(folder), record


def generate_starts(config: EvaluationConfig, models: dict, start: str) -> dict:
    """Return {name: images} of the first weights ("untrained" or "start") of runs that have them."""
    folders = {
        name: model.folder / start for name, model in models.items() if model.folder is not None
    }
    return {
        name: generate(config, f"{name} {start}", read_model(str(folder)))[0]
        for name, folder in folders.items()
        if (folder / "model_index.json").exists()
    }


def describe(name: str, info: Model, images, record: dict, without_grain=None) -> ModelImages:
    """Return what the report says of one model."""
    return ModelImages(
        name=name,
        family=record["family"],
        images=images,
        train_seconds=info.train_seconds,
        num_images_seen=info.num_images_seen,
        sample_seconds=record.get("sample_seconds"),
        sample_images_per_second=record.get("sample_images_per_second"),
        curves={
            stage: read_stats(info.folder / stage)
            for stage in info.family.stages
            if info.folder and (info.folder / stage).exists()
        },
        info={
            key: value
            for key, value in record["settings"].items()
            if key not in ("model", "format")
        },
        without_grain=without_grain,
    )


def make_reconstructions(config: EvaluationConfig, models: dict, device) -> dict:
    """Return {part of a model: function that sends images through it} for all models."""
    functions = {}
    for name, model in models.items():
        options = make_options([model.family], config.sampling)[model.family.name]
        pipeline = model.load(device=device)
        for level in model.family.reference_levels(pipeline, options, config.seed):
            functions[f"{level.part} of {name}"] = level.apply
    return functions


def list_commands(config: EvaluationConfig, models: dict) -> list[str]:
    """Return the command that makes this report again, with the models' names in place of paths; local data and weights left out."""
    defaults = {field.name: field.default for field in dataclasses.fields(EvaluationConfig)}
    words = ["python evaluate.py --models", *(info.name for info in models.values())]
    for name in (
        "num_images",
        "resize_mode",
        "input_px",
        "feature_precision",
        "seed",
        "precision",
    ):
        value = getattr(config, name)
        if name == "num_images" or value != defaults[name]:
            words.append(f"--{name.replace('_', '-')} {value}")
    words += [
        f"--no-{name}" for name in ("microscopy", "memorisation") if not getattr(config, name)
    ]
    for name in ("extractors", "metrics", "tiles", "floors", "sampling"):
        if getattr(config, name) != defaults[name]:
            words.append(f"--{name} {' '.join(getattr(config, name))}")
    return [" ".join(words)]


def print_summary(report: dict, page: Path) -> None:
    """Print the table of distances and the conclusion."""
    rows = [(model["name"], model["metrics"]["frechet_distance"]) for model in report["models"]]
    rows += [
        (floor["name"], floor["metrics"]["frechet_distance"]) for floor in report["floors"].values()
    ]
    width = max(len(name) for name, _ in rows)
    print(
        f"\nFrechet distance to held-out micrographs ({report['protocol']['num_images']:,} images each, 95 % interval)"
    )
    for name, distance in rows:
        print(
            f"  {name:{width}}  {distance['value']:9.4g}  [{distance['low']:.4g}, {distance['high']:.4g}]"
        )
    print("\n" + "\n".join(str(sentence) for sentence in as_sentences(report["conclusion"])))
    for measurement in report["measurements"]:
        for each in measurement["blindness"]:
            if each["misordered"]:
                print(each["sentence"])
    for warning in report["warnings"]:
        print(f"warning: {warning}")
    print(f"\n{page}")


def as_sentences(conclusion) -> list[str]:
    """Return the conclusion as a list of sentences."""
    return [conclusion] if isinstance(conclusion, str) else list(conclusion)
