"""A history of generated images, from which a discriminator is shown some."""

import torch


class ImagePool:
    """Keeps `size` generated images, so that a discriminator does not forget earlier ones.

    Each image that comes fills the pool while there is room, and is returned. Then it is returned
    with probability 1/2; else it takes the place of a random image of the pool, which is returned
    (Shrivastava et al. 2017, arXiv:1612.07828; Zhu et al. 2017 with a size of 50).

    Args:
        size: Images to keep; 0 returns all images as they come.
        shape: [C, H, W] of an image.
    """

    def __init__(self, size: int, shape: tuple[int, ...], device: torch.device | str = "cpu"):
        self.images = torch.zeros(size, *shape, device=device)
        self.count = 0

    @torch.no_grad()
    def exchange(self, images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """Return as many images [B, C, H, W] as given, some of them from the pool.

        rng: On the CPU.
        """
        size, images = len(self.images), images.detach().float()
        if size == 0:
            return images
        returned = images.clone()
        swaps = torch.rand(len(images), generator=rng) < 0.5
        places = torch.randint(size, (len(images),), generator=rng)
        for i, (swap, place) in enumerate(zip(swaps.tolist(), places.tolist(), strict=True)):
            if self.count < size:
                self.images[self.count] = images[i]
                self.count += 1
            elif swap:
                returned[i] = self.images[place]
                self.images[place] = images[i]
        return returned

    def state_dict(self) -> dict:
        return {"images": self.images, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.images.copy_(state["images"])
        self.count = state["count"]
