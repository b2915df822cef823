"""No answer is lost or doubled, no page reveals the source of an image, and pairs.jsonl holds the current answers."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from filelock import FileLock
from PIL import Image, PngImagePlugin
from torch import Tensor

from recipes import collect_preferences as recipe
from recipes.collect_preferences import Config, candidates, from_files, sampled
from reward_model.datasets import BadRecordError, load_records, load_same_prompt_pairs
from reward_model.types import PreferencePair
from rlhf_t2i.access import TOKEN_VARIABLE
from rlhf_t2i.annotation import answers as answers_module
from rlhf_t2i.annotation.agreement import (
    between_annotators,
    cohens_kappa,
    kappa_estimate,
    majority,
    pairwise_win_rates,
    wilson,
    with_reward,
)
from rlhf_t2i.annotation.answers import Answers, StaleError
from rlhf_t2i.annotation.questions import (
    Candidate,
    Question,
    from_runs,
    image_path,
    read_image,
    read_questions,
    score_questions,
    write_questions,
)
from rlhf_t2i.annotation.records import Answer, annotator_name
from rlhf_t2i.annotation.serve import Service, create_app
from rlhf_t2i.config import parse_config
from rlhf_t2i.data.saved_pairs import save_pairs
from rlhf_t2i.rewards.load import CheckedReward, WeightedSum
from rlhf_t2i.seeds import generator_for
from rlhf_t2i.training.claim import remove_failed_starts
from tests import browser, processes
from tests.report_files import CELLS, run_with_images
from tests.servers import free_port, running
from tests.trained_weights import denoiser_of

ROOT = Path(__file__).parent.parent
TOKEN = "open-sesame-0123456789"
GENERATOR = generator_for(0)


def colour(number: int) -> Tensor:
    """An image of one colour, another for each number."""
    return torch.tensor([number % 251, number // 251, 100])[:, None, None].expand(3, 8, 8) / 255


def write_pairs(folder: Path, count: int = 6) -> list[Question]:
    """Questions about images of one colour each: question i has colours 2i and 2i + 1."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [(colour(2 * i), colour(2 * i + 1)) for i in range(count)]
    return write_questions(
        folder, [Candidate(f"a fox {i}", pair, ("before", "after")) for i, pair in enumerate(images)]
    )


def preference_file(folder: Path, count: int) -> Path:
    """The same pairs as a file that diffusion_dpo.py reads, with the even colour preferred."""
    folder.mkdir(parents=True)
    lines: list[str] = []
    for i in range(count):
        for number in (2 * i, 2 * i + 1):
            pixels = (colour(number) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            remark = PngImagePlugin.PngInfo()
            remark.add_text("parameters", "sampled by the secret model")
            Image.fromarray(pixels).save(folder / f"secret_{number}.png", pnginfo=remark)
        row = {"prompt": f"a fox {i}", "winner": f"secret_{2 * i}.png", "loser": f"secret_{2 * i + 1}.png"}
        lines.append(json.dumps(row) + "\n")
    (folder / "preferences.jsonl").write_text("".join(lines))
    return folder / "preferences.jsonl"


def press(answers: Answers, annotator: str, *keys: Any) -> None:
    for key in keys:
        answers.record(annotator, shown=answers.open_pair(annotator).token, key=key)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def collecting(folder: Path, questions: Sequence[Question], *, seed: int = 0) -> Iterator[Answers]:
    answers = Answers(folder, questions, seed=seed)
    try:
        yield answers
    finally:
        answers.close()


# --- the page and its annotators ------------------------------------------------------------------


@contextmanager
def serving(answers: Answers, *, port: int = 0, **options: Any) -> Iterator[str]:
    """The page in a thread of this process; yields its address."""
    with running(create_app(Service(answers, **{"secret": None, **options})), port=port) as address:
        yield address


@dataclass
class Person:
    """An annotator with a browser; `pressed` has their keys by the pair that was shown."""

    name: str
    client: httpx.Client
    pair: dict[str, Any] = field(default_factory=dict)
    pressed: dict[tuple[str, str, str], str] = field(default_factory=dict)

    def post(self, path: str, **body: Any) -> httpx.Response:
        """Send a request until there is a response, as the page does."""
        deadline = time.monotonic() + 120
        while True:
            try:
                return self.client.post(path, json={"annotator": self.name, **body})
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def enter(self) -> None:
        self.pair = self.post("/enter").json()

    def press(self, key: str) -> None:
        pair = self.pair["prompt"], self.pair.get("left", ""), self.pair.get("right", "")
        reply = self.post("/answer", shown=self.pair["shown"], answer=key)
        assert reply.status_code == 200, reply.text
        self.pressed[pair] = key
        self.pair = reply.json()

    @property
    def preferences(self) -> dict[str, Any]:
        """The images by prompt: the better one first, a set if equally good, nothing if both bad."""
        means = {"left": lambda a, b: [a, b], "right": lambda a, b: [b, a], "tie": lambda a, b: {a, b}}
        return {prompt: means[key](a, b) for (prompt, a, b), key in self.pressed.items() if key in means}


def preferences_in(pairs: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The same, from an annotator's records in pairs.jsonl."""
    own = [row for row in pairs if row["comment"] == name]
    return {
        row["prompt"]: {Path(file).stem for file in row["tie"]}
        if "tie" in row
        else [Path(row["winner"]).stem, Path(row["loser"]).stem]
        for row in own
    }


@contextmanager
def person(name: str, address: str) -> Iterator[Person]:
    with httpx.Client(base_url=address, trust_env=False, timeout=30) as client:
        yield Person(name, client)


@contextmanager
def process(*arguments: object) -> Iterator[Any]:
    """The recipe as a command."""
    command = [sys.executable, str(ROOT / "recipes/collect_preferences.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = processes.start(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield server
    finally:
        if server.poll() is None:
            server.kill()
        server.communicate()


@pytest.mark.slow
def test_two_hundred_answers_of_four_annotators_survive_kill_9(tmp_path: Path) -> None:
    """None is lost, none is doubled, and each is the key that was pressed."""
    port, run = free_port(), tmp_path / "run"
    source = preference_file(tmp_path / "images", 50)
    arguments = ["--pairs", source, "--run_folder", run, "--port", port]
    log, killed = run / "answers.jsonl", threading.Event()

    def answer_all(name: str) -> Person:
        with person(name, f"http://127.0.0.1:{port}") as someone:
            someone.enter()
            for number in range(50):
                if number == 25:  # so that the kill comes in the middle on any machine
                    assert killed.wait(120)
                someone.press(("left", "right", "tie", "right", "bad")[(number + len(name)) % 5])
                time.sleep(0.01)
            assert someone.pair["prompt"] is None
            return someone

    with ThreadPoolExecutor(4) as pool:
        with process(*arguments) as first:
            people = [pool.submit(answer_all, "x" * length) for length in (1, 2, 3, 4)]
            while not log.is_file() or log.read_bytes().count(b"\n") < 70:
                assert first.poll() is None
                time.sleep(0.01)
            first.send_signal(signal.SIGKILL)
            first.wait()
            killed.set()
        assert log.read_bytes().count(b"\n") <= 100
        with log.open("ab") as file:  # as after a power failure during a write
            file.write(b'{"annotator": "x", "ques')
        with process(*arguments, "--resume") as second:
            done = [future.result() for future in people]
            second.send_signal(signal.SIGTERM)
            output, _ = second.communicate(timeout=30)
    assert "left by a crash: b'{" in output

    rows = lines_of(log)
    assert len(rows) == 200
    assert len({(row["annotator"], row["question"]) for row in rows}) == 200
    pairs = lines_of(run / "pairs.jsonl")
    assert len(pairs) == 160  # a fifth is "both bad"
    for someone in done:
        assert preferences_in(pairs, someone.name) == someone.preferences
    records = load_records(run / "pairs.jsonl")
    assert sum(record.tie for record in records if isinstance(record, PreferencePair)) == 40
    assert len(load_same_prompt_pairs([run / "pairs.jsonl"], image_root=None, skipped=None)) == 120


def test_a_double_click_counts_once_and_a_stale_tab_changes_nothing(tmp_path: Path) -> None:
    with collecting(tmp_path, write_pairs(tmp_path)) as answers, serving(answers) as address:
        with person("Ann", address) as ann, person("ann ", address) as other_tab:
            ann.enter()
            other_tab.enter()
            assert other_tab.pair == ann.pair  # names are compared without case and blanks
            shown = ann.pair["shown"]
            replies = [ann.post("/answer", shown=shown, answer="left").json() for _ in range(2)]
            assert replies[0] == replies[1]
            assert replies[0]["answered"] == 1

            stale = other_tab.post("/answer", shown=shown, answer="right")
            assert stale.status_code == 409
            assert "no longer open" in stale.json()["error"]
            assert stale.json()["state"] == replies[0]

            ann.enter()  # a reload
            assert ann.pair == replies[0]
            undone = [ann.post("/answer", shown=ann.pair["shown"], answer="undo").json() for _ in range(2)]
            assert undone[0] == undone[1]
            assert (undone[0]["answered"], undone[0]["prompt"]) == (0, other_tab.pair["prompt"])
            assert undone[0]["left"] == other_tab.pair["left"]
            nothing = ann.post("/answer", shown=undone[0]["shown"], answer="undo")
            assert (nothing.status_code, nothing.json()) == (422, {"error": "There is nothing to undo."})
            unknown = ann.post("/answer", shown=undone[0]["shown"], answer="best")
            assert unknown.status_code == 422
            assert (
                "answer: Input should be 'left', 'right', 'tie', 'bad', 'unsure', 'skip' or 'undo'"
                in unknown.json()["error"]
            )
        assert [row["key"] for row in lines_of(tmp_path / "answers.jsonl")] == ["left", "undo"]
        assert answers.current() == {"ann": []}


@pytest.mark.parametrize("name", ["", "  ", "x" * 41, "a\x00b"])
def test_an_invalid_name_is_refused(name: str, tmp_path: Path) -> None:
    with (
        collecting(tmp_path, write_pairs(tmp_path)) as answers,
        serving(answers) as address,
        person(name, address) as annotator,
    ):
        reply = annotator.post("/enter")
        assert (reply.status_code, reply.json()) == (422, {"error": "Please enter a name of 1 to 40 characters."})
    assert annotator_name("  ANN\tB ") == "ann b"


# --- the current answers --------------------------------------------------------------------------


def test_undo_and_another_answer_leave_one_preference(tmp_path: Path) -> None:
    questions = write_pairs(tmp_path, 3)
    with collecting(tmp_path, questions) as answers:
        press(answers, "ann", "left", "undo", "right", "tie", "undo", "bad", "undo", "undo", "left")
        (row,) = lines_of(tmp_path / "pairs.jsonl")
        (answer,) = answers.current()["ann"]
    question = questions[answer.question]
    left, right = question.images if answer.first_on_left else reversed(question.images)
    assert (row["winner"], row["loser"]) == (f"images/{left}.png", f"images/{right}.png")
    assert (row["prompt"], row["comment"]) == (question.prompt, "ann")


def test_a_tie_is_a_tie_and_both_bad_is_no_preference(tmp_path: Path) -> None:
    with collecting(tmp_path, write_pairs(tmp_path, 3)) as answers:
        press(answers, "ann", "tie", "bad", "left")
        with pytest.raises(ValueError, match="All pairs are answered"):
            press(answers, "ann", "left")
    records = load_records(tmp_path / "pairs.jsonl")
    assert [record.tie for record in records if isinstance(record, PreferencePair)] == [True, False]
    assert len(load_same_prompt_pairs([tmp_path / "pairs.jsonl"], image_root=None, skipped=None)) == 1


def test_order_and_sides_are_random_per_annotator_and_reproducible(tmp_path: Path) -> None:
    questions = write_pairs(tmp_path, 100)

    def order(name: str, *, seed: int) -> tuple[list[int], list[bool]]:
        with collecting(tmp_path, questions, seed=seed) as answers:
            while answers.open_pair(name).question is not None:
                press(answers, name, "left")
            current = answers.current()[name]
        (tmp_path / "answers.jsonl").unlink()
        return [one.question for one in current], [one.first_on_left for one in current]

    ann = order("ann", seed=0)
    assert order("ann", seed=0) == ann
    for others in (order("bob", seed=0), order("ann", seed=1)):
        assert sorted(others[0]) == list(range(100))
        assert others[0] != ann[0]
        assert 30 < sum(others[1]) < 70  # outside with probability 1/16,000 for a fair coin
        of_ann = dict(zip(*ann, strict=True))
        assert 30 < sum(of_ann[q] == side for q, side in zip(*others, strict=True)) < 70


def test_answers_survive_a_restart_and_a_truncated_last_line(tmp_path: Path) -> None:
    questions = write_pairs(tmp_path)
    with collecting(tmp_path, questions) as answers:
        press(answers, "ann", "left", "right")
        before, pairs = answers.open_pair("ann"), (tmp_path / "pairs.jsonl").read_bytes()
        shown = before.token
    with (tmp_path / "answers.jsonl").open("ab") as file:
        file.write(
            b'{"annotator": "ann", "question": 3, "key": "left"}'
        )  # complete but for its newline, and never confirmed
    (tmp_path / "pairs.jsonl").unlink()
    with collecting(tmp_path, questions) as answers:
        assert answers.truncated_line.startswith(b'{"annotator"')
        assert answers.open_pair("ann") == before
        assert (tmp_path / "pairs.jsonl").read_bytes() == pairs
        answers.record("ann", shown=shown, key="left")
        answers.record("ann", shown=shown, key="left")  # as if the response to it was lost
    with collecting(tmp_path, questions) as answers:
        answers.record("ann", shown=shown, key="left")
        with pytest.raises(StaleError):
            answers.record("ann", shown=shown, key="right")
        assert len(answers.current()["ann"]) == 3


@pytest.mark.parametrize(
    "line",
    [
        "no JSON", "[]", "{}",
        '{"annotator": "a", "question": 6, "key": "left", "first_on_left": true, "shown": "x"}',
        '{"annotator": "a", "question": 0, "key": "best", "first_on_left": true, "shown": "x"}',
        '{"annotator": "a", "question": 0, "key": "undo", "first_on_left": true, "shown": "x"}',
    ],
)  # fmt: skip
def test_a_damaged_line_is_refused_with_its_number(line: str, tmp_path: Path) -> None:
    questions = write_pairs(tmp_path)
    (tmp_path / "answers.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"answers\.jsonl:1 is no answer to one of 6 questions"):
        Answers(tmp_path, questions, seed=0)


def test_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    config = Config(runs="runs/a", run_folder=str(tmp_path), port=0)
    with FileLock(tmp_path / ".lock"), pytest.raises(BlockingIOError, match="in use: another process still writes"):
        recipe.main(config)


def test_on_a_full_disk_nothing_is_recorded_and_the_answer_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        collecting(tmp_path, write_pairs(tmp_path)) as answers,
        serving(answers) as address,
        person("ann", address) as ann,
    ):
        ann.enter()
        write = os.write
        with monkeypatch.context() as patched:
            patched.setattr(answers_module.os, "write", lambda file, line: write(file, line[:9]))
            refused = ann.post("/answer", shown=ann.pair["shown"], answer="left")
        assert refused.status_code == 507
        assert "The answer could not be saved: The disk of" in refused.json()["error"]
        assert (tmp_path / "answers.jsonl").read_bytes() == b""
        ann.press("left")
        assert len(lines_of(tmp_path / "answers.jsonl")) == 1


def test_an_answer_on_disk_is_confirmed_though_pairs_cannot_be_written_until_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full_disk(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    with collecting(tmp_path, write_pairs(tmp_path)) as answers:
        with monkeypatch.context() as patched:
            patched.setattr(answers_module, "append_line", full_disk)
            answers.record("ann", shown=answers.open_pair("ann").token, key="left")
        assert len(answers.current()["ann"]) == 1
        assert "pairs.jsonl could not be written ([Errno 28]" in caplog.text
        assert not lines_of(tmp_path / "pairs.jsonl")
    assert len(lines_of(tmp_path / "pairs.jsonl")) == 1


# --- what a browser can get -----------------------------------------------------------------------


def test_nothing_sent_to_a_browser_reveals_the_source_of_an_image(tmp_path: Path) -> None:
    source = preference_file(tmp_path / "images", 8)
    config = Config(pairs=str(source))
    (tmp_path / "run").mkdir()
    questions = write_questions(tmp_path / "run", from_files(config, tmp_path / "run", GENERATOR))
    assert {question.sources for question in questions} == {("preferred in the file", "not preferred in the file")}
    preferred_on_left, preferred_prefetched_first = 0, 0
    with (
        collecting(tmp_path / "run", questions) as answers,
        serving(answers) as address,
        person("ann", address) as ann,
    ):
        ann.enter()
        received = [ann.client.get("/").text, ann.client.get("/page.js").text, ann.client.get("/shared.js").text]
        for number in range(8):
            received.append(json.dumps(ann.pair))
            (question,) = [one for one in questions if one.prompt == ann.pair["prompt"]]
            preferred_on_left += ann.pair["left"] == question.images[0]
            for side in ("left", "right"):
                file = ann.client.get(f"/image/{ann.pair[side]}").content
                received.append(file.decode("latin-1"))
                with Image.open(io.BytesIO(file)) as image:
                    assert image.info == {}
            if number < 7:
                (following,) = [q for q in questions if set(q.images) == set(ann.pair["following"])]
                preferred_prefetched_first += following.images[0] == ann.pair["following"][0]
            ann.press("left")
    for word in ("secret", "preferred", "in the file", str(tmp_path)):
        assert not [text for text in received if word in text]
    assert 0 < preferred_on_left < 8
    assert 0 < preferred_prefetched_first < 7


@pytest.mark.parametrize(
    "path",
    [
        "/image/../config.yaml", "/image/..%2fconfig.yaml", "/image/%2e%2e/config.yaml",
        "/image/..%5cconfig.yaml",
        "/image//etc/passwd", "/image/%2fetc%2fpasswd", "/image/questions.jsonl", "/image/..", "/image/%00",
        "/../config.yaml", "/config.yaml", "/page.html", "/docs",
    ],
)  # fmt: skip
def test_a_path_instead_of_an_image_name_is_not_found(path: str, tmp_path: Path) -> None:
    questions = write_pairs(tmp_path)
    (tmp_path / "config.yaml").write_text("the secret")
    with collecting(tmp_path, questions) as answers, serving(answers) as address:
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
        connection.request("GET", path)  # unchanged; other clients would normalise it
        reply = connection.getresponse()
        assert reply.status == 404
        assert b"secret" not in reply.read()
        connection.close()


def test_a_public_address_needs_a_token(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.7", "annotate.example"):
        with pytest.raises(SystemExit):
            parse_config(Config, description="", arguments=["--runs", "a", "--host", host])
        assert f"error: host is {host}; it must be 127.0.0.1, ::1 or localhost unless" in capsys.readouterr().err
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert Config(runs="a", host="0.0.0.0").host == "0.0.0.0"


@pytest.mark.parametrize("secret", [TOKEN, 'a;b="c",d\\e'])
def test_without_the_token_only_the_empty_page_is_served(secret: str, tmp_path: Path) -> None:
    questions = write_pairs(tmp_path)
    with collecting(tmp_path, questions) as answers, serving(answers, secret=secret) as address:
        with person("ann", address) as ann:
            assert "Access token" in ann.client.get("/").text
            for token in ("", "wrong", "ö"):
                assert ann.post("/enter", token=token).status_code == 401
            for path in (f"/image/{questions[0].images[0]}", "/results"):
                assert ann.client.get(path).status_code == 401
            shown = answers.open_pair("ann").token
            assert ann.post("/answer", shown=shown, answer="left").status_code == 401
            entered = ann.post("/enter", token=secret)
            assert "HttpOnly" in entered.headers["set-cookie"]
            assert "SameSite=strict" in entered.headers["set-cookie"]
            ann.enter()  # a reload: the cookie is enough
            ann.press("left")
            assert ann.client.get(f"/image/{ann.pair['left']}").status_code == 200
            assert ann.client.get("/results").status_code == 200
        with person("bob", address) as script:
            script.client.headers["Authorization"] = f"Bearer {secret}"
            script.enter()
            script.press("right")
    assert secret not in "".join(path.read_text() for path in tmp_path.glob("*.jsonl"))


# --- the sources of images ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of runs, pairs and weights; given is none of them"),
        ({"runs": "a", "pairs": "b"}, "given is runs and pairs"),
        ({"weights": "base"}, "weights is base; it must be two of them"),
        ({"pairs": "a", "num_pairs": 0}, "num_pairs is 0"),
        ({"pairs": "a", "port": 65536}, "port is 65536"),
    ],
)
def test_a_config_that_cannot_work_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**given)


def test_an_unreadable_image_is_refused_by_name_or_skipped(tmp_path: Path) -> None:
    source = preference_file(tmp_path / "images", 3)
    (source.parent / "secret_2.png").write_bytes(b"no image")
    (tmp_path / "run").mkdir()
    with pytest.raises(BadRecordError, match=r"preferences\.jsonl:2: the image '.*secret_2.png' cannot be read as"):
        list(from_files(Config(pairs=str(source)), tmp_path / "run", GENERATOR))
    skip = Config(pairs=str(source.parent), on_bad_record="skip")
    questions = write_questions(tmp_path / "run", from_files(skip, tmp_path / "run", GENERATOR))
    assert [question.prompt for question in questions] == ["a fox 0", "a fox 2"]
    (skipped,) = lines_of(tmp_path / "run" / "skipped.jsonl")
    assert "secret_2.png" in skipped["reason"]


def test_pairs_without_a_preference_become_questions_and_two_equal_images_do_not(tmp_path: Path) -> None:
    source = preference_file(tmp_path / "images", 3)
    (source.parent / "copy.png").write_bytes((source.parent / "secret_0.png").read_bytes())
    rows = [["secret_0.png", "secret_3.png"], ["secret_0.png", "copy.png"]]
    source.write_text("".join(json.dumps({"prompt": "a hen", "tie": row}) + "\n" for row in rows))
    (tmp_path / "run").mkdir()
    (question,) = write_questions(tmp_path / "run", from_files(Config(pairs=str(source)), tmp_path, GENERATOR))
    assert question.sources == ("no preference in the file", "no preference in the file")
    assert read_questions(tmp_path / "run") == [question]
    for name, number in zip(question.images, (0, 3), strict=True):
        torch.testing.assert_close(read_image(image_path(tmp_path / "run", name)), colour(number), rtol=0, atol=0)
    with pytest.raises(ValueError, match="1 pairs were found, each of two identical images"):
        write_questions(tmp_path / "run", [Candidate("a hen", (colour(0), colour(0)), ("a", "b"))])


def test_the_pairs_that_diffusion_dpo_saves_become_questions(tmp_path: Path) -> None:
    images, scores = torch.stack([colour(i) for i in range(4)]), torch.tensor([[0.1, 0.9], [0.7, 0.2]])
    chosen = torch.tensor([1, 2]), torch.tensor([0, 3])
    save_pairs(tmp_path / "pairs" / "step_000001.jsonl", images, ["a fox", "a hen"], scores, chosen, first=0)
    fox, hen = from_files(Config(pairs=str(tmp_path / "pairs")), tmp_path, GENERATOR)
    for found, prompt, winner, loser in ((fox, "a fox", 1, 0), (hen, "a hen", 2, 3)):
        assert found.prompt == prompt
        assert found.sources == ("preferred in the file", "not preferred in the file")
        torch.testing.assert_close(found.images, (colour(winner), colour(loser)))


def test_num_pairs_draws_a_reproducible_subset(tmp_path: Path) -> None:
    source = preference_file(tmp_path / "images", 20)
    config = Config(pairs=str(source), num_pairs=7)
    drawn = [[one.prompt for one in from_files(config, tmp_path, generator_for(seed))] for seed in (0, 0, 1)]
    assert len(set(drawn[0])) == 7
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_run_gives_its_images_before_and_after_training(tmp_path: Path) -> None:
    run = run_with_images(tmp_path / "ddpo", after=0.8)
    after = run / "images" / "step_000002.png"
    with Image.open(after) as strip:
        last = Image.fromarray(255 - np.asarray(strip))
    last.save(after)
    config = Config(runs=str(run))
    found = list(candidates(config, tmp_path, torch.device("cpu")))
    assert [one.prompt for one in found] == [prompt for prompt, _ in CELLS[:4]]
    for i, one in enumerate(found):
        assert one.sources == ("before ddpo", "ddpo")
        drawn = torch.tensor((40 * i, 255 - 40 * i, 7 * i)) / 255
        torch.testing.assert_close(one.images[0], drawn[:, None, None].expand(3, 8, 8))
        torch.testing.assert_close(one.images[1], 1 - one.images[0])
    with pytest.raises(FileNotFoundError, match="contains no images of an evaluation"):
        list(from_runs([tmp_path], num_pairs=None, generator=GENERATOR))


@pytest.mark.slow
def test_two_weights_sample_the_same_prompts_from_the_same_seeds(tiny_sd: Path, tmp_path: Path) -> None:
    from rlhf_t2i.models.load import load_policy

    cpu = torch.device("cpu")
    policy = load_policy(str(tiny_sd), device=cpu)
    policy.set_trainable(None, keep_reference=False, seed=0)
    policy.export(tmp_path, {name: 1.05 * tensor for name, tensor in policy.network.state_dict().items()})
    (tmp_path / "prompts.txt").write_text("a fox\na hen\n")
    options: Any = {
        "model": str(tiny_sd),
        "evaluation_prompts": str(tmp_path / "prompts.txt"),
        "num_evaluation_steps": 2,
        "guidance_scale": 1.0,
    }
    found = list(sampled(Config(weights=f"base,{tmp_path}", num_pairs=3, **options), cpu))
    swapped = list(sampled(Config(weights=f"{tmp_path}/unet,base", num_pairs=2, **options), cpu))
    assert [one.prompt for one in found] == ["a fox", "a hen", "a fox"]
    assert [one.prompt for one in swapped] == ["a fox", "a hen"]
    assert found[0].sources == ("base", str(tmp_path))
    assert not torch.equal(*found[0].images)
    assert not torch.equal(found[0].images[0], found[2].images[0])  # the same prompt, another seed
    for one, other in zip(found, swapped, strict=False):
        torch.testing.assert_close(one.images, other.images[::-1])


def test_sampled_pairs_are_kept_when_a_reward_fails_on_them(tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\n")
    check = "assert images.shape[-1] == 64, 'only as in the trial'"
    code = f"def small(images, prompts):\n    {check}\n    return images.mean((1, 2, 3))"
    (tmp_path / "rewards_of_a_page.py").write_text(code)
    config = Config(
        weights=f"base,{denoiser_of(tiny_sd, tmp_path)}", model=str(tiny_sd),
        evaluation_prompts=str(tmp_path / "prompts.txt"), num_pairs=1, num_evaluation_steps=1,
        guidance_scale=1.0, rewards=f"{tmp_path}/rewards_of_a_page.py:small", port=0,
        run_folder=str(tmp_path / "page"),
    )  # fmt: skip
    with pytest.raises(AssertionError, match="only as in the trial"):
        recipe.main(config)
    remove_failed_starts()
    assert [question.prompt for question in read_questions(tmp_path / "page")] == ["a fox"]


# --- agreement ------------------------------------------------------------------------------------


def test_cohens_kappa_by_hand() -> None:
    """Cohen's example: 20 and 15 of 50 the same; expected 0.5 x 0.6 + 0.5 x 0.4 = 0.5; (0.7 - 0.5) / 0.5 = 0.4."""
    table = np.array([[20, 5], [10, 15]])
    assert cohens_kappa(table) == pytest.approx(0.4)
    estimate = kappa_estimate(table)
    assert estimate.value == pytest.approx(0.4)
    # The delta method's standard error is 0.13 (Fleiss, Cohen, Everitt 1969).
    assert estimate.low == pytest.approx(0.4 - 1.96 * 0.13, abs=0.04)
    assert estimate.high == pytest.approx(0.4 + 1.96 * 0.13, abs=0.04)
    assert cohens_kappa(np.array([[5, 0], [0, 5]])) == pytest.approx(1)
    assert cohens_kappa(np.array([[0, 5], [5, 0]])) == pytest.approx(-1)
    assert str(kappa_estimate(np.array([[7, 0], [0, 0]]))) == "undefined"


def test_wilsons_interval_by_hand() -> None:
    """(p + z^2 / 2n ± z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n) with z = 1.95996, n = 10, p = 0.8."""
    z, n, p = 1.959964, 10, 0.8
    centre, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    estimate = wilson(8, 10)
    assert estimate.value == 0.8
    assert estimate.low == pytest.approx((centre - half) / (1 + z**2 / n), abs=1e-6)
    assert estimate.high == pytest.approx((centre + half) / (1 + z**2 / n), abs=1e-6)
    assert str(estimate) == "0.80 [0.49, 0.94]"
    assert str(wilson(0, 0)) == "undefined"


def test_agreement_is_over_the_questions_that_both_answered() -> None:
    choices: dict[str, Any] = {
        "ann": {0: "first", 1: "second", 2: "tie", 3: "bad"},
        "bob": {1: "second", 2: "first", 3: "bad", 4: "first"},
        "cem": {5: "first"},
    }
    (both,) = between_annotators(choices)
    assert (both.names, both.count) == (("ann", "bob"), 3)
    assert both.raw.value == pytest.approx(2 / 3)
    # Expected: second 1/9, bad 1/9, tie and first 0; (2/3 - 2/9) / (7/9) = 4/7.
    assert both.kappa.value == pytest.approx(4 / 7)


def test_agreement_with_a_reward_is_over_the_questions_that_both_decided() -> None:
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [2.0, 1.0]])
    choices: dict[str, Any] = {
        "ann": {0: "first", 1: "second", 2: "first", 3: "second", 4: "tie"},
        "bob": {0: "first", 1: "first", 3: "bad", 4: "second"},
    }
    assert majority(choices) == {0: "first", 2: "first", 3: "second", 4: "second"}
    ann, bob, both = with_reward(choices, scores, reward="oracle")
    assert [one.names for one in (ann, bob, both)] == [("ann", "oracle"), ("bob", "oracle"), ("the majority", "oracle")]
    assert (ann.count, ann.raw.value) == (3, pytest.approx(2 / 3))
    assert (bob.count, bob.raw.value) == (3, pytest.approx(2 / 3))
    assert (both.count, both.raw.value) == (3, pytest.approx(2 / 3))


def test_pairwise_win_rates_count_preferences_by_source() -> None:
    questions = [Question("a", ("1", "2"), ("base", "tuned")), Question("b", ("3", "4"), ("base", "tuned"))]
    answers = {
        "ann": [Answer(0, "left", first_on_left=True), Answer(1, "left", first_on_left=False)],
        "bob": [Answer(0, "right", first_on_left=False), Answer(1, "bad", first_on_left=True)],
    }
    (row,) = pairwise_win_rates(answers, questions)
    assert (row.sources, row.wins, row.losses, row.ties, row.bad) == (("base", "tuned"), 2, 1, 0, 1)
    assert row.rate.value == pytest.approx(2 / 3)


def test_each_image_is_scored_with_its_prompt_whatever_its_size(tmp_path: Path) -> None:
    def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images[:, 0].mean((1, 2)) + 10 * torch.tensor([float(prompt) for prompt in prompts])

    shades = torch.tensor([[0.2, 0.4], [0.6, 0.0], [0.8, 1.0]])
    sizes = [(8, 8), (8, 16), (4, 4)]
    pairs = [
        (torch.full((3, *sizes[i]), float(shades[i, 0])), torch.full((3, *sizes[-1 - i]), float(shades[i, 1])))
        for i in range(3)
    ]
    found = [Candidate(str(i), pair, ("a", "b")) for i, pair in enumerate(pairs)]
    questions = write_questions(tmp_path, found)
    reward = WeightedSum(((CheckedReward("redness", redness), 1.0),))
    scores = score_questions(reward, tmp_path, questions, device=torch.device("cpu"), batch_size=2)
    torch.testing.assert_close(scores, shades + 10 * torch.arange(3.0)[:, None])


def test_the_results_page_shows_win_rates_and_agreement(tmp_path: Path) -> None:
    questions = write_pairs(tmp_path, 4)
    scores = torch.tensor([[1.0, 0.0]] * 4)
    with (
        collecting(tmp_path, questions) as answers,
        serving(answers, reward=("redness", scores)) as address,
        person("<b>ann", address) as ann,
        person("bob", address) as bob,
    ):
        assert "There are no answers yet." in ann.client.get("/results").text
        for someone in (ann, bob):
            someone.enter()
            while someone.pair["prompt"] is not None:
                (question,) = [one for one in questions if one.prompt == someone.pair["prompt"]]
                first = "left" if someone.pair["left"] == question.images[0] else "right"
                someone.press("tie" if (someone, question) == (bob, questions[0]) else first)
        page = " ".join(ann.client.get("/results").text.split())
    assert "2 annotators, 8 answers to 4 pairs" in page
    assert (
        "<td>before</td><td>after</td> <td>7</td><td>0</td><td>1</td><td>0</td><td>0</td><td>1.00 [0.65, 1.00]</td>"
        in page
    )
    assert "<td>&lt;b&gt;ann</td><td>bob</td><td>4</td> <td>0.75 [0.30, 0.95]</td><td>0.00</td>" in page
    assert "<td>bob</td><td>redness</td><td>3</td> <td>1.00 [0.44, 1.00]</td><td>undefined</td>" in page
    assert "<b>ann" not in page


def test_a_used_folder_is_continued_only_with_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = preference_file(tmp_path / "images", 3)
    served: list[Any] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: served.append(sockets[0].close()))
    options: Any = {"pairs": str(source), "run_folder": str(tmp_path / "run"), "port": 0}
    folder = recipe.main(Config(**options))
    (source.parent / "secret_0.png").unlink()  # the saved questions are not made again
    with pytest.raises(FileExistsError, match="Continue it with --resume"):
        recipe.main(Config(**options))
    assert recipe.main(Config(**options, resume=True, rewards="jpeg_compressibility")) == folder
    with pytest.raises(ValueError, match="seed was 0 and is now 1"):
        recipe.main(Config(**options, resume=True, seed=1))
    assert len(served) == 2


# --- in a browser ---------------------------------------------------------------------------------


@pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER), reason=browser.MISSING)
def test_keys_buttons_and_reloads_work_in_chromium(tmp_path: Path) -> None:
    questions = write_pairs(tmp_path, 5)
    shots = Path(os.environ.get("SCREENSHOTS", tmp_path))
    answered = "document.getElementById('count').textContent.startsWith('{} of 5') && !document.querySelector('.busy')"
    with collecting(tmp_path, questions) as answers, serving(answers, secret=TOKEN) as address:
        with browser.chromium() as page:
            page.emulate(width=390, height=844, dark=True)
            page.open(address)
            page.screenshot(shots / "entrance.png")
            page.type_in("name", "Ann")
            page.run(f"document.getElementById('token').value = '{TOKEN}'")
            page.press("enter")
            page.until(answered.format(0))
            page.screenshot(shots / "phone_dark.png")
            for count, key in enumerate(["left", "2", "t", "u", "b", "1"], start=1):
                count = count if count < 4 else count - 2
                page.press(key)
                page.until(answered.format(count))
            page.emulate(width=1200, height=800)
            page.open(address)  # a reload, in the same tab
            page.until(answered.format(4))
            page.screenshot(shots / "wide_light.png")
            page.run("const one = document.querySelector('[data-answer=right]'); one.click(); one.click()")
            page.until("!document.getElementById('done').hidden")
            page.screenshot(shots / "done.png")
            assert page.run("return document.querySelectorAll('#done a').length") == 0, "results would unblind"
            page.open(f"{address}/results")
            page.until("document.body.innerText.includes('1 annotator, 5 answers to 5 pairs')")
            page.screenshot(shots / "results.png")
            assert page.console() == []
        keys = [row["key"] for row in lines_of(tmp_path / "answers.jsonl")]
        assert keys == ["left", "right", "tie", "undo", "bad", "left", "right"]
        assert list(answers.current()) == ["ann"]


@pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER), reason=browser.MISSING)
def test_the_page_repeats_an_answer_until_a_server_responds(tmp_path: Path) -> None:
    port = free_port()
    with collecting(tmp_path, write_pairs(tmp_path, 3)) as answers, browser.chromium() as page:
        with serving(answers, port=port) as address:
            page.open(address)
            page.type_in("name", "ann")
            page.press("enter")
            page.until("document.getElementById('count').textContent === '0 of 3'")
            page.until("!document.querySelector('.busy')")
        page.press("t")
        page.until("document.getElementById('message').textContent.startsWith('The server does not respond')")
        page.press("1")  # ignored: the answer before it is still being sent
        with serving(answers, port=port):
            page.until("document.getElementById('count').textContent === '1 of 3'")
            page.until("document.getElementById('message').textContent === ''")
    assert [row["key"] for row in lines_of(tmp_path / "answers.jsonl")] == ["tie"]
