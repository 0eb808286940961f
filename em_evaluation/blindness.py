"""Which metrics see what they must: real < autoencoder < trained < surrogate < noise, each nearer to the real ones than the next."""

from em_evaluation.metrics import METRICS


def find_blindness(measurement, model_families, floor_info) -> list[dict]:
    """Return, for each metric of a measurement, the pairs of sets that it puts in the wrong order or on a par, and a sentence.

    model_families: name -> family; an autoencoder is expected to be nearer than the latent diffusion model that it belongs
    to (its name ends in "of NAME", or it is the only one), not than other models. Pairs with a model say less: the model
    may truly be no better.
    """
    rows, found = measurement["rows"], []
    names = {key: floor_info[key]["name"] if key in floor_info else key for key in rows}
    pairs = [
        pair
        for pair in expect_order(model_families, floor_info)
        if pair[0] in rows and pair[1] in rows
    ]
    for metric in measurement["metrics"]:
        sign = -1 if METRICS[metric].higher_is_better else 1
        values = {key: row["held_out"][metric]["value"] for key, row in rows.items()}
        wrong = [(near, far) for near, far in pairs if sign * values[near] >= sign * values[far]]
        found.append(
            {
                "extractor": measurement["extractor"],
                "metric": metric,
                "num_pairs": len(pairs),
                "misordered": [
                    {"nearer": near, "farther": far, "values": [values[near], values[far]]}
                    for near, far in wrong
                ],
                "sentence": _say(
                    measurement["extractor"],
                    metric,
                    wrong,
                    names,
                    values,
                    model_families,
                    len(pairs),
                ),
            }
        )
    return found


def expect_order(model_families, floor_info) -> list[tuple[str, str]]:
    """Return the pairs (nearer, farther) that any metric should put in this order."""
    autoencoders = [key for key in floor_info if key.startswith("reconstruction")]
    chain = [["real"], autoencoders, list(model_families), ["surrogates"], ["noise"]]
    pairs = [
        (near, far)
        for i, level in enumerate(chain)
        for later in chain[i + 1 :]
        for near in level
        for far in later
        if near not in autoencoders
        or far not in model_families
        or _belongs(near, far, model_families, floor_info)
    ]
    return pairs


def _belongs(key, model, model_families, floor_info):
    named = [name for name in model_families if floor_info[key]["name"].endswith(f" of {name}")]
    return model_families[model] == "ldm" and named in ([model], [])


def _say(extractor, metric, wrong, names, values, models, num_pairs):
    from em_evaluation.conclusion import format_number

    label = f"{METRICS[metric].label} ({extractor})"
    if not num_pairs:
        return f"{label}: there are no floors to try it on."
    if not wrong:
        return f"{label} puts every set in the order that it must."
    told = "; ".join(
        f"{names[near]} ({format_number(values[near])}) from {names[far]} ({format_number(values[far])})"
        for near, far in wrong
    )
    sentence = f"{label} is blind to part of the order: it does not tell {told}."
    if any(key in models for pair in wrong for key in pair):
        sentence += " Where one of a pair is a model, that model may truly be no better."
    return sentence
