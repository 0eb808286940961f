"""Distance to held-out tiles while a model trains."""

import torch
from accelerate.utils import broadcast

from em_data.intensity import to_uint8
from em_evaluation.distances import frechet_distance
from em_evaluation.features import get_extractor
from em_evaluation.images import ImageSet, read_images
from em_evaluation.metrics import METRICS, choose_metrics, measure_values
from em_evaluation.statistics import compute_features


def check_metrics(names) -> None:
    """Refuse metrics that cannot be measured during training: `ValueError`, before anything long begins."""
    usable = [name for name, metric in METRICS.items() if not metric.needs_unit_norm]
    wrong = [name for name in names if name not in usable]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)} cannot be measured during training, on efficientnet-lite0; there are {', '.join(usable)}"
        )


class HeldOutDistance:
    """Frechet distance of generated images to views of `held_out` tiles by `extractor`, as `evaluate.py` measures it.

    Both sides have `num_images`, or as many as there are held-out views, and go through 8 bits; `seed` chooses the views. The smaller
    they are, the larger the distance of the same model: it tells two moments of one run apart and is not the number of a report.
    Several processes share the images; what is measured does not depend on how many they are. `metrics` names more of
    `em_evaluation.metrics.METRICS`, whose values stand in `further` after each measurement.
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
        check_metrics(metrics)
        self.accelerator = accelerator
        self.num_images = min(num_images, held_out.num_views)
        if self.num_images < 2:
            raise ValueError(
                f"{held_out.num_views} held-out views are too few for a distance; turn evaluate_every off or hold out more micrographs."
            )
        if self.num_images < num_images:
            say(
                f"the distance during training is over {self.num_images} images, as many as there are held-out views"
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

    def measure(self, generate) -> float:
        """The distance of the images that `generate` makes of numbers 0, 1, ...: numbers -> float32 [N, 1, H, W] in [-1, 1]."""
        accelerator = self.accelerator
        share = -(-self.num_images // accelerator.num_processes)
        numbers = range(self.num_images)[accelerator.process_index * share :][:share]
        features = torch.zeros(share, self.extractor.num_features)
        if numbers:
            images = ImageSet(to_uint8(generate(numbers)))
            features[: len(numbers)] = torch.from_numpy(
                compute_features(images, self.extractor, use_cache=False)
            )
        features = accelerator.gather(features.to(accelerator.device))[
            : self.num_images
        ]  # what fills up the last share is cut off
        values = torch.zeros(1 + len(self.metrics), device=accelerator.device)
        if accelerator.is_main_process:
            features = features.cpu().numpy()
            further = measure_values(self.metrics, features, self.reference)
            values += torch.tensor(
                [frechet_distance(features, self.reference), *further.values()],
                device=values.device,
            )
        distance, *further = broadcast(values).tolist()
        self.further = dict(zip(self.metrics, further))
        return distance
