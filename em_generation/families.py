"""The registry of model families. A new family is a package with a `FAMILY`, and one entry here."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import em_cyclegan.family
import em_diffusion.family
import em_diffusion.mask_family
import em_stable_diffusion.family
import em_stylegan.family
from em_training.config import read_json_object
from em_training.family import Family

FAMILIES: list[Family] = [
    em_diffusion.family.FAMILY,
    em_stylegan.family.FAMILY,
    em_diffusion.mask_family.FAMILY,
    em_cyclegan.family.FAMILY,
    em_stable_diffusion.family.FAMILY,
]


def find_family(name: str, where: str = "the model") -> Family:
    """Return the family with this name, kind or pipeline class name.

    where: what the error calls the model. Raises `ValueError` if no family has that name.
    """
    for family in FAMILIES:
        if name in (family.name, family.class_name, *family.titles):
            return family
    known = ", ".join(family.class_name for family in FAMILIES)
    raise ValueError(f"{where} is of the unknown kind {name}; known are {known}")


def read_family(folder: Path) -> tuple[Family, str]:
    """Return (family, kind) of the pipeline saved in `folder`, from its model_index.json."""
    path = Path(folder) / "model_index.json"
    name = read_json_object(path).get("_class_name")
    name = name[-1] if isinstance(name, list) and name else name
    if not isinstance(name, str):
        raise ValueError(f"{path} is damaged: it names no pipeline class")
    family = find_family(name, str(folder))
    return family, family.read_kind(Path(folder))


def make_options(families: Iterable[Family], pairs: Sequence[str]) -> dict[str, object]:
    """Return {family name: its sampling options} from KEY=VALUE texts, such as "eta=0.5".

    Each family takes the keys that it has. Raises `ValueError` for a key that none of `families`
    has, and for a value of a wrong type or outside its range.
    """
    from em_training import config_from_dict, parse_pairs

    by_name = {family.name: family for family in families}
    values = parse_pairs(pairs, "--sampling", "eta=0.5")
    known = {
        name: {field.name for field in dataclasses.fields(family.options)}
        for name, family in by_name.items()
    }
    for key in values:
        if not any(key in names for names in known.values()):
            names = ", ".join(sorted(set().union(*known.values())))
            raise ValueError(
                f"--sampling has {key}, but no model here has this option. "
                f"{f'Choose from {names}.' if names else 'Leave it out.'}"
            )
    return {
        name: config_from_dict(
            family.options, {key: value for key, value in values.items() if key in known[name]}
        )
        for name, family in by_name.items()
    }
