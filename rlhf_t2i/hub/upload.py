"""From a finished run to a model card and a Hub repository. The only huggingface_hub import.

The token is that of the environment (HF_TOKEN) or of `hf auth login`; nothing here takes one, and none is written.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    ModelInfo,
    get_token,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of whichever client it uses
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from rlhf_t2i.hub.bundle import CHECKSUMS, Base, files_of
from rlhf_t2i.hub.model_card import card_text
from rlhf_t2i.report import Chart
from rlhf_t2i.training.finished_run import FinishedRun

_NO_DERIVATIVES = {
    "cc-by-nd-4.0": "Creative Commons Attribution-NoDerivatives 4.0 International",
    "cc-by-nc-nd-4.0": "Creative Commons Attribution-NonCommercial-NoDerivatives 4.0 International",
    "cc-by-nc-nd-3.0": "Creative Commons Attribution-NonCommercial-NoDerivatives 3.0 Unported",
}
_HUBS_OWN = {".gitattributes"}
"""What the Hub puts into every repository."""
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Licence:
    """Under what a base may be used, in the Hub's words; None where nobody said."""

    id: str | None = None
    name: str | None = None
    link: str | None = None

    @property
    def warnings(self) -> list[str]:
        """What speaks against publishing a derivative."""
        if self.id is None:
            return ["The licence of the base is not known, so nobody knows what they may do with this."]
        label = self.name if self.id == "other" and self.name else self.id
        if "nd" in label.lower().split("-"):
            text = _NO_DERIVATIVES.get(label.lower(), label)
            return [f"The licence of the base, {text} ({label}), forbids the publication of derivatives such as this."]
        return []


def licence_of(base: Base, *, named: str | None, api: HfApi) -> Licence:
    """The licence of a base: as named, or as the card of its repository or in its folder says."""
    data: Any = {"license": named} if named is not None else None
    if named is None and base.hub_id is not None:
        with contextlib.suppress(HTTPError, OSError):  # not there, no network, or not for us: then it is not known
            data = api.model_info(base.hub_id).card_data
    elif named is None and (Path(base.source) / "README.md").is_file():
        data = ModelCard.load(Path(base.source) / "README.md", ignore_metadata_errors=True).data
    return Licence(*(data.get(key) for key in ("license", "license_name", "license_link"))) if data else Licence()


# --- the card ---


def write_card(
    run: FinishedRun,
    base: Base,
    licence: Licence,
    folder: Path,
    *,
    repo: str | None,
    revision: str | None,
    whole_pipeline: bool,
    curves: Sequence[tuple[str, Chart]],
    datasets: Sequence[str],
) -> None:
    """Write the model card, README.md: what the Hub reads of it, and what people do."""
    name, judge, lora = repo or folder.name, run.kind == "reward_model", run.kind == "lora" and not whole_pipeline
    kind = ["reward-model", "llava-reward"] if base.family is None else [base.family.tag, "reinforcement-learning"]
    results = reward_model_results(run) if judge else policy_results(run)
    data = ModelCardData(
        license=licence.id,
        license_name=licence.name,
        license_link=licence.link,
        library_name="rlhf-t2i" if judge else "diffusers",
        pipeline_tag="image-text-to-text" if judge else "text-to-image",
        base_model=base.hub_id,
        tags=["rlhf-t2i", run.facts["recipe"], *kind, *(["lora"] if lora else [])],
        datasets=list(datasets) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=name.rpartition("/")[2],
        eval_results=results,
    )
    if base.hub_id is not None:
        data["base_model_relation"] = "adapter" if judge or lora else "finetune"
    body = card_text(
        run, base,
        name=name, revision=revision, whole_pipeline=whole_pipeline, curves=curves, warnings=licence.warnings,
    )  # fmt: skip
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(folder / "README.md")


def policy_results(run: FinishedRun) -> list[EvalResult]:
    """The rewards of the last evaluation, in the Hub's form."""
    asked, last = run.config["evaluation_prompts"], run.evaluations[-1]
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="prompts",
            dataset_name="held-out prompts of the built-in world" if asked == "shapes" else Path(asked).name,
            metric_type=name,
            metric_name=f"{name} ({'trained on' if name in run.trained_on else 'held out'})",
            metric_value=last[name],
            metric_args={"standard_error": last[key], "num_images": last["num_images"]},
        )
        for key in last
        if (name := key.removesuffix("/standard_error")) != key and math.isfinite(last[name])
    ]


def reward_model_results(run: FinishedRun) -> list[EvalResult]:
    """What a judge reached on each of its data sets, in the Hub's form."""
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type="preferences",
            dataset_name=name,
            dataset_config=name,
            metric_type=metric["name"],
            metric_value=metric["value"],
            metric_args={key: metric[key] for key in ("low", "high", "count") if metric[key] is not None},
        )
        for name, metrics in run.measured.items()
        for metric in metrics
        if math.isfinite(metric["value"])
    ]


def refuse_tokens(folder: Path) -> None:
    """ValueError, naming the file, if a text that would be published holds a token of the Hub."""
    own = get_token()
    for name in files_of(folder):
        if not name.endswith((".safetensors", ".png")):
            text = (folder / name).read_text(encoding="utf-8", errors="ignore")
            if (own and own in text) or re.search(r"\bhf_[A-Za-z0-9]{30,}", text):
                raise ValueError(
                    f"{name} holds a token of the Hub, from the run's command or config. Take it out there."
                )


# --- the Hub ---


def hub() -> HfApi:
    """The Hub that HF_ENDPOINT names, or huggingface.co."""
    return HfApi(library_name="rlhf-t2i")


def check_repo(repo: str) -> None:
    """ValueError unless it is OWNER/NAME, as the Hub allows them."""
    validate_repo_id(repo)
    if repo.count("/") != 1:
        raise ValueError(f"repo is {repo!r}; it must be OWNER/NAME.")


def upload(
    folder: Path, repo: str, *, private: bool, revision: str | None, api: HfApi, say: Callable[[str], None]
) -> str:
    """Publish a folder as one commit, whole or not at all; returns the address of the commit.

    A broken connection is tried again, and the whole can be: what the repository holds already is not sent twice.
    Raises PermissionError, FileExistsError, ConnectionError or OSError, saying what the Hub refused and what to do.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _check_owner(repo, api)
            there = _prepare(repo, private=private, revision=revision, api=api)
            return _commit(folder, repo, there=there, revision=revision, api=api, say=say)
        except (HTTPError, RuntimeError, ValueError) as error:
            problem = _problem(error, repo, folder)
            if not isinstance(problem, ConnectionError) or attempt == _ATTEMPTS:
                raise problem from None  # the Hub's own error may repeat what was sent
            say(f"{problem} Trying again ...")
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


def _check_owner(repo: str, api: HfApi) -> None:
    """PermissionError unless there is a token, of somebody whose the repository is or would be."""
    if get_token() is None:
        raise PermissionError("There is no token of the Hub: set HF_TOKEN, or run `hf auth login`.")
    me = api.whoami()
    owners = [me["name"], *(one["name"] for one in me.get("orgs", []))]
    if repo.partition("/")[0] not in owners:
        raise PermissionError(
            f"{repo} is not yours: the token is of {me['name']}, who can publish under {' or '.join(owners)}."
        )


def _prepare(repo: str, *, private: bool, revision: str | None, api: HfApi) -> ModelInfo:
    """Have a repository and a branch to commit to; returns what is there.

    FileExistsError for a repository whose files are not an earlier publication, or that is public although it must not.
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
            _refuse_foreign(repo, info)
            api.create_branch(repo, branch=revision, exist_ok=True)
            info = api.model_info(repo, revision=revision)
    _refuse_foreign(repo, info)
    return info


def _refuse_foreign(repo: str, info: ModelInfo) -> None:
    foreign = sorted(_names(info) - _HUBS_OWN)
    if foreign and CHECKSUMS not in foreign:
        raise FileExistsError(
            f"The name {repo} is taken: the repository exists, and its files ({', '.join(foreign[:3])}, ...) are no "
            f"publication of rlhf-t2i. Choose another name."
        )


def _names(info: ModelInfo) -> set[str]:
    return {sibling.rfilename for sibling in info.siblings or []}


def _commit(
    folder: Path, repo: str, *, there: ModelInfo, revision: str | None, api: HfApi, say: Callable[[str], None]
) -> str:
    """One commit, on top of what is there or not at all. Not upload_folder, which may split a large folder."""
    files = files_of(folder)
    gone = sorted(_names(there) - _HUBS_OWN - set(files))
    if gone:
        say(f"removed from {repo}, because this publication does not have it: {', '.join(gone)}")
    commit = api.create_commit(
        repo,
        [CommitOperationAdd(name, folder / name) for name in files] + [CommitOperationDelete(name) for name in gone],
        commit_message="Publish a model tuned with rlhf-t2i",
        revision=revision,
        parent_commit=there.sha,
    )
    return commit.commit_url


def _problem(error: BaseException, repo: str, folder: Path) -> OSError:
    """What the Hub did, and what to do about it, without the token."""
    while not isinstance(error, HTTPError) and error.__cause__ is not None:  # uploads wrap what went wrong
        error = error.__cause__
    refused = error if isinstance(error, HfHubHTTPError) else None
    said = str((refused and refused.server_message) or error).replace(get_token() or "\0", "***")
    said = " ".join(said.split())[:300]
    status = refused.response.status_code if refused else None
    again = "It is published whole or not at all; the same command can be repeated."
    if isinstance(error, HTTPError) and (status is None or status >= 500):
        return ConnectionError(f"The connection to the Hub broke ({status or 'no answer'}: {said}). {again}")
    match status:
        case 401:
            return PermissionError(f"The Hub does not know the token (401: {said}). Set HF_TOKEN, or `hf auth login`.")
        case 403:
            return PermissionError(
                f"The token may not write to {repo} (403: {said}). It needs the right to write there."
            )
        case 409 | 412:
            return FileExistsError(f"{repo} was changed by somebody else in the meantime ({status}: {said}). {again}")
        case 413:
            size, name = max(((folder / name).stat().st_size, name) for name in files_of(folder))
            largest = f"the largest is {name}, {size / 1e6:,.1f} MB"
            return OSError(f"A file is too large for {repo} (413: {said}); {largest}.")
        case _:
            return OSError(f"The Hub refused {repo} ({status or 'in its answer'}: {said}). {again}")
