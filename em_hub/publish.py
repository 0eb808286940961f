"""A run -> a repository on the Hub that loads without this project."""

import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from jinja2 import UndefinedError
from safetensors import SafetensorError

import em_pretrained
from em_data import save_image_grid
from em_data.files import write_atomically
from em_evaluation.environment import describe_environment
from em_generation.loading import SOURCES, Model, find_pipeline_folder, is_public, read_model
from em_hub.card import HIDDEN, VARIANT, make_card, read_evaluation
from em_hub.transport import HUB_ID, MAIN, check_dry_run_folder, find_account, upload_folder
from em_training.config import read_json_object
from em_training.family import check_options
from em_training.saved_models import explain_failure

LICENSE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")


def say(text: str) -> None:
    """Print a message to stderr."""
    print(text, file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class PublishConfig:
    """Publish a trained model on the Hub, so that others load it in one line.

    A second call sends what has changed or is missing.
    """

    run: str
    """A run's folder, a folder with a saved pipeline, or a model in the package."""
    repo: str
    """The repository: owner/name, or name for your own. It is created if it does not exist."""
    private: bool = False
    """Create the repository for its owner alone."""
    revision: str | None = None
    """A branch to publish to, created if it does not exist. Default: main."""
    token: str | None = None
    """A token with write rights. Default: HF_TOKEN, or that of `hf auth login`."""
    evaluation: str | None = None
    """report.json of evaluate.py. Its numbers go into the card and into the Hub's metadata."""
    license: str | None = None
    """Licence of the weights by its name on the Hub, such as apache-2.0 or cc-by-4.0. Default: that
    of the model's card, if it has one; else the card says that none is stated."""
    num_samples: int = 16
    """Images in the card's picture; 0 for none."""
    dry_run: str | None = None
    """Write the repository into this new folder, and upload nothing."""

    def __post_init__(self):
        if self.license is not None and not LICENSE_NAME.fullmatch(self.license):
            raise ValueError(
                f"--license {self.license} is not a licence's name on the Hub. Write it like "
                "apache-2.0, cc-by-4.0 or other."
            )
        check_options(self, num_samples=(0, 10_000))


def publish_run(config: PublishConfig, *, say: Callable[[str], object] = say) -> str:
    """Build the repository of a run and upload it in one commit; return the page's address.

    What the Hub then holds is compared with what was sent. Nothing is visible before all of it has
    arrived. The same call continues an upload that was cut.

    Raises:
        ValueError: No finished run, no token or one without rights, a repository that holds
            something else, no network, or a busy Hub.
    """
    if find_pipeline_folder(config.run) is None and em_pretrained.find(config.run) is None:
        raise ValueError(
            f"There is no folder {config.run}. Give a run's folder, or one with a saved pipeline."
        )
    model = read_model(config.run)
    license = config.license or em_pretrained.read_license(model.pipeline_folder)
    config = dataclasses.replace(config, license=license)
    note = make_record(model).get("note")
    if note:
        say(f"Warning: {note}")
    if config.dry_run is not None:
        out = check_dry_run_folder(config.dry_run)
        build_repository(config, model, out)
        say(f"{out} holds the whole repository; nothing was uploaded")
        return str(out)
    # before anything long begins
    config = dataclasses.replace(config, repo=find_account(config.repo, config.token))
    with tempfile.TemporaryDirectory(prefix="em-publish-") as temporary:
        build_repository(config, model, Path(temporary))
        parts = "|".join(list_parts(Path(temporary)))
        upload = upload_folder(
            temporary,
            config.repo,
            private=config.private,
            revision=config.revision,
            token=config.token,
            message=f"Publish {Path(config.run).resolve().name}",
            check=partial(refuse_other_content, class_name=model.family.class_name),
            is_replaced=lambda path: bool(re.fullmatch(rf"({parts})/.+|[^/]+\.py", path)),
        )
    if config.license is None:
        say("The card states no licence. Name one with --license, such as --license apache-2.0.")
    say(f"{upload.url} (commit {upload.commit[:8]}), verified")
    return upload.url


def refuse_other_content(
    api, repo_id: str, paths: set[str], revision: str, class_name: str
) -> None:
    """Refuse a branch that holds anything but a pipeline of the same class."""
    held = None
    if "model_index.json" in paths:
        path = api.hf_hub_download(repo_id, "model_index.json", revision=revision)
        held = json.loads(Path(path).read_text()).get("_class_name")
        held = held[-1] if isinstance(held, list) else held
    if held != class_name:
        what = f"a {held}" if held else f"something else ({', '.join(sorted(paths)[:3])})"
        where = repo_id if revision == MAIN else f"{repo_id}@{revision}"
        raise ValueError(
            f"{where} holds {what}, not a {class_name}. Choose another name, or empty it first."
        )


def list_parts(folder: Path) -> list[str]:
    """Return the names of a saved pipeline's components, whose folders are replaced as a whole."""
    index = json.loads((folder / "model_index.json").read_text())
    return [
        re.escape(name)
        for name, value in index.items()
        if isinstance(value, list) and not name.startswith("_")
    ]


def build_repository(config: PublishConfig, model: Model, out: Path) -> None:
    """Write all files of the repository of a run into `out`."""
    evaluation = None
    if config.evaluation:
        evaluation = read_evaluation(config.evaluation, model.weights_sha256)
    pipeline = model.load()
    record = make_record(model)
    if config.num_samples:
        save_image_grid(
            draw_samples(model, pipeline, config.num_samples), out / "samples.png", min_width=512
        )
    try:
        card = make_card(
            pipeline,
            repo_id=config.repo,
            record=record,
            evaluation=evaluation,
            license=config.license,
            revision=config.revision,
            num_samples=config.num_samples,
        )
    except (UndefinedError, TypeError) as error:
        raise ValueError(
            f"No card can be made from run.json of {config.run}: it is damaged, or of a version "
            f"that recorded less ({error})."
        ) from error
    try:
        save_weights(pipeline, model.family.find_exact_modules(pipeline), out)
    except SafetensorError as error:  # a full disk, which is no OSError here
        raise ValueError(
            f"The weights cannot be written to {out} ({error}). Make room, or set TMPDIR to "
            "another disk."
        ) from error
    write_atomically(out / "README.md", card)
    write_atomically(out / "run.json", json.dumps(record, indent=2) + "\n")
    if evaluation is not None:
        write_atomically(out / "evaluation.json", json.dumps(evaluation, indent=1) + "\n")


def save_weights(pipeline, exact_modules, out: Path) -> None:
    """Save a float32 pipeline and the narrow variant of its weights; the pipeline stays narrow.

    exact_modules: their weights stay float32 in the variant.
    """
    pipeline.save_pretrained(out)
    kept = [(module, module.weight.detach().clone()) for module in exact_modules]
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            # diffusers' own `to` warns of every narrower type
            torch.nn.Module.to(part, torch.bfloat16)
    for module, weight in kept:
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
    pipeline.save_pretrained(out, variant=VARIANT)


def draw_samples(model: Model, pipeline, num: int):
    """Return the card's images [N, 1, H, W] in [-1, 1]; image i is that of the card's own call."""
    if model.family.card.samples_by_drawer:
        try:
            drawer = model.start(pipeline, model.family.options(), seed=0, batch_size=num, say=say)
            return drawer.draw(list(range(num)))
        except ValueError as error:
            raise ValueError(f"{error} --num-samples 0 leaves out the card's picture.") from error
    rngs = [torch.Generator().manual_seed(seed) for seed in range(num)]
    pipeline.set_progress_bar_config(desc="samples of the card", disable=not sys.stderr.isatty())
    with explain_failure():
        return pipeline(batch_size=num, generator=rngs, output_type="pt").images * 2 - 1


def make_record(model: Model) -> dict:
    """Return the repository's run.json.

    It is the run's own with the versions, without names of files, folders or specimens.
    """
    path = (model.folder or model.pipeline_folder) / "run.json"
    if not path.is_file():
        folder = Path(model.source).resolve()
        name = folder.parent.name if folder.name == "pipeline" else folder.name
        return {"name": name, "family": model.kind, "versions": list_versions()}
    content = read_json_object(path)
    config = dict(content.get("config") or {})
    sources = {key: str(config.pop(key, "")) for key in SOURCES}
    stages = content.get("train_seconds_by_stage") or content.get("stages") or {}
    config.pop("out", None)
    config = hide_paths(config)
    config |= {key: source for key, source in sources.items() if is_public(source)}
    known = ("name", "family", "train_seconds", "num_images_seen")
    optional = ("preset", "note", "started_from")
    return {
        **{key: content.get(key) for key in known},
        **{key: content[key] for key in optional if content.get(key)},
        **{key: value for key, value in content.items() if key.endswith("_weights")},
        "stages": stages,
        "has_stages": len(stages) > 1,
        "config": config,
        "data": {k: v for k, v in (content.get("data") or {}).items() if k not in HIDDEN},
        "versions": list_versions(),
    }


def hide_paths(value):
    """Return a configuration in which only the last part of every local path is left."""
    if isinstance(value, dict):
        return {key: _hide_path_of(key, each) for key, each in value.items()}
    if isinstance(value, list):
        return [hide_paths(each) for each in value]
    if isinstance(value, str) and ("/" in value or "\\" in value):
        is_path = (
            value.startswith((".", "/", "~"))
            or "\\" in value
            or Path(value).exists()
            or not HUB_ID.fullmatch(value)
        )
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if is_path else value
    return value


def _hide_path_of(key, value):
    if key == "cache_dir":
        return None
    # always a path, even if it reads as a Hub id
    return hide_paths("./" + value if key == "init_from" and value else value)


def list_versions() -> dict:
    """Return the versions of this project and of what decides its images."""
    environment = describe_environment()
    return {"python": environment["python"], **environment["versions"]}
