"""Fitting the linear autoencoder: principal components of patches, then its decoder."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

from em_diffusion.em_patch_basis import EMPatchBasis
from em_diffusion.validation import choose_spaced_views

CHUNK_PIXELS = 2**20  # read at a time, which bounds the memory
RIDGE = 1e-9  # of the mean square of the decoder's inputs


def fit_to_tiles(tiles, num_views: int, patch_size: int, latent_channels: int) -> EMPatchBasis:
    """Fit to up to `num_views` views of tiles, evenly spaced over all; see `fit_patch_basis`."""
    ids = choose_spaced_views(tiles, num_views)
    size = max(1, CHUNK_PIXELS // tiles.resolution**2)

    def read():
        return (tiles.batch(ids[start : start + size]) for start in range(0, len(ids), size))

    return fit_patch_basis(read, patch_size, latent_channels)


@torch.no_grad()
def fit_patch_basis(
    read: Callable[[], Iterable[torch.Tensor]], patch_size: int, latent_channels: int
) -> EMPatchBasis:
    """Fit the components, then the decoder by least squares.

    Args:
        read: Returns batches of images, float32 [B, 1, H, W] in [-1, 1]; called twice. H and W are
            multiples of `patch_size`.

    Raises:
        ValueError: If a patch has fewer pixels than components.
    """
    if latent_channels > patch_size**2:
        raise ValueError(
            f"a patch of {patch_size} x {patch_size} pixels has {patch_size**2} components, fewer "
            f"than {latent_channels}. Use fewer with --autoencoder.latent-channels."
        )
    model = EMPatchBasis(patch_size, latent_channels)
    patches = (_as_rows(F.unfold(x, patch_size, stride=patch_size)) for x in read())
    moments = sum(rows.T @ rows for rows in map(_append_one, patches))  # [p^2 + 1, p^2 + 1]
    mean = moments[-1, :-1] / moments[-1, -1]
    covariance = moments[:-1, :-1] / moments[-1, -1] - torch.outer(mean, mean)
    basis = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :latent_channels]  # [p^2, C]
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    basis = basis * largest.sign()  # the sign of a component is arbitrary
    model.encoder.weight.copy_(basis.T.reshape(model.encoder.weight.shape))
    model.encoder.bias.copy_(-mean @ basis)

    num_inputs = 9 * latent_channels + 1
    squares = torch.zeros(num_inputs, num_inputs, dtype=torch.float64)
    products = torch.zeros(num_inputs, patch_size**2, dtype=torch.float64)
    for x in read():
        around = F.pad(model.encode(x).latents, (1, 1, 1, 1), mode="replicate")
        inputs = _append_one(_as_rows(F.unfold(around, 3)))  # [N, 9 C + 1]
        squares += inputs.T @ inputs
        products += inputs.T @ _as_rows(F.unfold(x, patch_size, stride=patch_size))
    ridge = RIDGE * squares.diagonal().mean() * torch.eye(len(squares))
    weights = torch.linalg.solve(squares + ridge, products)  # [9 C + 1, p^2]
    model.decoder.weight.copy_(weights[:-1].T.reshape(model.decoder.weight.shape))
    model.decoder.bias.copy_(weights[-1])
    return model.eval()


def _as_rows(unfolded):
    """Turn the columns of `unfold` [B, K, N] into rows, float64 [B N, K]."""
    return unfolded.movedim(1, 2).flatten(0, 1).double()


def _append_one(rows):
    return torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)
