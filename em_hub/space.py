"""The demo -> a Space on the Hub: `python -m em_hub.space REPO --models you/em-ldm you/em-gan`."""

import dataclasses
import importlib.metadata
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import SpaceCardData, constants

from em_data.markdown import escape_markdown
from em_hub.card import CODE_LICENSE
from em_hub.publish import say
from em_hub.transport import HUB_ID, check_dry_run_folder, find_account, upload_folder
from em_training.cli import run_command
from em_training.flags import parse_flags

ROOT = Path(__file__).parents[1]
PAGE, START = "app.py", "space.py"
PYTHON = "3.11"
START_TEXT = """\"\"\"Start the page; the variable EM_MODELS names other models.\"\"\"

import os
import runpy

os.environ.setdefault("EM_MODELS", {models!r})
runpy.run_path({page!r}, run_name="__main__")
"""
README_TEXT = """---
{metadata}
---

# {title}

Images drawn by models that learned from electron micrographs. They show no real specimen. The
models are

{links}

The code has the licence {license}; the models have licences of their own.
"""


@dataclasses.dataclass(frozen=True)
class SpaceConfig:
    """Publish the demo as a Gradio Space that shows models on the Hub.

    The Space holds app.py, this project's packages, requirements.txt and README.md. It fetches
    nothing but the models and what requirements.txt names. It shows private models only with a
    secret HF_TOKEN in its settings.
    """

    repo: str
    """The Space: owner/name, or name for your own. It is created if it does not exist."""
    models: tuple[str, ...] = ()
    """Hub ids (owner/name, owner/name@revision) of the models to choose from."""
    title: str = "EM Synthesis"
    """Title of the page on the Hub."""
    private: bool = False
    """Create the Space for its owner alone."""
    token: str | None = None
    """A token with write rights. Default: HF_TOKEN, or that of `hf auth login`."""
    dry_run: str | None = None
    """Write the Space into this new folder, and upload nothing."""


def publish_space(config: SpaceConfig, *, say: Callable[[str], object] = say) -> str:
    """Write the Space and upload it in one commit; return its address, or a dry run's folder.

    Raises:
        ValueError: No model, a model that is not a Hub id, an installation without app.py, and as
            `em_hub.transport.upload_folder` does.
    """
    check_models(config)
    if config.dry_run is not None:
        out = check_dry_run_folder(config.dry_run)
        write_space(config, out)
        say(f"{out} holds the whole Space; nothing was uploaded. `python {START}` in it starts it.")
        return str(out)
    repo_id = find_account(config.repo, config.token)
    packages = tuple(f"{name}/" for name in list_packages())
    with tempfile.TemporaryDirectory(prefix="em-space-") as temporary:
        write_space(config, Path(temporary))
        upload = upload_folder(
            temporary,
            repo_id,
            kind="space",
            private=config.private,
            token=config.token,
            message="Publish the demo",
            check=refuse_other_content,
            is_replaced=lambda path: path.startswith(packages),
        )
    say(f"{upload.url} (commit {upload.commit[:8]}), verified; the Hub builds it now")
    return upload.url


def list_packages() -> list[str]:
    """Return the names of this project's packages, which lie beside app.py."""
    names = {path.parent.name for path in ROOT.glob("em_*/__init__.py")}
    return sorted(names | {"model_cards"})


def check_models(config: SpaceConfig) -> None:
    """Refuse a Space without a model, or with one that lies on this machine."""
    if not config.models:
        raise ValueError(
            "A Space needs a model. Give Hub ids with --models (publish.py makes them)."
        )
    for model in config.models:
        if not HUB_ID.fullmatch(model) or Path(model).exists():
            raise ValueError(
                f"{model} is not a Hub id, and a Space sees no folder of yours. Publish it first "
                "with publish.py."
            )


def refuse_other_content(api, repo_id, paths, revision) -> None:
    """Refuse a Space that was not written by this module."""
    if not {PAGE, START} <= paths:
        held = ", ".join(sorted(paths)[:3])
        raise ValueError(f"{repo_id} holds something else ({held}). Choose another name.")


def write_space(config: SpaceConfig, out: Path) -> None:
    """Write README.md, requirements.txt, the page, what starts it, and the packages into `out`."""
    if not (ROOT / PAGE).is_file():
        raise ValueError(
            f"{PAGE} does not lie beside the installed packages. Run this in a checkout of the "
            "project."
        )
    out.mkdir(parents=True, exist_ok=True)
    gradio, requirements = list_requirements()
    shutil.copy(ROOT / PAGE, out / PAGE)
    shutil.copy(ROOT / "LICENSE", out / "LICENSE")
    # a Space loads its models from the Hub: those of the package stay here
    ignore = shutil.ignore_patterns("__pycache__", ".*", "em-*")
    for name in list_packages():
        shutil.copytree(ROOT / name, out / name, ignore=ignore)
    (out / START).write_text(START_TEXT.format(models=" ".join(config.models), page=PAGE))
    (out / "requirements.txt").write_text("\n".join(requirements) + "\n")
    (out / "README.md").write_text(make_readme(config, gradio))


def list_requirements() -> tuple[str, list[str]]:
    """Return (gradio's version, the other requirements), as the installation states them.

    The Hub installs gradio itself, in the version that README.md names: the installed one, else
    the least that the project takes.
    """
    requirements, least = [], "0"
    for requirement in importlib.metadata.requires("em-synthesis") or ():
        name, _, marker = (part.strip() for part in requirement.partition(";"))
        if name.startswith("gradio"):
            least = re.sub(r".*>=\s*([\d.]+).*", r"\1", name)
        elif "extra" not in marker:
            requirements.append(requirement)
    try:
        version = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        version = ".".join([*least.split("."), "0", "0"][:3])
    return version, sorted(requirements)


def make_readme(config: SpaceConfig, gradio: str) -> str:
    """Return README.md: the metadata by which the Hub runs the Space, and a page for people."""
    models = [model.split("@")[0] for model in config.models]
    metadata = SpaceCardData(
        title=config.title,
        sdk="gradio",
        sdk_version=gradio,
        python_version=PYTHON,
        app_file=START,
        license=CODE_LICENSE.lower(),
        models=models,
        tags=["electron-microscopy", "synthetic-data", "materials-science"],
    )
    links = "\n".join(f"- [{model}]({constants.ENDPOINT}/{model})" for model in models)
    return README_TEXT.format(
        metadata=metadata.to_yaml(),
        title=escape_markdown(config.title),
        links=links,
        license=CODE_LICENSE,
    )


def run() -> None:
    (config,) = parse_flags(
        [SpaceConfig], sys.argv[1:], command="-m em_hub.space", positional=("repo",)
    )
    publish_space(config)


if __name__ == "__main__":
    run_command(run)
