"""What our models share when they are saved: a mixin, which stands in each published file.

See `em_training.em_saved_pipeline.read_source`.
"""

import os
from typing import Any


class SavesSafetensors:
    """A model whose weights are always saved as safetensors; a mixin before `ModelMixin`."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: Any = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **kwargs: Any,
    ) -> None:
        """Save as `ModelMixin.save_pretrained` does; weights are always safetensors."""
        if not safe_serialization:
            raise ValueError(
                "safe_serialization is False, but pickled weights can run code when they are "
                "loaded, and our models do not load them. Leave safe_serialization out."
            )
        super().save_pretrained(  # type: ignore[misc]
            save_directory,
            is_main_process,
            save_function,
            variant=variant,
            max_shard_size=max_shard_size,
            **kwargs,
        )


class OwnLayers(SavesSafetensors):
    """A model whose layers are none of torch.nn's; a mixin before `ModelMixin`."""

    def enable_layerwise_casting(self, *args: Any, **kwargs: Any) -> None:
        """Raise `NotImplementedError`: diffusers casts layers of torch.nn only; there are none."""
        raise NotImplementedError(
            "Layerwise casting has no effect on this network, whose layers are its own. Use "
            "model.to(torch.bfloat16) to halve its memory."
        )
