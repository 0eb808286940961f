import numpy as np
import pytest

from em_data.split import (
    check_split,
    choose_groups,
    find_duplicates,
    group_micrographs,
    split_views,
)


def facts(num, specimens=None, hashes=None):
    return [
        {
            "name": f"m{i}.tif",
            "group": f"m{i}.tif",
            "specimen": specimens and specimens[i],
            "pixel_hash": hashes[i] if hashes else str(i),
        }
        for i in range(num)
    ]


def micrographs_of(views, micrograph_of_tile, num_symmetries=6):
    return {int(micrograph_of_tile[view // num_symmetries]) for view in views}


def test_split_by_micrograph_shares_none_and_loses_none(config):
    micrograph_of_tile = np.repeat(np.arange(20), 3)
    for seed in range(5):
        train, held_out = split_views(facts(20), micrograph_of_tile, config(seed=seed))
        assert np.array_equal(np.sort(np.concatenate([train, held_out])), np.arange(20 * 3 * 6))
        sides = [micrographs_of(side, micrograph_of_tile) for side in (train, held_out)]
        assert not sides[0] & sides[1]
        assert len(sides[1]) == 2


@pytest.mark.parametrize(
    ("num", "fraction", "expected"),
    [(2, 0.1, 1), (2, 0.9, 1), (5, 0.1, 1), (10, 0.25, 2), (494, 0.1, 49)],
)
def test_at_least_one_group_on_each_side(num, fraction, expected, config):
    groups = [str(i) for i in range(num)]
    assert len(choose_groups(groups, config(held_out_fraction=fraction))) == expected


def test_seed_decides_and_a_new_micrograph_changes_few(config):
    groups = [f"m{i}" for i in range(100)]
    chosen = choose_groups(groups, config())
    assert choose_groups(groups[::-1], config()) == chosen
    assert choose_groups(groups, config(seed=1)) != chosen
    assert len(chosen & choose_groups(groups + ["new"], config())) >= 9


def test_split_by_specimen_keeps_specimens_whole(config):
    specimens = ["a", "a", "b", "b", "b", "c"]
    train, held_out = split_views(facts(6, specimens), np.arange(6), config(split="specimen"))
    sides = [
        {specimens[m] for m in micrographs_of(views, np.arange(6))} for views in (train, held_out)
    ]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {"a", "b", "c"}


def test_leaky_split_draws_views(config):
    micrograph_of_tile = np.repeat(np.arange(4), 25)
    train, held_out = split_views(facts(4), micrograph_of_tile, config(split="leaky"))
    assert (len(train), len(held_out)) == (540, 60)
    assert np.array_equal(np.sort(np.concatenate([train, held_out])), np.arange(600))
    # other views of the same tiles: that is the leak
    assert len(set(train // 6) & set(held_out // 6)) > 30
    train, held_out = split_views(facts(1), np.zeros(4, int), config(split="leaky"))
    assert len(train) + len(held_out) == 24


def test_one_micrograph_cannot_be_split_and_the_way_out_is_named(config):
    with pytest.raises(ValueError, match=r"only one micrograph \(m0\.tif\).*--tiles\.split leaky"):
        split_views(facts(1), np.zeros(4, int), config())


def test_unknown_or_single_specimens_are_refused(config):
    unknown = r"specimen of m0\.tif, m1\.tif is unknown.*specimen-pattern"
    with pytest.raises(ValueError, match=unknown):
        split_views(facts(2), np.arange(2), config(split="specimen"))
    with pytest.raises(ValueError, match=r"only one specimen \(a\)"):
        split_views(facts(2, ["a", "a"]), np.arange(2), config(split="specimen"))


def test_sides_that_share_a_micrograph_are_refused_by_name():
    micrographs = facts(3)
    with pytest.raises(ValueError, match=r"share m1\.tif"):
        check_split(micrographs[:2], micrographs[1:])


def test_sides_that_share_an_exact_duplicate_are_refused_by_name():
    micrographs = facts(4, hashes=["a", "b", "c", "a"])
    with pytest.raises(ValueError, match=r"exact duplicates.*m0\.tif = m3\.tif"):
        check_split(micrographs[:2], micrographs[2:])
    check_split(micrographs[1:3], micrographs[::3])  # both on one side: nothing leaks
    assert find_duplicates(micrographs) == [["m0.tif", "m3.tif"]]


def test_near_copies_and_duplicates_are_one_group_with_the_first_name(config):
    micrographs = facts(6, ["a", "a", "b", "b", "c", "d"], hashes=["x", "y", "z", "w", "v", "x"])
    groups = group_micrographs(micrographs, "micrograph", [(1, 3), [3, 4]])
    assert groups == ["m0.tif", "m1.tif", "m2.tif", "m1.tif", "m1.tif", "m0.tif"]
    assert group_micrographs(micrographs, "specimen", [(4, 5)]) == ["a", "a", "b", "b", "a", "a"]
    pairs = [(i, i + 1) for i in range(5)]
    with pytest.raises(ValueError, match=r"All 6 micrographs \(m0.*show one scene.*split leaky"):
        split_views(micrographs, np.arange(6), config(), pairs)
