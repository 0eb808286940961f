"""Randomness keyed by what it is for, never by what ran before."""

import hashlib

import torch


def seed_for(*key: int | str) -> int:
    """Return a 63-bit seed that depends on all parts of `key` and on nothing else (BLAKE2b of their text)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def make_generator(
    seed: int, *, rank: int = 0, num_images_seen: int = 0, stream: str = "", device="cpu"
) -> torch.Generator:
    """Return a generator keyed by (seed, rank, num_images_seen, stream), so that a resumed run draws what the whole run drew.

    `stream` separates uses that must not share numbers, such as "noise" and "mixing".
    """
    return torch.Generator(device).manual_seed(seed_for(seed, rank, num_images_seen, stream))
