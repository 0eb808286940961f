"""The losses of one step: what generators and discriminators play for."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from em_cyclegan.contrastive import contrastive_loss, find_features
from em_cyclegan.discriminators import discriminator_loss, least_squares
from em_cyclegan.networks import Networks
from em_training import make_generator


class Translated(NamedTuple):
    """A batch after one pass through a generator."""

    images: torch.Tensor  # [B, 1, R, R], of the other domain, translated
    same: torch.Tensor  # [B, 1, R, R], of the generator's own target, which should not change


def translate_both(generator, images, targets) -> Translated:
    """Translate images, and pass images of the target through the same generator."""
    return Translated(*generator(torch.cat([images, targets])).chunk(2))


def cycle_loss(a_to_b, b_to_a, a, b, generated_a, generated_b):
    """Return E|F(G(a)) - a| + E|G(F(b)) - b| (Zhu et al. 2017, equation 2).

    Args:
        generated_a, generated_b: F(b) and G(a).
    """
    there_and_back = F.l1_loss(b_to_a(generated_b).float(), a)
    return there_and_back + F.l1_loss(a_to_b(generated_a).float(), b)


class Game:
    """The losses of one step, each with its backward pass.

    Args:
        config: A `CycleGANConfig`.
        networks: `Networks` of that configuration.
        accelerator: accelerate's.
    """

    def __init__(self, config, networks: Networks, accelerator):
        self.config, self.training, self.accelerator = config, config.training, accelerator
        self.generators, self.discriminators, self.projection = networks
        trained = [self.generators, *filter(None, [self.projection])]
        self.parameters = [p for network in trained for p in network.parameters()]
        self.parameters_D = list(self.discriminators.parameters())

    def backward_G(self, batch, num_images_seen: int) -> tuple[dict, dict]:
        """Generators: return what to log, and the generated images by their domain."""
        with self.accelerator.autocast():
            forward = self.cycle if self.training.method == "cycle" else self.contrast
            losses, generated = forward(batch, num_images_seen)
            for domain, images in generated.items():
                losses["loss_G"] = losses.get("loss_G", 0) + self.deceive(images, domain)
            weights = self.find_weights()
            loss = sum(weights[name] * value for name, value in losses.items())
        self.accelerator.backward(loss, inputs=self.parameters)
        losses = {name: value.detach() for name, value in losses.items()}
        return losses, {domain: images.detach() for domain, images in generated.items()}

    def backward_D(self, real: dict, generated: dict) -> dict:
        """Discriminators: real images against generated ones, both by their domain."""
        with self.accelerator.autocast():
            losses: dict[str, torch.Tensor] = {}
            for name, network in self.discriminators.items():
                domain, _, kind = name.partition("_")
                key = f"loss_D_{kind}" if kind else "loss_D"
                loss = discriminator_loss(network, real[domain], generated[domain])
                losses[key] = losses.get(key, 0) + loss
        self.accelerator.backward(sum(losses.values()), inputs=self.parameters_D)
        return {name: value.detach() for name, value in losses.items()}

    def find_weights(self) -> dict[str, float]:
        """Return the weights of the generators' losses by their names in the log."""
        training = self.training
        is_cycle = training.method == "cycle"
        main = training.cycle_weight if is_cycle else training.contrastive_weight
        return {
            "loss_G": 1.0,
            "loss_cycle" if is_cycle else "loss_contrastive": main,
            "loss_identity": main * training.identity_weight,
        }

    def deceive(self, images, domain):
        """Return how far the discriminators of a domain are from taking images for real."""
        loss = least_squares(self.discriminators[domain](images), 1.0)
        if weight := self.training.spectrum_weight:
            spectrum = self.discriminators[f"{domain}_spectrum"](images)
            loss = loss + weight * least_squares(spectrum, 1.0)
        return loss

    def cycle(self, batch, num_images_seen):
        """Return CycleGAN's losses beside the adversarial one, and the generated images."""
        a_to_b, b_to_a = self.generators["a_to_b"], self.generators["b_to_a"]
        to_b = translate_both(a_to_b, batch.a, batch.b)
        to_a = translate_both(b_to_a, batch.b, batch.a)
        identity = F.l1_loss(to_b.same.float(), batch.b) + F.l1_loss(to_a.same.float(), batch.a)
        losses = {
            "loss_cycle": cycle_loss(a_to_b, b_to_a, batch.a, batch.b, to_a.images, to_b.images),
            "loss_identity": identity,
        }
        return losses, {"b": to_b.images, "a": to_a.images}

    def contrast(self, batch, num_images_seen):
        """Return CUT's losses beside the adversarial one, and the generated images."""
        generator = self.generators["a_to_b"]
        to_b = translate_both(generator, batch.a, batch.b)
        losses = {
            "loss_contrastive": self.compare(to_b.images, batch.a, num_images_seen),
            "loss_identity": self.compare(to_b.same, batch.b, num_images_seen),
        }
        return losses, {"b": to_b.images}

    def compare(self, translated, images, num_images_seen):
        """Return the contrastive loss, mean over layers, of images and their translations."""
        generator, projection = self.generators["a_to_b"], self.projection
        assert projection is not None  # of a contrastive run
        # queries first: autocast keeps weights that it has cast, and without gradient from no_grad
        features = find_features(generator, translated)
        queries = projection(features, self.training.num_patches, self.make_rng(num_images_seen))
        with torch.no_grad():
            features = find_features(generator, images)
            keys = projection(features, self.training.num_patches, self.make_rng(num_images_seen))
        losses = [
            contrastive_loss(query, key, self.training.temperature)
            for query, key in zip(queries, keys, strict=True)
        ]
        return torch.stack(losses).mean()

    def make_rng(self, num_images_seen):
        """Create the random generator of the places that a step compares."""
        return make_generator(
            self.config.seed,
            rank=self.accelerator.process_index,
            num_images_seen=num_images_seen,
            stream="patches",
        )
