"""A VLM behind HTTP as a reward: what it is asked, the scores by hand, and servers that misbehave."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rlhf_t2i.prompt_rows import Prompt
from rlhf_t2i.rewards.load import CheckedReward, load_reward
from rlhf_t2i.rewards.rows import check_prompts
from rlhf_t2i.rewards.vlm import KEY_VARIABLE, VlmReward
from rlhf_t2i.rewards.vlm_template import YES_NO, BadAnswerError, VlmTemplate, read_template
from tests.servers import Response, scripted

IMAGES = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
DIGITS = VlmTemplate(form="digits", question="How well does it show {prompt}? 0 to 5.", model="m")
RUBRIC = VlmTemplate(form="rubric", question="Rate {prompt}.", aspects=("Alignment Score", "Style"), model="m")
ONE_AT_A_TIME = VlmTemplate(form="yes_no", question='"{prompt}"?', model="m", concurrency=1, timeout=20.0)


def tokens(**chances: float) -> Any:
    """The answer of a server whose first token has these probabilities."""
    top = [{"token": token.replace("_", " "), "logprob": math.log(chance)} for token, chance in chances.items()]
    return {"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"top_logprobs": top}]}}]}


def text(content: Any, reason: str = "stop") -> Any:
    return {"choices": [{"message": {"content": content}, "finish_reason": reason}]}


def response(answer: Any, **headers: str) -> Response:
    return 200, {"Content-Type": "application/json", **headers}, json.dumps(answer)


GOOD = response(tokens(Yes=0.6, No=0.2))


# --- scores by hand ---------------------------------------------------------------------------------


def test_yes_and_no_are_summed_over_spellings() -> None:
    assert YES_NO.score(tokens(Yes=0.3, _yes=0.2, YES=0.1, No=0.1, ĠNo=0.05, Maybe=0.2)) == pytest.approx(0.6 / 0.75)


def test_the_expectation_of_a_digit_is_normalised_over_digits() -> None:
    chances = {"5": 0.4, "_3": 0.2, "0": 0.1, "A": 0.2, "7": 0.1}
    assert DIGITS.score(tokens(**chances)) == pytest.approx((0.4 * 1 + 0.2 * 0.6) / 0.7)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Alignment Score: 5\nStyle: 2", (3.5 - 1) / 4),
        ("I think Style: 1.\n**Alignment Score (1-5):** 4/5\n- style = 3.0", (3.5 - 1) / 4),
        ("Alignment Score: 2\nStyle: n/a", 0.25),
    ],
)
def test_a_rubric_is_the_mean_of_the_aspects_that_apply(answer: str, score: float) -> None:
    assert RUBRIC.score(text(answer)) == pytest.approx(score)


@pytest.mark.parametrize(
    ("template", "answer", "why"),
    [
        (YES_NO, tokens(A=0.9, The=0.1), r"none of yes, no among the likely first tokens \['a', 'the'\]"),
        (YES_NO, text("Yes"), "no log-probabilities"),
        (YES_NO, {"choices": [{"logprobs": {"content": []}}]}, "no log-probabilities"),
        (YES_NO, {"choices": [{"logprobs": {"tokens": ["Yes"], "token_logprobs": [-0.1]}}]}, "no log-probabilities"),
        (YES_NO, ["Yes"], "no log-probabilities"),
        (DIGITS, tokens(**{"7": 1.0}), "none of 0, 1, 2, 3, 4, 5 among"),
        (RUBRIC, text("Alignment Score: 4"), "no line 'Style': RATING"),
        (RUBRIC, text("Alignment Score: 4\nStyle: 4", reason="length"), "half an answer, cut at max_tokens"),
        (RUBRIC, text("Alignment Score: 9\nStyle: 4"), "the rating 9 in the answer, which must be between 1 and 5"),
        (RUBRIC, text("Alignment Score: n/a\nStyle: n/a"), "no aspect applies"),
        (RUBRIC, text(None), "no text"),
        (RUBRIC, {}, "no text"),
    ],
)
def test_an_answer_without_a_score_is_no_score(template: VlmTemplate, answer: Any, why: str) -> None:
    with pytest.raises(BadAnswerError, match=why):
        template.score(answer)


# --- requests ---------------------------------------------------------------------------------------


def test_a_request_has_the_image_the_question_of_its_row_and_the_first_model_of_the_server(tmp_path: Path) -> None:
    file = tmp_path / "judge.yaml"
    file.write_text("form: yes_no\nquestion: '{question} ({prompt})'\nconcurrency: 1\n")
    rows = [Prompt(f"a {name}", {"prompt": f"a {name}", "question": f"Is it a {name}?"}) for name in ("fox", "cat")]
    with scripted(response({"data": [{"id": "tiny"}]}), GOOD, response(tokens(Yes=0.1, No=0.3))) as server:
        reward = load_reward(f'vlm:{server.address}/v1(template="{file}")')
        scores = reward(IMAGES, rows)
    assert scores.tolist() == pytest.approx([0.75, 0.25])
    assert server.requests[0] == "/v1/models"
    for image, row, request in zip(IMAGES, rows, server.requests[1:], strict=True):
        (turn,) = request.pop("messages")
        assert request == {"model": "tiny", "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
        picture, words = turn["content"]
        assert words["text"] == f"{row.metadata['question']} ({row})"
        png = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
        pixels = np.asarray(Image.open(io.BytesIO(png)))
        assert np.array_equal(pixels, (image.permute(1, 2, 0) * 255).round().byte().numpy())


def test_a_row_without_a_field_of_the_question_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    file = tmp_path / "judge.yaml"
    file.write_text("form: yes_no\nquestion: '{question}'\n")
    with pytest.raises(ValueError, match=r"prompt 0 has no 'question', which the reward .*vlm:.* needs"):
        check_prompts(f"vlm:http://127.0.0.1:1/v1(template='{file}')", ["a fox"])


# --- servers that misbehave -------------------------------------------------------------------------


def reward_of(address: str, template: VlmTemplate = ONE_AT_A_TIME) -> CheckedReward:
    return CheckedReward("vlm", VlmReward(f"{address}/v1", template, first_wait=0.0))


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"Retry-After": "0"}, "slow down"),
        (500, {}, "oops"),
        (503, {}, ""),
        (200, {"Content-Type": "text/html"}, "<html>Bad gateway</html>"),
        (200, {}, ""),
        None,
        (200, {"Content-Length": "9999"}, json.dumps(tokens(Yes=0.6))),
        (200, {}, json.dumps(tokens(Yes=0.6))[:40]),
        response(tokens(A=1.0)),
    ],
    ids=["429", "500", "503", "HTML", "empty", "closed", "cut off", "half of the JSON", "no yes or no"],
)
def test_after_any_trouble_the_same_score_comes_from_the_next_attempt(trouble: Response | None) -> None:
    with scripted(trouble, trouble, GOOD) as server:
        assert reward_of(server.address)(IMAGES[:1], ["a fox"]).tolist() == pytest.approx([0.75])
    assert len(server.requests) == 3


def test_answers_that_never_have_a_score_are_an_error_and_no_zero() -> None:
    with scripted(response(text("Yes"))) as server, pytest.raises(RuntimeError) as caught:
        reward_of(server.address)(IMAGES[:1], ["a fox"])
    assert len(server.requests) == 3
    assert "3 answers without a score for the prompt 'a fox'; the last has no log-probabilities" in str(caught.value)


def test_a_server_that_stays_broken_is_an_error_once_the_time_is_over() -> None:
    template = VlmTemplate(form="yes_no", question="{prompt}", model="m", timeout=0.3)
    with scripted((500, {}, "out of memory")) as server:
        reward = CheckedReward("vlm", VlmReward(server.address, template, first_wait=0.05))
        with pytest.raises(TimeoutError, match=r"no answer for the prompt 'a fox' within 0\.3 s: 500, out of memory"):
            reward(IMAGES[:1], ["a fox"])
    assert len(server.requests) > 1


def test_a_request_that_is_at_fault_is_not_repeated() -> None:
    refusal = (400, {}, "no images here")
    with scripted(refusal) as server, pytest.raises(RuntimeError, match="refused a request with 400: no images here"):
        reward_of(server.address)(IMAGES[:1], ["a fox"])
    assert len(server.requests) == 1


def test_the_key_comes_from_the_environment_and_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted((401, {}, "")) as server, pytest.raises(PermissionError, match=f"variable {KEY_VARIABLE} is not set"):
        reward_of(server.address)(IMAGES[:1], ["a fox"])
    monkeypatch.setenv(KEY_VARIABLE, "secret-key")
    with scripted((404, {}, "ECHO")) as server, pytest.raises(RuntimeError) as caught:
        reward_of(server.address)(IMAGES[:1], ["a fox"])
    assert "Bearer ***" in str(caught.value)
    with pytest.raises(ValueError, match=f"takes no user or password; set {KEY_VARIABLE} instead"):
        reward_of("http://me:secret@host")


# --- templates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("form: yes\nquestion: '{prompt}'", "form: Input should be 'yes_no', 'digits' or 'rubric'"),
        ("form: digits\nquestion: '{prompt}'\nscale: 20", "scale: Input should be less than or equal to 9"),
        ("form: digits\nquestion: '{prompt}'\nscael: 4", "scael: "),
        ("form: digits\nquestion: How good?", "question has no {prompt}"),
        ("form: rubric\nquestion: '{prompt}'", "aspects belong to the form rubric"),
        ("question: [", "is not YAML"),
        ("just a text", "it: "),
    ],
)
def test_a_template_that_cannot_work_is_refused_with_its_file(lines: str, why: str, tmp_path: Path) -> None:
    file = tmp_path / "judge.yaml"
    file.write_text(lines)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_template(str(file))
    assert str(file) in str(caught.value)
    assert why in str(caught.value)


def test_other_arguments_and_a_missing_template_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes one argument, as in vlm:http://h/v1\(template='judge.yaml'\)"):
        load_reward("vlm:http://h/v1(model='x')")
    with pytest.raises(FileNotFoundError, match=r"no template 'nowhere\.yaml'"):
        load_reward("vlm:http://h/v1(template='nowhere.yaml')")
