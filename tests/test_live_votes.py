"""Votes on the images of a model in training: durable, kind to late ones, and about what teaches most."""

from __future__ import annotations

import copy
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from reward_model.datasets import load_records, load_same_prompt_pairs
from reward_model.heads import HeadKind
from reward_model.model import RewardModel
from reward_model.online import OnlineRewardModel
from reward_model.types import LabelledImage, PreferencePair
from rlhf_t2i.access import listen
from rlhf_t2i.annotation.acquisition import binary_entropy, certainty, choose_questions, value_of_answers
from rlhf_t2i.annotation.answers import StaleError
from rlhf_t2i.annotation.live_records import NewQuestion
from rlhf_t2i.annotation.live_serve import LiveService, TrainingState, create_app, serving
from rlhf_t2i.annotation.live_votes import GONE, LATE, LiveVotes
from rlhf_t2i.settings.live_preferences import Config
from rlhf_t2i.training.online_reward import load_online
from tests.servers import running, until


def image(number: int, side: int = 8) -> Tensor:
    return torch.tensor([number % 256, number // 256, 100])[:, None, None].expand(3, side, side) / 255


def questions(count: int, *, num_images: int = 2, start: int = 0, favourite: int | None = 0) -> list[NewQuestion]:
    numbers = range(start, start + count)
    return [
        NewQuestion(f"<b>a fox</b> {i}", [image(num_images * i + k, 8 + k) for k in range(num_images)], favourite)
        for i in numbers
    ]


def press(votes: LiveVotes, annotator: str, *keys: Any) -> list[str]:
    found: list[str] = []
    for key in keys:
        shown = votes.shown(annotator)
        token = votes.last_vote(annotator) if key == "undo" else shown and shown.token
        assert token is not None
        found.append(votes.vote(annotator, shown=token, key=key))
    return found


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def votes(tmp_path: Path) -> Iterator[LiveVotes]:
    opened = LiveVotes(tmp_path, kind="pair", seed=0)
    yield opened
    opened.close()


def test_votes_outlive_the_process_and_a_torn_line_and_are_read_as_preferences(votes: LiveVotes) -> None:
    votes.offer(3, questions(5), max_age=2)
    press(votes, "ann", "1", "2", "tie", "bad", "undo", "unsure", "2")
    path = votes.folder / "votes.jsonl"
    with path.open("ab") as file:
        file.write(b'{"annotator": "x", "ques')
    again = LiveVotes(votes.folder.parent, kind="pair", seed=0)
    assert again.num_votes == votes.num_votes == 5
    assert again.records() == votes.records()
    again.offer(4, questions(1, start=9), max_age=2)
    press(again, "ann", "1", "undo")
    again.close()
    records = load_records(votes.folder / "pairs.jsonl")
    assert [one.tie for one in records if isinstance(one, PreferencePair)] == [False, False, True, False]
    assert len(load_same_prompt_pairs([votes.folder / "pairs.jsonl"], image_root=None, skipped=None)) == 3
    first = lines_of(path)[0]
    assert lines_of(votes.folder / "pairs.jsonl")[0]["winner"] == f"images/{first['images'][0]}.png"


def test_a_late_vote_counts_and_one_on_images_that_are_gone_is_refused_kindly(votes: LiveVotes) -> None:
    votes.offer(0, questions(1), max_age=1)
    shown = votes.shown("ann")
    assert shown is not None
    votes.offer(1, questions(1, start=1), max_age=1)
    assert votes.shown("ann") == shown
    votes.offer(2, questions(1, start=2), max_age=1)
    newer = votes.shown("ann")
    assert newer is not None
    assert newer.question.step > 0  # nobody is asked about a stale sample
    assert votes.vote("ann", shown=shown.token, key="1") == LATE
    assert votes.num_votes == 1
    assert votes.vote("ann", shown=shown.token, key="1") == ""  # a repeated request
    with pytest.raises(StaleError, match="answered already"):
        votes.vote("ann", shown=shown.token, key="2")
    for token in ("made-up", newer.token[::-1]):
        with pytest.raises(StaleError, match=GONE.split(",")[0]):
            votes.vote("ann", shown=token, key="1")
    assert votes.num_votes == 1
    with pytest.raises(ValueError, match="The vote is '3'; it must be one of 1, 2, tie"):
        votes.vote("ann", shown=newer.token, key="3")


def test_images_of_withdrawn_questions_go_unless_somebody_saw_them(votes: LiveVotes) -> None:
    votes.offer(0, questions(3), max_age=0)
    shown = votes.shown("ann")
    assert shown is not None
    votes.offer(1, [], max_age=0)
    assert {path.stem for path in (votes.folder / "images").iterdir()} == set(shown.images)


def test_two_people_see_different_questions_and_may_vote_on_the_same_only_one(votes: LiveVotes) -> None:
    votes.offer(0, questions(2), max_age=9)
    ann, bob, eve = (votes.shown(name) for name in ("ann", "bob", "eve"))
    assert ann
    assert bob
    assert eve
    assert ann.question is not bob.question
    assert eve.question in (ann.question, bob.question)
    other = "ann" if eve.question is ann.question else "bob"
    press(votes, "eve", "1")
    press(votes, other, "2")
    assert [row["question"] for row in lines_of(votes.folder / "votes.jsonl")] == [eve.question.number] * 2
    assert votes.num_votes == 2


def test_who_skips_everything_is_asked_again_and_undo_brings_a_question_back(votes: LiveVotes) -> None:
    votes.offer(0, questions(2), max_age=9)
    press(votes, "ann", "skip", "skip", "1")
    assert votes.num_votes == 1
    asked = lines_of(votes.folder / "votes.jsonl")[0]["question"]
    press(votes, "ann", "undo")
    shown = votes.shown("ann")
    assert shown is not None
    assert shown.question.number == asked
    assert votes.records() == []
    assert votes.last_vote("ann") is None
    with pytest.raises(StaleError, match="Another vote was the last one"):
        votes.vote("ann", shown=shown.token, key="undo")


def test_best_of_four_is_three_pairs_and_good_or_bad_a_label(tmp_path: Path) -> None:
    four = LiveVotes(tmp_path / "four", kind="best_of_four", seed=0)
    four.offer(0, questions(2, num_images=4), max_age=0)
    press(four, "ann", "3", "bad")
    assert len({one.winner for one in four.records() if isinstance(one, PreferencePair)}) == 1
    assert len(four.records()) == 3
    labels = LiveVotes(tmp_path / "labels", kind="good_bad", seed=0)
    labels.offer(0, questions(3, num_images=1, favourite=None), max_age=0)
    press(labels, "ann", "good", "bad", "unsure")
    assert [one.label for one in labels.records() if isinstance(one, LabelledImage)] == [1, 0]
    assert len(load_records(labels.folder / "labels.jsonl")) == 2
    for opened in (four, labels):
        opened.close()
    with pytest.raises(ValueError, match=r"votes\.jsonl:1 is no vote on a question of the kind pair"):
        LiveVotes(tmp_path / "four", kind="pair", seed=0)


def test_foreseen_counts_the_choices_of_the_favourite(votes: LiveVotes) -> None:
    votes.offer(0, questions(4), max_age=0)
    for right in (True, True, False):
        shown = votes.shown("ann")
        assert shown is not None
        favourite = shown.images.index(shown.question.favourite or "")
        press(votes, "ann", str(1 + (favourite if right else 1 - favourite)))
    press(votes, "ann", "tie")
    assert votes.foreseen(last=50) == (2, 3)
    assert votes.foreseen(last=1) == (0, 1)


# --- acquisition ----------------------------------------------------------------------------------


def test_disagreement_asks_where_members_differ_and_entropy_where_the_answer_is_open() -> None:
    """Prompt 0: both members call it even; 1: they contradict each other; 2: both are sure."""
    first = torch.tensor([[0.0, 2.0, 5.0], [0.0, -2.0, 5.0]])
    values = value_of_answers(first, "disagreement")
    assert values.argmax() == 1
    assert values[0] == pytest.approx(0)
    one = torch.sigmoid(torch.tensor(2.0))
    assert values[1] == pytest.approx((binary_entropy(torch.tensor(0.5)) - binary_entropy(one)).item())
    assert value_of_answers(first, "entropy")[0] == pytest.approx(0.6931, abs=1e-4)
    scores = torch.stack([first, torch.zeros_like(first)], dim=-1)
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"num_images": 2, "count": 3, "temperature": 1.0, "generator": generator}
    assert choose_questions(scores, rule="disagreement", **options)[0].prompt == 1
    assert {one.prompt for one in choose_questions(scores, rule="entropy", **options)[:2]} == {0, 1}
    assert choose_questions(scores, rule="entropy", **options)[2].prompt == 2
    sure = next(one for one in choose_questions(scores, rule="random", **options) if one.prompt == 2)
    assert sure.favourite is not None
    assert sure.images[sure.favourite] == 0
    assert certainty(scores[:, 2:], temperature=1.0) == pytest.approx(torch.sigmoid(torch.tensor(5.0)).item())


def test_random_questions_are_of_all_prompts_and_sets_alike() -> None:
    generator, scores = torch.Generator().manual_seed(0), torch.randn(2, 3, 4) * 9
    drawn = [
        one
        for _ in range(200)
        for one in choose_questions(scores, num_images=2, count=1, temperature=1.0, rule="random", generator=generator)
    ]
    counts = [sum(one.prompt == prompt for one in drawn) for prompt in range(3)]
    assert min(counts) > 40
    assert len({(one.prompt, one.images) for one in drawn}) == 3 * 12


# --- the reward model -----------------------------------------------------------------------------


def online(**options: Any) -> OnlineRewardModel:
    return load_online(Config(num_members=2, votes_per_batch=8, **options), seed=0)


def reddest(folder: Path, count: int) -> list[PreferencePair]:
    """Votes for the redder image."""
    votes = LiveVotes(folder, kind="pair", seed=0)
    images = [[torch.rand(()) * torch.ones(3, 32, 32), torch.zeros(3, 32, 32)] for _ in range(count)]
    for pair in images:
        pair[0][0], pair[0][1:] = 0.9, 0.1 * pair[0][1:]
    votes.offer(0, [NewQuestion("a red circle on a white background", pair) for pair in images], max_age=0)
    for _ in range(count):
        shown = votes.shown("ann")
        assert shown is not None
        press(votes, "ann", str(1 + shown.images.index(shown.question.images[0])))
    votes.close()
    return [one for one in votes.records() if isinstance(one, PreferencePair)]


@pytest.mark.parametrize("parts", ["head", "skip_ca", "all"])
def test_an_untrained_reward_model_learns_from_votes_and_its_state_is_complete(parts: str, tmp_path: Path) -> None:
    model, records = online(reward_parts=parts, reward_learning_rate=5e-3), reddest(tmp_path, 8)
    frozen = {name: p.clone() for name, p in model.model.named_parameters() if not p.requires_grad}
    assert any("lora" in name for name in frozen) == (parts != "all")
    assert model.learn_new(records[:4], updates_per_record=0.5).keys() == {"loss", "accuracy"}
    assert model.num_updates == 2
    copied = online(reward_parts=parts, reward_learning_rate=5e-3)
    copied.load_state_dict(copy.deepcopy(model.state_dict()))  # as from a file
    for one in (model, copied):
        assert one.learn_new(records[:4], updates_per_record=1.0) == {}  # nothing without new votes
        one.learn_new(records, updates_per_record=2.0)
    images = torch.rand(4, 3, 32, 32)
    before, after = (one.scores(images, ["a red circle"] * 4, batch_size=3) for one in (model, copied))
    assert before.shape == (2, 4)
    assert torch.equal(before, after)
    assert not torch.equal(before[0], before[1])  # members differ
    assert model.learn(records, num_updates=1)["accuracy"] == 1.0
    assert all(torch.equal(p, frozen[name]) for name, p in model.model.named_parameters() if name in frozen)


def test_votes_go_on_teaching_a_built_in_reward_model_that_has_a_head() -> None:
    found = online(start_reward_model="shapes-skip-ca")
    assert found.config.skip_ca
    with pytest.raises(ValueError, match="Give a reward model whose readout is last_token"):
        online(start_reward_model="shapes")


def test_a_reward_model_that_only_compares_is_refused() -> None:
    model = load_online(Config(num_members=1, acquisition="entropy"), seed=0).model
    kind: HeadKind = "general_preference"
    object.__setattr__(model.configs["votes"], "head", kind)
    options: dict[str, Any] = {"groups": ("head",), "learning_rate": 1e-3, "batch_size": 4, "tie_width": 0.5, "seed": 0}
    assert isinstance(model, RewardModel)
    with pytest.raises(ValueError, match="a general-preference head, which compares two images"):
        OnlineRewardModel(model, num_members=1, **options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"learn": "dpo", "question": "good_bad"}, "learn is dpo; it must be reward_model with --question good_bad"),
        ({"num_members": 1}, "acquisition is disagreement; it must be entropy or random with one member"),
        ({"question": "best_of_four", "images_per_prompt": 2, "num_minibatches": 1}, "images_per_prompt is 2; it must"),
        (
            {"advantages": "per_prompt_history"},
            "advantages is per_prompt_history; it must be one of group_relative, whole_batch",
        ),
        ({"dry_run": True}, "dry_run is True; it must be false"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why.replace("(", r"\(")):
        Config(**options)


# --- the page -------------------------------------------------------------------------------------


def test_the_page_needs_its_token_gives_no_other_files_and_pauses(votes: LiveVotes) -> None:
    votes.offer(0, questions(1), max_age=0)
    training = TrainingState(num_steps=4)
    with (
        running(create_app(LiveService(votes, training, secret="s"))) as address,
        httpx.Client(base_url=address, trust_env=False) as client,
    ):
        assert client.get("/state", params={"annotator": "ann"}).status_code == 401
        state = client.post("/enter", json={"annotator": "Ann ", "token": "s"}).json()
        assert (state["annotator"], state["question"]["prompt"]) == ("ann", "<b>a fox</b> 0")
        assert client.get(f"/image/{state['question']['images'][0]}").status_code == 200
        assert client.get("/image/..%2Fvotes").status_code == 404
        assert client.get("/image/nothing").status_code == 404
        assert client.post("/pause", json={"annotator": "ann", "paused": True}).status_code == 200
        assert training.paused_by == "ann"
        gone = client.post("/vote", json={"annotator": "ann", "shown": "x", "vote": "1"})
        assert (gone.status_code, gone.json()["state"]["question"]) == (409, state["question"])
        wrong = client.post("/vote", json={"annotator": "ann", "shown": state["question"]["shown"], "vote": "9"})
        assert wrong.status_code == 422


def test_a_browser_that_closes_in_the_middle_of_a_vote_has_voted_once(votes: LiveVotes) -> None:
    """The request was sent and nobody reads the response; who comes back goes on with the next question."""
    votes.offer(0, questions(2), max_age=0)
    with (
        running(create_app(LiveService(votes, TrainingState(), secret=None))) as address,
        httpx.Client(base_url=address, trust_env=False) as client,
    ):
        state = client.post("/enter", json={"annotator": "ann"}).json()
        body = json.dumps({"annotator": "ann", "shown": state["question"]["shown"], "vote": "1"})
        head = (
            f"POST /vote HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}\r\n\r\n{body}".encode())
        until(lambda: votes.num_votes == 1)
        back = client.post("/enter", json={"annotator": "ann"}).json()
        assert (back["votes"], back["own_votes"]) == (1, 1)
        assert back["question"]["shown"] != state["question"]["shown"]
    assert len(lines_of(votes.folder / "votes.jsonl")) == 1


def test_people_see_that_training_failed_and_their_votes_stay(
    votes: LiveVotes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_t2i.annotation.live_serve._FAREWELL_SECONDS", 1.0)
    votes.offer(0, questions(2), max_age=0)
    service, states = LiveService(votes, TrainingState(), secret=None), list[dict[str, Any]]()
    monkeypatch.setattr("time.sleep", lambda _: states.append(service.state_of("ann")))
    listener = listen("127.0.0.1", 0)
    with pytest.raises(RuntimeError, match="out of memory"), serving(service, listener) as address:  # noqa: PT012
        httpx.post(f"{address}/enter", json={"annotator": "ann"}, trust_env=False)
        press(votes, "ann", "1")
        raise RuntimeError("out of memory")
    assert states[-1]["training"]["failure"] == "RuntimeError: out of memory"
    assert (states[-1]["question"], states[-1]["votes"]) == (None, 1)
    assert len(lines_of(votes.folder / "votes.jsonl")) == 1
