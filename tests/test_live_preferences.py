"""recipes/live_preferences.py end to end: people vote while a tiny model trains, and a normal run is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from recipes import live_preferences
from recipes.live_preferences import Config
from reward_model.datasets import load_records
from reward_model.scoring import LlavaReward
from rlhf_t2i.training.finished_run import read_run
from rlhf_t2i.training.trainer import Trainer
from tests import browser, processes
from tests.launch import ROOT, command_line, environment
from tests.layout import problems
from tests.runs import REDNESS, as_for_toy_models, rows
from tests.servers import free_port


@pytest.fixture
def config(tiny_sd: Path, tmp_path: Path) -> Config:
    return Config(
        **as_for_toy_models(
            model=str(tiny_sd), prompts_per_step=3, images_per_prompt=4, num_denoising_steps=2, window_end=1.0,
            evaluation_rewards=REDNESS, lora_rank=2, num_steps=2, checkpoint_every=1, num_evaluation_images=4,
            evaluate_every=0, num_cpu_threads=1, run_folder=str(tmp_path / "run"), port=free_port(), backbone="shapes",
            questions_per_step=3, first_votes=4, num_members=2, votes_per_batch=4, pairs_per_step=4,
        )
    )  # fmt: skip


class Voter(threading.Thread):
    """Sends the vote that `choose` returns for the images of each question until the server is gone."""

    def __init__(self, port: int, choose: Callable[[list[str]], str], *, name: str = "ann", most: int = 1000) -> None:
        super().__init__(daemon=True)
        self.address, self.choose, self.person, self.most = f"http://127.0.0.1:{port}", choose, name, most
        self.confirmed: list[str] = []
        """Votes that the server confirmed, by their tokens."""
        self.states: list[dict[str, Any]] = []
        self.ends = False

    def run(self) -> None:
        with httpx.Client(base_url=self.address, trust_env=False, timeout=30) as client:
            while not self.ends:
                try:
                    self._vote(client)
                except httpx.TransportError:
                    time.sleep(0.05)

    def _vote(self, client: httpx.Client) -> None:
        state = client.get("/state", params={"annotator": self.person}).json()
        self.states.append(state)
        if state["question"] is None or len(self.confirmed) >= self.most:
            time.sleep(0.02)
            return
        shown = state["question"]["shown"]
        vote = self.choose(state["question"]["images"])
        if client.post("/vote", json={"annotator": self.person, "shown": shown, "vote": vote}).status_code == 200:
            self.confirmed.append(shown)


@contextmanager
def voting(*voters: Voter) -> Iterator[None]:
    for voter in voters:
        voter.start()
    try:
        yield
    finally:
        for voter in voters:
            voter.ends = True
            voter.join()


@pytest.fixture(autouse=True)
def without_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_t2i.annotation.live_serve._FAREWELL_SECONDS", 0.0)


def test_two_people_teach_a_run_that_ends_as_any_other(config: Config) -> None:
    """Both ways of learning at once; its votes, its reward model and its weights can be used."""
    config = replace(config, learn="both", rewards=f"{REDNESS}=0.1")
    voters = Voter(config.port, lambda images: "1"), Voter(config.port, lambda images: "tie", name="bob")
    with voting(*voters):
        folder = live_preferences.main(config)
    found = read_run(folder)
    assert (found.kind, found.info["recipe"], found.trained_on) == ("lora", "live_preferences", ["votes", REDNESS])
    train = rows(folder, "train")
    assert [row["step"] for row in train] == [1, 2]
    assert train[0]["votes"] >= config.first_votes
    assert {"reward_model/loss", "seconds/waiting", "dpo/loss", "rewards/votes", "loss"} <= train[0].keys()
    records = load_records(folder / "votes" / "pairs.jsonl")
    assert len(records) == sum(len(voter.confirmed) for voter in voters)
    learned = LlavaReward.from_pretrained(folder / "votes" / "reward_model", device="cpu")
    assert learned.perspectives == ["votes"]
    progress = [state["training"]["progress"] for state in voters[0].states if state["training"]["progress"]]
    assert 1 <= len(progress[-1][0]["images"]) == 3


@pytest.mark.parametrize(
    ("question", "learn", "vote", "update"),
    [
        ("best_of_four", "dpo", "4", "ddpo"),
        ("good_bad", "reward_model", "good", "ddpo"),
        ("pair", "reward_model", "1", "diffusion_nft"),
    ],
)
def test_other_questions_and_updates_teach_too(
    question: Any, learn: Any, vote: str, update: Any, config: Config
) -> None:
    """DiffusionNFT begins at the weights that sampled, and its old policy is theirs in every step."""
    config = replace(config, question=question, learn=learn, num_steps=2, acquisition="entropy", update=update)
    config = replace(config, num_minibatches=1) if update == "diffusion_nft" else config
    with voting(Voter(config.port, lambda images: vote)):
        folder = live_preferences.main(config)
    for row in rows(folder, "train"):
        assert row["votes"] >= 2
        assert ("dpo/loss" in row) == (learn == "dpo")
        assert ("clip_fraction" in row) == (learn != "dpo" and update == "ddpo")
        if update == "diffusion_nft":
            assert row["sampling_gap"] == 0, "the only optimiser step of a step starts at the weights that sampled"


def test_training_that_waits_for_its_first_votes_stops_on_a_signal(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGTERM])
    monkeypatch.setattr(Trainer, "print", lambda self, text: timer.start() if "page " in text else None)
    folder = live_preferences.main(config)
    assert rows(folder, "train")[-1]["step"] == 1
    assert not (folder / "lora").exists()


def test_several_processes_are_refused_in_a_line(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "num_processes", property(lambda self: 2))
    with pytest.raises(ValueError, match="one process, not on 2: --num_processes 1"):
        live_preferences.main(config)


@pytest.mark.slow
def test_no_vote_is_lost_by_kill_9_and_the_run_resumes(config: Config) -> None:
    config, folder = replace(config, num_steps=3), Path(config.run_folder or "")
    log = folder / "votes" / "votes.jsonl"

    def start(**options: Any) -> Any:
        command = [sys.executable, "recipes/live_preferences.py", *command_line(replace(config, **options))]
        return processes.start(
            command, cwd=ROOT, env=environment(OMP_NUM_THREADS="1"), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    voter = Voter(config.port, lambda images: "2")
    with voting(voter):
        first = start()
        while not (folder / "checkpoints").is_dir() or not any((folder / "checkpoints").glob("step_*1")):
            assert first.poll() is None, first.communicate()
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        first.wait()
        first.communicate()
        killed_at = len(log.read_bytes().splitlines())
        second = start(resume=True)
        output, _ = second.communicate(timeout=240)
    assert second.returncode == 0, output
    assert "Resumed after step" in output
    kept = log.read_text()
    assert killed_at >= config.first_votes
    assert all(token in kept for token in voter.confirmed)
    assert kept.count("\n") >= len(voter.confirmed) >= killed_at - 1  # the last one may be written, not confirmed
    assert rows(folder, "train")[-1]["step"] == 3


@pytest.mark.slow
@pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER), reason=browser.MISSING)
@pytest.mark.parametrize("question", ["pair", "best_of_four"])
def test_a_vote_in_a_browser(config: Config, question: Any) -> None:
    """By key and by click; the page says what training does, and nothing is beyond its card."""
    config, done, flaws = replace(config, question=question), threading.Event(), list[Any]()

    def vote() -> None:
        with browser.chromium() as page:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                try:
                    httpx.get(f"http://127.0.0.1:{config.port}/", trust_env=False)
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            page.open(f"http://127.0.0.1:{config.port}/")
            page.type_in("name", "<i>ann</i>")
            page.press("enter")
            page.until("state && state.question && !busy")
            for width, height in ((1280, 800), (390, 844)):
                page.emulate(width=width, height=height)
                flaws.extend(problems(page))
            page.press("1")
            page.until("state.own_votes === 1 && !busy")
            page.run("document.querySelector('[data-answer=\"2\"]').click()")
            page.until("state.own_votes === 2 && !busy")
            flaws.extend(page.console())
            done.set()

    thread = threading.Thread(target=vote, daemon=True)
    thread.start()
    other = Voter(config.port, lambda images: "1" if done.wait(60) else "2")
    with voting(other):
        folder = live_preferences.main(config)
    thread.join(30)
    assert flaws == []
    assert "<i>ann</i>" in (folder / "votes" / "votes.jsonl").read_text()
