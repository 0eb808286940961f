"""A run and its evaluation -> a model card: front matter that the Hub reads, and a page for people, from the templates in model_cards."""

import json
import math
from pathlib import Path

import diffusers
import jinja2
import torch
from huggingface_hub import EvalResult, ModelCardData

from em_evaluation.conclusion import format_number
from em_evaluation.memorisation_report import conclude_memorisation
from em_evaluation.metrics import METRICS
from em_evaluation.report import format_count, format_duration

CODE_LICENSE = "Apache-2.0"
TASK = "unconditional-image-generation"
SAMPLING = (
    "scheduler",
    "num_inference_steps",
    "eta",
    "truncation_psi",
    "noise_mode",
    "grain",
    "precision",
    "seed",
)
VARIANT = "bf16"
FAMILIES = {
    "EMLatentDiffusionPipeline": (
        "ldm.md.j2",
        "em_diffusion",
        "latent-diffusion",
        "latent diffusion model",
    ),
    "EMStyleGANPipeline": ("stylegan.md.j2", "em_stylegan", "stylegan", "StyleGAN"),
}


def make_card(
    pipeline, *, repo_id, record, evaluation=None, license=None, revision=None, num_samples=0
) -> str:
    """Return the text of README.md: metadata and page, whose every number comes from the arguments.

    pipeline: the one that is published. record: what run.json of the repository says, as `em_hub.publish.make_record` makes it.
    evaluation: what `read_evaluation` returns. license: its identifier on the Hub; None where the publisher states none.
    num_samples: images in samples.png; 0 for none.
    """
    template, package, tag, family = FAMILIES[type(pipeline).__name__]
    title = f"Electron micrographs by a {family}: {record['name']}"
    metadata = ModelCardData(
        license=license or "unknown",
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["electron-microscopy", "synthetic-data", "materials-science", tag],
        model_name=record["name"],
        eval_results=(make_eval_results(record, evaluation) or None) if evaluation else None,
    )
    values = {
        "title": title,
        "repo_id": repo_id,
        "revision": revision,
        "package": package,
        "class_name": type(pipeline).__name__,
        "call": {"batch_size": num_samples or 1},
        "samples": bool(num_samples),
        "components": {
            name: type(part).__name__ for name, part in pipeline.components.items() if part
        },
        "data": record.get("data"),
        "pixel_size_nm": pipeline.config.pixel_size_nm,
        "evaluation": evaluation,
        "metrics": list_metrics(evaluation) if evaluation else [],
        "run": record if record.get("num_images_seen") is not None else None,
        "variant": VARIANT,
        "versions": record["versions"],
        "license": license,
        "code_license": CODE_LICENSE,
    }
    values |= (
        describe_ldm(pipeline)
        if hasattr(pipeline, "unet")
        else {"resolution": pipeline.generator.config.resolution}
    )
    page = create_environment().get_template(template).render(values)
    return f"---\n{metadata.to_yaml()}\n---\n\n{page}"


def describe_ldm(pipeline) -> dict:
    """Return what only the template of the latent diffusion model asks for."""
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    stock = [
        type(part).__name__
        for part in pipeline.components.values()
        if type(part).__module__.startswith("diffusers.")
    ]
    return {
        "resolution": pipeline.decode(
            torch.zeros(1, pipeline.unet.config.in_channels, height, width), add_grain=False
        ).shape[-1],
        "latents": {"channels": pipeline.unet.config.in_channels, "height": height, "width": width},
        "autoencoder": {"num_codes": pipeline.vqvae.config.get("num_vq_embeddings")},
        "default_num_inference_steps": pipeline.config.default_num_inference_steps,
        "stock": [name for name in stock if hasattr(diffusers, name)],
    }


def create_environment() -> jinja2.Environment:
    """Return what renders the templates; a placeholder without a value is an error."""
    try:
        loader = jinja2.PackageLoader("model_cards", package_path="")
    except (ValueError, ImportError) as error:
        raise ValueError(
            "the templates of the model cards (package model_cards) are not installed; install the project again"
        ) from error
    environment = jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": format_number,
        "duration": format_duration,
        "count": format_count,
    }
    environment.filters["sentence"] = lambda text: text[:1].upper() + text[1:]
    return environment


def read_evaluation(path, weights_sha256: str) -> dict:
    """Return what a report.json of evaluate.py says of the model with these weights: protocol, dataset, model, floors, sentences.

    The model is found by its weights and not by its name, so that no card has another model's numbers. Of several LDMs, only
    the floor of this one's autoencoder is kept. Raises `ValueError` for a file that is no report or does not judge this model.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "report.json"
    try:
        report = json.loads(path.read_text())
        models, floors = report["models"], report["floors"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no report of evaluate.py; give its report.json with --evaluation"
        ) from error
    found = [model for model in models if model["info"].get("weights_sha256") == weights_sha256]
    if not found:
        judged = ", ".join(model["name"] for model in models)
        raise ValueError(
            f"{path} does not judge this model ({judged} had other weights); run evaluate.py on it and give the new report.json"
        )
    name, others = found[0]["name"], {model["name"] for model in models} - {found[0]["name"]}
    kept = [
        floor
        for floor in floors.values()
        if not any(is_about(other, floor["name"]) for other in others)
    ]
    sentences = [
        text
        for text in [*report["conclusion"], *report.get("warnings", ())]
        if is_about(name, text) and not any(is_about(other, text) for other in others)
    ]
    hidden = ("source", "held_out", "ignored", "notices", "specimens")
    return {
        "protocol": report["protocol"],
        "dataset": {key: value for key, value in report["dataset"].items() if key not in hidden},
        "model": {key: value for key, value in found[0].items() if key != "curves"},
        "floors": kept,
        "sentences": sentences,
        "memorisation": conclude_memorisation(report["memorisation"], [name])
        if report.get("memorisation")
        else [],
        "sampling": say_sampling(found[0]["info"]),
        "environment": report.get("environment"),
    }


def say_sampling(info: dict) -> dict:
    """How the images that were measured were drawn, in words where it is yes or no."""
    known = {key: info[key] for key in SAMPLING if info.get(key) is not None}
    return {
        key: ("added" if value else "left out") if key == "grain" else value
        for key, value in known.items()
    }


def is_about(name: str, text: str) -> bool:
    """Say whether a text names a model as a word of its own: "StyleGAN" is not in "StyleGAN2"."""
    position = text.find(name)
    while position >= 0:
        before, after = (
            text[position - 1 : position],
            text[position + len(name) : position + len(name) + 1],
        )
        if not (before.isalnum() or after.isalnum()):
            return True
        position = text.find(name, position + 1)
    return False


def list_metrics(evaluation) -> list[dict]:
    """Return the metrics that the model has: key, label, and which way is better; a floor may lack some of them."""
    return [
        {
            "key": key,
            "label": metric.label,
            "better": "higher" if metric.higher_is_better else "lower",
        }
        for key, metric in METRICS.items()
        if is_measured(evaluation["model"]["metrics"].get(key))
    ]


def is_measured(metric) -> bool:
    """Say whether a metric of a report has a number: the Hub takes no other."""
    return bool(metric) and metric["value"] is not None and math.isfinite(metric["value"])


def make_eval_results(record, evaluation) -> list[EvalResult]:
    """Return the evaluation as the Hub shows it beside a model: value, interval and protocol of each metric that has a number."""
    protocol, dataset = evaluation["protocol"], evaluation["dataset"]
    return [
        EvalResult(
            task_type=TASK,
            dataset_type="electron-micrographs",
            dataset_name=dataset["name"],
            dataset_split=f"held out by {dataset['split']}",
            dataset_args={
                "split_hash": dataset["split_hash"],
                "num_images": protocol["num_images"],
            },
            metric_type=key,
            metric_name=f"{METRICS[key].label} ({protocol['extractor'].split(',')[0]})",
            metric_value=metric["value"],
            metric_args=describe_interval(metric, protocol),
        )
        for key, metric in evaluation["model"]["metrics"].items()
        if key in METRICS and is_measured(metric)
    ]


def describe_interval(metric, protocol) -> dict | None:
    """Return low, high and kind of a metric's interval; None where it has none."""
    bounds = {key: metric.get(key) for key in ("low", "high")}
    if any(bound is None or not math.isfinite(bound) for bound in bounds.values()):
        return None
    return bounds | {"intervals": protocol["intervals"]}
