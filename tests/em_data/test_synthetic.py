import numpy as np
import pytest

from em_data.synthetic_defects import (
    NORMALS_100,
    NORMALS_111,
    draw_dot,
    draw_line,
    draw_loop,
    project_loop,
)
from em_data.synthetic_imaging import _mottle, expose, make_background
from em_data.synthetic_micrographs import Specimen, synthesise_micrograph, synthesise_micrographs

LOOP = dict(diameter_nm=24.0, axis_ratio=1 / np.sqrt(3), angle=0.4, g_angle=0.9, strength=0.6)


@pytest.fixture(scope="module")
def micrographs():
    return list(synthesise_micrographs(6, seed=3, size=256))


def rng_of(seed):
    return np.random.default_rng(seed)


def has_kind(micrograph, prefix):
    return [defect for defect in micrograph.defects if defect.kind.startswith(prefix)]


def is_centred_inside(defect, size):
    return all(-0.5 <= c < size - 0.5 for c in defect.metadata["center_px"])


def principal_axes(points):
    """Axis ratio and angle of the major axis of points [n, 2], from their second moments."""
    values, vectors = np.linalg.eigh(np.cov(points.T))
    return np.sqrt(max(values[0], 0) / values[1]), np.arctan2(vectors[1, 1], vectors[0, 1]) % np.pi


def angle_between(a, b):
    return abs((a - b + np.pi / 2) % np.pi - np.pi / 2)


# --- what a seed means


def test_a_seed_is_a_picture_whatever_ran_before(micrographs):
    np.random.seed(1)  # noqa: NPY002 (the global state must not matter)
    again = synthesise_micrograph(3_000_004, size=256)
    assert np.array_equal(again.image, micrographs[4].image)
    assert [d.box_px for d in again.defects] == [d.box_px for d in micrographs[4].defects]
    for defect, other in zip(again.defects, micrographs[4].defects):
        assert np.array_equal(defect.mask, other.mask)
    assert again.name == micrographs[4].name


def test_different_seeds_are_different_pictures(micrographs):
    others = list(synthesise_micrographs(2, seed=4, size=256))
    pictures = [m.image for m in [*micrographs, *others]]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert np.mean(a == b) < 0.2  # 8-bit pictures agree in a few pixels by chance
    assert len({m.name for m in [*micrographs, *others]}) == 8


def test_four_micrographs_share_a_specimen(micrographs):
    names = [m.specimen for m in micrographs]
    assert names == [names[0]] * 4 + [names[4]] * 2
    assert names[0] != names[4]
    a, b = Specimen.from_seed(750_000), Specimen.from_seed(750_001)
    assert (a.name, b.name) == (names[0], names[4])
    assert a.rotation != b.rotation
    angles = [{round(d.metadata["angle"], 9) for d in has_kind(m, "loop_111")} for m in micrographs]
    assert angles[0] == angles[3] != angles[4]  # the crystal of a specimen has one orientation


def test_the_picture_is_8_bit_with_its_pixel_size(micrographs):
    m = synthesise_micrograph(0, size=96, pixel_size_nm=0.5)
    assert m.image.shape == (96, 96)
    assert m.image.dtype == np.uint8
    assert (m.pixel_size_nm, micrographs[0].pixel_size_nm) == (0.5, 1.0)


@pytest.mark.parametrize("arguments", [(-1, 64, 1.0), (0, 8, 1.0), (0, 64, 0.0)])
def test_impossible_pictures_are_refused(arguments):
    with pytest.raises(ValueError, match="a synthetic micrograph needs"):
        synthesise_micrograph(*arguments)


def test_seeds_never_overlap():
    with pytest.raises(ValueError, match=r"must be 1 to 1000000"):
        synthesise_micrographs(1_000_001)
    with pytest.raises(ValueError, match=r"must be 1 to 1000000"):
        synthesise_micrographs(0)


# --- labels


def test_masks_fill_their_boxes_and_boxes_lie_in_the_picture(micrographs):
    kinds = set()
    for micrograph in micrographs:
        height, width = micrograph.image.shape
        for defect in micrograph.defects:
            x0, y0, x1, y1 = defect.box_px
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height
            assert defect.mask.shape == (y1 - y0, x1 - x0)
            assert defect.mask.dtype == bool
            for edge in (defect.mask[0], defect.mask[-1], defect.mask[:, 0], defect.mask[:, -1]):
                assert edge.any()  # the box is tight
            assert (defect.length_nm is None) == (defect.kind != "line")
            assert (defect.diameter_nm is None) == (defect.kind == "line")
            kinds.add(defect.kind)
    assert kinds == {"loop_111", "loop_100", "dot", "line"}


def test_a_border_cuts_the_mask_and_says_so(micrographs):
    for micrograph in micrographs:
        for defect in micrograph.defects:
            x0, y0, x1, y1 = defect.box_px
            if defect.metadata["is_cut_by_border"]:
                assert x0 == 0 or y0 == 0 or x1 == 256 or y1 == 256
            elif defect.kind.startswith("loop"):
                long_side = max(x1 - x0, y1 - y0) * micrograph.pixel_size_nm
                assert long_side >= 0.6 * defect.diameter_nm


def test_labels_lie_where_the_picture_is_dark(micrographs):
    darker = []
    for micrograph in micrographs:
        taken = np.zeros(micrograph.image.shape, dtype=bool)
        for d in micrograph.defects:
            x0, y0, x1, y1 = d.box_px
            taken[y0:y1, x0:x1] |= d.mask
        for d in has_kind(micrograph, "dot"):
            x0, y0, x1, y1 = d.box_px
            if d.metadata["strength"] < 0.4 or d.mask.sum() < 6:
                continue
            around = np.s_[max(y0 - 8, 0) : y1 + 8, max(x0 - 8, 0) : x1 + 8]
            matrix = micrograph.image[around][~taken[around]]
            if len(matrix) > 40:
                darker.append(micrograph.image[y0:y1, x0:x1][d.mask].mean() < matrix.mean() - 5)
    assert len(darker) > 50
    assert np.mean(darker) > 0.95


# --- crystallography


def test_loops_along_the_cube_axis_have_their_closed_form():
    rotation = 0.3
    for normal in NORMALS_111:
        ratio, angle = project_loop(normal, (1, 0, 0), rotation)
        assert ratio == pytest.approx(1 / np.sqrt(3))
        # 45 degrees off <010>
        assert angle_between(2 * angle, 2 * rotation + np.pi / 2) == pytest.approx(0, abs=1e-9)
    shapes = [project_loop(normal, (1, 0, 0), rotation) for normal in NORMALS_100]
    assert [ratio for ratio, _ in shapes] == pytest.approx([1, 0, 0])  # one face-on, two edge-on
    assert angle_between(shapes[1][1], rotation + np.pi / 2) == pytest.approx(0, abs=1e-9)
    assert angle_between(shapes[2][1], rotation) == pytest.approx(0, abs=1e-9)


def test_loops_along_the_face_diagonal_have_their_closed_form():
    ratios = sorted(project_loop(normal, (1, 1, 0), 0.0)[0] for normal in NORMALS_111)
    assert ratios == pytest.approx([0, 0, np.sqrt(2 / 3), np.sqrt(2 / 3)], abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_projection_is_that_of_a_circle_in_space(seed):
    normal, beam = rng_of(seed).standard_normal((2, 3))
    beam /= np.linalg.norm(beam)
    u = np.cross(normal, [0.3, 0.5, -0.7])
    u /= np.linalg.norm(u)
    v = np.cross(normal / np.linalg.norm(normal), u)
    phi = np.linspace(0, 2 * np.pi, 720, endpoint=False)[:, None]
    circle = np.cos(phi) * u + np.sin(phi) * v
    axis = 1 if abs(beam[1]) < 0.9 else 2
    x = np.eye(3)[axis] - beam * beam[axis]
    x /= np.linalg.norm(x)
    y = np.cross(beam, x)
    expected_ratio, expected_angle = principal_axes(np.stack([circle @ x, circle @ y], axis=1))
    ratio, angle = project_loop(normal, beam, 0.0)
    assert ratio == pytest.approx(expected_ratio, abs=1e-6)
    assert angle_between(angle, expected_angle) < 1e-6


def test_drawn_loops_have_the_projected_shape():
    specimen = Specimen(rotation=0.2, loop_median_nm=26, loop_spread=0.1)
    ratios = []
    for seed in range(4):
        for loop in has_kind(synthesise_micrograph(seed, 256, 0.5, specimen=specimen), "loop_111"):
            if loop.metadata["is_cut_by_border"]:
                continue
            ratio, angle = principal_axes(np.argwhere(loop.mask)[:, ::-1].astype(float))
            assert angle_between(angle, loop.metadata["angle"]) < np.deg2rad(10)
            ratios.append(ratio)
    assert len(ratios) > 10
    # the ellipse has 1 / sqrt(3) = 0.577; the width of the line adds to both axes
    assert 0.57 < np.mean(ratios) < 0.68


# --- statistics


def test_number_densities_are_the_specimens():
    specimen = Specimen(loops_per_um2=900, fraction_100=0.4, dots_per_um2=700)
    size, num = 128, 24
    pictures = [synthesise_micrograph(seed, size, 1.0, specimen=specimen) for seed in range(num)]
    area_um2 = num * (size / 1000) ** 2
    for kind, density in (("loop_111", 540), ("loop_100", 360), ("dot", 700)):
        count = sum(is_centred_inside(d, size) for m in pictures for d in has_kind(m, kind))
        assert abs(count - density * area_um2) < 4 * np.sqrt(density * area_um2), kind


def test_diameters_are_log_normal():
    specimen = Specimen(loop_median_nm=18, loop_spread=0.3, dots_per_um2=0, lines_per_um2=0)
    pictures = [synthesise_micrograph(seed, 160, 1.0, specimen=specimen) for seed in range(10)]
    loops = [d for m in pictures for d in has_kind(m, "loop") if is_centred_inside(d, 160)]
    logs = np.log([d.diameter_nm for d in loops])
    n = len(logs)
    assert n > 80
    assert abs(logs.mean() - np.log(18)) < 4 * 0.3 / np.sqrt(n)
    assert abs(logs.std() - 0.3) < 4 * 0.3 / np.sqrt(2 * n)


def test_a_tile_of_64_pixels_shows_one_to_three_loops():
    loops = [d for m in synthesise_micrographs(12, seed=9, size=256) for d in has_kind(m, "loop")]
    per_tile = sum(is_centred_inside(d, 256) for d in loops) / (12 * 16)
    assert 1.2 < per_tile < 2.8
    sizes_px = np.array([d.diameter_nm for d in loops])  # 1 nm per pixel
    assert np.mean((sizes_px > 12) & (sizes_px < 30)) > 0.8


def test_counts_are_poisson():
    transmission = np.full((256, 256), 0.37)
    for dose in (5, 40, 320, 2560):
        counts = expose(rng_of(dose), transmission, dose)
        standard_error = np.sqrt((2 + 1 / dose) / counts.size)  # of variance / mean, Poisson
        assert counts.mean() == pytest.approx(dose, abs=5 * np.sqrt(dose / counts.size))
        assert counts.var() / counts.mean() == pytest.approx(1, abs=5 * standard_error)


def test_counts_follow_the_transmission():
    transmission = np.concatenate([np.full((128, 128), 0.2), np.full((128, 128), 0.6)])
    counts = expose(rng_of(0), transmission, 100)
    dark, bright = counts[:128], counts[128:]
    assert bright.mean() / dark.mean() == pytest.approx(3, rel=0.01)
    assert bright.var() / dark.var() == pytest.approx(3, rel=0.1)


def test_grain_of_a_picture_falls_with_the_dose():
    def grain(dose):
        specimen = Specimen(dose=dose, loops_per_um2=0, dots_per_um2=0, lines_per_um2=0)
        image = synthesise_micrograph(5, 128, specimen=specimen).image.astype(float)
        second = image[:, 2:] - 2 * image[:, 1:-1] + image[:, :-2]
        return second.std() / image.std()

    assert grain(20) > 1.3 * grain(2000)


def test_the_ends_of_the_scale_are_clear_and_the_scale_is_used(micrographs):
    small = [synthesise_micrograph(seed, 64) for seed in range(8)]
    for image in [m.image for m in [*micrographs, *small]]:
        assert np.mean(image == 0) < 1e-3
        assert np.mean(image == 255) < 1e-3
        assert image.std() > 15
        assert np.quantile(image, 0.999) - np.quantile(image, 0.001) > 120


def test_mottle_has_unit_variance_and_two_independent_fields():
    fields = np.stack([_mottle(rng_of(seed), 256, 2.0) for seed in range(8)])  # [8, 2, 256, 256]
    assert fields.var(axis=(0, 2, 3)) == pytest.approx([1, 1], abs=0.05)
    assert abs(np.mean(fields[:, 0] * fields[:, 1])) < 0.03


def test_the_foil_is_smooth_and_never_brighter_than_the_beam():
    log_transmission, visibility = make_background(rng_of(0), Specimen(mottle=0.0), 128, 1.0)
    assert log_transmission.dtype == visibility.dtype == np.float32
    assert log_transmission.max() < 0
    assert np.abs(np.diff(log_transmission, axis=0)).max() < 0.05
    assert visibility.min() > 0.2


# --- drawings


def integral(drawing, pixel_size_nm):
    return drawing.contrast.sum() * pixel_size_nm**2, drawing.mask.sum() * pixel_size_nm**2


DOT = dict(diameter_nm=8.0, g_angle=0.3, strength=0.5)
LINE = dict(length_nm=90.0, direction=0.7, strength=0.5)


@pytest.mark.parametrize(
    ("draw", "keywords"), [(draw_loop, LOOP), (draw_dot, DOT), (draw_line, LINE)]
)
def test_a_drawing_does_not_depend_on_the_pixel_size(draw, keywords):
    fine, coarse = (draw(rng_of(2), (40.3, 50.6), pixel_size_nm=p, **keywords) for p in (0.25, 0.5))
    assert integral(coarse, 0.5) == pytest.approx(integral(fine, 0.25), rel=0.06)


def test_a_drawing_moves_with_its_centre():
    here = draw_loop(rng_of(1), (20.25, 30.5), pixel_size_nm=0.5, **LOOP)
    there = draw_loop(rng_of(1), (27.25, 25.5), pixel_size_nm=0.5, **LOOP)
    assert np.subtract(there.origin, here.origin).tolist() == [7, -5]
    assert np.allclose(here.contrast, there.contrast, atol=1e-5)
    assert np.array_equal(here.mask, there.mask)


def test_a_loop_is_an_open_dark_ring_with_two_faint_stretches():
    keywords = LOOP | {"axis_ratio": 1.0, "diameter_nm": 30.0}
    drawing = draw_loop(rng_of(4), (64.0, 64.0), pixel_size_nm=0.25, **keywords)
    x0, y0 = drawing.origin
    centre = drawing.contrast[64 - y0, 64 - x0]
    phi = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    x, y = 64 + 60 * np.cos(phi), 64 + 60 * np.sin(phi)
    ring = drawing.contrast[np.rint(y - y0).astype(int), np.rint(x - x0).astype(int)]
    assert centre < 0.25 * ring.max()  # open: the middle is as the matrix or brighter
    assert ring.min() > centre
    # contrast goes twice round the ring: cos^2 of the angle to g
    assert np.argmax(np.abs(np.fft.rfft(ring))[1:5]) + 1 == 2
    assert np.abs(drawing.contrast[[0, -1]]).max() < 0.02  # nothing is cut off by the window
    assert np.abs(drawing.contrast[:, [0, -1]]).max() < 0.02


def test_a_line_reaches_its_strength_and_no_more():
    drawing = draw_line(
        rng_of(0), (10.0, 10.0), length_nm=200.0, direction=0.0, strength=0.5, pixel_size_nm=0.5
    )
    assert 0.35 < drawing.contrast.max() < 0.56
    assert drawing.contrast.min() > -1e-4
    assert drawing.metadata["length_nm"] == pytest.approx(200, rel=0.01)
