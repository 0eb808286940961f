"""The benchmark of the evaluation: both sides answer alike, and its lines have what those of the
other benchmarks have.
"""

import json

import pytest
from evaluation import main, time_distance

KEYS = {"name", "ours", "baseline", "ratio", "baseline_is"}


def test_both_distances_are_one_and_the_ratio_is_theirs_over_ours():
    line = time_distance(200)
    assert set(line) >= KEYS
    assert line["relative_difference"] < 1e-6
    assert line["baseline"] > 0
    assert line["ratio"] == pytest.approx(line["baseline"] / line["ours"], rel=0.1)


@pytest.mark.slow  # Inception, twice
def test_a_line_a_figure(monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv",
        [
            "evaluation.py",
            "--num-tiles",
            "8",
            "--dimensions",
            "64",
            "--batch-size",
            "4",
            "--threads",
            "1",
        ],
    )
    main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["name"] for line in lines] == [
        "Frechet distance of features, seconds",
        "Inception's features, images per second",
    ]
    for line in lines:
        assert set(line) >= KEYS | {"num_threads", "clock"}
    assert lines[1]["relative_difference_of_distance"] < 0.01
    assert lines[1]["greatest_difference_of_features"] < 0.05
