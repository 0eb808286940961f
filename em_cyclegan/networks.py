"""The networks of a translation run, and how they are trained."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from em_cyclegan.config import CycleGANConfig
from em_cyclegan.contrastive import NUM_BLOCKS, PatchProjection
from em_cyclegan.discriminators import PatchDiscriminator, SpectrumDiscriminator
from em_cyclegan.em_resnet_generator import EMResnetGenerator
from em_training import seed_for

BETAS = (0.5, 0.999)  # of Adam, appendix 7.1


class Translators(nn.ModuleDict):
    """The generators by their directions: "a_to_b" and, of a cycle, "b_to_a"."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Save each generator in a folder with the name of its direction."""
        for name, model in self.items():
            assert isinstance(model, EMResnetGenerator)
            model.save_pretrained(Path(folder) / name)

    @staticmethod
    def from_pretrained(folder: str | Path) -> "Translators":
        """Load what `save_pretrained` has written."""
        parts = sorted(path.parent for path in Path(folder).glob("*/config.json"))
        models = {path.name: EMResnetGenerator.from_pretrained(path) for path in parts}
        return Translators(models)


class Networks(NamedTuple):
    """All networks of a run.

    discriminators: "b" and, with a weight of spectra, "b_spectrum"; of a cycle also "a" and
    "a_spectrum". projection: of the contrastive loss; None for a cycle.
    """

    generators: Translators
    discriminators: nn.ModuleDict
    projection: PatchProjection | None


def create_networks(config: CycleGANConfig, device: torch.device | str = "cpu") -> Networks:
    """Create the networks of a run; their weights depend on the seed alone."""
    is_cycle = config.training.method == "cycle"
    num_blocks = config.num_blocks if is_cycle else max(NUM_BLOCKS, config.num_blocks)
    kinds = {"": PatchDiscriminator, "_spectrum": SpectrumDiscriminator}
    if not config.training.spectrum_weight:
        del kinds["_spectrum"]
    sizes = (config.discriminator.base_channels, config.discriminator.num_layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "cyclegan"))
        generators = Translators(
            {
                direction: EMResnetGenerator(
                    config.generator.base_channels, num_blocks, config.generator.adds_input
                )
                for direction in (("a_to_b", "b_to_a") if is_cycle else ("a_to_b",))
            }
        )
        discriminators = nn.ModuleDict(
            {
                domain + suffix: kind(*sizes)
                for domain in ("ba" if is_cycle else "b")
                for suffix, kind in kinds.items()
            }
        )
        projection = None if is_cycle else PatchProjection(config.generator.base_channels)
    for network in (generators, discriminators):
        network.to(device).to(memory_format=torch.channels_last)
    return Networks(generators, discriminators, projection and projection.to(device))


def create_optimizer(parameters, learning_rate: float) -> torch.optim.Optimizer:
    """Create the Adam of the paper."""
    return torch.optim.Adam(parameters, learning_rate, betas=BETAS, fused=True)


def learning_rate_at(training, num_images_seen: int) -> float:
    """Return the learning rate of the step after so many images: constant, then falling to 0."""
    constant = training.constant_images
    constant = training.num_images // 2 if constant is None else constant
    left = (training.num_images - num_images_seen) / max(1, training.num_images - constant)
    return training.learning_rate * min(1.0, left)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
