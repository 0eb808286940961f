"""What files say about their pixel size, and what is no pixel size."""

import pytest

from em_data.metadata import refuse_diffraction, unit_to_nm
from em_data.refusal import Refusal

SPELLINGS = {
    1e9: ["m", "meter", "metre", "meters", "METRES"],
    1e7: ["cm", "centimeter"],
    1e6: ["mm", "millimetres"],
    1e3: ["um", "µm", "μm", "\\u00B5m", "Âµm", "micron", "microns", "micrometers", "Micrometre"],
    1.0: ["nm", " nm ", "nm\0", "NM", "nanometer", "nanometers", "nanometres"],
    0.1: ["A", "Å", "\u212b", "angstrom", "Angstroms", "Ångström"],
    1e-3: ["pm", "picometer"],
    2.54e7: ["inch", "in"],
}


@pytest.mark.parametrize("nanometres", SPELLINGS)
def test_a_unit_is_known_in_every_spelling(nanometres):
    for unit in SPELLINGS[nanometres]:
        assert unit_to_nm(unit) == pytest.approx(nanometres, rel=1e-12), unit


@pytest.mark.parametrize("unit", ["", "pixel", "px", "1/nm", "mrad", "s", "eV", "counts", None])
def test_what_is_no_unit_of_length_is_unknown(unit):
    assert unit_to_nm(unit) is None


PATTERNS = [
    "1/nm",
    "1 / nm",
    "nm^-1",
    "nm-1",
    "nm⁻¹",
    "1/Å",
    "1/A",
    "A^-1",
    "1/µm",
    "1/m",
    "per nm",
]


@pytest.mark.parametrize("unit", [*PATTERNS, "mrad", "rad", "1/px", "µrad"])
def test_reciprocal_units_are_of_a_diffraction_pattern(unit):
    with pytest.raises(Refusal, match="diffraction pattern"):
        refuse_diffraction(unit)


@pytest.mark.parametrize("unit", ["nm", "µm", "", "pixel", "1/s", "counts", "m", None, "eV"])
def test_other_units_are_not(unit):
    refuse_diffraction(unit)
