"""Upload of a publication to the Hugging Face Hub, as one commit.

The token is HF_TOKEN or that of `hf auth login`. No function takes a token, and no file or message contains it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # from its HTTP client
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from rlhf_t2i.hub.publication import CHECKSUMS, list_files

_FILES_OF_THE_HUB = {".gitattributes"}
"""Files that the Hub creates in every repository."""
_ATTEMPTS = 3


def hub_api() -> HfApi:
    """Return a client of the Hub at HF_ENDPOINT, or of huggingface.co."""
    return HfApi(library_name="rlhf-t2i")


def check_repo_id(repo: str) -> None:
    """Raise ValueError unless `repo` is a valid OWNER/NAME."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"repo is {repo!r}; it must be OWNER/NAME. {error}") from error
    if repo.count("/") != 1:
        raise ValueError(f"repo is {repo!r}; it must be OWNER/NAME.")


def upload(
    folder: Path, repo: str, *, private: bool, revision: str | None, api: HfApi, log: Callable[[str], None]
) -> str:
    """Upload a publication as one commit, all of it or nothing; returns the URL of the commit.

    A lost connection is retried up to three times, and the call can be repeated: files that the repository holds
    already are not sent again. Raises PermissionError, FileExistsError, ConnectionError or OSError, which say what the
    Hub refused and what to do.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _check_owner(repo, api)
            info = _prepare(repo, private=private, revision=revision, api=api)
            return _commit(folder, repo, info=info, revision=revision, api=api, log=log)
        except (HTTPError, RuntimeError, ValueError) as error:
            problem = _explain(error, repo, folder)
            if not isinstance(problem, ConnectionError) or attempt == _ATTEMPTS:
                raise problem from None  # the Hub's own error may repeat the request with its token
            log(f"{problem} Trying again ...")
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


def _check_owner(repo: str, api: HfApi) -> None:
    """Raise PermissionError unless there is a token whose user or organisations own `repo`."""
    if get_token() is None:
        raise PermissionError("There is no access token of the Hub: set HF_TOKEN, or run `hf auth login`.")
    user = api.whoami()
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    if repo.partition("/")[0] not in owners:
        raise PermissionError(
            f"{repo} has another owner: the token belongs to {user['name']}, who can publish under "
            f"{' or '.join(owners)}."
        )


def _prepare(repo: str, *, private: bool, revision: str | None, api: HfApi) -> ModelInfo:
    """Create the repository and the branch if necessary; returns their present state.

    Raises FileExistsError if the repository holds anything except an earlier publication, or is public although
    `private` is set.
    """
    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=private)
        info = api.model_info(repo)
    if private and not info.private:
        raise FileExistsError(f"{repo} exists and is public; make it private on the Hub first, or choose another name.")
    if revision is not None:
        try:
            info = api.model_info(repo, revision=revision)
        except RevisionNotFoundError:
            _check_only_publication(repo, info)
            api.create_branch(repo, branch=revision, exist_ok=True)
            info = api.model_info(repo, revision=revision)
    _check_only_publication(repo, info)
    return info


def _check_only_publication(repo: str, info: ModelInfo) -> None:
    foreign = sorted(_file_names(info) - _FILES_OF_THE_HUB)
    if foreign and CHECKSUMS not in foreign:
        raise FileExistsError(
            f"The name {repo} is taken: the repository exists, and its files ({', '.join(foreign[:3])}, ...) are not a "
            f"publication of rlhf-t2i. Choose another name."
        )


def _file_names(info: ModelInfo) -> set[str]:
    return {sibling.rfilename for sibling in info.siblings or []}


def _commit(
    folder: Path, repo: str, *, info: ModelInfo, revision: str | None, api: HfApi, log: Callable[[str], None]
) -> str:
    """Make one commit on top of the state `info`; `HfApi.upload_folder` may split a large folder into several."""
    files = list_files(folder)
    removed = sorted(_file_names(info) - _FILES_OF_THE_HUB - set(files))
    if removed:
        log(f"removed from {repo}, because this publication does not contain it: {', '.join(removed)}")
    commit = api.create_commit(
        repo,
        [CommitOperationAdd(name, folder / name) for name in files] + [CommitOperationDelete(name) for name in removed],
        commit_message="Publish a model fine-tuned with rlhf-t2i",
        revision=revision,
        parent_commit=info.sha,
    )
    return commit.commit_url


def _explain(error: BaseException, repo: str, folder: Path) -> OSError:
    """Return an exception that says what the Hub refused and what to do, without the token."""
    while not isinstance(error, HTTPError) and error.__cause__ is not None:  # uploads wrap the original error
        error = error.__cause__
    refused = error if isinstance(error, HfHubHTTPError) else None
    text = str((refused and refused.server_message) or error).replace(get_token() or "\0", "***")
    text = " ".join(text.split())[:300]
    status = refused.response.status_code if refused else None
    repeat = "An upload is all or nothing; the same command can be repeated."
    if isinstance(error, HTTPError) and (status is None or status >= 500):
        return ConnectionError(f"The connection to the Hub was lost ({status or 'no answer'}: {text}). {repeat}")
    match status:
        case 401:
            return PermissionError(
                f"The Hub does not accept the token (401: {text}). Set HF_TOKEN, or run `hf auth login`."
            )
        case 403:
            return PermissionError(f"The token has no write access to {repo} (403: {text}).")
        case 409 | 412:
            return FileExistsError(f"{repo} was changed by someone else in the meantime ({status}: {text}). {repeat}")
        case 413:
            size, name = max(((folder / name).stat().st_size, name) for name in list_files(folder))
            largest = f"the largest is {name}, {size / 1e6:,.1f} MB"
            return OSError(f"A file is too large for {repo} (413: {text}); {largest}.")
        case _:
            return OSError(f"The Hub refused {repo} ({status or 'in its answer'}: {text}). {repeat}")
