"""Compute features in one process or several: run by test_features.py as `torchrun
features_in_processes.py OUT`.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from em_evaluation.extractor import Extractor
from em_evaluation.feature_cache import compute_features

torch.set_num_threads(1)
out = Path(sys.argv[1])


class Moments(Extractor):
    name, identity, num_features = "moments", "moments", 2
    num_seen = 0

    def _features(self, images):
        self.num_seen += len(images)
        return torch.stack([images.mean((1, 2, 3)), images.std((1, 2, 3))], 1)


state = PartialState(cpu=True)
for num in (7, 1):
    images = torch.rand(num, 1, 8, 8, generator=torch.Generator().manual_seed(num)) * 2 - 1
    first, again = Moments(), Moments()
    features = compute_features(images, first, batch_size=3, cache_dir=out, state=state)
    cached = compute_features(images, again, batch_size=3, cache_dir=out, state=state)
    assert again.num_seen == 0  # on every process, since the main one has found them
    assert first.num_seen <= -(-num // state.num_processes)
    assert (features is not None) == (cached is not None) == state.is_main_process
    if state.is_main_process:
        np.testing.assert_array_equal(features, cached)
        np.save(out / f"{num}.npy", features)
state.destroy_process_group()
