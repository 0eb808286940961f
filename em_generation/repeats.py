"""Which runs are trainings of one configuration that differ in the seed alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from em_generation.loading import Model
from em_training.config import flatten

ELSEWHERE = ("out", "tiles.cache_dir")  # where a run lies decides no weight
MOST_TOLD = 3  # settings that a message names


@dataclass(frozen=True)
class Training:
    """What two runs are compared by: the kind of model, its settings and its seeds."""

    kind: str
    settings: dict
    seeds: dict

    @property
    def seed(self) -> str:
        """The seed for people; those of the stages are added to it if they are not 0."""
        first, *others = self.seeds.values()
        return "/".join(map(str, [first, *others] if any(others) else [first]))


def read_training(model: Model | None) -> Training | None:
    """Return what a run recorded; None for images, and for models that recorded nothing."""
    values = flatten((model.config if model else None) or {})
    # the seed of the tiles draws the split, not the training
    names = [name for name in values if name.rpartition(".")[2] == "seed" and name != "tiles.seed"]
    if model is None or not names:
        return None
    seeds = {name: values.pop(name) for name in sorted(names, key=lambda name: ("." in name, name))}
    settings = {name: value for name, value in values.items() if name not in ELSEWHERE}
    return Training(model.kind, settings, seeds)


def list_changes(first: Training, second: Training) -> list[str]:
    """Return the settings in which two trainings of one kind differ, as "name (value, value)"."""
    a, b = first.settings, second.settings
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return [f"{name} ({a.get(name)}, {b.get(name)})" for name in names]


def find_difference(first: Training | None, second: Training | None) -> str | None:
    """Return what keeps two models from differing in the seed alone; None if nothing does."""
    if first is None or second is None:
        return "have no recorded configuration"
    if first.kind != second.kind:
        return "are of two kinds"
    if changes := list_changes(first, second):
        return f"differ in {', '.join(changes[:MOST_TOLD])}" + (
            f" and {len(changes) - MOST_TOLD} more settings" if len(changes) > MOST_TOLD else ""
        )
    return f"have the same seed, {first.seed}" if first.seeds == second.seeds else None


def group_trainings(trainings: Sequence[Training | None], names: Sequence[str]) -> list[list[int]]:
    """Return the positions of runs that differ in the seed alone, two or more a group.

    names: What the user calls each run, or "". Runs of one name are a group of their own.

    Raises:
        ValueError: Runs of one name do not differ in the seed alone.
    """
    groups: list[list[int]] = []
    shared = [name if name and names.count(name) > 1 else "" for name in names]
    for i, training in enumerate(trainings):
        fitting = (
            group
            for group in groups
            if all(
                shared[i] == shared[j] and find_difference(trainings[j], training) is None
                for j in group
            )
        )
        group = next(fitting, None)
        if group is not None:
            group.append(i)
            continue
        namesakes = [trainings[j] for j in range(i) if shared[i] and shared[j] == shared[i]]
        if namesakes:
            reason = next(filter(None, (find_difference(each, training) for each in namesakes)))
            raise ValueError(
                f"Two models are called {names[i]}, but they {reason}. Only trainings that differ "
                "in the seed alone may share a name. Give one another name: --models NAME=MODEL"
            )
        groups.append([i])
    return [group for group in groups if len(group) > 1]


def explain_others(trainings: Sequence[Training | None], names: Sequence[str]) -> list[str]:
    """Say of pairs that seem to be repeats why they are none: one setting differs, or no seed."""
    found = []
    for i, j in combinations(range(len(names)), 2):
        first, second = trainings[i], trainings[j]
        if first is None or second is None or first.kind != second.kind:
            continue
        reason, num_changes = find_difference(first, second), len(list_changes(first, second))
        if reason and num_changes == (0 if first.seeds == second.seeds else 1):
            found.append(f"{names[i]} and {names[j]} are no repeats: they {reason}.")
    return found
