"""Averages of weights whose width is chosen after the training.

Karras et al. 2024, arXiv:2312.02696, section 3. A power-function average at t images weights the
weights at tau images by p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1). Its width sigma_rel is the
standard deviation of this profile over t. Many profiles are close to a sum of the profiles of
stored snapshots; the average of such a width is the same sum of the snapshots' weights.
"""

import math
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from em_data.files import flush_to_disk, make_folder

SIGMA_RELS = (0.05, 0.10)  # the paper's
LARGEST_SIGMA_REL = 12**-0.5  # the plain mean of all weights, gamma = 0
LARGEST_ERROR = 0.2


class PosthocEMA:
    """Two power-function averages of `model` and their snapshots in `folder`, one file each.

    Call `update` after every step and `save_snapshot` now and then: 16 snapshots reach any
    sigma_rel from 0.03 to 0.2 within a few percent. A snapshot takes 2 bytes for each weight and
    average (float16, or 4 bytes for values beyond its range).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        folder: str | Path,
        sigma_rels: tuple[float, ...] = SIGMA_RELS,
    ):
        self.folder = Path(folder)
        self.names = [name for name, _ in model.named_parameters()]
        self.weights = [parameter.detach() for parameter in model.parameters()]
        self.averages = {
            sigma_rel: [weight.clone() for weight in self.weights] for sigma_rel in sigma_rels
        }
        self.gammas = {sigma_rel: sigma_rel_to_gamma(sigma_rel) for sigma_rel in sigma_rels}

    @torch.no_grad()
    def update(self, num_images_seen: int, batch_size: int) -> None:
        """Move the averages towards the model after a step.

        With beta = (1 - batch_size / t)^(gamma + 1), a step's weights count by the integral of p
        over its images.
        """
        for sigma_rel, averages in self.averages.items():
            beta = (1 - batch_size / num_images_seen) ** (self.gammas[sigma_rel] + 1)
            torch._foreach_lerp_(averages, self.weights, 1 - beta)

    def save_snapshot(self, num_images_seen: int) -> None:
        """Write the averages atomically, one file each."""
        make_folder(self.folder)
        for sigma_rel, averages in self.averages.items():
            largest = max(float(average.abs().max()) for average in averages)
            dtype = torch.float16 if largest < 6e4 else torch.float32
            tensors = {
                name: average.to("cpu", dtype).contiguous()
                for name, average in zip(self.names, averages)
            }
            path = self.folder / f"{num_images_seen:012d}-{sigma_rel}.safetensors"
            partial = path.with_suffix(".partial")
            save_file(tensors, partial)
            flush_to_disk(partial)
            os.replace(partial, path)
        flush_to_disk(self.folder)

    def drop_snapshots_after(self, num_images_seen: int) -> None:
        """Remove snapshots of steps after the checkpoint that a run resumes from."""
        for path, (count, _) in list_snapshots(self.folder).items():
            if count > num_images_seen:
                path.unlink()

    def state_dict(self) -> dict:
        return {
            str(sigma_rel): dict(zip(self.names, averages))
            for sigma_rel, averages in self.averages.items()
        }

    def load_state_dict(self, state: dict) -> None:
        for sigma_rel, averages in self.averages.items():
            for name, average in zip(self.names, averages, strict=True):
                average.copy_(state[str(sigma_rel)][name])


def list_snapshots(folder: str | Path) -> dict[Path, tuple[int, float]]:
    """Return {path: (images seen, sigma_rel)} of the snapshots in `folder`, oldest first."""
    paths = sorted(Path(folder).glob("[0-9]" * 12 + "-*.safetensors"))
    return {path: (int(path.stem[:12]), float(path.stem[13:])) for path in paths}


def reconstruct_average(
    folder: str | Path, sigma_rel: float, num_images_seen: int | None = None
) -> tuple[dict[str, torch.Tensor], float, int]:
    """Return the average of width `sigma_rel`: weights by name (float32), error and images seen.

    Args:
        num_images_seen: Count of one of the snapshots. Default: the last one.

    Returns:
        The error is ||sum - p|| / ||p|| of the profile p: 0 for a width that was stored.

    Raises:
        ValueError: For a width or a count that the snapshots do not allow.
    """
    snapshots = list_snapshots(folder)
    if not snapshots:
        raise ValueError(
            f"There are no snapshots in {folder}. Train with posthoc_ema_every to keep them."
        )
    counts = sorted({count for count, _ in snapshots.values()})
    target = counts[-1] if num_images_seen is None else num_images_seen
    if target not in counts:
        raise ValueError(
            f"There is no snapshot at {target} images. Choose one of {', '.join(map(str, counts))}."
        )
    snapshots = {path: key for path, key in snapshots.items() if key[0] <= target}
    coefficients, error = solve_coefficients(list(snapshots.values()), (target, sigma_rel))
    if error > LARGEST_ERROR:
        stored = ", ".join(map(str, sorted({key[1] for key in snapshots.values()})))
        raise ValueError(
            f"The {len(snapshots)} snapshots up to {target} images reach sigma_rel {sigma_rel} "
            f"only within {error:.0%}. Choose one nearer to those stored ({stored}), a later "
            "count, or store more snapshots."
        )
    weights: dict[str, torch.Tensor] = {}
    for path, coefficient in zip(snapshots, coefficients):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_tensor(name).double() * float(coefficient)
                weights[name] = weights[name] + part if name in weights else part
    return {name: weight.float() for name, weight in weights.items()}, error, target


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """Return gamma >= 0 of the profile with relative deviation sigma_rel.

    sigma_rel = ((gamma + 1) / ((gamma + 2)^2 (gamma + 3)))^(1/2).
    """
    if not 0 < sigma_rel <= LARGEST_SIGMA_REL:
        raise ValueError(
            f"sigma_rel is {sigma_rel}, but must lie above 0 and be at most "
            f"{LARGEST_SIGMA_REL:.4f} (the plain mean)."
        )
    # roots of (g + 2)^2 (g + 3) - (g + 1) / sigma_rel^2
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return max(0.0, float(roots.real[np.abs(roots.imag) < 1e-6].max()))


def solve_coefficients(snapshots, target):
    """Return (coefficients of `snapshots` [N], relative error of the profile).

    Minimises ||sum_i x_i p_i - p||^2 over tau under sum_i x_i = 1, so that constant weights are met
    exactly. snapshots, target: (images seen, sigma_rel).
    """
    times = np.array([count for count, _ in [*snapshots, target]], dtype=np.float64)
    gammas = np.array([sigma_rel_to_gamma(sigma_rel) for _, sigma_rel in [*snapshots, target]])
    products = multiply_profiles(times[:, None], gammas[:, None], times[None], gammas[None])
    num = len(snapshots)
    system = np.ones((num + 1, num + 1))
    system[:num, :num] = products[:num, :num]
    system[num, num] = 0
    solution = np.linalg.lstsq(system, np.append(products[:num, num], 1.0), rcond=1e-13)[0]
    x = np.append(solution[:num], -1.0)
    return solution[:num], math.sqrt(max(0.0, float(x @ products @ x) / float(products[num, num])))


def multiply_profiles(t_a, gamma_a, t_b, gamma_b):
    """Return the integrals of p_a p_b over tau for arrays of profiles that broadcast.

    The profiles overlap up to the earlier time: (a + 1)(b + 1) / (a + b + 1) min^(a + b + 1) /
    (t_a^(a + 1) t_b^(b + 1)).
    """
    exponent = gamma_a + gamma_b + 1
    logarithm = (
        exponent * np.log(np.minimum(t_a, t_b))
        - (gamma_a + 1) * np.log(t_a)
        - (gamma_b + 1) * np.log(t_b)
    )
    return (gamma_a + 1) * (gamma_b + 1) / exponent * np.exp(logarithm)
