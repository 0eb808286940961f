"""From numbers to sentences: which difference is beyond chance, which floor binds, and what the study says."""

from em_evaluation.distances import Distance, difference_interval

STUDY = {
    "title": "A Comparative Analysis of GANs and Diffusion Models for Synthesizing Electron Microscopy Images",
    "metric": "Frechet Inception distance (FID), against training images",
    "comparable": False,
    "note": "The study's distances are of another protocol: Inception features of 50,000 images of 256 x 256 pixels of other micrographs, "
    "against training images and without intervals. They stand beside ours for orientation and must not be compared with them in value.",
    "num_micrographs": 494,
    "num_tiles": 10_400,
    "num_views": 62_400,
    "resolution": 256,
    "models": [
        {
            "name": "LDM",
            "family": "ldm",
            "frechet_distance": 36.1,
            "train_seconds": 6 * 3600,
            "sample_seconds_50000": 30 * 3600,
        },
        {
            "name": "StyleGAN2",
            "family": "stylegan2",
            "frechet_distance": 58.96,
            "train_seconds": 18 * 3600,
            "sample_seconds_50000": 8 * 60,
        },
    ],
    "autoencoders": [
        {"name": "VQGAN f8, 8192 codes", "frechet_distance": 31.15},
        {"name": "VQGAN f16, 16384 codes", "frechet_distance": 60.26},
        {"name": "VQGAN f16, 1024 codes", "frechet_distance": 82.19},
        {"name": "DALL-E dVAE", "frechet_distance": 116.64},
    ],
}


def compare_models(names, floors, distances, origin, reference_groups, seed):
    """Return the Frechet distance's differences, model by model and model by floor, with intervals in which the common
    reference cancels.
    """
    pairs = [(first, second) for i, first in enumerate(names) for second in names[i + 1 :]]
    pairs += [(name, floor) for name in names for floor in floors]
    comparisons = []
    for first, second in pairs:
        interval = difference_interval(
            distances[first],
            distances[second],
            groups_first=origin[first],
            groups_second=origin[second],
            groups_reference=reference_groups,
            seed=seed,
        )
        verdict = "closer" if interval.high < 0 else "farther" if interval.low > 0 else "undecided"
        difference = {"value": interval.value, "low": interval.low, "high": interval.high}
        comparisons.append(
            {
                "first": first,
                "second": second,
                "frechet_distance_difference": difference,
                "first_is": verdict,
            }
        )
    return comparisons


def weigh_autoencoders(models, floor_info, distances, origin, reference_groups, seed):
    """Return, for each diffusion model with a reconstruction floor, whether that floor lies above half of its distance.

    The interval is of the floor's distance less half of the model's, in which part of the common reference cancels:
    "above" where it excludes 0 from above, "below" from below, else "undecided".
    """
    weighed = []
    for model in models:
        key = _find_own_floor(model, floor_info, distances)
        if key is None or distances[model.name].value <= 0:
            continue
        score, floor = distances[model.name], distances[key]
        interval = difference_interval(
            floor,
            Distance(score.value / 2, score.influence_a / 2, score.influence_b / 2),
            groups_first=origin[key],
            groups_second=origin[model.name],
            groups_reference=reference_groups,
            seed=seed,
        )
        verdict = "above" if interval.low > 0 else "below" if interval.high < 0 else "undecided"
        difference = {"value": interval.value, "low": interval.low, "high": interval.high}
        share = floor.value / score.value
        weighed.append(
            {
                "model": model.name,
                "floor": key,
                "share": share,
                "difference_to_half": difference,
                "floor_is": verdict,
            }
        )
    return weighed


def _find_own_floor(model, floor_info, distances):
    """Return the key of the reconstruction floor of a model's own autoencoder; of the best where none bears its name."""
    keys = [key for key in floor_info if key.startswith("reconstruction")]
    if model.family != "ldm" or not keys:
        return None
    own = [key for key in keys if floor_info[key]["name"].endswith(f" of {model.name}")]
    return own[0] if own else min(keys, key=lambda key: distances[key].value)


def conclude(report) -> list[str]:
    """Return the sentences that the numbers of a report allow, most important first; `warn` has what limits the result."""
    names = [model["name"] for model in report["models"]]
    sentences = []
    for comparison in report["comparisons"]:
        if comparison["first"] in names and comparison["second"] in names:
            sentences.append(_say_which_is_closer(report, comparison))
    sentences += [
        sentence for model in report["models"] if (sentence := _say_structure(report, model))
    ]
    sentences += [
        _say_autoencoder(report, each)
        for each in report["autoencoders"]
        if not _is_above_half(each)
    ]
    if names:
        sentences.append(_say_scope(report))
    return sentences


def format_number(value) -> str:
    """Return a number with four significant digits, as the page prints it."""
    if value is None:
        return "–"
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        digits = max(0, 3 - _exponent(value))
        return f"{value:,.{digits}f}".replace("-", "−")
    return f"{value:.3e}".replace("-", "−")


def _exponent(value):
    return int(f"{value:.3e}".split("e")[1])


def _say(metric):
    return f"{format_number(metric['value'])} ({format_number(metric['low'])} to {format_number(metric['high'])})"


def _find(report, first, second):
    found = [c for c in report["comparisons"] if (c["first"], c["second"]) == (first, second)]
    return found[0] if found else None


def _metrics(report):
    metrics = {model["name"]: model["metrics"]["frechet_distance"] for model in report["models"]}
    return metrics | {
        key: floor["metrics"]["frechet_distance"] for key, floor in report["floors"].items()
    }


def _say_which_is_closer(report, comparison):
    metrics = _metrics(report)
    first, second = comparison["first"], comparison["second"]
    if comparison["first_is"] == "farther":
        first, second = second, first
    a, b = metrics[first], metrics[second]
    overlap = "do not overlap" if a["high"] < b["low"] or b["high"] < a["low"] else "overlap"
    numbers = f"Frechet distance {_say(a)} against {_say(b)}"
    difference = format_number(abs(comparison["frechet_distance_difference"]["value"]))
    if comparison["first_is"] == "undecided":
        return f"{first} and {second} cannot be told apart: {numbers}; the intervals {overlap} and that of their difference holds 0."
    how = (
        ", but the reference is common to both and the interval of their difference excludes 0"
        if overlap == "overlap"
        else ""
    )
    return (
        f"{first} is closer to the held-out micrographs than {second}: {numbers}, a difference of {difference}; "
        f"the intervals {overlap}{how}."
    )


def _say_structure(report, model):
    comparison = _find(report, model["name"], "surrogates")
    if comparison is None:
        return None
    name, floor = model["name"], _say(report["floors"]["surrogates"]["metrics"]["frechet_distance"])
    if comparison["first_is"] == "closer":
        then = "necessary for having learnt structure, not proof of it"
        return f"{name} beats the phase-randomised surrogates at {floor}, texture without structure: {then}."
    if comparison["first_is"] == "farther":
        then = "by this measure it is worse than texture without structure"
        return f"{name} does not reach the phase-randomised surrogates at {floor}: {then}."
    then = "that it has learnt structure is not shown"
    return f"{name} cannot be told apart from the phase-randomised surrogates at {floor}: {then}."


def _say_autoencoder(report, weighed):
    """Say how much of a diffusion model's distance its autoencoder has alone, and how much of what exceeds real images."""
    name, share = weighed["model"], f"{100 * weighed['share']:.0f} %"
    metrics = _metrics(report)
    autoencoder, score = metrics[weighed["floor"]], metrics[name]
    side = "above" if _is_above_half(weighed) else "below"
    alone = (
        "The autoencoder alone, with its grain,"
        if "autoencoder and grain of " in report["floors"][weighed["floor"]]["name"]
        else "The autoencoder alone"
    )
    sentence = f"{alone} scores {_say(autoencoder)}, {share} of {name}'s distance of {_say(score)}, {side} half of it"
    low, high = score["low"] / 2, score["high"] / 2
    overlap = autoencoder["low"] <= high and low <= autoencoder["high"]
    if weighed["floor_is"] == "undecided":
        sentence += ", but not beyond chance (the interval of what parts it from the half holds 0)"
    elif overlap:
        sentence += (
            " (its interval and that of the half overlap, but that of their difference excludes 0)"
        )
    excess = _find_excess(report, autoencoder["value"], score["value"])
    if _is_above_half(weighed):
        is_sure = weighed["floor_is"] == "above" and (excess is None or excess > 0.5)
        sentence += (
            f": then the autoencoder, not the diffusion, {'is' if is_sure else 'may be'} the limit"
        )
    if excess is None:
        return f"{sentence}."
    then = (
        "the larger part is the autoencoder's"
        if excess > 0.5
        else "the larger part is the diffusion model's"
    )
    but = "but " if _is_above_half(weighed) and excess <= 0.5 else ""
    return f"{sentence}; {but}of what {name} has above real images, the autoencoder has {100 * excess:.0f} %: {then}."


def warn(report) -> list[str]:
    """Return what limits the result and the way out: an autoencoder whose floor lies above half of the score reached."""
    way_out = (
        "Train the autoencoder longer (--autoencoder.num-images) or with a patch discriminator, or take a better one: "
        "python -m em_diffusion.select_autoencoder compares candidates."
    )
    limited = [weighed for weighed in report["autoencoders"] if _is_above_half(weighed)]
    return [f"{_say_autoencoder(report, weighed)} {way_out}" for weighed in limited]


def _is_above_half(weighed):
    return weighed["share"] > 0.5


def _find_excess(report, autoencoder, score):
    """Return the autoencoder's share of what a score has above real images; None where that means nothing."""
    if "real" not in report["floors"] or score <= _value(report["floors"]["real"]):
        return None
    real = _value(report["floors"]["real"])
    excess = (autoencoder - real) / (score - real)
    return excess if 0 <= excess <= 1 else None


def _value(row):
    return row["metrics"]["frechet_distance"]["value"]


def _say_scope(report):
    real, protocol = report["floors"].get("real"), report["protocol"]
    sentence = (
        f"All of this holds for {protocol['num_images']:,} images of each set, one training run of each model and "
        f"{protocol['extractor'].split(',')[0]} features; the intervals do not hold the scatter between training runs."
    )
    if real is None:
        return sentence
    return f"{sentence} Real training tiles score {_say(real['metrics']['frechet_distance'])} on the same measure."
