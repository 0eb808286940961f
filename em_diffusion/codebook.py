"""The codebook of a VQ autoencoder: its losses, and codes that are kept in use."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from em_diffusion.pipeline_em_ldm import nearest_codes


@dataclass
class Quantised:
    """Latents replaced by their nearest codes, and the two losses of the replacement."""

    latents: torch.Tensor  # [B, C, h, w]; the gradient passes straight through to the encoder
    indices: torch.Tensor  # [B, h, w], int64
    codebook_loss: torch.Tensor  # mean of (sg(z_e) - e)^2: moves the codes
    commitment_loss: torch.Tensor  # mean of (z_e - sg(e))^2: moves the encoder


def quantise(latents, codebook) -> Quantised:
    """Replace each latent vector by its nearest code, in float32 also under autocast.

    The losses are the second and third term of the VQ-VAE objective, ||sg(z_e) - e||^2 +
    beta ||z_e - sg(e)||^2 (van den Oord et al. 2017, arXiv:1711.00937, equation 3). Each is a mean
    over elements, without its weight.

    Args:
        latents: Outputs z_e of the encoder, [B, C, h, w].
        codebook: Codes e, [num_codes, C].
    """
    with torch.autocast(latents.device.type, enabled=False):
        z = latents.float().movedim(1, -1)  # [B, h, w, C]
        codebook = codebook.float()
        vectors = z.detach().reshape(-1, z.shape[-1])  # [B h w, C]
        indices = nearest_codes(vectors, codebook.detach()).reshape(z.shape[:-1])  # [B, h, w]
        codes = F.embedding(indices, codebook)  # [B, h, w, C]
        codebook_loss = F.mse_loss(codes, z.detach())
        commitment_loss = F.mse_loss(z, codes.detach())
        quantised = z + (codes - z).detach()
    return Quantised(quantised.movedim(-1, 1), indices, codebook_loss, commitment_loss)


class CodebookMonitor:
    """Counts how often each code is used, and moves unused codes onto recent encoder outputs.

    At the end of a window of `window_images`, `end_window` moves each code that no latent chose in
    it. The counts are part of the checkpoint: a resumed run moves the same codes.
    """

    def __init__(self, num_codes: int, window_images: int, device="cpu"):
        self.counts = torch.zeros(num_codes, dtype=torch.int64, device=device)
        self.window_images = window_images
        self.window_start = 0

    def count(self, indices, accelerator=None):
        """Add the codes chosen in one step, int64 of any shape; of all processes together."""
        counts = torch.bincount(indices.flatten(), minlength=len(self.counts))
        self.counts += counts if accelerator is None else accelerator.reduce(counts, "sum")

    def usage(self):
        """Return the fraction of the codes used since the window began, a 0-d tensor in [0, 1]."""
        return (self.counts > 0).float().mean()

    def perplexity(self):
        """Return exp(entropy) of the codes used since the window began: 1 to num_codes."""
        frequencies = self.counts / self.counts.sum().clamp(min=1)
        return torch.special.entr(frequencies).sum().exp()

    def is_due(self, num_images_seen: int) -> bool:
        """Say whether the window is over."""
        return num_images_seen - self.window_start >= self.window_images

    @torch.no_grad()
    def end_window(
        self, embedding: nn.Embedding, latents, rng, optimizer, num_images_seen, average=None
    ) -> int:
        """Move the unused codes, begin a new window and return how many codes were moved.

        Args:
            embedding: The codes.
            latents: Encoder outputs [B, C, h, w], from which `rng` draws the new places. None moves
                no code: late in a run the decoder has no time to learn what a new code means.
            optimizer: Forgets its moments of the moved codes.
            average: Averaged codes, an embedding that follows `embedding`. The moved ones jump,
                too: a mean of the old and the new place would be near no latent.
        """
        moved = torch.zeros(0, dtype=torch.int64)
        if latents is not None:
            moved = (self.counts == 0).nonzero().flatten()
            move_codes(embedding, moved, latents, rng)
            if average is not None:
                average.weight[moved] = embedding.weight[moved]
            for moment in optimizer.state.get(embedding.weight, {}).values():
                if torch.is_tensor(moment) and moment.shape == embedding.weight.shape:
                    moment[moved] = 0
        self.counts.zero_()
        self.window_start = num_images_seen
        return len(moved)

    def state_dict(self):
        return {"counts": self.counts.clone(), "window_start": self.window_start}

    def load_state_dict(self, state):
        self.counts.copy_(state["counts"])
        self.window_start = int(state["window_start"])


@torch.no_grad()
def move_codes(embedding: nn.Embedding, codes, latents, rng):
    """Put the codes with these indices onto vectors of latents [B, C, h, w] drawn by `rng`.

    The vectors are distinct if there are enough.
    """
    vectors = latents.movedim(1, -1).reshape(-1, latents.shape[1]).to(embedding.weight.dtype)
    order = torch.randperm(len(vectors), generator=rng, device=rng.device).to(vectors.device)
    chosen = order[torch.arange(len(codes), device=order.device) % len(order)]
    embedding.weight[codes] = vectors[chosen]
