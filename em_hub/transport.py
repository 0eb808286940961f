"""Upload folders to the Hub and fetch repositories, both verified. Imports nothing of ours."""

import contextlib
import errno
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
MAIN = "main"
KEPT_BY_THE_HUB = {".gitattributes", "README.md"}  # may be there before anything was uploaded
DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EFBIG: "a file may not grow so large",
    errno.EDQUOT: "the quota is used up",
}


@dataclass(frozen=True)
class Upload:
    """Result of an upload: the repository's id and page, and the commit that holds it."""

    repo_id: str
    url: str
    commit: str


def split_hub_id(name: str) -> tuple[str, str | None]:
    """Split "owner/name@revision" into id and revision (a branch, tag or commit; else None)."""
    match = HUB_ID.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is not a Hub id: owner/name, or owner/name@revision")
    return match["repo"], match["revision"]


def check_dry_run_folder(folder) -> Path:
    """Return the folder of --dry-run as a path; `ValueError` if it holds anything."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty. Give a new folder with --dry-run.")
    return folder


def check_repo_id(repo_id: str) -> None:
    """Raise `ValueError` if this cannot be the name of a repository on the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id} cannot be the name of a repository on the Hub. Give OWNER/NAME, or NAME "
            "for your own account."
        ) from error


def find_account(repo_id: str, token: str | None = None) -> str:
    """Return the full id of a repository, after asking the Hub whether the token may write there.

    Args:
        repo_id: owner/name, or the name alone for one's own.
        token: By default HF_TOKEN, or that of the login.

    Raises:
        ValueError: No name of a repository; no token, a wrong one, or one that may only read.
    """
    check_repo_id(repo_id)
    token = token or get_token()
    if not token:
        raise ValueError(
            f"There is no token for {constants.ENDPOINT}. {_new_token()}, then run "
            "`hf auth login` or set HF_TOKEN."
        )
    with explain_hub_errors(repo_id, "asking who the token belongs to"):
        account = HfApi(token=token).whoami()
    name = account["name"]
    if "/" not in repo_id:
        repo_id = f"{name}/{repo_id}"
    role = (account.get("auth") or {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ValueError(f"The token of {name} may only read. {_new_token()}.")
    owner = repo_id.split("/")[0]
    known = {name, *(org["name"] for org in account.get("orgs") or ())}
    if owner not in known:
        raise ValueError(
            f"{repo_id} belongs to {owner}, but the token to {name}, which may write to "
            f"{', '.join(sorted(known))}."
        )
    return repo_id


def upload_folder(
    folder,
    repo_id: str,
    *,
    kind: str = "model",
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str,
    check: Callable[[HfApi, str, set[str], str], None] = lambda api, repo_id, paths, revision: None,
    is_replaced: Callable[[str], bool] = lambda path: False,
) -> Upload:
    """Upload all files of `folder` in one commit and check what the Hub then holds.

    Large files are sent first, each under its checksum. One that has arrived is not sent again by
    the next call. Until all have arrived, the repository stays as it was.

    Args:
        kind: "model", "dataset" or "space" (a Gradio one).
        private: Of a repository that is created now.
        revision: A branch, created from main if it does not exist.
        check: Called as check(api, repo_id, paths, branch) with what lies where the upload goes.
            It refuses by a `ValueError`.
        is_replaced: Whether a path that lies there is deleted if `folder` no longer has it.

    Raises:
        ValueError: What went wrong and what to do, in one or two sentences.
    """
    repo_id = find_account(repo_id, token)
    api = HfApi(token=token)
    with explain_hub_errors(repo_id, "uploading"):
        paths, held = _list_existing(api, repo_id, kind, private, revision)
        if paths - KEPT_BY_THE_HUB:
            check(api, repo_id, paths, held)
        sdk = "gradio" if kind == "space" else None
        api.create_repo(
            repo_id, repo_type=kind, private=private or None, exist_ok=True, space_sdk=sdk
        )
        branch = revision or MAIN
        if held != branch:
            api.create_branch(repo_id, branch=branch, repo_type=kind, exist_ok=True)
        files = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file()
        }
        gone = [path for path in sorted(paths - set(files)) if is_replaced(path)]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, path) for name, path in files.items()),
            *(CommitOperationDelete(path) for path in gone),
        ]
        commit = api.create_commit(
            repo_id, operations, commit_message=message, repo_type=kind, revision=revision
        ).oid
        _verify_upload(api, repo_id, kind, commit, files)
    prefix = "" if kind == "model" else f"{kind}s/"
    return Upload(repo_id, f"{constants.ENDPOINT}/{prefix}{repo_id}", commit)


def _list_existing(api, repo_id, kind, private, revision):
    """Return (paths, branch) of what lies where an upload goes; a new branch starts from main."""
    try:
        info = api.repo_info(repo_id, repo_type=kind)
    except RepositoryNotFoundError:
        return set(), MAIN
    if private and not info.private:
        raise ValueError(
            f"{repo_id} is public already. Make it private in its settings, or choose another name."
        )
    branch = MAIN
    if revision not in (None, MAIN):
        with contextlib.suppress(RevisionNotFoundError):
            info, branch = api.repo_info(repo_id, repo_type=kind, revision=revision), revision
    return {sibling.rfilename for sibling in info.siblings or ()}, branch


def _verify_upload(api, repo_id, kind, commit, files):
    """Compare the checksums of all files with those that the Hub names."""
    there = {}
    for each in api.list_repo_tree(repo_id, recursive=True, revision=commit, repo_type=kind):
        if hasattr(each, "blob_id"):
            there[each.path] = each.lfs.sha256 if each.lfs else each.blob_id
    wrong = [name for name, path in files.items() if there.get(name) not in hash_as_hub(path)]
    if wrong:
        raise ValueError(
            f"{repo_id} does not hold what was sent ({', '.join(wrong)}). Run the same command "
            "again; it sends those files again."
        )


def hash_as_hub(path) -> tuple[str, str]:
    """Return the checksums that the Hub may use: SHA-256 (large files) and git's SHA-1 (others)."""
    path = Path(path)
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while piece := file.read(2**20):
            sha256.update(piece)
            sha1.update(piece)
    return sha256.hexdigest(), sha1.hexdigest()


def fetch_repository(
    name: str, patterns: list[str], *, ignore=(), kind: str = "model", token: str | None = None
) -> Path:
    """Return a local folder with the files of a Hub repository that match `patterns`.

    What was downloaded once is found without a network. Each of these files is compared with its
    checksum; a damaged one is removed from the cache.

    Args:
        name: owner/name, or owner/name@revision.

    Raises:
        ValueError: What went wrong and what to do.
    """
    repo_id, revision = split_hub_id(name)
    with explain_hub_errors(name, "downloading"):
        folder = Path(
            snapshot_download(
                repo_id,
                repo_type=kind,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=list(ignore) or None,
                token=token,
            )
        )
    files = filter_repo_objects(
        (path for path in sorted(folder.rglob("*")) if path.is_file()),
        allow_patterns=patterns,
        ignore_patterns=list(ignore) or None,
        key=lambda path: path.relative_to(folder).as_posix(),
    )
    damaged = [path for path in files if not _is_sound(path)]
    for path in damaged:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    if damaged:
        names = ", ".join(path.relative_to(folder).as_posix() for path in damaged)
        raise ValueError(
            f"{names} of {name} came with another checksum than the Hub names, and was removed "
            "from the cache. Run the same command again. If it fails again, do not use this "
            "repository."
        )
    return folder


def list_files(
    name: str, suffix: str, *, kind: str = "model", token: str | None = None
) -> tuple[str, str, dict]:
    """Return (id, commit, {path: checksum}) of a repository's files that end in `suffix`.

    They are in the order of their folders. A checksum is SHA-256 of a large file, git's SHA-1 of a
    small one. Raises `ValueError` with what went wrong and what to do.
    """
    repo_id, revision = split_hub_id(name)
    with explain_hub_errors(name, "asking for its files"):
        info: Any = HfApi(token=token).repo_info(
            repo_id, repo_type=kind, revision=revision, files_metadata=True
        )
    files = {
        each.rfilename: each.lfs.sha256 if each.lfs else each.blob_id
        for each in info.siblings or ()
        if each.rfilename.endswith(suffix)
    }
    return repo_id, info.sha, dict(sorted(files.items(), key=lambda item: item[0].split("/")))


def _is_sound(path):
    """Return whether a cached file has the checksum that it is named by; True if by none."""
    checksum = path.resolve().name
    if not path.is_symlink() or not re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", checksum):
        return True
    return checksum in hash_as_hub(path)


@contextlib.contextmanager
def explain_hub_errors(name: str, doing: str):
    """Turn an error of the Hub in the block into a `ValueError` that says how to fix it."""
    try:
        yield
    except Exception as error:
        sentence = _explain(error)
        if sentence is None:
            raise
        raise ValueError(f"{doing} {name}: {sentence}") from error


def _explain(error: BaseException) -> str | None:
    """Return what happened and what to do, by the error and its causes; None for other errors."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 10:
        chain.append(cause)
    for each in chain:
        if isinstance(each, OSError) and each.errno in DISK_ERRORS:
            return (
                f"{DISK_ERRORS[each.errno]} ({each.filename or constants.HF_HUB_CACHE}). Make room "
                "or set HF_HOME to another disk, then run the same command again."
            )
    for each in chain:
        if isinstance(each, HfHubHTTPError) and getattr(each, "response", None) is not None:
            return _explain_response(each)
    for each in chain:
        if isinstance(each, HFValidationError):
            return f"this is not a name for a repository. {_first_line(error)}"
        if isinstance(each, OfflineModeIsEnabled):
            return (
                "HF_HUB_OFFLINE forbids the network, and the cache does not hold it whole. Unset "
                "it once."
            )
    for each in chain:
        is_of_client = type(each).__module__.startswith(("httpx", "requests"))
        if isinstance(each, ConnectionError | LocalEntryNotFoundError) or is_of_client:
            return (
                f"no connection to {constants.ENDPOINT} ({_first_line(chain[-1])}). Check the "
                "network and run the same command again; what arrived is kept."
            )
    return None


def _explain_response(error: HfHubHTTPError) -> str:
    status, headers = error.response.status_code, error.response.headers
    said = headers.get("X-Error-Message")
    again = "Run the same command again later; what arrived is kept."
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision. Name a branch, a tag or a commit of it."
    if isinstance(error, RepositoryNotFoundError):
        return (
            "there is no such repository, or it is private and HF_TOKEN (or `hf auth login`) may "
            "not see it."
        )
    if status >= 500:
        return f"the Hub has a fault of its own ({status}). {again}"
    wait = f" {headers['Retry-After']} seconds" if "Retry-After" in headers else ""
    sentences = {
        401: f"the Hub does not know the token. {_new_token()}.",
        403: f"the token has no right to do so ({said or 'forbidden'}). {_new_token()}.",
        429: f"the Hub asks to wait{wait} (429, too many requests). {again}",
    }
    return sentences.get(status, f"the Hub refused ({status}: {said or _first_line(error)}).")


def _new_token() -> str:
    return f"Make one with write rights at {constants.ENDPOINT}/settings/tokens"


def _first_line(error):
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
