"""The model card of a published run, from the templates in model_cards."""

import math
import re

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from em_data.markdown import escape_markdown
from em_evaluation import wording
from em_evaluation.class_report import conclude_classes, keep_classes
from em_evaluation.compare import read_report
from em_evaluation.feature_metrics import METRICS
from em_evaluation.memorisation_report import conclude_memorisation
from em_evaluation.numbers import format_count, format_duration, format_interval, format_number
from em_evaluation.repeats import say_one_of
from em_generation.families import find_family
from em_training.sources import say_starts

CODE_LICENSE = "Apache-2.0"
SAMPLING = (
    "scheduler",
    "num_inference_steps",
    "eta",
    "classes",
    "guidance_scale",
    "guidance_start",
    "guidance_stop",
    "truncation_psi",
    "noise_mode",
    "grain",
    "precision",
    "seed",
)
VARIANT = "bf16"
HIDDEN = ("source", "held_out", "ignored", "notices", "specimens")  # of the data: private names


def make_card(
    pipeline,
    *,
    repo_id,
    record,
    evaluation=None,
    license=None,
    revision=None,
    num_samples=0,
    is_in_package=False,
) -> str:
    """Return the text of a repository's README.md: metadata for the Hub and a page for people.

    Args:
        pipeline: The pipeline that is published.
        repo_id: Its repository, owner/name.
        record: What the repository's run.json says.
        evaluation: What `read_evaluation` returns, or None.
        license: The licence's identifier on the Hub; None if none is stated.
        revision: The branch; None for the main one.
        num_samples: Images in samples.png; 0 for none.
        is_in_package: Whether the model comes with this package; `repo_id` is then its name.
    """
    family = find_family(type(pipeline).__name__)
    name = " ".join(str(record["name"]).split())
    described = family.card.describe(pipeline)
    values = {
        "title": f"Electron micrographs by a {family.card.noun}: {name}",
        "repo_id": repo_id,
        "revision": revision,
        "is_in_package": is_in_package,
        "package": family.card.package,
        "class_name": type(pipeline).__name__,
        "call": {"batch_size": num_samples or 1},
        "samples": bool(num_samples),
        "components": {
            name: type(part).__name__ for name, part in pipeline.components.items() if part
        },
        "data": record.get("data"),
        "pixel_size_nm": pipeline.config.pixel_size_nm,
        **view_classes(pipeline),
        **view_evaluation(evaluation),
        "run": record if record.get("num_images_seen") is not None else None,
        "started_from": say_starts(record.get("started_from")),
        "start_licenses": list_licenses(record.get("started_from")),
        "variant": VARIANT,
        "versions": record["versions"],
        "license": license,
        "code_license": CODE_LICENSE,
        **described,
    }
    page = create_environment().get_template(family.card.template).render(values)
    metadata = make_metadata(family.card, name, license, evaluation, described.get("base_model"))
    return f"---\n{metadata.to_yaml()}\n---\n\n{page}"


def make_metadata(card, name: str, license, evaluation, base_model: str | None) -> ModelCardData:
    """Return what the Hub reads of a card: by it, models are found and listed."""
    return ModelCardData(
        license=license or "unknown",
        library_name="diffusers",
        pipeline_tag=card.task,
        tags=["electron-microscopy", "synthetic-data", "materials-science", card.tag],
        model_name=name,
        base_model=base_model,
        eval_results=make_eval_results(evaluation, card.task) or None,
    )


def view_classes(pipeline) -> dict:
    """Return the names of a pipeline's classes, and one as the page's code has it.

    A name that has more than letters, digits and some signs is there by its number.
    """
    names = list(getattr(pipeline, "labels", ()))
    is_plain = names and re.fullmatch(r"[\w .+-]+", names[0])
    example = f'"{names[0]}"' if is_plain else pipeline.labels[names[0]] if names else None
    return {"classes": names, "example_class": example}


def view_evaluation(evaluation: dict | None) -> dict:
    """Return what the template shows of an evaluation, or of none."""
    return {
        "evaluation": evaluation,
        "metrics": list_metrics(evaluation) if evaluation else [],
        "rows": list_rows(evaluation) if evaluation else [],
        "sentences": list_sentences(evaluation) if evaluation else [],
        "sampling": say_sampling(evaluation["models"][0]["info"]) if evaluation else {},
    }


def list_licenses(started: dict | None) -> list[str]:
    """Return the licences of the models that a run started from, as far as they are known."""
    origins = [each for each in (started or {}).values() if isinstance(each, dict)]
    return sorted({str(each["license"]) for each in origins if each.get("license")})


def create_environment() -> jinja2.Environment:
    """Return the environment of the templates; a placeholder without a value is an error."""
    try:
        loader = jinja2.PackageLoader("model_cards", package_path="")
    except (ValueError, ImportError) as error:
        raise ValueError(
            "The templates of the model cards (package model_cards) are missing. "
            "Install the project again."
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
        "interval": format_interval,
        "duration": format_duration,
        "count": format_count,
        "text": escape_markdown,
    }
    return environment


def read_evaluation(path, weights_sha256: str) -> dict:
    """Read what a report says about the model with these weights: a report of that model alone.

    The model is found by its weights, not by its name, so that no card has another model's
    numbers. Other models, their reference levels and private names are left out.

    Raises:
        ValueError: The file is no report of this version, or does not judge this model.
    """
    report = read_report(path)
    found = [
        model for model in report["models"] if model["info"].get("weights_sha256") == weights_sha256
    ]
    if not found:
        judged = ", ".join(model["name"] for model in report["models"])
        raise ValueError(
            f"{path} does not judge this model: {judged} had other weights. Run evaluate.py on "
            "this model and give the new report.json with --evaluation."
        )
    name = found[0]["name"]
    levels = [level for level in report["levels"] if level["model"] in (None, name)]
    kept = {name, *(level["key"] for level in levels)}
    first = report["measurements"][0]
    rows = {key: row for key, row in first["rows"].items() if key in kept}
    memorisation = report["memorisation"]
    return {
        "format": report["format"],
        "protocol": report["protocol"],
        "dataset": {key: value for key, value in report["dataset"].items() if key not in HIDDEN},
        "models": [{key: value for key, value in found[0].items() if key != "curves"}],
        "levels": levels,
        "measurements": [first | {"rows": rows, "blind_spots": []}],
        "comparisons": [
            each
            for each in report["comparisons"]
            if each["first"] == name and each["second"] in kept
        ],
        "autoencoders": [each for each in report["autoencoders"] if each["model"] == name],
        "verdicts": [each for each in report["verdicts"] if each["model"] == name],
        "repeats": [
            {key: each[key] for key in ("seeds", "measurements", "exceeds_intervals")}
            for each in report.get("repeats", [])
            if name in each["models"]
        ],
        "memorisation": keep_model(memorisation, name) if memorisation else None,
        "classes": keep_classes(report.get("classes"), name),
        "environment": report["environment"],
    }


def keep_model(section: dict, name: str) -> dict:
    """Return a report's section on memorisation with one model and the held-out tiles only."""
    kept = {
        key: section[key]
        for key in ("max_shift_px", "copy_ratio", "num_train_tiles")
        if key in section
    }
    kept["without_grain"] = [each for each in section["without_grain"] if each == name]
    for part in ("pixels", "features", "partial"):
        if section.get(part):
            sets = {
                key: row for key, row in section[part]["sets"].items() if key in ("held_out", name)
            }
            kept[part] = {"scale": section[part]["scale"], "sets": sets}
    return kept


def list_sentences(evaluation: dict) -> list[str]:
    """Return what the report concludes about the model, in sentences."""
    name = evaluation["models"][0]["name"]
    sentences = [wording.summarise_model(evaluation, name)]
    sentences += [say_one_of(group) for group in evaluation.get("repeats", [])]
    sentences += wording.conclude_model(evaluation, name) + wording.warn(evaluation, name)
    if evaluation["memorisation"]:
        sentences += conclude_memorisation(evaluation["memorisation"], [name])
    if evaluation.get("classes"):
        sentences += conclude_classes(evaluation["classes"], [name])
    return sentences + wording.list_notes(evaluation)


def list_rows(evaluation: dict) -> list[dict]:
    """Return the reference levels of the card's table: title, description, metrics."""
    rows = evaluation["measurements"][0]["rows"]
    return [level | {"metrics": rows[level["key"]]["held_out"]} for level in evaluation["levels"]]


def find_metrics(evaluation: dict) -> dict:
    """Return the model's own metrics against the held-out images."""
    name = evaluation["models"][0]["name"]
    return evaluation["measurements"][0]["rows"][name]["held_out"]


def say_sampling(info: dict) -> dict:
    """Return how the images that were measured were drawn; yes and no in words."""
    known = {key: info[key] for key in SAMPLING if info.get(key) is not None}
    said = {
        key: ("added" if value else "left out") for key, value in known.items() if key == "grain"
    }
    lists = {key: ", ".join(value) for key, value in known.items() if isinstance(value, list)}
    return known | said | lists


def list_metrics(evaluation: dict) -> list[dict]:
    """Return the metrics that the model has: key, label, which way is better, value."""
    measured = find_metrics(evaluation)
    return [
        {
            "key": key,
            "label": metric.label,
            "better": "higher" if metric.higher_is_better else "lower",
            "value": measured[key],
        }
        for key, metric in METRICS.items()
        if is_measured(measured.get(key))
    ]


def is_measured(metric) -> bool:
    """Return whether a metric has a number; the Hub takes no other."""
    return bool(metric) and metric["value"] is not None and math.isfinite(metric["value"])


def make_eval_results(evaluation: dict | None, task: str) -> list[EvalResult]:
    """Return the metrics as the Hub shows them beside a model: value, interval and protocol."""
    if evaluation is None:
        return []
    protocol, dataset = evaluation["protocol"], evaluation["dataset"]
    extractor = evaluation["measurements"][0]["extractor"]
    split = dataset.get("split")
    return [
        EvalResult(
            task_type=task,
            dataset_type="electron-micrographs",
            dataset_name=dataset["name"],
            dataset_split="reference" if split is None else f"held out by {split}",
            dataset_args={
                "split_hash": dataset.get("split_hash"),
                "num_images": protocol["num_images"],
            },
            metric_type=metric["key"],
            metric_name=f"{metric['label']} ({extractor})",
            metric_value=metric["value"]["value"],
            metric_args=describe_interval(metric["value"]),
        )
        for metric in list_metrics(evaluation)
    ]


def describe_interval(metric) -> dict | None:
    """Return low and high of a metric's 95 % interval, or None if it has none."""
    bounds = {key: metric.get(key) for key in ("low", "high")}
    if any(bound is None or not math.isfinite(bound) for bound in bounds.values()):
        return None
    return bounds | {"interval": "95 %"}
