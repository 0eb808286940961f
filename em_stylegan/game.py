"""The losses of a step of StyleGAN2 and 3, and the images that they judge."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from em_stylegan.augmentation import AdaptiveProbability, augment
from em_stylegan.em_stylegan2_generator import StyleGAN2Generator
from em_stylegan.em_stylegan3_generator import StyleGAN3Generator
from em_stylegan.grain import reduce_images
from em_stylegan.losses import (
    PathLengthMean,
    blur_sigma,
    discriminator_loss,
    find_class_weight,
    gaussian_blur,
    generator_loss,
    path_lengths,
    r1_penalty,
    relativistic_discriminator_loss,
    relativistic_generator_loss,
)
from em_stylegan.networks import set_trainable
from em_stylegan.second_derivatives import second_derivatives
from em_training import make_generator


class Generated(NamedTuple):
    """Generated and real images of a part of the batch."""

    w: torch.Tensor  # [B, w_dim]
    images: torch.Tensor  # [B, 1, R, R], generated
    seen: torch.Tensor  # the same, as the discriminator sees them
    seen_real: torch.Tensor  # [B, 1, R, R]


class Game:
    """The losses of one step, each with its backward pass over a part of the batch.

    The random numbers of a part depend on the seed, the step, their use and the part's first row,
    so that the generator's turn can repeat the images that the discriminator's turn has judged. If
    the batch is a single part, its graph is kept from one turn to the next instead.

    With classes, generated images have those of the real images. The classes come in by a weight
    lambda that rises from 0 to 1: in the generator it scales the vector of the class, and the loss
    is L = L_unconditional + lambda L_conditional (Shahbazi et al. 2022, arXiv:2201.06578).
    """

    def __init__(self, config, model, discriminator, accelerator):
        self.config, self.training = config, config.training
        self.model, self.discriminator, self.accelerator = model, discriminator, accelerator
        self.parameters = list(model.parameters())
        set_trainable(discriminator, True, config.discriminator.num_frozen_layers)
        self.parameters_D = [p for p in discriminator.parameters() if p.requires_grad]
        self.path_length_mean = PathLengthMean(self.training.path_length_decay, accelerator.device)
        self.augmentation = create_augmentation(self.training.augmentation, accelerator.device)
        self.has_classes = discriminator.config.num_classes > 0
        self.is_relativistic = self.training.loss == "relativistic"
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        self.compute_dtype = dtypes.get(accelerator.mixed_precision)

    def start_step(self, num_images_seen: int) -> None:
        """Set what is fixed for one step."""
        training = self.training
        self.num_images_seen, self._kept = num_images_seen, None
        self.sigma = blur_sigma(
            num_images_seen, training.blur_initial_sigma_px, training.blur_fade_images
        )
        self.p = 0.0 if self.augmentation is None else self.augmentation.p
        self.class_weight = find_class_weight(num_images_seen, training.class_ramp_images)
        judges_both = self.discriminator.config.unconditional_output and self.has_classes
        self.output_weights = (1.0, self.class_weight) if judges_both else (1.0,)
        self.settings = {"class_weight": self.class_weight} if self.has_classes else {}

    def backward_D(self, part, share):
        """Discriminator: real images against generated ones."""
        with torch.set_grad_enabled(share == 1):
            generated = self.generate(part, update_magnitudes=True)
        seen = torch.cat([generated.seen_real, generated.seen.detach()])
        scores_real, scores_fake = self.judge(seen, part, num_batches=2).chunk(2)
        loss_of = relativistic_discriminator_loss if self.is_relativistic else discriminator_loss
        loss = self.add_up(loss_of, scores_real, scores_fake)
        self.accelerator.backward(loss * share, inputs=self.parameters_D)
        self._kept = generated if share == 1 else None
        scores = {
            "scores_real": self.combine(scores_real),
            "scores_fake": self.combine(scores_fake),
        }
        return {"loss_D": loss, "w": generated.w, **scores}

    def backward_penalty_D(self, part, share):
        """Discriminator: R1 on real images, and R2 on generated ones in the relativistic game."""
        show = partial(self.show, rng=self.make_rng(part, "r1"))
        labels = self.list_classes(part)

        def score(images):
            return self.combine(self.discriminator(images, class_labels=labels))  # [B, 1]

        real = reduce_images(part.images, self.config.generator.reduction)
        penalties = {"r1": compute_gradient_penalty(score, real, show)}
        if self.is_relativistic:
            with torch.no_grad():
                images = (self._kept or self.generate(part)).images
            penalties["r2"] = compute_gradient_penalty(score, images, show)
        scale = self.discriminator.config.image_std  # gradients are those of scaled images
        weight = self.config.r1_gamma / 2 * self.training.r1_every_steps * scale**2
        # two outputs with the same gradient are penalised as their losses are weighted, not squared
        weight = weight / sum(self.output_weights)
        self.accelerator.backward(
            sum(penalties.values()) * (weight * share), inputs=self.parameters_D
        )
        return penalties

    def backward_G(self, part, share):
        """Generator: its images as the updated discriminator judges them."""
        generated, self._kept = self._kept or self.generate(part), None
        scores_fake = self.judge(generated.seen, part)
        if self.is_relativistic:
            scores_real = self.judge(generated.seen_real, part).detach()
            loss = self.add_up(relativistic_generator_loss, scores_real, scores_fake)
        else:
            loss = self.add_up(generator_loss, scores_fake)
        self.accelerator.backward(loss * share, inputs=self.parameters)
        return {"loss_G": loss}

    def backward_path_length(self, part, share):
        """Generator: deviation of the path lengths from their running mean."""
        training, rng = self.training, self.make_rng(part, "path length")
        count = max(1, round(len(part) * training.path_length_batch_fraction))
        labels = self.list_classes(part)
        lengths = compute_path_lengths(
            self.model,
            count,
            training.style_mixing_probability,
            rng,
            None if labels is None else labels[:count],
            self.class_weight,
        )
        mean = self.path_length_mean.next(lengths.detach().mean())
        penalty = (lengths - mean).square().mean()
        weight = training.path_length_weight * training.path_length_every_steps
        self.accelerator.backward(penalty * (weight * share), inputs=self.parameters)
        return {"path_length": lengths, "path_length_penalty": penalty}

    def generate(self, part, update_magnitudes=False) -> Generated:
        """Generate as many images as the part has."""
        rng = self.make_rng(part)
        w, ws = draw_ws(
            self.model,
            len(part),
            self.training.style_mixing_probability,
            rng,
            self.list_classes(part),
            self.class_weight,
        )
        is_alias_free = isinstance(self.model, StyleGAN3Generator)
        options = {"update_magnitudes": update_magnitudes} if is_alias_free else {}
        images = draw_images(self.model, ws, rng, self.compute_dtype, **options)
        real = reduce_images(part.images, self.config.generator.reduction)
        return Generated(w, images, self.show(images, rng), self.show(real, rng))

    def list_classes(self, part):
        """Return the classes [B] of the part's images; None for networks without classes."""
        return part.class_labels if self.has_classes else None

    def judge(self, seen, part, num_batches=1):
        """Return the discriminator's logits; a part is compared in groups that divide it."""
        count, largest = len(seen) // num_batches, self.config.discriminator.group_size
        sizes = range(min(largest, count), 0, -1)
        self.discriminator.group_size = next(size for size in sizes if count % size == 0)
        labels = self.list_classes(part)
        return self.discriminator(
            seen,
            class_labels=None if labels is None else labels.repeat(num_batches),
            compute_dtype=self.compute_dtype,
            num_batches=num_batches,
        )

    def add_up(self, loss, *scores):
        """Sum a loss over the discriminator's outputs [B, 1 or 2] by their weights."""
        columns = zip(*(each.split(1, dim=1) for each in scores), strict=True)
        return sum(weight * loss(*each) for weight, each in zip(self.output_weights, columns))

    def combine(self, scores):
        """Return the weighted sum [B, 1] of the discriminator's outputs [B, 1 or 2]."""
        return self.add_up(lambda column: column, scores)

    def show(self, images, rng):
        """Return images as the discriminator sees them: blurred, then augmented."""
        return augment(gaussian_blur(images, self.sigma), self.p, rng)

    def make_rng(self, part, stream=""):
        """Create the random generator of one use by one part in this step."""
        stream = stream if part.first_row == 0 else f"{stream} from row {part.first_row}"
        return make_generator(
            self.config.seed,
            rank=self.accelerator.process_index,
            num_images_seen=self.num_images_seen,
            stream=stream,
            device=self.accelerator.device,
        )


def draw_images(model, ws, rng, compute_dtype=None, **options):
    """Draw images from ws with fresh noise, as the discriminator sees them: before any grain."""
    draw = model.draw if isinstance(model, StyleGAN2Generator) else model.synthesis
    return draw(ws, "random", rng, compute_dtype, **options)


def map_to_ws(model, z, class_labels=None, class_weight=1.0):
    """Map z [B, z_dim] to ws [B, num_ws, w_dim]; the class's vector is scaled by `class_weight`."""
    w = model.mapping_network(z, class_labels, class_weight=class_weight)
    return w.unsqueeze(1).repeat(1, model.num_ws, 1)


def draw_ws(
    model, batch_size: int, mixing_probability: float, rng, class_labels=None, class_weight=1.0
):
    """Draw w [B, w_dim] and the ws [B, num_ws, w_dim] made of them.

    With `mixing_probability` an image changes to a second w at a random layer (StyleGAN paper,
    section 3.1).
    """
    device, num_ws = rng.device, model.num_ws
    z = torch.randn(2 * batch_size, model.config.z_dim, generator=rng, device=device)
    cutoffs = torch.randint(1, num_ws, (batch_size, 1), generator=rng, device=device)  # [B, 1]
    mixed = torch.rand(batch_size, 1, generator=rng, device=device) < mixing_probability
    labels = None if class_labels is None else class_labels.repeat(2)
    ws, ws_second = map_to_ws(model, z, labels, class_weight).chunk(2)  # [B, num_ws, w_dim]
    second = mixed & (torch.arange(num_ws, device=device) >= cutoffs)  # [B, num_ws]
    return ws[:, 0], torch.where(second.unsqueeze(2), ws_second, ws)


def compute_gradient_penalty(score, images, show):
    """Compute the mean squared gradient of `score`, images -> logits [B, 1], in float32.

    images [B, 1, R, R] pass through `show` before they are judged.
    """
    images = images.detach().requires_grad_()
    with second_derivatives():
        return r1_penalty(score(show(images)), images).mean()


def compute_path_lengths(model, batch_size: int, mixing_probability: float, rng, *classes):
    """Compute path lengths [B] of new images in float32; in bfloat16 they would be noise.

    classes: `class_labels` and `class_weight` of `draw_ws`.
    """
    _, ws = draw_ws(model, batch_size, mixing_probability, rng, *classes)
    with second_derivatives():
        images = draw_images(model, ws, rng)  # [B, 1, R, R]
    noise = torch.randn(images.shape, generator=rng, device=rng.device)
    return path_lengths(images, ws, noise)


def create_augmentation(config, device):
    """Create the probability that an `AugmentationConfig` describes; None for no augmentation."""
    if config.mode == "none":
        return None
    target = config.target if config.mode == "adaptive" else None
    return AdaptiveProbability(
        config.initial_probability, target, config.images_to_one, config.every_steps, device
    )


@torch.no_grad()
def share_magnitudes(model, accelerator) -> None:
    """Average the running magnitudes over processes, as if one process had seen all images."""
    if accelerator.num_processes == 1 or not isinstance(model, StyleGAN3Generator):
        return
    magnitudes = [layer.magnitude for layer in model.synthesis_network.layers]
    means = accelerator.reduce(torch.stack(magnitudes), "mean")
    for magnitude, mean in zip(magnitudes, means, strict=True):
        magnitude.copy_(mean)


@torch.no_grad()
def update_w_means(model, w, class_labels, accelerator, decay) -> None:
    """Move the running means of w towards those of a batch w [B, w_dim] over all processes."""
    mapping = model.mapping_network
    mapping.update_w_mean(accelerator.reduce(w.mean(dim=0), "mean"), decay)
    if mapping.class_means:
        classes = F.one_hot(class_labels, mapping.num_classes).to(w)  # [B, K]
        sums, counts = classes.T @ w, classes.sum(dim=0)
        mapping.update_class_means(
            accelerator.reduce(sums, "sum"), accelerator.reduce(counts, "sum"), decay
        )
