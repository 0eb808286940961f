"""A report's conclusions in words, for the page, the terminal and the model card."""

from collections.abc import Sequence

from em_evaluation.feature_metrics import METRICS
from em_evaluation.numbers import format_interval, format_number
from em_evaluation.repeats import list_units, say_scatter, say_seeds

DISTANCE = "frechet_distance"
OUTCOMES = {
    "fidelity": {"as_real": "as real", "differs": "lower than real"},
    "variety": {"as_real": "as real", "differs": "lower than real"},
    "defects": {"as_real": "as real", "differs": "differ from real"},
}
COMMON = {"undecided": "cannot tell", "not_measured": "not measured"}
BLIND = {
    "nothing_found": "none found on either side, which shows nothing",
    "passed_by_noise": "images without defects would pass, too",
    "narrow": "a model that draws only typical images would pass, too",
}
EFFECTS = {
    "fidelity": "would learn from images that are less like real ones than real images are",
    "variety": "would miss part of what real micrographs show",
    "defects": "would learn the wrong number or size of defects",
}


def find_metric(report: dict, key: str, metric: str = DISTANCE, side: str = "held_out"):
    """Return a metric of a set as {"value", "low", "high"}, or None if it was not measured."""
    return report["measurements"][0]["rows"].get(key, {}).get(side, {}).get(metric)


def find_level(report: dict, kind: str, model: str | None = None) -> dict | None:
    """Return the first reference level of a kind, of a model if one is given."""
    found = [
        level
        for level in report["levels"]
        if level["kind"] == kind and (model is None or level["model"] == model)
    ]
    return found[0] if found else None


def name_sets(report: dict) -> dict[str, str]:
    """Return {key: title} of all sets of a report."""
    names = {"held_out": name_reference(report), "train": "training tiles"}
    names |= {model["name"]: model["name"] for model in report["models"]}
    return names | {level["key"]: level["title"] for level in report["levels"]}


def name_reference(report: dict) -> str:
    """Return what models are compared with: held-out micrographs, or images of --reference."""
    is_folder = "dataset" in report and report["dataset"].get("split") is None
    return "reference images" if is_folder else "held-out micrographs"


def name_real(report: dict, aspect: str) -> str:
    """Return which real images stand beside a model's measures of an aspect."""
    if aspect == "defects":
        return name_reference(report)
    digest = report.get("protocol", {}).get("train_digest")
    return "other reference images" if digest is None else "training tiles"


def find_verdicts(report: dict, model: str) -> list[dict]:
    return [verdict for verdict in report["verdicts"] if verdict["model"] == model]


def say_outcome(verdict: dict) -> str:
    """Return the outcome of a verdict in two or three words."""
    return (OUTCOMES[verdict["aspect"]] | COMMON)[verdict["outcome"]]


def say_reason(verdict: dict) -> str:
    """Return why a verdict is open although no difference was found, else ""."""
    blind = {each.get("blind") for each in verdict["measures"]}
    if verdict["outcome"] == "undecided" and "narrow" in blind:
        return (
            "the recall is below half that of real images, and a model that draws only typical "
            "images has a high precision"
        )
    if blind and None not in blind and "narrow" not in blind:
        return "the detector does not distinguish noise from real images here"
    return ""


def say_measures(report: dict, verdict: dict) -> list[str]:
    """Return the numbers of a verdict, those of real images beside them."""
    if not verdict["measures"]:
        return ["needs real images to compare with, and enough images of enough pixels"]
    return [
        f"{each['label'].capitalize()}{', ' + each['unit'] if each['unit'] else ''}: "
        f"{format_interval(each['value'])}; {name_real(report, verdict['aspect'])} "
        f"{format_interval(each['reference'])}"
        f"{'; ' + BLIND[each['blind']] if each.get('blind') else ''}"
        for each in verdict["measures"]
    ]


def say_for_detector(report: dict, *models: str) -> str:
    """Return what the verdicts mean for a detector that is trained on a model's images.

    models: One, or several whose verdicts have the same outcomes.
    """
    verdicts, caveat = find_verdicts(report, models[0]), say_caveat(report)
    wrong = [each["aspect"] for each in verdicts if each["outcome"] == "differs"]
    open_ = [
        each["aspect"] for each in verdicts if each["outcome"] in ("undecided", "not_measured")
    ]
    if wrong:
        effects = join_words([EFFECTS[aspect] for aspect in wrong])
        shares = "".join(say_share(report, aspect, models) for aspect in wrong)
        return f"A detector trained on these images alone {effects}.{shares}{caveat}"
    if open_:
        return (
            f"These numbers do not show whether a detector can be trained on these images: "
            f"{join_words(open_)} {'is' if open_ in (['fidelity'], ['variety']) else 'are'} open. "
            f"Use more images or more {name_reference(report)}.{caveat}"
        )
    return (
        "Nothing measured here speaks against training a detector on these images. "
        f"Test it on real micrographs.{caveat}"
    )


def say_share(report: dict, aspect: str, models: Sequence[str]) -> str:
    """Say which share of the images resembles no real image, if that is what differs."""
    measures = [
        each
        for model in models
        for verdict in find_verdicts(report, model)
        if verdict["aspect"] == aspect
        for each in verdict["measures"]
        if each["metric"] == "precision" and each["outcome"] == "differs"
    ]
    if not measures:
        return ""
    own = sorted({round(100 * (1 - each["value"]["value"])) for each in measures})
    real = 100 * (1 - measures[0]["reference"]["value"])
    shares = f"{own[0]}" if len(own) == 1 else f"{own[0]} to {own[-1]}"
    beside = name_real(report, aspect)
    return f" {shares} % of the images resemble no real image ({beside}: {real:.0f} %)."


def say_caveat(report: dict) -> str:
    """Return the sentence that goes with verdicts that rest on one micrograph, else ""."""
    if report.get("protocol", {}).get("reference_num_micrographs") != 1:
        return ""
    return " This rests on one real micrograph and may be chance: compare with more."


def summarise_model(report: dict, model: str) -> str:
    """Return one sentence about a model, for the terminal."""
    verdicts = find_verdicts(report, model)
    parts = []
    for verdict in verdicts:
        reasons = [say_reason(verdict)] if say_reason(verdict) else []
        telling = [each for each in verdict["measures"] if each["outcome"] == verdict["outcome"]]
        if telling:
            reasons.insert(0, say_numbers(report, verdict, telling[0]))
        outcome = say_outcome(verdict) + (f" ({'; '.join(reasons)})" if reasons else "")
        parts.append(f"{verdict['aspect']} {outcome}")
    return f"{model}: {', '.join(parts)}. {say_for_detector(report, model)}"


def say_numbers(report: dict, verdict: dict, measure: dict) -> str:
    """Return a measure of a model beside that of real images, without intervals."""
    own, real = (format_number(measure[side]["value"]) for side in ("value", "reference"))
    unit = f" {measure['unit']}" if measure["unit"] else ""
    beside = name_real(report, verdict["aspect"])
    return f"{measure['label'].lower()} {own} against {real}{unit} of {beside}"


def conclude(report: dict) -> list[str]:
    """Return the sentences on distances: models, texture, autoencoders, and what they hold for."""
    models, repeats = [model["name"] for model in report["models"]], report.get("repeats", [])
    single = [name for name, members in list_units(repeats, models).items() if members == [name]]
    sentences = [
        say_closer(report, each)
        for each in report["comparisons"]
        if each["first"] in single and each["second"] in single
    ]
    sentences += conclude_repeats(report)
    for model in models:
        sentences += conclude_model(report, model)
    return sentences + [say_scope(report)]


def conclude_repeats(report: dict) -> list[str]:
    """Return the sentences on trainings that differ in the seed alone: scatter, what holds."""
    sentences = [say_scatter(group) for group in report.get("repeats", [])]
    return sentences + [
        say_seeds(report, each, name_reference(report))
        for each in report.get("comparisons_of_repeats", [])
    ]


def conclude_model(report: dict, model: str) -> list[str]:
    """Return the sentences on the distance of one model."""
    structure = say_structure(report, model)
    shares = [each for each in report["autoencoders"] if each["model"] == model]
    parts = [say_autoencoder(report, each) for each in shares if not is_limit(each)]
    return [structure, *parts] if structure else parts


def warn(report: dict, model: str | None = None) -> list[str]:
    """Return what limits the models: what their runs note, autoencoders with most of a distance."""
    way_out = (
        "Train the autoencoder longer, or compare others: python -m "
        "em_diffusion.select_autoencoder."
    )
    told = [
        f"{each['name']}: {each['info']['note']}"
        for each in report["models"]
        if each.get("info", {}).get("note") and model in (None, each["name"])
    ]
    return told + [
        f"{say_autoencoder(report, each)} {way_out}"
        for each in report["autoencoders"]
        if is_limit(each) and model in (None, each["model"])
    ]


def is_limit(share: dict) -> bool:
    """Return whether an autoencoder has most of its model's distance above that of real images.

    Without a level of real images the whole distance counts.
    """
    return (share["share"] if share["excess"] is None else share["excess"]) > 0.5


def list_notes(report: dict) -> list[str]:
    """Return what the reader must know before the numbers: few micrographs, few images."""
    notes = list(report["protocol"]["notes"])
    real = find_level(report, "real")
    number = report["protocol"]["reference_num_micrographs"]
    distance = find_metric(report, real["key"]) if real else None
    if distance and number is not None and number < 5:
        notes.append(
            f"Real images themselves score {format_interval(distance)} against "
            f"{'this one micrograph' if number == 1 else f'these {number} micrographs'}: a perfect "
            "model would score no better here. Judge the models by their distance to this level."
        )
    if distance:
        found = {
            model["name"]: find_metric(report, model["name"]) or {} for model in report["models"]
        }
        better = [
            name
            for name, own in found.items()
            if own.get("high") is not None and own["high"] < distance["low"]
        ]
        if better:
            notes.append(
                f"{join_words(better)} {'scores' if len(better) == 1 else 'score'} better than "
                f"real images: the {name_reference(report)} are unlike the other real ones. Use "
                "more of them."
            )
    return notes + say_other_data(report) + say_help(report)


def say_other_data(report: dict) -> list[str]:
    """Return a note for each model of embedded micrographs other than the held-out ones."""
    if report["dataset"].get("fingerprint") is None:  # real images of --reference
        return []
    name = report["dataset"]["name"]
    trained = {each["name"]: each.get("info", {}).get("trained_on") for each in report["models"]}
    return [
        f"{model} was trained on {data}, but the reference is {name}: its distance holds the "
        "difference between the two sets of micrographs, too."
        for model, data in trained.items()
        if data not in (None, name)
    ]


def say_help(report: dict) -> list[str]:
    """Return a note if some of several models started from trained ones: who was given what."""
    starts = {each["name"]: each.get("info", {}).get("started_from") for each in report["models"]}
    if len(starts) < 2 or not any(starts.values()):
        return []
    given = [
        f"{name} started from {start}" if start else f"{name} from random weights"
        for name, start in starts.items()
    ]
    return [f"{'; '.join(given)}. A comparison is fair only if all were given as much."]


def say_closer(report: dict, comparison: dict) -> str:
    """Say which of two models is closer to the reference."""
    first, second = comparison["first"], comparison["second"]
    if comparison["first_is"] == "farther":
        first, second = second, first
    a, b = (find_metric(report, key) for key in (first, second))
    numbers = f"Frechet distance {format_interval(a)} against {format_interval(b)}"
    difference = comparison["difference"]
    if comparison["first_is"] == "undecided":
        return (
            f"{first} and {second} cannot be told apart: {numbers}. Their difference is not "
            f"significant (95 % interval {format_number(difference['low'])} to "
            f"{format_number(difference['high'])})."
        )
    return (
        f"{first} is closer to the {name_reference(report)} than {second}: {numbers}. The "
        f"difference of {format_number(abs(difference['value']))} is significant (its 95 % "
        "interval excludes 0)."
    )


def say_structure(report: dict, model: str) -> str | None:
    """Say whether a model is closer than texture without structure."""
    level = find_level(report, "surrogates")
    found = [
        each
        for each in report["comparisons"]
        if level and (each["first"], each["second"]) == (model, level["key"])
    ]
    if level is None or not found:
        return None
    scores = f"which scores {format_interval(find_metric(report, level['key']))}"
    texture = f"texture without structure, {scores}"
    if found[0]["first_is"] == "closer":
        return f"{model} is closer than {texture}. It must be, to have learnt any structure."
    if found[0]["first_is"] == "farther":
        return f"{model} is farther away than {texture}."
    return f"{model} cannot be told apart from {texture}. It may have learnt no structure."


def say_autoencoder(report: dict, share: dict) -> str:
    """Say how much of a model's distance its autoencoder has alone."""
    model = share["model"]
    (level,) = [each for each in report["levels"] if each["key"] == share["level"]]
    alone, score = (format_interval(find_metric(report, key)) for key in (level["key"], model))
    sentence = (
        f"The {level['part']} of {model} alone scores {alone}, "
        f"{100 * share['share']:.0f} % of {model}'s {score}"
    )
    unsure = share["autoencoder_is"] == "undecided"
    doubt = " (its difference to one half is not significant)" if unsure else ""
    if share["excess"] is not None:
        sentence += (
            f". Real images have a distance, too. Of {model}'s distance above theirs, the "
            f"autoencoder has {100 * share['excess']:.0f} %"
        )
    if is_limit(share):
        verb = "limits" if share["autoencoder_is"] == "above" else "may limit"
        return f"{sentence}, so the autoencoder {verb} the model{doubt}."
    if share["excess"] is None:
        return f"{sentence}: less than half of it{doubt}."
    return f"{sentence}: less than half of it, so the autoencoder is not what limits the model."


def say_scope(report: dict) -> str:
    """Say what all of this holds for."""
    protocol, repeats = report["protocol"], report.get("repeats", [])
    trainings = [f"{len(group['models'])} trainings of {group['name']}" for group in repeats]
    in_groups = sum(len(group["models"]) for group in repeats)
    if in_groups < len(report["models"]):
        trainings.append(f"one training run of each {'other ' if repeats else ''}model")
    images = f"{protocol['num_images']:,} images of each set"
    features = f"{report['measurements'][0]['extractor']} features"
    return (
        f"This holds for {join_words([images, *trainings, features])}. The intervals do not "
        "contain the scatter between training runs."
    )


def say_blind_spot(report: dict, spot: dict) -> str:
    """Say which pairs of sets a metric does not put in the order they have."""
    label = METRICS[spot["metric"]].label
    if not spot["num_pairs"]:
        return f"{label}: there are no reference levels to try it on."
    if not spot["misordered"]:
        return f"{label} puts all sets in the expected order."
    names, models = name_sets(report), {model["name"] for model in report["models"]}
    told = "; ".join(
        f"{names[pair['nearer']]} ({format_number(pair['nearer_value'])}) is not nearer than "
        f"{names[pair['farther']]} ({format_number(pair['farther_value'])})"
        for pair in spot["misordered"]
    )
    sentence = f"{label} misses part of the expected order: {told}."
    if any(
        key in models for pair in spot["misordered"] for key in (pair["nearer"], pair["farther"])
    ):
        sentence += " Where one of a pair is a model, that model may truly be no better."
    return sentence


def join_words(words: list[str]) -> str:
    """Return words as a list in a sentence: a, b and c."""
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + words[-1] if words else ""
