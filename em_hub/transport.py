"""The road to the Hub and back: folders uploaded in one commit, repositories fetched, both verified; failures in one sentence."""

import contextlib
import errno
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
    """What came of an upload: the repository's id and page, and the commit that holds it."""

    repo_id: str
    url: str
    commit: str


def split_hub_id(name: str) -> tuple[str, str | None]:
    """Split "owner/name@revision" into its id and its revision (branch, tag or commit; None where it names none)."""
    match = HUB_ID.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is not a Hub id: owner/name, or owner/name@revision")
    return match["repo"], match["revision"]


def check_dry_run_folder(folder) -> Path:
    """Return the folder that --dry-run names as a path; `ValueError` where it holds something, which would pass for ours."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give a new folder with --dry-run")
    return folder


def find_account(repo_id: str, token: str | None = None) -> str:
    """Return the whole id of a repository, owner included, after asking the Hub whether the token may write there.

    repo_id: owner/name, or the name alone for one's own. token: left out, that of HF_TOKEN or of the login. Raises
    `ValueError` without a token, with a wrong one, or with one that may only read.
    """
    token = token or get_token()
    if not token:
        raise ValueError(
            f"no token for {constants.ENDPOINT}: make one with write rights at {constants.ENDPOINT}/settings/tokens, then run "
            "`hf auth login` or set HF_TOKEN"
        )
    with explain_hub_errors(repo_id, "asking who the token belongs to"):
        account = HfApi(token=token).whoami()
    name = account["name"]
    if "/" not in repo_id:
        repo_id = f"{name}/{repo_id}"
    role = (account.get("auth") or {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ValueError(
            f"the token of {name} may only read; make one with write rights at {constants.ENDPOINT}/settings/tokens"
        )
    owner, known = (
        repo_id.split("/")[0],
        {name, *(org["name"] for org in account.get("orgs") or ())},
    )
    if owner not in known:
        raise ValueError(
            f"{repo_id} belongs to {owner}, the token to {name}; it may write to {', '.join(sorted(known))}"
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
    """Upload all files of `folder` in one commit and check what the Hub then holds, size and checksum of each file.

    kind: "model", "dataset" or "space" (of Gradio's). private: of a repository that is made now. revision: a branch, made if it
    is not there.
    check: called with what lies where the upload goes, and the branch that holds it (a new branch starts from main), to refuse it
    by a `ValueError`. is_replaced: paths there that go when `folder` has them no longer.
    Large files are uploaded first, each under its checksum: one that arrived is not sent again by the next call, and until all
    have arrived the repository stays as it was. Raises `ValueError` in one sentence.
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
        if held != (revision or MAIN):
            api.create_branch(repo_id, branch=revision, repo_type=kind, exist_ok=True)
        folder = Path(folder)
        files = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        gone = [path for path in sorted(paths - set(files)) if is_replaced(path)]
        operations += [CommitOperationDelete(path) for path in gone]
        commit = api.create_commit(
            repo_id, operations, commit_message=message, repo_type=kind, revision=revision
        ).oid
        _verify_upload(api, repo_id, kind, commit, files)
    prefix = "" if kind == "model" else f"{kind}s/"
    return Upload(repo_id, f"{constants.ENDPOINT}/{prefix}{repo_id}", commit)


def _list_existing(api, repo_id, kind, private, revision):
    """Return (paths, branch): what lies on the branch that an upload goes to, or else on main, from which it will start."""
    try:
        info = api.repo_info(repo_id, repo_type=kind)
    except RepositoryNotFoundError:
        return set(), MAIN
    if private and not info.private:
        raise ValueError(
            f"{repo_id} is public already; make it private in its settings, or choose another name"
        )
    branch = MAIN
    if revision not in (None, MAIN):
        with contextlib.suppress(RevisionNotFoundError):
            info, branch = api.repo_info(repo_id, repo_type=kind, revision=revision), revision
    return {sibling.rfilename for sibling in info.siblings or ()}, branch


def _verify_upload(api, repo_id, kind, commit, files):
    there = {}
    for each in api.list_repo_tree(repo_id, recursive=True, revision=commit, repo_type=kind):
        if hasattr(each, "blob_id"):
            there[each.path] = each.lfs.sha256 if each.lfs else each.blob_id
    wrong = [name for name, path in files.items() if there.get(name) not in hash_as_hub(path)]
    if wrong:
        raise ValueError(
            f"{repo_id} does not hold what was sent ({', '.join(wrong)}); run the same command again, which sends those files again"
        )


def hash_as_hub(path) -> tuple[str, str]:
    """The two names that the Hub may give a file's content: SHA-256 of a large one, git's SHA-1 of a small one."""
    path = Path(path)
    size, sha256, sha1 = (
        path.stat().st_size,
        hashlib.sha256(),
        hashlib.sha1(b"blob %d\0" % path.stat().st_size),
    )
    with path.open("rb") as file:
        while piece := file.read(2**20):
            sha256.update(piece)
            sha1.update(piece)
            size -= len(piece)
    return sha256.hexdigest(), sha1.hexdigest()


def fetch_repository(
    name: str, patterns: list[str], *, ignore=(), kind: str = "model", token: str | None = None
) -> Path:
    """Return the local folder with the files of a Hub repository that match `patterns`, downloaded where they are not there yet.

    name: owner/name, or owner/name@revision. What was downloaded once is found without a network. Every file is compared
    with its checksum; a damaged one is removed from the cache. Raises `ValueError` in one sentence.
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
    damaged = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_sound(path)]
    for path in damaged:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    if damaged:
        raise ValueError(
            f"{', '.join(path.relative_to(folder).as_posix() for path in damaged)} of {name} came with another checksum than the Hub "
            "names; removed from the cache: run the same command again, and if it fails again do not use this repository"
        )
    return folder


def list_files(
    name: str, suffix: str, *, kind: str = "model", token: str | None = None
) -> tuple[str, str, dict]:
    """Return (id, commit, {path: checksum}) of the files of a Hub repository that end in `suffix`, in the order of their folders.

    name: owner/name, or owner/name@revision. A checksum is SHA-256 of a large file, git's SHA-1 of a small one. Raises
    `ValueError` in one sentence.
    """
    repo_id, revision = split_hub_id(name)
    with explain_hub_errors(name, "asking for its files"):
        info = HfApi(token=token).repo_info(
            repo_id, repo_type=kind, revision=revision, files_metadata=True
        )
    files = {
        each.rfilename: each.lfs.sha256 if each.lfs else each.blob_id
        for each in info.siblings or ()
        if each.rfilename.endswith(suffix)
    }
    return repo_id, info.sha, dict(sorted(files.items(), key=lambda item: item[0].split("/")))


def _is_sound(path):
    """Whether a file of the cache has the checksum that it is stored under; True for one that is stored under none."""
    checksum = path.resolve().name
    if not path.is_symlink() or not re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", checksum):
        return True
    return checksum in hash_as_hub(path)


@contextlib.contextmanager
def explain_hub_errors(name: str, doing: str):
    """Turn what goes wrong on the way to the Hub inside the block into a `ValueError` of one sentence with the way out."""
    try:
        yield
    except Exception as error:
        sentence = _explain(error, name, doing)
        if sentence is None:
            raise
        raise ValueError(sentence) from error


def _explain(error, name, doing):
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 10:
        chain.append(cause)
    for each in chain:
        if isinstance(each, OSError) and each.errno in DISK_ERRORS:
            return (
                f"{doing} {name}: {DISK_ERRORS[each.errno]} ({each.filename or constants.HF_HUB_CACHE}); make room or set HF_HOME to "
                "another disk, then run the same command again"
            )
    for each in chain:
        response = getattr(each, "response", None)
        if isinstance(each, HfHubHTTPError) and response is not None:
            return _explain_status(each, response, name, doing)
    if any(isinstance(each, HFValidationError) for each in chain):
        return f"{name} is no name for a repository: {_first_line(error)}"
    if any(isinstance(each, OfflineModeIsEnabled) for each in chain):
        return f"{doing} {name}: HF_HUB_OFFLINE forbids the network, and the cache does not hold it whole; unset it once"
    is_network = any(
        type(each).__module__.split(".")[0].startswith(("httpx", "requests")) for each in chain
    )
    if is_network or any(
        isinstance(each, ConnectionError | LocalEntryNotFoundError) for each in chain
    ):
        return (
            f"{doing} {name}: no connection to {constants.ENDPOINT} ({_first_line(chain[-1])}); check the network and run the same "
            "command again: what arrived is kept"
        )
    return None


def _explain_status(error, response, name, doing):
    status, said = response.status_code, response.headers.get("X-Error-Message") or ""
    again = "run the same command again later: what arrived is kept"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no such revision; name a branch, a tag or a commit of it"
    if isinstance(error, RepositoryNotFoundError):
        return f"{doing} {name}: there is no such repository, or it is private and HF_TOKEN (or `hf auth login`) may not see it"
    if status == 401:
        return f"{doing} {name}: the Hub does not know the token; make a new one at {constants.ENDPOINT}/settings/tokens"
    if status == 403:
        return f"{doing} {name}: the token has no right to do so ({said or 'forbidden'}); use one with write rights"
    if status == 429:
        wait = response.headers.get("Retry-After")
        return f"{doing} {name}: the Hub asks to wait{f' {wait} seconds' if wait else ''} (429, too many requests); {again}"
    if status >= 500:
        return f"{doing} {name}: the Hub has a fault of its own ({status}); {again}"
    return f"{doing} {name}: the Hub refused ({status}: {said or _first_line(error)})"


def _first_line(error):
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
