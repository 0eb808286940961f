"""Random numbers keyed by what they are for, never by what ran before."""

import hashlib

import torch


def seed_for(*key: int | str) -> int:
    """Return a 63-bit seed that depends on all parts of `key` and on nothing else (BLAKE2b)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def make_generator(
    seed: int,
    *,
    rank: int = 0,
    num_images_seen: int = 0,
    stream: str = "",
    device: str | torch.device = "cpu",
) -> torch.Generator:
    """Return a torch.Generator keyed by (seed, rank, num_images_seen, stream).

    A resumed run thus draws what an uninterrupted run draws. `stream` separates uses that must not
    share numbers, such as "noise" and "mixing".
    """
    return torch.Generator(device).manual_seed(seed_for(seed, rank, num_images_seen, stream))


def make_image_rng(seed: int, number: int) -> torch.Generator:
    """Return the random generator of image `number`; on the CPU, so that any device gets its noise.

    Every `Drawer` draws from it.
    """
    return torch.Generator().manual_seed(seed_for(seed, number))
