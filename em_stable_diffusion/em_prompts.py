"""Encoded prompts: with them, images are drawn without the text encoder.

It needs only torch and diffusers.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from em_training.em_saved_model import SavesSafetensors


class EMPrompts(SavesSafetensors, ModelMixin, ConfigMixin):
    """The embeddings of the empty prompt and of some prompts, float32 [1 + P, L, D].

    Args:
        texts: The prompts: one for all images, or one for each class in the order of the classes.
        length: Tokens of an encoded prompt, padding included.
        width: Numbers for each token.
    """

    @register_to_config
    def __init__(self, texts: list[str], length: int, width: int):
        super().__init__()
        self.embeddings = nn.Parameter(
            torch.zeros(1 + len(texts), length, width), requires_grad=False
        )

    @property
    def empty(self) -> torch.Tensor:
        """The embeddings of the empty prompt, [L, D]."""
        return self.embeddings[0]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of these rows; row 0 is the empty prompt, row 1 the first text."""
        return self.embeddings[rows]
