"""Which runs count as trainings that differ in the seed alone, and what they are called."""

import pytest

from em_generation import candidates as candidates_module
from em_generation.candidates import name_candidates
from em_generation.families import find_family
from em_generation.loading import Model
from em_generation.repeats import explain_others, read_training


def run(name, seed, kind="ldm", **changes):
    """A run of this name and seed; its folder, its cache and `changes` differ, too."""
    config = {
        "seed": seed,
        "out": f"runs/{name}-{seed}",
        "tiles": {"resolution": 64, "seed": 0, "cache_dir": name},
        "denoiser": {"seed": 0, "num_images": 32_000},
    }
    for key, value in changes.items():
        section, _, last = key.rpartition("__")
        (config[section] if section else config)[last] = value
    return Model(name, name, find_family(kind), kind, None, None, config=config)


@pytest.fixture
def name_all(monkeypatch):
    """Name runs as evaluate.py does: a run, or (the name that the user gives it, run)."""

    def name_all(*runs):
        pairs = [each if isinstance(each, tuple) else ("", each) for each in runs]
        models = {f"run{i}": model for i, (_, model) in enumerate(pairs)}
        monkeypatch.setattr(candidates_module, "read_model", models.__getitem__)
        texts = [f"{name}=run{i}" if name else f"run{i}" for i, (name, _) in enumerate(pairs)]
        return [(each.name, each.repeat_of) for each in name_candidates(texts)]

    return name_all


def test_runs_that_differ_in_the_seed_alone_are_repeats(name_all):
    assert name_all(run("a", 0), run("b", 1), run("gan", 0, "stylegan2"), run("c", 2)) == [
        ("a", "LDM"),
        ("b", "LDM"),
        ("StyleGAN2", ""),
        ("c", "LDM"),
    ]
    # runs of `make demo` in several folders are all called ldm
    assert name_all(run("ldm", 3), run("ldm", 0)) == [
        ("ldm (seed 3)", "LDM"),
        ("ldm (seed 0)", "LDM"),
    ]


@pytest.mark.parametrize(
    "changes", [{"denoiser__num_images": 64_000}, {"tiles__seed": 1}, {"extra": True}]
)
def test_runs_with_another_setting_are_none(name_all, changes):
    assert name_all(run("a", 0), run("b", 1, **changes)) == [("a", ""), ("b", "")]


def test_a_seed_counts_once(name_all):
    assert name_all(run("a", 0), run("b", 1), run("copy", 0)) == [
        ("a", "a and repeats"),
        ("b", "a and repeats"),
        ("copy", ""),
    ]
    assert name_all(run("a", 0), run("copy", 0)) == [("a", ""), ("copy", "")]


def test_seeds_of_stages_count(name_all):
    assert name_all(run("a", 0), run("b", 0, denoiser__seed=4)) == [("a", "LDM"), ("b", "LDM")]
    assert read_training(run("b", 0, denoiser__seed=4)).seed == "0/4"
    assert read_training(run("b", 7)).seed == "7"


def test_repeats_may_share_the_name_that_the_user_gives(name_all):
    arms = {"batch 32": {}, "batch 64": {"denoiser__batch_size": 64}}
    runs = [(arm, run("x", seed, **changes)) for arm, changes in arms.items() for seed in (0, 1)]
    assert name_all(*runs) == [
        ("batch 32 (seed 0)", "batch 32"),
        ("batch 32 (seed 1)", "batch 32"),
        ("batch 64 (seed 0)", "batch 64"),
        ("batch 64 (seed 1)", "batch 64"),
    ]
    # other names, same configuration: as the user sorts them
    sorted_by_user = [("p", run("x", 0)), ("p", run("x", 1)), ("q", run("x", 2))]
    assert [group for _, group in name_all(*sorted_by_user)] == ["p", "p", ""]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (run("b", 1, denoiser__num_images=1), r"differ in denoiser.num_images \(32000, 1\)"),
        (run("b", 0), "have the same seed, 0"),
        (run("b", 1, "stylegan2"), "are of two kinds"),
        (Model("b", "b", find_family("ldm"), "ldm", None, None), "no recorded configuration"),
    ],
)
def test_others_may_not_share_a_name(name_all, second, message):
    with pytest.raises(ValueError, match=f"Two models are called x, but they .*{message}"):
        name_all(("x", run("a", 0)), ("x", second))


def test_the_third_of_a_name_is_compared_with_all(name_all):
    with pytest.raises(ValueError, match="have the same seed, 1"):
        name_all(("x", run("a", 0)), ("x", run("b", 1)), ("x", run("c", 1)))


def test_why_two_runs_are_no_repeats_is_said_where_it_surprises():
    runs = {
        "a": run("a", 0),
        "copy": run("a", 0),
        "longer": run("b", 1, denoiser__num_images=64_000),
        "ablation": run("c", 0, denoiser__num_images=64_000),  # the same seed is meant
        "other": run("d", 2, data="there", precision="no"),
        "gan": run("e", 3, "stylegan2"),
    }
    told = explain_others([read_training(each) for each in runs.values()], list(runs))
    assert told == [
        "a and copy are no repeats: they have the same seed, 0.",
        "a and longer are no repeats: they differ in denoiser.num_images (32000, 64000).",
        "copy and longer are no repeats: they differ in denoiser.num_images (32000, 64000).",
    ]
