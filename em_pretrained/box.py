"""Names of the models in the package, their folders and licences. Imports nothing of ours."""

import difflib
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = ("em-ldm-64", "em-stylegan2-64")
"""Names of models; a version of the package may lack some, see `list_models`."""


def list_models() -> list[str]:
    """Return the names of the models that this version of the package holds."""
    return [name for name in NAMES if (FOLDER / name / "model_index.json").is_file()]


def path(name: str) -> Path:
    """Return the folder of a model: a saved pipeline, for `from_pretrained` of its class.

    Raises:
        ValueError: There is no such model in the package.
    """
    if name in list_models():
        return FOLDER / name
    if name in NAMES:
        raise ValueError(f"This version of the package does not hold {name}. {_say_models()}")
    raise ValueError(f"The package holds no model {name}.{suggest(name)}")


def find(source: str) -> Path | None:
    """Return the folder of the model in the package that a user means by `source`.

    Returns None if `source` is no name of such a model, or if a local file or folder has this name.
    Raises `ValueError` if this version of the package lacks the model.
    """
    if str(source) not in NAMES or Path(source).exists():
        return None
    return path(str(source))


def suggest(source: str) -> str:
    """Return sentences to end an error about an unknown model; "" if `source` has a slash."""
    if "/" in str(source) or "\\" in str(source):
        return ""
    nearest = difflib.get_close_matches(str(source), NAMES, n=1)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    return f"{hint} {_say_models()}"


def read_license(folder: Path) -> str | None:
    """Return the licence that the card (README.md) of a saved pipeline states; None if none."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8").splitlines()
    end = lines.index("---", 1) if "---" in lines[1:] else 0
    values = [line.partition(":")[2].strip() for line in lines[1:end] if line[:8] == "license:"]
    return values[0] if values and values[0] != "unknown" else None


def _say_models() -> str:
    held = list_models()
    return f"Models in the package: {', '.join(held)}." if held else "The package holds no model."
