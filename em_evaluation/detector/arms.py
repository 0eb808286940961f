"""The training sets that are compared, and the trainings that this takes."""

from dataclasses import dataclass

STRONG, WEAK, ALL, ONLY = "strong", "weak", "all", "only"
TITLES = {
    WEAK: "flips and turns",
    STRONG: "strong classical augmentation",
    ALL: "all labels",
    "raw": "raw simulation",
    "way1": "way 1 (simulated, made real)",
    "way2": "way 2 (LDM conditioned on masks)",
    "way3": "way 3 (copy-paste on generated grounds)",
    "way4": "way 4 (simulated, translated by CycleGAN)",
}


@dataclass(frozen=True)
class Arm:
    """How a segmenter is trained.

    key: STRONG, WEAK, ALL, the name of pairs that are added, or "only NAME" of pairs alone.
    pairs: Name of the pairs; None without.
    """

    key: str
    pairs: str | None = None

    @property
    def title(self) -> str:
        if self.key.startswith(ONLY):
            return f"{name_pairs(self.pairs)} alone"
        return TITLES.get(self.key, self.key)

    @property
    def has_real(self) -> bool:
        return not self.key.startswith(ONLY)


@dataclass(frozen=True)
class Task:
    """One training: an arm on the first `num` labelled micrographs of a split, with a seed."""

    arm: Arm
    num: int  # labelled micrographs; 0 without any
    split: int
    seed: int


def name_pairs(name) -> str:
    """Return the title of pairs, such as "raw simulation"."""
    return TITLES.get(name, name)


def list_tasks(nums, num_pool, pairs, synthetic_only, num_splits, num_seeds, curve) -> list[Task]:
    """Return all trainings.

    Args:
        nums: Numbers of labelled micrographs, at most num_pool.
        num_pool: Number of labelled micrographs that there are.
        pairs: Names of the pairs that are added.
        synthetic_only: Names of the pairs that are also used alone.
        num_splits, num_seeds: How often each arm is trained. All labels and pairs alone do not
            depend on the split and are trained once per seed.
        curve: Further numbers at which only STRONG is trained.
    """
    arms = [Arm(WEAK), Arm(STRONG), *(Arm(name, name) for name in pairs)]
    tasks = [
        Task(arm, num, split, seed)
        for seed in range(num_seeds)
        for split in range(num_splits)
        for num in sorted({*nums, *curve})
        for arm in arms
        if num in nums or arm.key == STRONG
    ]
    once = [Task(Arm(ALL), num_pool, 0, seed) for seed in range(num_seeds)]
    once += [
        Task(Arm(f"{ONLY} {name}", name), 0, 0, seed)
        for seed in range(num_seeds)
        for name in synthetic_only
    ]
    return tasks + once
