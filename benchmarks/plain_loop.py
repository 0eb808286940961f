"""The plain way to train a latent diffusion model, after diffusers' unconditional training example.

Every step decodes PNG tiles with PIL, encodes them, draws independent uniform timesteps, and
predicts the noise with a float32 U-Net in the default memory format. Adam has torch's defaults,
gradients are clipped at 1, and the weights are not averaged. Other benchmarks compare ours with it.
"""

import torch
import torch.nn.functional as F
from data_loading import read_png_batch


class PlainLoop:
    """A U-Net trained the plain way.

    Args:
        unet: A `UNet2DModel`.
        vqvae: A frozen `VQModel`.
        scheduler: The noise schedule.
        tiles: Locates the tile and the symmetry of each view.
        paths: The PNG file of each tile.
        latents_mean, latents_std: Numbers, or one per channel, that normalise the latents.
        generator: Random numbers for the order of views, the noise and the timesteps.
    """

    def __init__(
        self,
        unet,
        vqvae,
        scheduler,
        tiles,
        paths,
        *,
        batch_size,
        learning_rate,
        latents_mean,
        latents_std,
        generator,
    ):
        self.device = next(vqvae.parameters()).device
        self.unet, self.vqvae, self.scheduler = unet.to(self.device), vqvae.eval(), scheduler
        self.tiles, self.paths, self.batch_size = tiles, paths, batch_size
        self.mean, self.std = (
            as_channels(value, self.device) for value in (latents_mean, latents_std)
        )
        self.optimizer = torch.optim.Adam(unet.parameters(), lr=learning_rate)
        self.generator = generator
        self.order = torch.empty(0, dtype=torch.int64)

    def step(self, lap=lambda part: None):
        """Train on one batch and return its loss; call `lap(part)` at the end of each part."""
        view_ids = self.draw_views()
        images = read_png_batch(self.tiles, self.paths, view_ids).to(self.device)  # [B, 1, R, R]
        lap("decode PNG")
        latents = self.encode(images)  # [B, C, h, w]
        lap("encode")
        noise = torch.randn(latents.shape, generator=self.generator).to(self.device)
        num_timesteps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(num_timesteps, (len(images),), generator=self.generator).to(
            self.device
        )
        loss = self.compute_loss(latents, noise, timesteps)
        loss.backward()
        lap("forward and backward")
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        lap("clip and optimizer")
        return loss.detach()

    def draw_views(self):
        """Return the next views of a shuffled epoch."""
        while len(self.order) < self.batch_size:
            epoch = torch.randperm(self.tiles.num_views, generator=self.generator)
            self.order = torch.cat([self.order, epoch])
        view_ids, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        return view_ids.numpy()

    @torch.no_grad()
    def encode(self, images):
        """Return the normalised latents [B, C, h, w] of images [B, 1, R, R]."""
        return (self.vqvae.encode(images).latents - self.mean) / self.std

    def compute_loss(self, latents, noise, timesteps):
        """Return the mean squared error of the predicted noise, a scalar."""
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        return F.mse_loss(self.unet(noisy, timesteps).sample, noise)


def as_channels(value, device):
    return torch.as_tensor(value, dtype=torch.float32, device=device).reshape(1, -1, 1, 1)
