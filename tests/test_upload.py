"""A publication reaches the Hub as one commit or not at all, and no message contains the token."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from recipes import publish as recipe
from rlhf_t2i.hub.publication import list_files
from rlhf_t2i.hub.upload import hub_api
from rlhf_t2i.hub.upload import upload as upload_publication
from tests.hub import TOKEN, Commit, FakeHub, Repository
from tests.publications import BASE, file_contents

pytestmark = [
    pytest.mark.usefixtures("hub"),
    # huggingface_hub passes files to its HTTP client in a deprecated way.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]


def upload(folder: Path, repo: str = "me/tuned", *, private: bool = False, revision: str | None = None) -> str:
    """Upload with the token of the environment; returns the printed lines."""
    lines: list[str] = []
    upload_publication(folder, repo, private=private, revision=revision, api=hub_api(), log=lines.append)
    return "\n".join(lines)


def test_one_commit_holds_all_files_and_nothing_else(hub: FakeHub, publication: Path) -> None:
    printed = upload(publication)
    repo = hub.repos["me/tuned"]
    assert repo.files() == {".gitattributes": b"", **file_contents(publication)}
    assert [commit.summary for commit in repo.branches["main"]] == [
        "initial commit", "Publish a model fine-tuned with rlhf-t2i",
    ]  # fmt: skip
    assert not repo.private
    assert printed == ""


def test_the_recipe_uploads_the_folder_that_it_wrote(
    hub: FakeHub, lora_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The token appears in no file, output or log."""
    caplog.set_level("DEBUG")
    config = recipe.Config(run=str(lora_run), folder=str(tmp_path / "out"), repo="team/tuned", private=True, base=BASE)
    folder = recipe.main(config)
    repo = hub.repos["team/tuned"]
    assert repo.private
    assert repo.files() == {".gitattributes": b"", **file_contents(folder)}
    printed = "".join(capfd.readouterr())
    assert f"published {hub.endpoint}/team/tuned/commit/" in printed
    for text in (printed, caplog.text, *(data.decode(errors="ignore") for data in file_contents(folder).values())):
        assert TOKEN not in text


def test_a_dry_run_writes_the_same_folder_without_an_upload(
    hub: FakeHub, lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe.Config(run=str(lora_run), folder=str(tmp_path / "out"), repo="me/tuned", dry_run=True, base=BASE)
    folder = recipe.main(config)
    assert "one commit to me/tuned; nothing was uploaded" in (printed := capsys.readouterr().out)
    assert all(name in printed for name in list_files(folder))
    assert not hub.count("POST|PUT")
    before = file_contents(folder)
    recipe.main(replace(config, dry_run=False))
    assert hub.repos["me/tuned"].files() == {".gitattributes": b"", **before}


def test_a_second_publication_replaces_the_first_in_one_commit(hub: FakeHub, publication: Path, tmp_path: Path) -> None:
    upload(publication)
    changed = shutil.copytree(publication, tmp_path / "changed")
    (changed / "report.html").unlink()
    (changed / "README.md").write_text("---\nlicense: mit\n---\nOther words.\n")
    assert "removed from me/tuned, because this publication does not contain it: report.html" in upload(changed)
    assert hub.repos["me/tuned"].files() == {".gitattributes": b"", **file_contents(changed)}
    assert len(hub.repos["me/tuned"].branches["main"]) == 3


def test_a_revision_is_a_branch_and_leaves_main_unchanged(hub: FakeHub, publication: Path) -> None:
    upload(publication, revision="v2")
    repo = hub.repos["me/tuned"]
    assert repo.files("v2") == {".gitattributes": b"", **file_contents(publication)}
    assert repo.files("main") == {".gitattributes": b""}


@pytest.mark.parametrize(
    "failing_request", ["GET /api/who", "POST /api/repos", "preupload", "batch", "PUT /lfs/", "commit/"]
)
@pytest.mark.parametrize("after_work", [False, True])
def test_a_lost_connection_is_retried(failing_request: str, after_work: bool, hub: FakeHub, publication: Path) -> None:
    """Also if the Hub did the work and only its answer was lost: nothing is committed twice."""
    hub.fail(failing_request, after_work=after_work)
    upload(publication)
    repo = hub.repos["me/tuned"]
    assert repo.files() == {".gitattributes": b"", **file_contents(publication)}
    assert len(repo.branches["main"]) == 2


@pytest.mark.parametrize("failing_request", ["PUT /lfs/", "POST .*/commit/"])
def test_a_failed_upload_changes_nothing_and_can_be_repeated(
    failing_request: str, hub: FakeHub, publication: Path
) -> None:
    hub.fail(failing_request, status=503, message="come back later", times=100)
    with pytest.raises(ConnectionError, match=r"503.*all or nothing; the same command can be repeated"):
        upload(publication)
    assert hub.repos["me/tuned"].files() == {".gitattributes": b""}
    hub.failures.clear()
    upload(publication)
    assert hub.repos["me/tuned"].files() == {".gitattributes": b"", **file_contents(publication)}
    (weights,) = (
        hashlib.sha256(data).hexdigest() for name, data in file_contents(publication).items() if "lora_w" in name
    )
    assert hub.count(f"PUT /lfs/{weights}") >= 1


def test_large_files_on_the_hub_are_not_sent_again(hub: FakeHub, publication: Path) -> None:
    hub.fail("POST .*/commit/", times=1)
    upload(publication)
    assert hub.count("PUT /lfs/") == len(hub.objects) == 3


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (
            ("POST .*/commit/", 403, "You need the write role"),
            PermissionError,
            "no write access to me/tuned.*write role",
        ),
        (("POST /api/repos/create", 403, "No rights"), PermissionError, "no write access to me/tuned.*No rights"),
        (
            ("PUT /lfs/", 413, "Too big"),
            OSError,
            r"too large.*Too big.*largest is report.html, 0\.\d MB",
        ),
        (("POST .*/commit/", 413, "Too big"), OSError, "too large for me/tuned"),
        (("POST .*/commit/", 412, "A commit has happened since"), FileExistsError, "changed by someone else"),
        (("POST /api/repos/create", 409, "You already created this"), FileExistsError, "409: You already created this"),
        (("GET /api/whoami", 401, f"unknown {TOKEN}"), PermissionError, r"does not accept the token.*HF_TOKEN"),
        (("POST .*/commit/", 400, f"bad {TOKEN}"), OSError, r"refused me/tuned \(400: bad \*\*\*\)"),
    ],
)
def test_a_refusal_is_explained_without_the_token(
    failure: tuple[str, int, str], error: type[Exception], message: str, hub: FakeHub, publication: Path
) -> None:
    pattern, status, text = failure
    hub.fail(pattern, status=status, message=text, times=100)
    with pytest.raises(error, match=message) as refusal:
        upload(publication)
    assert TOKEN not in str(refusal.value)
    assert all(repo.files() == {".gitattributes": b""} for repo in hub.repos.values())


def test_a_concurrent_commit_is_not_overwritten(hub: FakeHub, publication: Path) -> None:
    theirs = Commit({".gitattributes": b"", "theirs.txt": b"hello"})
    hub.fail("POST .*/commit/", meanwhile=lambda: hub.repos["me/tuned"].branches["main"].append(theirs))
    with pytest.raises(FileExistsError, match="changed by someone else in the meantime"):
        upload(publication)
    assert hub.repos["me/tuned"].files() == theirs.files


@pytest.mark.parametrize("repo", ["somebody/tuned", "me/other"])
def test_a_foreign_repository_is_left_unchanged(repo: str, hub: FakeHub, publication: Path) -> None:
    """A repository of another user, or an own one with other files."""
    hub.repos[repo] = Repository()
    hub.repos[repo].files()["model.bin"] = b"theirs"
    message = "has another owner: the token belongs to me, who can publish under me or team" if repo[0] == "s" else (
        "The name me/other is taken: the repository exists, and its files .model.bin"
    )  # fmt: skip
    for revision in (None, "v2"):
        with pytest.raises(OSError, match=message):
            upload(publication, repo, revision=revision)
    assert hub.repos[repo].files() == {".gitattributes": b"", "model.bin": b"theirs"}
    assert not hub.count("POST|PUT")


def test_private_is_refused_for_a_public_repository(hub: FakeHub, publication: Path) -> None:
    hub.repos["me/tuned"] = Repository(private=False)
    with pytest.raises(FileExistsError, match="me/tuned exists and is public"):
        upload(publication, private=True)
    assert not hub.count("POST|PUT")


def test_without_a_token_no_request_about_the_repository_is_made(
    hub: FakeHub, publication: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match="no access token of the Hub: set HF_TOKEN, or run `hf auth login`"):
        upload(publication)
    assert not hub.count("me/tuned")


def test_the_token_of_a_login_is_used(
    hub: FakeHub, publication: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "login").write_text(TOKEN)
    upload(publication)
    assert "README.md" in hub.repos["me/tuned"].files()


def test_no_option_takes_a_token() -> None:
    assert not [name for name in recipe.Config.__dataclass_fields__ if "token" in name]
