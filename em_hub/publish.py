"""A run -> a repository on the Hub that loads where this project is absent: weights, code, card, samples, evaluation."""

import contextlib
import dataclasses
import json
import re
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError

from em_data import save_image_grid
from em_data.files import write_atomically
from em_evaluation.environment import describe_environment
from em_generation.loading import find_pipeline_folder, hash_weight_files, read_model
from em_hub.card import HIDDEN, VARIANT, make_card, read_evaluation
from em_hub.transport import HUB_ID, MAIN, check_dry_run_folder, find_account, upload_folder

WEIGHTS_OF_A_PART = r"(vqvae|unet|scheduler|grain|generator)/.+"
PUBLIC_DATA = ("synthetic", "hub:", "hub-stream:")


@dataclasses.dataclass(frozen=True)
class PublishConfig:
    """Publish a trained model on the Hub, so that others load it in one line. A second call sends what has changed or is missing."""

    run: str
    """A run's folder, or a folder with a saved pipeline."""
    repo: str
    """The repository's name: owner/name, or name for one's own. Made where there is none."""
    private: bool = False
    """Show a new repository to its owner alone."""
    revision: str | None = None
    """A branch to publish to, made where there is none; left out, main."""
    token: str | None = None
    """A token with write rights; left out, that of HF_TOKEN or of `hf auth login`."""
    evaluation: str | None = None
    """report.json of evaluate.py, whose numbers go into the card and the Hub's own metadata."""
    license: str | None = None
    """Licence of the weights by its name on the Hub, such as apache-2.0 or cc-by-4.0; left out, the card says that none is stated."""
    num_samples: int = 16
    """Images in the card's picture; 0 for none."""
    dry_run: str | None = None
    """Write the repository into this new folder, and upload nothing."""


def publish_run(config: PublishConfig, *, say=lambda text: print(text, file=sys.stderr)) -> str:
    """Build the repository of a run, upload it in one commit, compare what the Hub then holds; return the page's address.

    Raises `ValueError` in one sentence: no finished run, no token or one without rights, a name that holds something else, no
    network, a Hub that is busy. Nothing is visible before all of it has arrived; the same call goes on where an upload was cut.
    """
    folder = find_pipeline_folder(config.run)
    if folder is None:
        raise ValueError(
            f"there is no folder {config.run}; give a run's folder, or a folder with a saved pipeline"
        )
    if config.dry_run is not None:
        out = check_dry_run_folder(config.dry_run)
        build_repository(config, out)
        say(f"{out}: the whole repository; nothing was uploaded")
        return str(out)
    config = dataclasses.replace(
        config, repo=find_account(config.repo, config.token)
    )  # before anything long begins
    with tempfile.TemporaryDirectory(prefix="em-publish-") as temporary:
        build_repository(config, Path(temporary))
        class_name = read_model(temporary).family.class_name
        upload = upload_folder(
            temporary,
            config.repo,
            private=config.private,
            revision=config.revision,
            token=config.token,
            message=f"Publish {Path(config.run).resolve().name}",
            check=lambda *there: refuse_other_content(*there, class_name),
            is_replaced=lambda path: bool(re.fullmatch(rf"{WEIGHTS_OF_A_PART}|[^/]+\.py", path)),
        )
    if config.license is None:
        say(
            "the card says that no licence is stated: name one with --license, such as --license apache-2.0"
        )
    say(f"{upload.url} (commit {upload.commit[:8]}), verified")
    return upload.url


def refuse_other_content(
    api, repo_id: str, paths: set[str], revision: str, class_name: str
) -> None:
    """Refuse a branch of a repository that holds anything else than a pipeline of the same class."""
    held = None
    if "model_index.json" in paths:
        index = Path(
            api.hf_hub_download(repo_id, "model_index.json", revision=revision)
        ).read_text()
        held = json.loads(index).get("_class_name")
        held = held[-1] if isinstance(held, list) else held
    if held != class_name:
        what = f"a {held}" if held else f"something else ({', '.join(sorted(paths)[:3])})"
        where = repo_id if revision == MAIN else f"{repo_id}@{revision}"
        raise ValueError(
            f"{where} holds {what}, not a {class_name}; choose another name, or empty it first"
        )


def build_repository(config: PublishConfig, out: Path) -> None:
    """Write all that the repository of a run holds into `out`."""
    license = config.license
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ValueError(
            f"--license {license} is no licence's name on the Hub; write it as apache-2.0, cc-by-4.0 or other"
        )
    if config.num_samples < 0:
        raise ValueError(f"--num-samples {config.num_samples}: a number of images, or 0 for none")
    source = find_pipeline_folder(config.run)
    evaluation = (
        read_evaluation(config.evaluation, hash_weight_files(source)) if config.evaluation else None
    )
    pipeline = read_model(str(source)).load()
    record = make_record(Path(config.run))
    if config.num_samples:
        save_image_grid(draw_samples(pipeline, config.num_samples), out / "samples.png")
    card = make_card(
        pipeline,
        repo_id=config.repo,
        record=record,
        evaluation=evaluation,
        license=license,
        revision=config.revision,
        num_samples=config.num_samples,
    )
    try:
        save_weights(pipeline, out)
    except SafetensorError as error:  # of the disk: it is no OSError
        raise ValueError(
            f"the weights cannot be written to {out} ({error}); make room, or set TMPDIR to another disk"
        ) from error
    write_atomically(out / "README.md", card)
    write_atomically(out / "run.json", json.dumps(record, indent=2) + "\n")
    if evaluation is not None:
        write_atomically(out / "evaluation.json", json.dumps(evaluation, indent=1) + "\n")


def save_weights(pipeline, out: Path) -> None:
    """Save a float32 pipeline and the narrow variant of its weights; leaves the pipeline narrow.

    The codes of a VQ autoencoder stay float32 in the variant, since rounded ones are confused with each other.
    """
    pipeline.save_pretrained(out)
    codes = getattr(getattr(getattr(pipeline, "vqvae", None), "quantize", None), "embedding", None)
    exact = None if codes is None else codes.weight.detach().clone()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(
                part, torch.bfloat16
            )  # diffusers' own `to` warns of every narrower type
    if exact is not None:
        codes.weight = torch.nn.Parameter(exact, requires_grad=False)
    pipeline.save_pretrained(out, variant=VARIANT)


def draw_samples(pipeline, num: int):
    """The images of the card: [N, 1, H, W] in [-1, 1], image i of generator i, as the card's own call makes them."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(num)]
    pipeline.set_progress_bar_config(desc="samples of the card", disable=not sys.stderr.isatty())
    return pipeline(batch_size=num, generator=generators, output_type="pt").images * 2 - 1


def make_record(run: Path) -> dict:
    """Return what the repository's run.json says: the run's own, with the versions, without what names files, folders or specimens."""
    with contextlib.suppress(FileNotFoundError):
        content = json.loads((run / "run.json").read_text())
        data, config = content.get("data") or {}, dict(content.get("config") or {})
        source, stages = str(config.pop("data", "")), content.get("train_seconds_by_stage") or {}
        config.pop("out", None)
        config = hide_paths(config)
        if is_public(source):
            config["data"] = source
        return {
            **{
                key: content.get(key)
                for key in ("name", "family", "train_seconds", "num_images_seen")
            },
            **{
                key: content[key]
                for key in ("denoiser_weights", "generator_weights")
                if key in content
            },
            "stages": stages,
            "has_stages": len(stages) > 1,
            "config": config,
            "data": {key: value for key, value in data.items() if key not in HIDDEN},
            "versions": list_versions(),
        }
    name = run.resolve().parent.name if run.resolve().name == "pipeline" else run.resolve().name
    return {"name": name, "family": "unknown", "versions": list_versions()}


def is_public(source: str) -> bool:
    """Say whether the name of a run's data means the same to others: the embedded micrographs, or a set on the Hub."""
    if source.startswith("datasets:"):
        return (
            bool(HUB_ID.fullmatch(source.removeprefix("datasets:")))
            and not Path(source.removeprefix("datasets:")).exists()
        )
    return source.startswith(PUBLIC_DATA)


def hide_paths(value):
    """Return a configuration with the last name alone of every path on this machine."""
    if isinstance(value, dict):
        return {
            key: None
            if key == "cache_dir"
            else hide_paths("./" + each if key == "init_from" and each else each)
            for key, each in value.items()
        }
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


def list_versions() -> dict:
    """Return the versions of this project and of what decides its images."""
    environment = describe_environment()
    return {"python": environment["python"], **environment["versions"]}
