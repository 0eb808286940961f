"""The flags of `generate.py --pairs`."""

import dataclasses
from typing import Literal, get_args

from em_training.family import check_options

DEFAULT_STRENGTH = 0.2  # chosen by experiments/labelled_pairs/choose_strength.py
Way = Literal["simulated", "copy-paste", "mask"]
LabelName = Literal["coco", "yolo", "masks"]


@dataclasses.dataclass(frozen=True)
class PairOptions:
    """Images with the labels of their defects."""

    pairs: Way | None = None
    """Write labels beside the images, made in this way. simulated: simulated micrographs, which the
    model makes real. copy-paste: defects of labelled micrographs, pasted on grounds that the model
    draws. mask: the model draws images for layouts of its own: a model that was trained with masks,
    or one that translates simulated tiles."""
    labels: tuple[LabelName, ...] = ("coco", "yolo", "masks")
    """What to write of the labels. coco: labels/coco.json. yolo: labels/*.txt and data.yaml. masks:
    instance masks of 16 bits in masks/, masks of the kinds in semantic/."""
    labelled: str | None = None
    """Labelled micrographs, as --data of a training. simulated: draw layouts like theirs, and
    defects that look like theirs; default: those of the simulator. copy-paste: paste their defects;
    default: those of the training side of the model's data."""
    strength: float = DEFAULT_STRENGTH
    """Fraction of the denoising steps that change the picture that the model starts from: 0 keeps
    it, 1 replaces it. More makes it more like the model's images, and moves its defects."""

    def __post_init__(self):
        check_options(self, strength=(0, 1))
        for name, values, kind in (
            ("pairs", [self.pairs] * (self.pairs is not None), Way),
            ("labels", self.labels, LabelName),
        ):
            wrong = [value for value in values if value not in get_args(kind)]
            if wrong:
                choices = ", ".join(get_args(kind))
                raise ValueError(f"--{name} is {wrong[0]}; choose {choices}.")
        if self.pairs is not None and not self.labels:
            raise ValueError("--labels is empty; choose one or more of coco, yolo and masks.")
        given = [
            f"--{field.name}"
            for field in dataclasses.fields(self)
            if field.name != "pairs" and getattr(self, field.name) != field.default
        ]
        if self.pairs is None and given:
            raise ValueError(
                f"{' and '.join(given)}: only images with labels have these options. Add --pairs "
                "simulated, copy-paste or mask."
            )
        if self.pairs == "mask" and {"--strength", "--labelled"} & set(given):
            raise ValueError(
                "--pairs mask takes neither --strength nor --labelled: the model has layouts of "
                "its own. Leave them out."
            )
