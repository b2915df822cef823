"""Signs of the toy world: their prompts and drawings, and the oracle that reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf_t2i.data.prompts import load_prompts
from rlhf_t2i.rewards.builtin import oracle_graded, oracle_pass, oracle_word
from rlhf_t2i.rewards.ocr import OcrReward
from rlhf_t2i.settings import flow_grpo
from rlhf_t2i.shapes.build_words import misspelt, random_signs
from rlhf_t2i.shapes.names import TOY_SIGN_REWARD
from rlhf_t2i.shapes.sign_oracle import read_signs, sign_scores
from rlhf_t2i.shapes.signs import GROUNDS, LENGTHS, LETTERS, WORDS, Sign, parse_sign, render_signs, words

HELD_OUT = [parse_sign(prompt) for prompt in load_prompts("words", held_out=True)]


def drawn(signs: list[Sign], seed: int = 0) -> torch.Tensor:
    return render_signs(signs, rng=np.random.default_rng(seed))


def test_a_quarter_of_the_words_is_held_out_and_prompts_say_what_they_are_parsed_to() -> None:
    training, held_out = words("training"), words("held-out")
    assert sorted(training + held_out) == sorted(set(WORDS))
    assert 0.2 < len(held_out) / len(WORDS) < 0.3
    assert {len(word) for word in held_out} == set(LENGTHS)
    assert [sign.word for sign in HELD_OUT] == held_out
    assert {(sign.colour, sign.background) for sign in HELD_OUT} == set(GROUNDS)
    assert parse_sign('A sign that says "Fox" in red on a white background') == Sign("FOX", "red", "white")


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ('a sign that says "FO" in red on a white background', "is not in the grammar of the signs"),
        ("a sign that says FOX in red on a white background", "is not in the grammar of the signs"),
        ('a sign that says "FOX" in red on a red background', "letters in the colour of their background"),
    ],
)
def test_prompts_outside_of_the_grammar_of_signs_are_refused(prompt: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        oracle_graded(torch.zeros(1, 3, 24, 80), [prompt])


def test_captions_to_train_on_never_have_a_held_out_word_unless_they_misspell_another() -> None:
    rng = np.random.default_rng(0)
    signs = random_signs(2_000, rng)
    assert not {sign.word for sign in signs} & set(words("held-out"))
    assert {sign.word for sign in signs} & set(words("training"))
    wrong = [a != b for sign in signs for a, b in zip(sign.word, misspelt(sign, rng).word, strict=True)]
    assert np.mean(wrong) == pytest.approx(0.15 * 25 / 26, abs=0.02)


def test_the_oracle_reads_every_held_out_word_as_drawn_and_refuses_each_with_one_wrong_letter_or_colour() -> None:
    images, prompts = drawn(HELD_OUT), [sign.prompt for sign in HELD_OUT]
    assert oracle_pass(images, prompts).min() == oracle_graded(images, prompts).min() == 1
    assert all(reading.fit > 0.95 for reading in read_signs(images))
    place = [i % len(sign.word) for i, sign in enumerate(HELD_OUT)]
    next_letter = {a: LETTERS[(i + 1) % 26] for i, a in enumerate(LETTERS)}
    changed = [s.word[:i] + next_letter[s.word[i]] + s.word[i + 1 :] for i, s in zip(place, HELD_OUT, strict=True)]
    wrong = sign_scores(
        images, [Sign(w, s.colour, s.background).prompt for w, s in zip(changed, HELD_OUT, strict=True)]
    )
    assert not wrong.passed.any()
    assert wrong.graded.tolist() == pytest.approx([1 - 1 / len(sign.word) for sign in HELD_OUT])
    other = [next(c for c in ("red", "blue", "green") if c not in (s.colour, s.background)) for s in HELD_OUT]
    recoloured = sign_scores(
        images, [Sign(s.word, c, s.background).prompt for s, c in zip(HELD_OUT, other, strict=True)]
    )
    assert not recoloured.passed.any()
    assert recoloured.graded.max() == 0.5


def test_the_oracle_reads_letters_at_random_through_noise_and_in_another_size() -> None:
    signs = random_signs(100, np.random.default_rng(1))
    images = drawn(signs)
    noisy = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    larger = torch.nn.functional.interpolate(images, scale_factor=2, mode="bilinear")
    for seen in (noisy, larger):
        assert [reading.sign.word for reading in read_signs(seen)] == [sign.word for sign in signs]


def test_noise_and_a_blank_sign_are_not_legible() -> None:
    noise = torch.rand(8, 3, 24, 80, generator=torch.Generator().manual_seed(0))
    blank = torch.full((1, 3, 24, 80), 0.5)
    assert all(reading.fit < 0.2 for reading in read_signs(torch.cat([noise, blank])))


def test_one_letter_that_is_half_covered_is_not_legible_whatever_the_others_are() -> None:
    images, prompts = drawn([Sign("HOUSE", "red", "white")]), [Sign("HOUSE", "red", "white").prompt]
    images[..., 10:, 48:64] = images[..., :1, :1]
    assert read_signs(images)[0].fit < 0.6
    assert not sign_scores(images, prompts).passed.any()


def test_a_word_is_read_in_other_colours_and_scored_apart_from_them() -> None:
    images, asked = drawn([Sign("HOUSE", "red", "white")]), Sign("HOUSE", "blue", "white").prompt
    other = Sign("HORSE", "red", "white").prompt
    assert (oracle_word(images, [asked]).item(), oracle_pass(images, [asked]).item()) == (1, 0)
    assert oracle_word(images, [other]).item() == 0


def test_ocr_and_oracle_agree_about_drawings() -> None:
    signs = [sign for sign in HELD_OUT if sign.background in ("white", "black", "yellow")][:12]
    images, prompts = drawn(signs), [sign.prompt for sign in signs]
    scores = OcrReward(min_side=64)(images, prompts, [{"prompt": prompt} for prompt in prompts])
    assert (scores == oracle_pass(images, prompts)).sum() >= 11


def test_options_of_the_model_of_words_are_about_words_by_default() -> None:
    config = flow_grpo.Config(model="words-flow")
    assert (config.prompts, config.evaluation_prompts, config.rewards) == ("words", "words", TOY_SIGN_REWARD)
    assert config.evaluation_rewards == f"oracle,oracle_pass,oracle_word,{TOY_SIGN_REWARD}"
    assert flow_grpo.Config().prompts == "shapes"
