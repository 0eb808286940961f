"""The demo -> a Space on the Hub: `python -m em_hub.space REPO --ldm you/em-ldm --stylegan you/em-gan`."""

import dataclasses
import importlib.metadata
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import tyro
from huggingface_hub import SpaceCardData, constants

from em_hub.card import CODE_LICENSE
from em_hub.transport import HUB_ID, check_dry_run_folder, find_account, upload_folder
from em_training.cli import run_command

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "em_data",
    "em_training",
    "em_diffusion",
    "em_stylegan",
    "em_evaluation",
    "em_generation",
    "em_hub",
    "model_cards",
)
PAGE, START = "app.py", "space.py"
PYTHON = "3.11"


@dataclasses.dataclass(frozen=True)
class SpaceConfig:
    """Publish the demo as a Gradio Space that shows models on the Hub.

    The Space holds app.py, this project's own packages, requirements.txt and README.md; nothing of it is fetched from elsewhere
    but the models and what requirements.txt names. A Space shows private models only with a secret HF_TOKEN in its settings.
    """

    repo: str
    """The Space's name: owner/name, or name for one's own. Made where there is none."""
    ldm: tuple[str, ...] = ()
    """Hub ids (owner/name, owner/name@revision) of latent diffusion models to choose from."""
    stylegan: tuple[str, ...] = ()
    """Hub ids of StyleGANs to choose from."""
    title: str = "EM Synthesis"
    """What the Hub writes above the page."""
    private: bool = False
    """Show a new Space to its owner alone."""
    token: str | None = None
    """A token with write rights; left out, that of HF_TOKEN or of `hf auth login`."""
    dry_run: str | None = None
    """Write the Space into this new folder, and upload nothing."""


def publish_space(config: SpaceConfig, *, say=lambda text: print(text, file=sys.stderr)) -> str:
    """Write the Space and upload it in one commit; return its page's address, or the folder of a dry run.

    Raises `ValueError` in one sentence: no model, a model that is no Hub id, an installation without app.py, and as
    `em_hub.transport.upload_folder` does.
    """
    check_models(config)
    if config.dry_run is not None:
        out = check_dry_run_folder(config.dry_run)
        write_space(config, out)
        say(f"{out}: the whole Space; nothing was uploaded. `python {START}` in it shows the page")
        return str(out)
    repo_id = find_account(config.repo, config.token)
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
            is_replaced=lambda path: path.startswith(tuple(f"{name}/" for name in PACKAGES)),
        )
    say(f"{upload.url} (commit {upload.commit[:8]}), verified; the Hub builds it now")
    return upload.url


def check_models(config: SpaceConfig) -> None:
    """Refuse a Space without a model, or with one that lies on this machine alone."""
    if not config.ldm and not config.stylegan:
        raise ValueError(
            "a Space needs a model: give the Hub ids with --ldm or --stylegan (publish.py makes them)"
        )
    for model in (*config.ldm, *config.stylegan):
        if not HUB_ID.fullmatch(model) or Path(model).exists():
            raise ValueError(
                f"{model} is no Hub id, and a Space sees no folder of yours; publish it first: publish.py"
            )


def refuse_other_content(api, repo_id, paths, revision):
    """Refuse a Space that was not written by this."""
    if not {PAGE, START} <= paths:
        raise ValueError(
            f"{repo_id} holds something else ({', '.join(sorted(paths)[:3])}); choose another name"
        )


def write_space(config: SpaceConfig, out: Path) -> None:
    """Write README.md, requirements.txt, the page, what starts it, and this project's packages into `out`."""
    if not (ROOT / PAGE).is_file():
        raise ValueError(
            f"{PAGE} does not lie beside the installed packages; run this in a checkout of the project"
        )
    out.mkdir(parents=True, exist_ok=True)
    gradio, requirements = list_requirements()
    shutil.copy(ROOT / PAGE, out / PAGE)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, out / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    (out / "LICENSE").write_bytes((ROOT / "LICENSE").read_bytes())
    (out / START).write_text(make_start(config))
    (out / "requirements.txt").write_text("\n".join(requirements) + "\n")
    (out / "README.md").write_text(make_readme(config, gradio))


def list_requirements() -> tuple[str, list[str]]:
    """Return (gradio's version, the other requirements) of the project, as its installation states them.

    gradio itself is no requirement of a Space: the Hub installs the version that README.md names. That is the installed one, or
    else the least that the project takes.
    """
    requirements, least = [], None
    for requirement in importlib.metadata.requires("em-synthesis") or ():
        name, _, marker = (part.strip() for part in requirement.partition(";"))
        if name.startswith("gradio"):
            least = re.search(r">=\s*([\d.]+)", name)[1]
        elif "extra" not in marker:
            requirements.append(requirement)
    try:
        version = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        version = ".".join([*least.split("."), "0", "0"][:3])
    return version, sorted(requirements)


def make_start(config: SpaceConfig) -> str:
    """Return the file that the Space runs: the page with these models, unless its settings name others."""
    names = {"EM_LDM": " ".join(config.ldm), "EM_STYLEGAN": " ".join(config.stylegan)}
    lines = [
        f"    os.environ.setdefault({key!r}, {json.dumps(value)})"
        for key, value in names.items()
        if value
    ]
    return "\n".join(
        [
            '"""Start the page with its models; the variables EM_LDM and EM_STYLEGAN in the settings name others."""',
            "",
            "import os",
            "import runpy",
            "",
            'if not {"EM_LDM", "EM_STYLEGAN"} & set(os.environ):',
            *lines,
            f'runpy.run_path("{PAGE}", run_name="__main__")',
            "",
        ]
    )


def make_readme(config: SpaceConfig, gradio: str) -> str:
    """Return README.md: the front matter by which the Hub runs the Space, and a page for people."""
    models = [model.split("@")[0] for model in (*config.ldm, *config.stylegan)]
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
    return f"""---
{metadata.to_yaml()}
---

# {config.title}

Images that models have drawn, none of a real specimen: a latent diffusion model and a StyleGAN beside each other, of

{links}

The code is under {CODE_LICENSE}; the models have licences of their own.
"""


if __name__ == "__main__":
    run_command(
        lambda: publish_space(tyro.cli(SpaceConfig, config=(tyro.conf.PositionalRequiredArgs,)))
    )
