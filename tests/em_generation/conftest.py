import pytest

from support.models import make_ldm, make_stylegan


@pytest.fixture(scope="module", params=["ldm", "stylegan2"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (make_ldm() if request.param == "ldm" else make_stylegan()).save_pretrained(folder)
    return str(folder)
