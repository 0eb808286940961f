"""Models, images and micrographs -> one report: joins the models to the evaluation."""

import dataclasses
import re
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from em_data import DataConfig, load_data, load_tiles, read_image_folder
from em_data.files import find_cache_dir
from em_data.tiles import Tiles
from em_evaluation import Protocol, evaluate_models, wording, write_report
from em_evaluation.baselines import read_baselines
from em_evaluation.compare import compare_reports
from em_evaluation.evaluator import RealImages
from em_evaluation.levels import LEVELS, LevelName
from em_evaluation.numbers import format_interval
from em_generation.adherence import add_adherence
from em_generation.candidates import Candidate, name_candidates, refuse_other_splits
from em_generation.class_images import list_classes
from em_generation.extractors import create_extractors
from em_generation.folder import RECORD
from em_generation.generate import MOST_IMAGES
from em_generation.judged_sets import describe_sets, find_pixel_size
from em_generation.loading import is_public
from em_generation.model_images import make_models
from em_generation.repeats import explain_others, read_training
from em_generation.reproduce import list_commands
from em_training import config_from_dict, create_process_state, parse_pairs
from em_training.family import check_options


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Compare models and folders of images with real micrographs, and write a report."""

    models: tuple[str, ...] = ()
    """What to judge: runs, saved pipelines, models in the package such as em-ldm-64, Hub ids
    (owner/name, owner/name@revision), folders of images (PNG, TIFF, JPEG; 8 or 16 bit), datasets
    folders, or data sets on the Hub (hub:owner/name). NAME=MODEL gives one a name in the report.
    Runs that differ in the seed alone are shown with their median and range; they may share a name.
    Images must be as large as the tiles; larger ones beside a run are cut into tiles like its
    micrographs."""
    out: str = "runs/evaluation"
    """Folder for the report. Generated images are kept in images/ below it for the next time."""
    data: str | None = None
    """Micrographs to compare with, as in training. Default: those of the first run."""
    reference: str | None = None
    """Real images to compare with instead of held-out tiles: a folder, a datasets folder or
    hub:owner/name. Memorisation then needs --data, too. Images as large as the run's tiles are
    compared as they are; larger ones are cut into tiles like the run's micrographs."""
    num_images: int = 1000
    """Images of every set: of each model, each reference level, and the reference."""
    tiles: tuple[str, ...] = ()
    """KEY=VALUE of what differs from the tiles of the first run, such as resolution=64."""
    sampling: tuple[str, ...] = ()
    """KEY=VALUE of the models' sampling options, such as num-inference-steps=20 scheduler=ddim
    grain=false; see generate.py."""
    precision: Literal["auto", "bf16", "no"] = "auto"
    """Precision of sampling: auto (bf16 if the hardware has it), bf16 or no (float32)."""
    extractors: tuple[str, ...] = ("efficientnet-lite0",)
    """One or more of efficientnet-lite0 (offline), inception (clean-fid's), dinov2, clip,
    timm:NAME, transformers:NAME. The conclusions rest on the first one."""
    metrics: tuple[str, ...] = ()
    """Some of frechet_distance (always), frechet_distance_infinite, kernel_distance, cmmd (needs
    clip), precision, recall, density, coverage. Default: all that apply."""
    levels: tuple[LevelName, ...] = LEVELS
    """Reference levels to measure beside the models: real, reconstruction (by each model's
    autoencoder), surrogates (texture only), noise."""
    microscopy: bool = True
    """Measure spectrum, noise, two-point correlation and defects."""
    memorisation: bool = True
    """Search the training tiles for copies. Of models with grain, images without it are used."""
    baselines: str | None = None
    """JSON file with published numbers to show in the report."""
    seed: int = 0
    """Seed of the generated images, of the tiles drawn and of the intervals."""
    guidance_scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    """Guidance scales at which models with classes are also judged, if they have guidance: as many
    images at each. Give none to leave this out."""
    batch_size: int = 50
    """Images at once."""
    resize_mode: Literal["clean", "legacy_pytorch", "own"] | None = None
    """Resizing of inception: clean or legacy_pytorch. Default: clean. Of dinov2, clip, timm: and
    transformers: models: own, their own preprocessing, which reads 8 bits and may crop. Default:
    whole images, in floating point."""
    input_px: int | None = None
    """Side that efficientnet-lite0 resizes images to. Default: 128 for images of up to 128 pixels,
    else 224."""
    weights: tuple[str, ...] = ()
    """EXTRACTOR=PATH of local weights: a file, or a folder for dinov2 and clip."""
    feature_precision: Literal["no", "bf16"] = "no"
    """Precision of the extractors: no (float32) or bf16."""
    cache_dir: str | None = None
    """Folder for features and tiles. Default: em-synthesis in the user's cache folder."""
    compare: tuple[str, ...] = ()
    """Two or more report.json to compare instead of evaluating."""

    def __post_init__(self):
        check_options(
            self,
            num_images=(2, MOST_IMAGES),
            seed=(0, 2**63),
            batch_size=(1, 65_536),
            input_px=(32, 4096),
            guidance_scales=(-100, 100),
        )


def evaluate_runs(config: EvaluationConfig) -> Path | None:
    """Generate missing images, measure all sets, write the report and print a summary.

    With `compare`, print a comparison of reports instead.

    Returns:
        The page's path; None on all processes but the main one.

    Raises:
        ValueError: There is nothing to judge, the models were trained on other micrographs than
            they would be judged by, or a folder cannot be written.
    """
    if config.compare:
        if config.models:
            raise ValueError("--compare reads finished reports. Evaluate --models in another call.")
        print(compare_reports(config.compare))
        return None
    state = create_process_state()
    say = state.on_main_process(print)  # state.print prints once on each node
    candidates = name_candidates(config.models)
    for remark in explain_others(
        [read_training(each.model) for each in candidates], [each.name for each in candidates]
    ):
        say(remark)
    baselines = read_baselines(config.baselines)
    if state.is_main_process:
        check_writable(config.out, "--out")
        check_writable(find_cache_dir(config.cache_dir), "--cache-dir")
    real, candidates = load_sets(config, candidates, state, log=say)
    with state.main_process_first():
        extractors = create_extractors(config, real.summary["resolution"], state.device)
    evaluated = evaluate_models(
        make_models(config, candidates, list_classes(real), state.device),
        real,
        extractors,
        Protocol(
            metrics=config.metrics,
            levels=config.levels,
            num_images=config.num_images,
            seed=config.seed,
            microscopy=config.microscopy,
            memorisation=config.memorisation,
            batch_size=config.batch_size,
            cache_dir=config.cache_dir,
        ),
        baselines=baselines,
        reproduce=list_commands(config, candidates),
        state=state,
        log=say,
    )
    page = None
    if evaluated is not None:
        report, pictures = evaluated
        pictures += add_adherence(report, config, candidates, real, log=say)
        page = write_report(report, pictures, config.out)
        print_summary(report, page, candidates)
    state.wait_for_everyone()
    return page


def check_writable(folder, flag: str) -> None:
    """Raise `ValueError` if nothing can be written to a folder: before the work, not after it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written ({error.strerror}). Name another folder with {flag}."
        ) from error


def load_sets(config, candidates: Sequence[Candidate], state, log):
    """Return the real images and the candidates, cut alike, with notes on what differs."""
    with state.main_process_first():
        real = load_real_images(config, candidates, log=log)
        candidates = cut_candidates(config, candidates, log=log)
    real = dataclasses.replace(real, notes=tuple(describe_sets(real, candidates)))
    for note in real.notes:
        log(note)
    return real, candidates


def load_real_images(config, candidates: Sequence[Candidate], log=print) -> RealImages:
    """Return the real images to compare with: held-out tiles, or those of --reference."""
    train, summary = None, None
    if config.reference is None or config.data is not None:
        source, tiles = find_data(config, candidates)
        data = load_data(source, tiles, log=log)
        train, summary = data.train, data.summary
        if config.reference is None:
            refuse_other_splits(candidates, summary)
            return RealImages(data.held_out, train, summary)
    elif config.tiles:
        raise ValueError("--tiles cuts micrographs. Give --data, or leave out --tiles.")
    images = read_image_folder(config.reference)
    tiling = find_tiles(config, candidates)
    images = cut_large("--reference", config.reference, images, tiling, log)
    is_cut = isinstance(images, Tiles)
    return RealImages(
        images,
        train,
        {
            "name": Path(config.reference).name,
            "num_images": len(images),
            "resolution": images.resolution if is_cut else images.shape[0],
            "pixel_size_nm": find_pixel_size(images) or (summary or {}).get("pixel_size_nm"),
            "split": None,
            "split_hash": None,
            "fingerprint": None,
        },
    )


def find_tiles(config, candidates: Sequence[Candidate]) -> DataConfig | None:
    """Return the tiling of the first run, changed as the flags say; None without a run."""
    configs = [each.model.config for each in candidates if each.model is not None]
    tiles = [each["tiles"] for each in configs if each]
    return change_tiles(config, tiles[0]) if tiles else None


def change_tiles(config, values: dict) -> DataConfig:
    """Return a tiling from these values and --tiles; the cache is that of --cache-dir alone."""
    values = values | parse_pairs(config.tiles, "--tiles", "resolution=64")
    values["cache_dir"] = config.cache_dir  # a run of others may name any folder
    return config_from_dict(DataConfig, values)


def cut_candidates(config, candidates: Sequence[Candidate], log) -> list[Candidate]:
    """Return the candidates, those of images as large as the tiles of the first run."""
    tiles = find_tiles(config, candidates)
    return [
        each
        if each.images is None
        else dataclasses.replace(
            each, images=cut_large(each.name, each.source, each.images, tiles, log)
        )
        for each in candidates
    ]


def cut_large(name: str, source: str, images, tiles: DataConfig | None, log):
    """Return images of the size of a run's tiles; larger ones are cut as its micrographs are.

    Images that `generate.py` wrote have the pixels of the tiles: they are cut as they are.

    Raises:
        ValueError: The images are larger or smaller than the tiles and cannot be cut, or they have
            the size of tiles and are too dark for their 16 bits.
    """
    size = "" if tiles is None else f"tiles of {tiles.resolution} px"
    if tiles is None or images.shape == (tiles.resolution, tiles.resolution):
        images.check_range()
        for sentence in images.ignored:
            log(f"{name}: {sentence}")
        return images
    if is_generated(source):
        tiles = dataclasses.replace(tiles, downsample=1, label_bar="keep", intensity="full")
    height, width = images.shape
    factor = tiles.downsample
    if min(height, width) < tiles.resolution * factor:
        raise ValueError(
            f"{name} has images of {height} x {width} px, but the run has {size}"
            f"{f', averaged {factor} x {factor}' if factor > 1 else ''}. Give images of "
            f"{tiles.resolution} x {tiles.resolution} px, or micrographs of at least "
            f"{tiles.resolution * factor} px a side, which are then cut."
        )
    cut = load_tiles(source, tiles, log=log)
    log(
        f"{name}: {len(images):,} images of {height} x {width} px, cut into {len(cut):,} {size}"
        + (f", averaged {factor} x {factor}" if factor > 1 else "")
    )
    return cut


def is_generated(source: str) -> bool:
    """Return whether `generate.py` wrote a folder, or the folder of images of its pairs."""
    folder = Path(source)
    return any((each / RECORD).is_file() for each in (folder, folder.absolute().parent))


def find_data(config, candidates: Sequence[Candidate]) -> tuple[str, DataConfig]:
    """Return the source and the tiling of the micrographs: the flags', else the first run's."""
    models = [each.model for each in candidates if each.model is not None]
    sources = [(str((model.config or {}).get("data") or ""), model.folder) for model in models]
    # a repository of others may name any folder of this machine
    told = [source for source, folder in sources if source and (folder or is_public(source))]
    if config.data is None and not told:
        raise ValueError(
            "These models do not say which micrographs they were trained on. Name real images "
            "with --data MICROGRAPHS or --reference FOLDER."
        )
    source = config.data if config.data is not None else told[0]
    tiles = find_tiles(config, candidates)
    if tiles is None:
        sizes = [each.images.shape[0] for each in candidates if each.images is not None]
        tiles = change_tiles(config, {"resolution": sizes[0]} if sizes else {})
    return source, tiles


def print_summary(report: dict, page: Path, candidates: Sequence[Candidate]) -> None:
    """Print the table of distances, one sentence per model, the page and the next command."""
    levels = [(level["key"], level["title"]) for level in report["levels"]]
    rows = [(model["name"], model["name"]) for model in report["models"]] + levels
    width = max(len(title) for _, title in rows)
    number, beside = report["protocol"]["num_images"], wording.name_reference(report)
    print(f"\nFrechet distance to {beside} ({number:,} of each set, 95 % interval)")
    for key, title in rows:
        print(f"  {title:{width}}  {format_interval(wording.find_metric(report, key))}")
    print()
    for sentence in wording.conclude_repeats(report):
        print(sentence)
    for model in report["models"]:
        print(wording.summarise_model(report, model["name"]))
    for warning in wording.warn(report):
        print(f"Warning: {warning}")
    for note in wording.list_notes(report):
        print(f"Note: {note}")
    print(f"\nReport: {page}")
    runs = [each.source for each in candidates if each.model and each.model.folder]
    if runs:
        name = re.sub(r"[^a-zA-Z0-9]+", "-", Path(runs[0]).resolve().name).strip("-") or "model"
        words = ["python", "publish.py", runs[0], name, "--evaluation", str(page.parent)]
        print(f"Next: publish a model with its numbers: {shlex.join([*words, '--private'])}")
