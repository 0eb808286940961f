"""The 1-channel autoencoders, VQ and KL: construction, encoding, loss, and a codebook that stays alive."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from diffusers.models.autoencoders.vae import VectorQuantizer
from torch import nn

from em_diffusion.patch_discriminator import adaptive_weight, hinge_loss
from em_evaluation.perceptual import LPIPSDistance, PerceptualDistance

MAX_DISTANCES = (
    2**24
)  # entries of the matrix of distances to the codes held at a time: 64 MiB in float32


def create_autoencoder(config, resolution: int) -> VQModel | AutoencoderKL:
    """A stock `VQModel` or `AutoencoderKL` for images [B, 1, resolution, resolution], with latents in their own scale.

    diffusers' defaults are for other models: `scaling_factor` is 1 here, since mean and deviation of the latents are
    measured and stored beside it, and the quantiser's `legacy` (beta on the wrong term of the loss) is off. The
    constructor exposes neither `legacy` nor `beta`, so they are set on the quantiser; training does not depend on them
    (see `quantise`), nor does a model that was loaded from disk.
    """
    num_levels = len(config.block_out_channels)
    shape = {
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ("DownEncoderBlock2D",) * num_levels,
        "up_block_types": ("UpDecoderBlock2D",) * num_levels,
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "sample_size": resolution,
        "norm_num_groups": config.norm_num_groups,
        "scaling_factor": 1.0,
        "mid_block_add_attention": config.mid_attention,
    }
    if config.family == "kl":
        return AutoencoderKL(**shape)
    vqvae = VQModel(**shape, num_vq_embeddings=config.num_codes)
    vqvae.quantize.legacy = False
    vqvae.quantize.beta = config.commitment_weight
    return vqvae


def has_codebook(model) -> bool:
    """Whether the model is a `VQModel` whose codes are the nearest ones, as `quantise` takes them; a `GumbelVQ`'s are not."""
    return isinstance(model, VQModel) and isinstance(model.quantize, VectorQuantizer)


def is_trainable(model) -> bool:
    """Whether the `AutoencoderObjective` knows the model's loss."""
    return has_codebook(model) or isinstance(model, AutoencoderKL)


def encode(model, images):
    """Latents of images [B, 1, R, R] in [-1, 1] as a diffusion model learns them: [B, C, h, w] in the autoencoder's scale.

    Of a `VQModel` they are the encoder's outputs before quantisation, of an `AutoencoderKL` the mean of the posterior.
    """
    output = model.encode(images)
    return output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents


def decode(model, latents):
    """Images [B, 1, R, R] of latents [B, C, h, w] in the autoencoder's scale, moved onto the nearest codes of a `VQModel`.

    Nearest codes are searched in float32, since a narrower type would confuse near ones. Other kinds quantise by themselves.
    """
    if not has_codebook(model):
        return model.decode(latents.to(model.dtype)).sample
    quantised = quantise(latents, model.quantize.embedding.weight).latents
    return model.decode(quantised.to(model.dtype), force_not_quantize=True).sample


def find_codes(model, latents):
    """Return the codes int64 [B, h, w] of latents [B, C, h, w]; None for a model without a codebook."""
    if not hasattr(model, "quantize"):
        return None
    indices = model.quantize(latents.to(model.dtype))[2][2]
    return indices.reshape(len(latents), *latents.shape[2:])


@dataclass
class Quantised:
    """Latents moved onto their nearest codes, and the two losses of that move."""

    latents: torch.Tensor  # [B, C, h, w]; the gradient passes straight through to the encoder
    indices: torch.Tensor  # [B, h, w], int64
    codebook_loss: torch.Tensor  # mean of (sg(z_e) - e)^2: moves the codes
    commitment_loss: torch.Tensor  # mean of (z_e - sg(e))^2: moves the encoder


def quantise(latents, codebook) -> Quantised:
    """Replace each latent vector by its nearest code, in float32 whatever the autocast.

    `latents` [B, C, h, w] are the encoder's outputs z_e, `codebook` [num_codes, C] holds the codes e. The losses are
    the second and third term of the VQ-VAE objective, ||sg(z_e) - e||^2 + beta ||z_e - sg(e)||^2 (van den Oord et al.
    2017, arXiv:1711.00937, equation 3), each a mean over elements and without its weight.
    """
    with torch.autocast(latents.device.type, enabled=False):
        z = latents.float().movedim(1, -1)  # [B, h, w, C]
        codebook = codebook.float()
        indices = nearest_codes(z.detach().reshape(-1, z.shape[-1]), codebook.detach()).reshape(
            z.shape[:-1]
        )
        codes = F.embedding(indices, codebook)  # [B, h, w, C]
        codebook_loss = F.mse_loss(codes, z.detach())
        commitment_loss = F.mse_loss(z, codes.detach())
        quantised = z + (codes - z).detach()
    return Quantised(quantised.movedim(-1, 1), indices, codebook_loss, commitment_loss)


@torch.no_grad()
def nearest_codes(vectors, codebook):
    """Index of the code nearest to each of vectors [N, C] among codebook [K, C]: int64 [N], in bounded memory."""
    rows = max(1, MAX_DISTANCES // len(codebook))
    half_squares = codebook.square().sum(dim=1) / 2  # [K]
    return torch.cat(
        [
            torch.addmm(half_squares, x, codebook.T, alpha=-1).argmin(dim=1)
            for x in vectors.split(rows)
        ]
    )


class Objective(NamedTuple):
    """What one forward pass of the `AutoencoderObjective` gives."""

    loss: torch.Tensor  # its backward pass gives the autoencoder's gradients
    terms: dict[str, torch.Tensor]  # the losses by name, without weights and gradients
    latents: torch.Tensor  # the encoder's outputs [B, C, h, w], without gradient
    indices: torch.Tensor | None  # of the codes [B, h, w]; None without a codebook
    discriminator_loss: torch.Tensor | None  # its gradients reach the discriminator alone


def create_perceptual_distance(config) -> nn.Module | None:
    """Create the distance that an `AutoencoderConfig` asks for; None with a weight of 0."""
    if config.perceptual_weight == 0:
        return None
    if config.perceptual_network == "lpips":
        return LPIPSDistance()
    return PerceptualDistance(config.perceptual_layers)


class AutoencoderObjective(nn.Module):
    """The autoencoder with its training loss."""

    def __init__(self, model: VQModel | AutoencoderKL, config):
        super().__init__()
        self.model = model
        self.config = config
        self.perceptual = create_perceptual_distance(config)

    def forward(self, images, noise=None, discriminator=None) -> Objective:
        """The losses of images [B, 1, R, R] in [-1, 1]; with a `PatchDiscriminator`, the adversarial ones as well.

        noise: of the posterior of an `AutoencoderKL`, standard normal [B, C, h, w].
        """
        if isinstance(self.model, AutoencoderKL):
            latents, decoded, loss, terms, indices = self.pass_kl(images, noise)
        else:
            latents, decoded, loss, terms, indices = self.pass_vq(images)
        discriminator_loss = None
        if discriminator is None:
            reconstruction, reconstruction_terms = self.compare(decoded, images)
        else:
            reconstruction, reconstruction_terms, discriminator_loss = self.play(
                decoded, images, discriminator
            )
        terms = {name: term.detach() for name, term in (reconstruction_terms | terms).items()}
        return Objective(
            reconstruction + loss, terms, latents.detach(), indices, discriminator_loss
        )

    def pass_vq(self, images):
        """(encoder's outputs, decoded images, weighted loss of the codebook, its terms, codes) of a `VQModel`."""
        latents = self.model.encode(images).latents  # [B, C, h, w]
        quantised = quantise(latents, self.model.quantize.embedding.weight)
        decoded = self.model.decode(
            quantised.latents, force_not_quantize=True
        ).sample  # [B, 1, R, R]
        c = self.config
        terms = {"codebook": quantised.codebook_loss, "commitment": quantised.commitment_loss}
        loss = c.codebook_weight * (terms["codebook"] + c.commitment_weight * terms["commitment"])
        return latents, decoded, loss, terms, quantised.indices

    def pass_kl(self, images, noise):
        """(posterior's mean, decoded images, weighted divergence, its term, None) of an `AutoencoderKL`.

        The divergence of the posterior from a standard normal is counted in nats per pixel (Kingma and Welling 2014,
        arXiv:1312.6114, appendix B), the unit in which the reconstruction's loss is counted: `kl_weight` means the same
        at every resolution and for every number of channels, and about the same as in latent diffusion.
        """
        posterior = self.model.encode(images).latent_dist
        with torch.autocast(images.device.type, enabled=False):
            mean, log_variance = posterior.mean.float(), posterior.logvar.float()  # [B, C, h, w]
            latents = mean + (0.5 * log_variance).exp() * noise
            divergence = (
                (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2 / images.numel()
            )
        decoded = self.model.decode(latents).sample  # [B, 1, R, R]
        return mean, decoded, self.config.kl_weight * divergence, {"kl": divergence}, None

    def compare(self, decoded, images):
        """The weighted distance of decoded images to `images`, both [B, 1, R, R], and its terms by name."""
        terms = {
            "l1": F.l1_loss(decoded.float(), images),
            "l2": F.mse_loss(decoded.float(), images),
        }
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(decoded, images)
        c = self.config
        loss = c.l1_weight * terms["l1"] + c.l2_weight * terms["l2"]
        return loss + c.perceptual_weight * terms.get("perceptual", 0.0), terms

    def play(self, decoded, images, discriminator):
        """One round of the game: (a scalar of the same gradients as L_rec + lambda L_GAN, terms, the discriminator's loss).

        Perceptual network and discriminator are passed forward and backward once, down to the pixels; there the two
        gradients are compared at the decoder's last layer, weighed, summed, and sent on through the decoder together:
        <decoded, dL / d decoded>, the second factor constant, has the gradients of L. Its value is shifted to that of L.
        The discriminator's loss shares the pass over the decoded images, which it sees without gradient to the decoder.

        Gradients at the pixels of a mean over them are tiny: they are computed of the sum, which float16 can hold, and the
        scale is taken off in float32. Several processes, and parts of a batch, each weigh by their own images.
        """
        pixels = decoded.detach().requires_grad_()
        reconstruction, terms = self.compare(pixels, images)
        logits_fake = discriminator(pixels)  # [B, 1, h, w]
        adversarial = -logits_fake.float().mean()
        last, count = self.model.decoder.conv_out.weight, pixels.numel()
        with torch.autocast(pixels.device.type, enabled=False):
            pulls = [
                torch.autograd.grad(term * count, pixels, retain_graph=term is adversarial)[0]
                for term in (reconstruction, adversarial)
            ]
            at_last = [
                torch.autograd.grad(decoded, last, pull / count**0.5, retain_graph=True)[0].float()
                / count**0.5
                for pull in pulls
            ]
            weight = adaptive_weight(*at_last)
            scale = self.config.discriminator_weight * weight
            pull = (pulls[0].float() + scale * pulls[1].float()) / count
            surrogate = (decoded.float() * pull).sum()
        loss = surrogate + (reconstruction + scale * adversarial - surrogate).detach()
        logits_real = discriminator(images)
        terms |= {"generator": adversarial, "adaptive_weight": weight}
        terms |= {"logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
        terms["discriminator"] = hinge_loss(logits_real, logits_fake)
        return loss, terms, terms["discriminator"]


class CodebookMonitor:
    """Counts how often each code is used, and moves codes that fell out of use onto recent encoder outputs.

    A window lasts `window_images`; at its end `end_window` moves each code that no latent chose in it. The counts are part
    of the checkpoint, so that a resumed run revives the same codes at the same moment.
    """

    def __init__(self, num_codes: int, window_images: int, device="cpu"):
        self.counts = torch.zeros(num_codes, dtype=torch.int64, device=device)
        self.window_images = window_images
        self.window_start = 0

    def count(self, indices, accelerator=None):
        """Add the codes chosen in one step, int64 of any shape; summed over processes with an `accelerator`."""
        counts = torch.bincount(indices.flatten(), minlength=len(self.counts))
        self.counts += counts if accelerator is None else accelerator.reduce(counts, "sum")

    def usage(self):
        """Fraction of the codes used since the window began, a 0-d tensor in [0, 1]."""
        return (self.counts > 0).float().mean()

    def perplexity(self):
        """exp of the entropy of the codes used since the window began: 1 to num_codes (all equally used)."""
        frequencies = self.counts / self.counts.sum().clamp(min=1)
        return torch.special.entr(frequencies).sum().exp()

    def is_due(self, num_images_seen: int) -> bool:
        """Whether the window has lasted."""
        return num_images_seen - self.window_start >= self.window_images

    @torch.no_grad()
    def end_window(
        self,
        embedding: nn.Embedding,
        latents,
        generator,
        optimizer,
        num_images_seen: int,
        average=None,
    ) -> int:
        """Move codes without use onto vectors drawn from latents [B, C, h, w], and begin a new window.

        The optimizer's moments of a moved code are forgotten with it, and so is its `average`, an embedding whose codes
        follow those of `embedding`: a mean of the dead place and the new one would be near no latent at all. With latents
        None no code is moved: late in a run the decoder has no steps left to learn what a new code stands for. Returns the
        number of codes moved.
        """
        moved = (
            self._revive(embedding, latents, generator, optimizer, average)
            if latents is not None
            else 0
        )
        self.counts.zero_()
        self.window_start = num_images_seen
        return moved

    def _revive(self, embedding, latents, generator, optimizer, average):
        dead = (self.counts == 0).nonzero().flatten()
        move_codes(embedding, dead, latents, generator)
        if average is not None:
            average.weight[dead] = embedding.weight[dead]
        for moment in optimizer.state.get(embedding.weight, {}).values():
            if torch.is_tensor(moment) and moment.shape == embedding.weight.shape:
                moment[dead] = 0
        return len(dead)

    def state_dict(self):
        return {"counts": self.counts.clone(), "window_start": self.window_start}

    def load_state_dict(self, state):
        self.counts.copy_(state["counts"])
        self.window_start = int(state["window_start"])


@torch.no_grad()
def move_codes(embedding: nn.Embedding, codes, latents, generator):
    """Put the codes with these indices onto vectors of latents [B, C, h, w], drawn by `generator`, distinct if enough."""
    vectors = (
        latents.movedim(1, -1).reshape(-1, latents.shape[1]).to(embedding.weight.dtype)
    )  # [B h w, C]
    order = torch.randperm(len(vectors), generator=generator, device=generator.device).to(
        vectors.device
    )
    chosen = order[torch.arange(len(codes), device=order.device) % len(order)]
    embedding.weight[codes] = vectors[chosen]


def hash_weights(module: nn.Module, without: tuple[str, ...] = ()) -> str:
    """SHA-256 of a module's state: names, types, shapes and bytes; without the parts whose names begin so."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(without):
            continue
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
