"""The StyleGANs as a `Family`: what the commands need to know about them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from em_training.classes import list_class_controls
from em_training.config import read_json_object
from em_training.family import Card, Control, Family, check_options, parse_size

LayerGroup = Literal["coarse", "middle", "fine"]
TITLES = {
    "stylegan2": "StyleGAN2",
    "stylegan1": "StyleGAN",
    "stylegan3-t": "StyleGAN3-T",
    "stylegan3-r": "StyleGAN3-R",
}


@dataclass(frozen=True)
class StyleGANOptions:
    """Sampling options of StyleGANs."""

    truncation_psi: float = 1.0
    """Truncation: 1 draws from the whole distribution, smaller values give more typical and less
    varied images. Report distances at 1."""
    classes: tuple[str, ...] = ()
    """Classes of the images by name or number, such as --classes copper steel: images take them in
    turn. Default: each image draws its class, all alike. For models that have classes."""
    mix_seed: int | None = None
    """Seed of a second style: a third of the layers takes the style of that seed's image 0."""
    mix_layers: LayerGroup = "coarse"
    """The third of the layers that takes the second style. Coarse layers decide the large shapes,
    fine ones the texture."""
    size: str | None = None
    """Height x width of the images in pixels, such as 512x768, or one number for a square. Default:
    the size of a tile. Only StyleGAN3 draws larger images."""

    def __post_init__(self):
        check_options(self, truncation_psi=(-10, 10), mix_seed=(0, 2**63))
        if self.size is not None:
            parse_size(self.size)
        if self.mix_layers not in get_args(LayerGroup):
            raise ValueError(
                f"--mix-layers is {self.mix_layers}; choose {', '.join(get_args(LayerGroup))}"
            )


def read_kind(folder: Path) -> str:
    """Return stylegan1, stylegan2, stylegan3-t or stylegan3-r: what the saved generator is."""
    entry = read_json_object(folder / "model_index.json").get("generator")
    module = entry[0] if isinstance(entry, list) and entry else entry
    kind = str(module).removeprefix("em_").removesuffix("_generator")
    if kind == "stylegan3":
        config = read_json_object(folder / "generator" / "config.json")
        kind = "stylegan3-r" if config.get("radial_filters") else "stylegan3-t"
    if kind not in TITLES:
        raise ValueError(f"{folder} holds the generator {module}, which this version does not have")
    return kind


def list_controls(pipeline) -> tuple[Control, ...]:
    """Return the demo's inputs: the class, truncation and style mixing."""
    return (
        *list_class_controls(pipeline, "any"),
        Control(
            "truncation_psi",
            "Truncation",
            "slider",
            1.0,
            help="1: the whole distribution. Smaller: more typical images, less variety.",
            minimum=0,
            maximum=1.5,
            step=0.05,
        ),
        Control(
            "mix_seed",
            "Seed of a second style",
            "integer",
            None,
            help="Some layers take the style of this seed's first image. Empty: no mixing. "
            "The walk does not mix.",
        ),
        Control(
            "mix_layers",
            "Layers that take the second style",
            "choice",
            "coarse",
            help="Coarse layers decide the large shapes, fine ones the texture.",
            choices={name: name for name in get_args(LayerGroup)},
            only_with="mix_seed",
        ),
    )


FAMILY = Family(
    name="stylegan",
    titles=TITLES,
    pipeline="em_stylegan.pipeline_em_stylegan:EMStyleGANPipeline",
    options=StyleGANOptions,
    stages=("stylegan",),
    card=Card(
        "stylegan.md.j2",
        "em_stylegan",
        "stylegan",
        "StyleGAN",
        lambda pipeline: {"resolution": pipeline.generator.config.resolution},
    ),
    drawer="em_stylegan.drawing:StyleGANDrawer",
    read_kind=read_kind,
    controls=list_controls,
    walk_help="The style w changes smoothly, and the fine noise stands still.",
    script="train_gan.py",
    presets="em_stylegan.presets:PRESETS",
    train="em_stylegan.train:train_gan",
)
