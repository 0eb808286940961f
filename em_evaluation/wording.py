"""A report's conclusions in words, for the page, the terminal and the model card."""

from em_evaluation.feature_metrics import METRICS
from em_evaluation.numbers import format_interval, format_number

DISTANCE = "frechet_distance"
OUTCOMES = {
    "fidelity": {"as_real": "as real", "differs": "lower than real"},
    "variety": {"as_real": "as real", "differs": "lower than real"},
    "defects": {"as_real": "as real", "differs": "differ from real"},
}
COMMON = {"undecided": "cannot tell", "not_measured": "not measured"}
EFFECTS = {
    "fidelity": "would learn from images that resemble no real tile",
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
    names = {"held_out": "held-out micrographs", "train": "training tiles"}
    names |= {model["name"]: model["name"] for model in report["models"]}
    return names | {level["key"]: level["title"] for level in report["levels"]}


def find_verdicts(report: dict, model: str) -> list[dict]:
    return [verdict for verdict in report["verdicts"] if verdict["model"] == model]


def say_outcome(verdict: dict) -> str:
    """Return the outcome of a verdict in two or three words."""
    return (OUTCOMES[verdict["aspect"]] | COMMON)[verdict["outcome"]]


def say_measures(verdict: dict) -> list[str]:
    """Return the numbers of a verdict, those of real images beside them."""
    if not verdict["measures"]:
        return ["needs real images to compare with, and enough images of enough pixels"]
    return [
        f"{each['label'].capitalize()}{', ' + each['unit'] if each['unit'] else ''}: "
        f"{format_interval(each['value'])}; real {format_interval(each['reference'])}"
        for each in verdict["measures"]
    ]


def say_for_detector(report: dict, model: str) -> str:
    """Return what the verdicts mean for a detector that is trained on the model's images."""
    verdicts = find_verdicts(report, model)
    wrong = [each["aspect"] for each in verdicts if each["outcome"] == "differs"]
    open_ = [
        each["aspect"] for each in verdicts if each["outcome"] in ("undecided", "not_measured")
    ]
    if wrong:
        effects = join_words([EFFECTS[aspect] for aspect in wrong])
        return f"A detector trained on these images alone {effects}."
    if open_:
        return (
            f"These numbers do not show whether a detector can be trained on these images: "
            f"{join_words(open_)} {'is' if open_ in (['fidelity'], ['variety']) else 'are'} open. "
            "Use more images or more held-out micrographs."
        )
    return (
        "Nothing measured here speaks against training a detector on these images. "
        "Test it on real micrographs."
    )


def summarise_model(report: dict, model: str) -> str:
    """Return one sentence about a model, for the terminal."""
    verdicts = find_verdicts(report, model)
    parts = []
    for verdict in verdicts:
        outcome = say_outcome(verdict)
        telling = [each for each in verdict["measures"] if each["outcome"] == "differs"]
        if telling:
            first = telling[0]
            own, real = (format_number(first[side]["value"]) for side in ("value", "reference"))
            outcome += f" ({first['label'].lower()} {own} against {real})"
        parts.append(f"{verdict['aspect']} {outcome}")
    return f"{model}: {', '.join(parts)}. {say_for_detector(report, model)}"


def conclude(report: dict) -> list[str]:
    """Return the sentences on distances: models, texture, autoencoders, and what they hold for."""
    models = [model["name"] for model in report["models"]]
    sentences = [
        say_closer(report, each)
        for each in report["comparisons"]
        if each["first"] in models and each["second"] in models
    ]
    for model in models:
        sentences += conclude_model(report, model)
    return sentences + [say_scope(report)]


def conclude_model(report: dict, model: str) -> list[str]:
    """Return the sentences on the distance of one model."""
    structure = say_structure(report, model)
    shares = [each for each in report["autoencoders"] if each["model"] == model]
    parts = [say_autoencoder(report, each) for each in shares if each["share"] <= 0.5]
    return [structure, *parts] if structure else parts


def warn(report: dict, model: str | None = None) -> list[str]:
    """Return what limits the models and how to fix it: autoencoders with most of a distance."""
    way_out = (
        "Train the autoencoder longer (--autoencoder.num-images) or compare others: "
        "python -m em_diffusion.select_autoencoder."
    )
    return [
        f"{say_autoencoder(report, each)} {way_out}"
        for each in report["autoencoders"]
        if each["share"] > 0.5 and model in (None, each["model"])
    ]


def list_notes(report: dict) -> list[str]:
    """Return what the reader must know before the numbers: few micrographs, few images."""
    notes = list(report["protocol"]["notes"])
    real = find_level(report, "real")
    number = report["protocol"]["reference_num_micrographs"]
    distance = find_metric(report, real["key"]) if real else None
    if distance and number is not None and number < 5:
        notes.append(
            f"Real tiles themselves score {format_interval(distance)} against "
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
                "real tiles: the held-out micrographs are unlike the other real ones. Hold out "
                "more micrographs."
            )
    return notes


def say_closer(report: dict, comparison: dict) -> str:
    """Say which of two models is closer to the held-out micrographs."""
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
        f"{first} is closer to the held-out micrographs than {second}: {numbers}. The difference "
        f"of {format_number(abs(difference['value']))} is significant (its 95 % interval "
        "excludes 0)."
    )


def say_structure(report: dict, model: str) -> str | None:
    """Say whether a model is closer than texture without structure."""
    level = find_level(report, "surrogates")
    found = [
        each
        for each in report["comparisons"]
        if level and (each["first"], each["second"]) == (model, level["key"])
    ]
    if not found:
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
    if share["share"] <= 0.5:
        side = "less than half of it"
    else:
        sure = share["autoencoder_is"] == "above" and (share["excess"] or 1) > 0.5
        side = f"so the autoencoder {'limits' if sure else 'may limit'} the model"
    if share["autoencoder_is"] == "undecided":
        side += " (its difference to one half is not significant)"
    sentence += f": {side}." if share["share"] <= 0.5 else f", {side}."
    if share["excess"] is not None:
        sentence += (
            f" Of {model}'s distance above that of real tiles, the autoencoder has "
            f"{100 * share['excess']:.0f} %."
        )
    return sentence


def say_scope(report: dict) -> str:
    """Say what all of this holds for."""
    protocol = report["protocol"]
    return (
        f"This holds for {protocol['num_images']:,} images of each set, one training run of each "
        f"model and {report['measurements'][0]['extractor']} features. The intervals do not "
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
