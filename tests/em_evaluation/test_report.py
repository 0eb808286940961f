"""The protocol on tiny sets with a tiny extractor, and the page that shows it."""

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from em_data.figures import make_scale_bar
from em_evaluation import ModelImages, Protocol, evaluate_models, write_report
from em_evaluation.baselines import read_baselines
from em_evaluation.charts import draw_overview
from em_evaluation.evaluator import RealImages
from em_evaluation.features import Extractor
from em_evaluation.images import select_views
from em_evaluation.interval import to_json
from em_evaluation.levels import LEVELS
from em_evaluation.numbers import format_duration, format_interval, format_number
from em_evaluation.report import render_page
from em_evaluation.wording import conclude, find_level, find_metric, list_notes, warn


class Pooled(Extractor):
    """Block means and block deviations: texture and brightness, in 32 features."""

    name, identity, num_features = "pooled", "pooled, 32 features", 32

    def _features(self, images):
        blocks = torch.nn.functional.unfold(images, 4, stride=4)  # [B, 16, 16]
        return torch.cat([blocks.mean(1), blocks.std(1)], 1)


class FakeTiles:
    """Tiles with two symmetries (as they are, mirrored) of several micrographs."""

    def __init__(self, seed, num_tiles, num_micrographs=6):
        generator = torch.Generator().manual_seed(seed)
        self.tiles = blobs(num_tiles, generator)
        self.num_tiles, self.num_views = num_tiles, 2 * num_tiles
        self.groups = np.array([f"m{i % num_micrographs}" for i in range(num_tiles)])

    def __len__(self):
        return self.num_views

    def locate(self, view_ids):
        return np.divmod(view_ids, 2)

    def batch(self, view_ids):
        tiles, symmetries = self.locate(np.asarray(view_ids))
        images = self.tiles[tiles]
        return torch.where(
            torch.as_tensor(symmetries).view(-1, 1, 1, 1) == 1, images.flip(-1), images
        )


def blobs(count, generator, contrast=1.2):
    centre = torch.rand(count, 2, 1, 1, 1, generator=generator) * 10 + 3
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    distance = (x - centre[:, 0]) ** 2 + (y - centre[:, 1]) ** 2
    return (
        0.4
        - contrast * torch.exp(-distance / 6)
        + 0.05 * torch.randn(count, 1, 16, 16, generator=generator)
    )


SUMMARY = {
    "name": "blobs",
    "source": "/home/somebody/blobs",
    "num_micrographs": 12,
    "num_tiles": 160,
    "split": "micrograph",
    "split_hash": "0123456789abcdef",
    "resolution": 16,
    "pixel_size_nm": 1.5,
    "held_out": ["m0"],
    "ignored": [],
}


def evaluate(num_images=80, models=None, seed=0, held_out=None, **options):
    generator = torch.Generator().manual_seed(5)
    if models is None:
        curves = {
            "denoiser": [
                {"num_images_seen": 100 * i, "loss": 1 / i, "odd": None} for i in range(1, 300)
            ]
        }
        models = [
            ModelImages(
                "LDM",
                blobs(80, generator, 0.95),
                "ldm",
                train_seconds=120.0,
                num_images_seen=5000,
                sample_seconds=2.0,
                curves=curves,
                reconstructions={"autoencoder": lambda images: images + 0.02},
            ),
            ModelImages(
                "StyleGAN2",
                blobs(90, generator, 0.8),
                "stylegan2",
                train_seconds=100.0,
                num_images_seen=4000,
                sample_images_per_second=400.0,
                untrained=torch.zeros(80, 1, 16, 16),
            ),
        ]
    real = RealImages(held_out or FakeTiles(1, 80), FakeTiles(2, 80), SUMMARY)
    protocol = Protocol(num_images=num_images, seed=seed, use_cache=False, **options)
    return evaluate_models(
        models, real, [Pooled()], protocol, reproduce=["make demo"], log=lambda text: None
    )


@pytest.fixture(scope="module")
def evaluated():
    return evaluate()


def distance(report, key):
    return find_metric(report, key)["value"]


def test_the_measure_orders_what_it_must(evaluated):
    report, _ = evaluated
    keys = [level["key"] for level in report["levels"]]
    assert [level["kind"] for level in report["levels"]] == [*LEVELS, "untrained"]
    real, reconstruction, surrogates, _, untrained = keys
    order = [real, reconstruction, "LDM", "StyleGAN2", surrogates, untrained]
    assert [distance(report, key) for key in order] == sorted(
        distance(report, key) for key in order
    )
    rows = report["measurements"][0]["rows"]
    assert set(rows) == {"LDM", "StyleGAN2", *keys}
    for row in rows.values():
        for metrics in row.values():
            assert all(each["low"] <= each["value"] <= each["high"] for each in metrics.values())


def test_a_transferred_start_is_reported_as_what_it_is():
    images = torch.zeros(30, 1, 16, 16)
    report, pictures = evaluate(
        num_images=20,
        models=[ModelImages("StyleGAN2", blobs(20, torch.Generator()), transferred=images)],
        levels=("real",),
        microscopy=False,
        memorisation=False,
    )
    level = find_level(report, "transferred", "StyleGAN2")
    assert level["title"] == "StyleGAN2 before training (transferred)"
    shown = [picture for picture in pictures if picture["key"] == level["key"]]
    assert [picture["title"] for picture in shown] == [level["title"]]
    assert "untrained" not in json.dumps([report["levels"], conclude(report)])


def test_the_report_has_the_promised_keys_and_no_path(evaluated):
    report, _ = evaluated
    assert report["dataset"]["split_hash"] == SUMMARY["split_hash"]
    assert "somebody" not in json.dumps(report)
    first = report["models"][0]
    assert {"name", "family", "train_seconds", "num_images_seen"} <= set(first)
    assert set(report["measurements"][0]["rows"]["LDM"]) == {"held_out", "train"}
    assert first["sample_images_per_second"] == 40  # 80 images in 2 s
    assert first["sample_seconds_50000"] == 1250
    assert len(first["curves"]["denoiser"]) == 200
    assert first["curves"]["denoiser"][-1]["num_images_seen"] == 29_900
    assert report["protocol"]["reference_num_micrographs"] == 6
    assert report["format"] == 2
    assert report["baselines"] is None


def test_the_conclusion_says_what_the_numbers_say(evaluated):
    report, _ = evaluated
    text = " ".join(conclude(report))
    assert text.startswith("LDM is closer to the held-out micrographs than StyleGAN2")
    assert "LDM is closer than texture without structure" in text


def blur(amount):
    """An autoencoder that mixes `amount` of each image's mean into it, and so loses contrast."""
    return lambda images: images + amount * (images.mean((1, 2, 3), keepdim=True) - images)


def make_ldm(amount, contrast=0.6, part="autoencoder"):
    images = blobs(80, torch.Generator().manual_seed(5), contrast)
    return ModelImages("LDM", images, "ldm", reconstructions={part: blur(amount)})


def evaluate_ldm(amount, contrast=0.6, levels=LEVELS):
    """The report of an LDM of this contrast with an autoencoder that blurs this much."""
    report, _ = evaluate(models=[make_ldm(amount, contrast)], levels=levels)
    return report, find_level(report, "reconstruction", "LDM")["key"]


@pytest.fixture(scope="module")
def balance():
    """The greatest amount of blur that stays below half of the LDM's distance, and the least above
    it, by bisection.
    """
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        report, key = evaluate_ldm(middle, levels=("reconstruction",))
        is_above = distance(report, key) > distance(report, "LDM") / 2
        low, high = (low, middle) if is_above else (middle, high)
    return {"just below": low, "just above": high, "far below": 0.0, "far above": 0.8}


@pytest.mark.parametrize("side", ["far below", "just below", "just above", "far above"])
def test_an_autoencoder_above_half_of_the_score_is_warned_of(side, balance, tmp_path):
    report, key = evaluate_ldm(balance[side], levels=("reconstruction",))
    (share,) = report["autoencoders"]
    assert share["difference_to_half"]["value"] == pytest.approx(
        distance(report, key) - distance(report, "LDM") / 2, abs=1e-9
    )
    where = {"far below": "below", "far above": "above"}.get(side, "undecided")
    assert share["autoencoder_is"] == where
    page = write_report(report, [], tmp_path).read_text()
    start = "The autoencoder of LDM alone scores"
    if side.endswith("below"):
        assert warn(report) == []
        assert "Warning" not in page
        said = next(sentence for sentence in conclude(report) if sentence.startswith(start))
        assert "less than half of it" in said
        assert "limit the model" not in said
    else:
        (said,) = warn(report)
        assert said.replace("'", "&#39;") in page
        assert not any(sentence.startswith(start) for sentence in conclude(report))
        verb = "limits" if side == "far above" else "may limit"
        assert f"so the autoencoder {verb} the model" in said
        assert "select_autoencoder" in said
    assert all(format_interval(find_metric(report, each)) in said for each in (key, "LDM"))
    assert ("not significant" in said) == side.startswith("just")


def test_a_score_near_that_of_real_images_does_not_blame_the_autoencoder():
    """Real images have a distance too at a finite number: half of a good score may lie below it."""
    report, key = evaluate_ldm(amount=0.0, contrast=0.95)
    assert distance(report, key) == distance(report, "real") > distance(report, "LDM") / 2
    assert warn(report) == []
    said = " ".join(conclude(report))
    assert "Of LDM's distance above theirs, the autoencoder has 0 %" in said
    assert "the autoencoder is not what limits the model" in said


def test_an_autoencoder_that_was_measured_with_its_grain_is_called_so():
    report, _ = evaluate(models=[make_ldm(0.0, part="autoencoder and grain")])
    level = find_level(report, "reconstruction", "LDM")
    assert level["title"] == "autoencoder and grain of LDM"
    assert any(
        sentence.startswith("The autoencoder and grain of LDM alone scores")
        for sentence in conclude(report)
    )


def test_the_autoencoder_of_another_model_is_no_limit():
    gan = ModelImages("GAN", blobs(80, torch.Generator().manual_seed(5), 0.95), "stylegan2")
    report, _ = evaluate(models=[gan, make_ldm(0.6)])
    assert [share["model"] for share in report["autoencoders"]] == ["LDM"]
    assert not any("GAN" in warning for warning in warn(report))


def test_equal_models_cannot_be_told_apart_and_order_does_not_matter():
    images = [blobs(80, torch.Generator().manual_seed(seed)) for seed in (7, 8)]
    models = [ModelImages(name, batch) for name, batch in zip("AB", images)]
    one, _ = evaluate(models=models, levels=())
    other, _ = evaluate(models=models[::-1], levels=())
    assert conclude(one)[0].startswith("A and B cannot be told apart")
    assert "not significant" in conclude(one)[0]
    assert distance(one, "A") == pytest.approx(distance(other, "A"), rel=1e-12)
    turned = [ModelImages("A", images[0].flip(0)), models[1]]
    found, _ = evaluate(models=turned, levels=())
    assert distance(found, "A") == pytest.approx(distance(one, "A"))


def test_texture_without_structure_does_not_beat_the_surrogates():
    generator = torch.Generator().manual_seed(0)
    noise = ModelImages("Noise", torch.rand(80, 1, 16, 16, generator=generator) * 2 - 1)
    report, _ = evaluate(models=[noise])
    assert any("Noise is farther away than texture" in text for text in conclude(report))


@pytest.mark.parametrize(
    ("num_micrographs", "said"),
    [(1, "is one micrograph"), (3, "is 3 micrographs"), (6, None)],
)
def test_too_few_held_out_micrographs_are_said(num_micrographs, said):
    models = [ModelImages("LDM", blobs(80, torch.Generator().manual_seed(0)))]
    report, _ = evaluate(models=models, held_out=FakeTiles(1, 80, num_micrographs))
    assert [said in note for note in report["protocol"]["notes"]] == ([True] if said else [])
    assert any(
        "a perfect model would score no better" in note for note in list_notes(report)
    ) == bool(said)


def test_fewer_images_lower_the_number_for_all_and_it_is_said():
    few = ModelImages("LDM", blobs(30, torch.Generator().manual_seed(0)))
    report, _ = evaluate(num_images=70, models=[few])
    assert report["protocol"]["num_images"] == 30
    assert report["models"][0]["num_images"] == 30
    assert "there are only 30 images of LDM" in report["protocol"]["notes"][0]


@pytest.mark.parametrize(
    ("names", "images", "options", "message"),
    [
        (["A"], torch.zeros(80, 1, 8, 8), {}, r"16 x 16 pixels, but not A \(8 x 8\)"),
        (["A"], torch.zeros(1, 1, 16, 16), {}, "There are 1 images of A"),
        (["A", "A"], torch.zeros(80, 1, 16, 16), {}, "name of its own, not A"),
        (["noise"], torch.zeros(80, 1, 16, 16), {}, "name of its own, not noise"),
        (
            ["A"],
            torch.zeros(80, 1, 16, 16),
            {"levels": ("ceiling",)},
            "Unknown reference levels: ceiling",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(names, images, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(models=[ModelImages(name, images) for name in names], **options)


def test_views_are_drawn_every_tile_once_before_any_twice():
    tile_of_view = np.repeat([4, 7, 9, 11], [3, 1, 2, 6])
    for count in range(1, 13):
        views = select_views(tile_of_view, count, seed=3)
        assert len(set(views.tolist())) == count
        times = np.unique(tile_of_view[views], return_counts=True)[1]
        assert len(times) == min(count, 4)
        assert times.max() == next(
            n for n in range(1, 7) if np.minimum([3, 1, 2, 6], n).sum() >= count
        )
    assert (select_views(tile_of_view, 6, 1) != select_views(tile_of_view, 6, 2)).any()


# ---------------------------------------------------------------- page


@pytest.fixture(scope="module")
def written(evaluated, tmp_path_factory):
    page = write_report(*evaluated, tmp_path_factory.mktemp("report"))
    return page.read_text(), json.loads(
        (page.parent / "report.json").read_text(), parse_constant=pytest.fail
    )


def test_the_page_holds_every_number_of_the_json(written):
    html, report = written
    rows = report["measurements"][0]["rows"].values()
    metrics = [metric for row in rows for side in row.values() for metric in side.values()]
    metrics += [comparison["difference"] for comparison in report["comparisons"]]
    assert len(metrics) > 60
    for metric in metrics:
        assert f"<td>{format_interval(metric)}</td>" in html
    for model in report["models"]:
        for text in (
            format_duration(model["train_seconds"]),
            format_duration(model["sample_seconds_50000"]),
        ):
            assert f"<td>{text}" in html
        assert f"{model['num_images_seen']:,} images seen" in html
    assert all(sentence.replace("'", "&#39;") in html for sentence in conclude(report))
    assert "make demo" in html


def test_published_numbers_are_shown_only_if_they_are_given(evaluated, written, tmp_path):
    study = Path(__file__).parents[2] / "experiments" / "2024_gan_vs_ldm" / "study.json"
    report = evaluated[0] | {"baselines": read_baselines(study)}
    html = write_report(report, [], tmp_path).read_text()
    for model in report["baselines"]["models"]:
        assert f"<td>{format_number(model['frechet_distance'])}</td>" in html
    assert "published, not comparable" in html
    assert "published" not in written[0]
    study = tmp_path / "numbers.json"
    study.write_text('{"models": [{"name": "x"}]}')
    with pytest.raises(ValueError, match=r"--baselines .* is not a file of published numbers"):
        read_baselines(study)


def test_the_page_refers_to_nothing_outside_itself(written):
    html, _ = written
    targets = re.findall(r"""(?:src|href|action|data|poster)=["']([^"']*)""", html) + re.findall(
        r"url\(([^)]*)\)", html
    )
    assert targets
    assert all(target.startswith(("data:image/png;base64,", "#")) for target in targets)
    assert not re.search(
        r"<(link|iframe|object|embed)|<script[^>]|@import|https?://|import\(", html
    )
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in targets if target.startswith("#")} <= set(ids)


def test_the_overview_shows_the_pixels_of_every_set_side_by_side(evaluated):
    report, pictures = evaluated
    overview = np.asarray(PIL.Image.open(io.BytesIO(draw_overview(report, pictures))).convert("L"))
    num_panels = 1 + len(report["models"])
    assert overview.shape[1] == num_panels * 396
    for i in range(num_panels):  # each panel holds the dark blobs of its images, the gaps are white
        panel = overview[60:340, i * 396 : (i + 1) * 396]
        assert panel.min() < 120
        assert (panel == 255).any()


HOSTILE = "<script>alert(1)</script> $x$ $\\frac{1}{ & 'q'"


@pytest.fixture(scope="module")
def repeated():
    """The report of three trainings of one model, two of another, and one alone."""
    rng = torch.Generator().manual_seed(6)
    models = [
        ModelImages(f"{name}-{seed}", blobs(80, rng, contrast), repeat_of=name, training_seed=seed)
        for name, contrasts in (("LDM", (0.95, 0.9, 1.0)), ("GAN", (0.5, 0.92)))
        for seed, contrast in zip("012", contrasts)
    ]
    models.append(ModelImages("alone", blobs(80, rng, 0.3)))
    return evaluate(models=models, levels=("real", "surrogates"), memorisation=False)


def test_the_spread_between_training_seeds_is_shown(repeated, tmp_path):
    report, pictures = repeated
    ldm, gan = report["repeats"]
    assert [each["name"] for each in (ldm, gan)] == ["LDM", "GAN"]
    values = sorted(distance(report, f"LDM-{seed}") for seed in range(3))
    row = ldm["measurements"][0]["held_out"]["frechet_distance"]
    assert row == pytest.approx({"low": values[0], "value": values[1], "high": values[2]})
    assert {"train", "held_out"} == set(ldm["measurements"][0])
    html = write_report(report, pictures, tmp_path).read_text()
    assert json.loads((tmp_path / "report.json").read_text())["repeats"] == report["repeats"]
    for group in (ldm, gan):
        for side in group["measurements"][0].values():
            assert all(format_interval(metric) in html for metric in side.values())
        assert html.count(f"{group['name']}, {len(group['models'])} trainings") >= 4
    names = re.findall(r'<th scope="row">([^<]*)', html.split('id="terms"')[0])
    assert names[1:] == ["LDM, 3 trainings", "LDM-0", "LDM-1", "LDM-2"] + [
        "GAN, 2 trainings", "GAN-0", "GAN-1", "alone"
    ]  # fmt: skip
    text = conclude(report)
    assert text[0].startswith("The 3 trainings of LDM differ in the seed alone")
    pairs = [
        (each["first"], each["second"], each["first_is"])
        for each in report["comparisons_of_repeats"]
    ]
    assert pairs == [
        ("LDM", "GAN", "depends"),
        ("LDM", "alone", "closer"),
        ("GAN", "alone", "closer"),
    ]
    assert "Whether LDM or GAN is closer to the held-out micrographs depends" in " ".join(text)
    assert not any("LDM-0 is closer" in each and "GAN" in each for each in text)
    assert "3 trainings of LDM, 2 trainings of GAN, one training run of each other" in text[-1]


def test_a_report_without_repeats_shows_none(evaluated):
    report, pictures = evaluated
    assert report["repeats"] == report["comparisons_of_repeats"] == []
    assert "trainings" not in render_page(report, pictures)


def test_names_can_neither_inject_markup_nor_stop_the_charts(evaluated, tmp_path):
    report, pictures = (
        json.loads(json.dumps(evaluated[0]).replace('"LDM"', json.dumps(HOSTILE))),
        [],
    )
    for picture in evaluated[1]:
        pictures.append(
            picture | {"title": HOSTILE if picture["key"] == "LDM" else picture["title"]}
        )
        pictures[-1]["key"] = HOSTILE if picture["key"] == "LDM" else picture["key"]
    html = write_report(report, pictures, tmp_path).read_text()
    assert "<script>alert" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt; $x$") > 10
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_a_report_with_nan_is_not_written(evaluated, tmp_path):
    report = {**evaluated[0], "evaluation_seconds": float("nan")}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_report(report, [], tmp_path)
    assert not list(tmp_path.iterdir())


def test_numbers_durations_and_scale_bars_are_formatted_for_people():
    numbers = (123.456, -0.012344, 9999.6, 12_345.6, 1.0, 2e-6, 2e-7, 0, None)
    assert [format_number(x) for x in numbers] == [
        "123", "−0.0123", "10,000", "12,346", "1.00", "2.00 × 10⁻⁶", "2.00 × 10⁻⁷", "0.00", "–",
    ]  # fmt: skip
    intervals = [(223.4, 191.2, 264.8), (0.06, 0.02, 0.1), (11.72, 9.3, 101.4), (-0.5, -2.25, 0)]
    assert [format_interval(dict(zip(("value", "low", "high"), each))) for each in intervals] == [
        "223 (191 to 265)",
        "0.060 (0.020 to 0.100)",
        "12 (9 to 101)",
        "−0.50 (−2.25 to 0.00)",
    ]
    assert [format_duration(x) for x in (42.04, 480, 21_600, 108_000, 300_000, None)] == [
        "42 s", "8 min", "6 h", "30 h", "3.47 days", "–",
    ]  # fmt: skip
    bar = make_scale_bar(1.5, 64, 259)
    assert bar["label"] == "50 nm"
    assert bar["percent"] == pytest.approx(100 * 50 / 1.5 / 259, abs=1e-3)
    assert make_scale_bar(None, 64, 259) is None


def test_json_values_become_plain():
    value = {
        "a": np.float32(1.5),
        "b": torch.tensor([1, 2]),
        "c": float("nan"),
        "d": (np.int64(3), {"e": None}),
    }
    assert to_json(value) == {"a": 1.5, "b": [1, 2], "c": None, "d": [3, {"e": None}]}


# ---------------------------------------------------------------- browser

BROWSER = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
# plays the quiz by keys: Enter starts and goes on, R says real each time
PLAYER = """<script>
const lines = [];
window.addEventListener("error", (event) => lines.push("error: " + event.message));
setTimeout(() => {
  document.getElementById("quiz-image").scrollIntoView();
  const press = (key) =>
    document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const find = (id) => document.getElementById(id);
  for (let i = 0; i < 40 && !find("quiz-score").children.length; i++) {
    press("Enter");
    press("r");
  }
  lines.push(find("quiz-status").textContent, find("quiz-score").textContent);
  const page = document.documentElement;
  lines.push("overflow " + (page.scrollWidth > page.clientWidth));
  const result = document.createElement("output");
  result.textContent = lines.join("|");
  document.body.append(result);
}, 300);
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_quiz_is_played_by_keys_and_nothing_is_wider_than_the_page(evaluated, tmp_path):
    html = render_page(*evaluated).replace("</body>", PLAYER)
    (tmp_path / "page.html").write_text(html)
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        "--window-size=500,900",
    ]
    command += ["--enable-logging=stderr", "--dump-dom", (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    (result,) = re.findall(r"<output>(.*?)</output>", done.stdout)
    status, score, overflow = result.split("|")
    assert "CONSOLE" not in done.stderr
    assert status == "You got 12 of 24 right."  # half of them are real
    assert "Held-out micrographs taken for real: 12 of 12." in score
    assert "Images of LDM taken for real: 6 of 6." in score
    assert "A coin gets at least as many in 58 % of all tries." in score
    assert overflow == "overflow false"
    # what the coin's share is made of: P(X >= 12) of 24 tosses
    tosses = np.random.default_rng(0).binomial(24, 0.5, 200_000)
    assert (tosses >= 12).mean() == pytest.approx(0.58, abs=0.01)
