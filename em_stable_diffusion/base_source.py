"""Where a base lies: a folder in diffusers' layout, or a repository on the Hub at a commit."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from em_hub.transport import HUB_ID, fetch_repository, split_hub_id
from em_stable_diffusion.em_base_models import BASE_MODELS, VARIANTS, BaseModel
from em_training.config import read_json_object
from em_training.sources import OTHER_VARIANTS

INDEX = "model_index.json"
SUFFIXES = ("json", "txt", "jinja", "safetensors")  # of files that are read: no code, no pickles
NON_EMA = "*non_ema*"  # another copy of the same weights, as are other variants
HAVE_NO_WEIGHTS = ("scheduler", "tokenizer")


@dataclass(frozen=True)
class BaseSource:
    """A base that was found.

    Attributes:
        name: As the user named it.
        folder: Its local folder.
        kind: Key of `BASE_MODELS`.
        repository, revision: Its repository on the Hub and the commit; None for a folder.
    """

    name: str
    folder: Path
    kind: str
    repository: str | None = None
    revision: str | None = None

    @property
    def model(self) -> BaseModel:
        """Its classes in diffusers."""
        return BASE_MODELS[self.kind]

    def describe(self) -> str:
        """Return what is loaded, and from where, as one line."""
        commit = f" at commit {self.revision[:8]}" if self.revision else ""
        narrow = sorted(set(self.find_variants().values()))
        files = f" ({' and '.join(narrow)} files: there are no others)" if narrow else ""
        return f"base: {self.model.title}, loaded from {self.name}{commit}{files}"

    def identify(self) -> dict[str, str]:
        """Return what must not change while it is tuned: the commit, or a hash of the weights."""
        if self.revision is not None:
            return {"commit": self.revision}
        digest = hashlib.sha256()
        for part in (self.model.denoiser, "vae"):
            for path in sorted((self.folder / part).glob("*.safetensors")):
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return {"weights_sha256": digest.hexdigest()}

    def find_variants(self, *parts: str) -> dict[str, str]:
        """Return {part: variant} of those whose weights are there in 16 bits only.

        parts: By default the denoiser and the autoencoder.

        Raises:
            ValueError: A part has no weights as safetensors.
        """
        found = {}
        for part in parts or (self.model.denoiser, "vae"):
            variant = find_variant(self.folder / part)
            if variant is None:
                raise ValueError(
                    f"base is {self.name}, which holds no weights of its {part} as safetensors. "
                    "Use another revision or another base with --base, or save it as safetensors."
                )
            found |= {part: variant} if variant else {}
        return found

    def fetch_text_encoder(self) -> None:
        """Download the text encoder and its tokenizer of a repository; a folder has them."""
        if self.repository is not None:
            fetch_parts(f"{self.repository}@{self.revision}", ("text_encoder", "tokenizer"))


def find_base(name: str, commit: str | None = None) -> BaseSource:
    """Find a base, and download what a training needs of a repository; no code is read.

    The text encoder is not downloaded, see `BaseSource.fetch_text_encoder`.

    Args:
        name: A folder in diffusers' layout, or owner/name[@revision] on the Hub.
        commit: Of the repository, whatever the name says.

    Raises:
        ValueError: There is no such base, its class is not known, it has no weights as safetensors,
            or the Hub cannot be reached.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            raise ValueError(
                f"base is {name}, which holds no {INDEX}. Give a folder in diffusers' layout, as "
                "`hf download owner/name --local-dir FOLDER` makes one, or a repository on the Hub."
            )
        source = BaseSource(name, folder, read_kind(folder, name))
        source.find_variants()  # a part without weights is an error now
        return source
    if HUB_ID.fullmatch(name) is None:
        raise ValueError(
            f"base is {name}, but there is no such folder, and it is not a Hub id (owner/name or "
            "owner/name@revision). Use --base."
        )
    repository = split_hub_id(name)[0]
    pinned = f"{repository}@{commit}" if commit else name
    try:
        folder = fetch_repository(pinned, [INDEX, "README.md"])
    except ValueError as error:
        raise ValueError(f"{error} Or name a folder that holds a base with --base.") from error
    kind = read_kind(folder, name)
    folder = fetch_parts(pinned, (BASE_MODELS[kind].denoiser, "vae", "scheduler"))
    # the cache names the folder of a snapshot by its commit
    source = BaseSource(name, folder, kind, repository, folder.name)
    source.find_variants()
    return source


def fetch_parts(name: str, parts: tuple[str, ...]) -> Path:
    """Return a local folder with these parts of a repository in diffusers' layout.

    A part comes in 16 bits only if the repository holds no other weights of it.
    """
    patterns = [f"{part}/*.{suffix}" for part in parts for suffix in SUFFIXES]
    folder = fetch_repository(name, [INDEX, *patterns], ignore=[*OTHER_VARIANTS, NON_EMA])
    for variant in VARIANTS:
        lacking = [
            part
            for part in parts
            if part not in HAVE_NO_WEIGHTS and find_variant(folder / part) is None
        ]
        if lacking:
            patterns = [f"{part}/*.{variant}[.-]*" for part in lacking]
            patterns = [f"{pattern}{suffix}" for pattern in patterns for suffix in SUFFIXES]
            fetch_repository(name, patterns, ignore=[NON_EMA])
    return folder


def find_variant(folder: Path) -> str | None:
    """Return the name of the weights that a part is loaded from: "" or one of `VARIANTS`.

    Returns None if it has no weights as safetensors.
    """
    names = [path.name for path in folder.glob("*.safetensors") if not path.match(NON_EMA)]
    if any(not any(map(Path(name).match, OTHER_VARIANTS)) for name in names):
        return ""
    for variant in VARIANTS:
        if any(f".{variant}." in name or f".{variant}-" in name for name in names):
            return variant
    return None


def read_kind(folder: Path, name: str) -> str:
    """Return the kind of the base in `folder`, from its model_index.json."""
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"The Hub repository {name} holds no pipeline (no {INDEX}).")
    found = read_json_object(path).get("_class_name")
    found = found[-1] if isinstance(found, list) and found else found
    for kind, base in BASE_MODELS.items():
        if found == base.pipeline:
            return kind
    known = ", ".join(f"{base.pipeline} ({base.title})" for base in BASE_MODELS.values())
    raise ValueError(f"base is {name}, a {found}, but must be one of {known}. Use --base.")
