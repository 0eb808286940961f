"""What was found of labels and classes, counted and in sentences."""

from collections import Counter

from em_data.micrograph import Micrograph


def count_defects(micrograph: Micrograph) -> dict:
    """Return its "defects", {kind: number} or None without labels, and its "class_name"."""
    kinds = Counter(each.kind for each in micrograph.defects or ())
    counts = None if micrograph.defects is None else dict(sorted(kinds.items()))
    return {"defects": counts, "class_name": micrograph.class_name}


def count_labels(micrographs) -> tuple[dict[str, int], dict[str, int]]:
    """Return {kind: number of defects} and {class: number of micrographs}.

    Args:
        micrographs: Dictionaries as of `count_defects`.
    """
    kinds, classes = Counter(), Counter()
    for each in micrographs:
        kinds.update(each["defects"])
        classes.update([each["class_name"]] if each["class_name"] else [])
    return dict(sorted(kinds.items())), dict(sorted(classes.items()))


def describe_found(source, micrographs) -> list[str]:
    """Return a sentence each on the labels and on the classes of a source, if it has them.

    Args:
        source: `em_data.sources.base.Source`, which says where they come from.
        micrographs: As of `count_labels`.
    """
    kinds, classes = count_labels(micrographs)
    num_labelled = sum(each["defects"] is not None for each in micrographs)
    sentences, num = [], len(micrographs)
    if source.labels or num_labelled:
        counts = ", ".join(f"{name}: {count:,}" for name, count in kinds.items())
        origin = f" from {source.labels}" if source.labels else ""
        sentences.append(
            f"labels{origin}: {num_labelled:,} of {num:,} micrographs, "
            f"{sum(kinds.values()):,} defects" + (f" ({counts})" if counts else "")
        )
    if classes:
        counts = ", ".join(f"{name}: {count:,}" for name, count in classes.items())
        origin = f" from {source.classes}" if source.classes else ""
        num_known = sum(classes.values())
        sentences.append(f"classes{origin}: {num_known:,} of {num:,} micrographs ({counts})")
    return sentences
