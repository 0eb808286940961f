"""Distance to held-out tiles while a model trains."""

import torch
from accelerate.utils import broadcast

from em_data.intensity import to_uint8
from em_evaluation.distances import frechet_distance
from em_evaluation.feature_cache import compute_features
from em_evaluation.feature_metrics import check_metrics, choose_metrics, measure_values
from em_evaluation.features import get_extractor
from em_evaluation.images import ImageSet, read_images


class HeldOutDistance:
    """Frechet distance of generated images to held-out views while a model trains.

    It tells moments of one run apart and is not the number of a report: the fewer images, the
    larger the distance of the same model. Several processes share the images; the result does not
    depend on their number.

    Args:
        held_out: Tiles that are not trained on.
        num_images: Images of both sides, at most the number of held-out views.
        seed: Draws the views.
        accelerator: accelerate's.
        metrics: More metrics of `em_evaluation.feature_metrics`; their values are in `further`
            after each measurement.
        say: Gets notes.
        extractor: Name of the extractor.
    """

    def __init__(
        self,
        held_out,
        num_images: int,
        seed: int,
        *,
        accelerator,
        metrics=(),
        say=print,
        extractor="efficientnet-lite0",
    ):
        check_metrics(metrics, in_training=True)
        self.accelerator = accelerator
        self.num_images = min(num_images, len(held_out))
        if self.num_images < 2:
            raise ValueError(
                f"{len(held_out)} held-out views are too few for a distance. Hold out more "
                "micrographs, or set evaluate_every to 0."
            )
        if self.num_images < num_images:
            say(
                f"the distance during training is over {self.num_images} images: there are no "
                "more held-out views"
            )
        self.extractor = get_extractor(
            extractor, resolution=held_out.resolution, device=accelerator.device
        )
        self.further = {}
        self.metrics, notes = (
            choose_metrics(metrics, self.extractor, self.num_images) if metrics else ((), [])
        )
        self.metrics = tuple(name for name in self.metrics if name != "frechet_distance")
        for note in notes:
            say(note)
        self.reference = None
        if accelerator.is_main_process:
            images = read_images(held_out, self.num_images, seed % 2**32)
            self.reference = compute_features(images, self.extractor, use_cache=False)

    @property
    def curves(self) -> dict[str, float]:
        """The further metrics of the last measurement by their names in a training log."""
        return {f"held_out_{name}": value for name, value in self.further.items()}

    def measure(self, generate) -> float:
        """Measure the images that `generate` draws: numbers -> float32 [N, 1, H, W] in [-1, 1]."""
        accelerator = self.accelerator
        share = -(-self.num_images // accelerator.num_processes)
        numbers = range(self.num_images)[accelerator.process_index * share :][:share]
        features = torch.zeros(share, self.extractor.num_features)
        if numbers:
            images = ImageSet(to_uint8(generate(numbers)))
            features[: len(numbers)] = torch.from_numpy(
                compute_features(images, self.extractor, use_cache=False)
            )
        features = accelerator.gather(features.to(accelerator.device))
        features = features[: self.num_images]  # without the padding of the last share
        values = torch.zeros(1 + len(self.metrics), device=accelerator.device)
        if self.reference is not None:  # on the main process
            features = features.cpu().numpy()
            further = measure_values(self.metrics, features, self.reference)
            values += torch.tensor(
                [frechet_distance(features, self.reference), *further.values()],
                device=values.device,
            )
        distance, *further = broadcast(values).tolist()
        self.further = dict(zip(self.metrics, further))
        return distance
