"""The table of rewards: every NAME that `--rewards` takes, with its loader and its properties.

Option help, error messages, `require_gradient` and the table in docs/rewards.md are made from it. It imports only the
standard library; a loader imports what its reward needs when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

Loader = Callable[[str, bool], Any]
"""(argument, finite) -> reward. `argument` is what follows the colon in NAME:PATH, the whole name for module:function
and for an address, and empty otherwise. `finite` is false if the caller accepts scores that are not finite."""


@dataclass(frozen=True, slots=True)
class RewardEntry:
    """One row of the table."""

    name: str
    """NAME, NAME:PATH, NAME:URL, module:function or http://HOST:PORT, as written on the command line."""
    load: Loader
    differentiable: bool | None
    """True if the gradient reaches the pixels; None if that is tested on a random image when a recipe needs it."""
    help: str
    """One line: what a score is, and its range or unit."""
    declares: Callable[[str], Any] = lambda _: None
    """Argument of the loader -> the function or class of the reward, which is not loaded by it; it may declare the
    fields of prompt rows that it needs (`rows`)."""

    @property
    def takes_path(self) -> bool:
        """True for NAME:PATH and NAME:URL."""
        return self.name.endswith((":PATH", ":URL"))


# --- loaders --------------------------------------------------------------------------------------


def function(module: str, name: str) -> Loader:
    """Return the loader of a function of this project; its module is imported when the reward is loaded."""
    return lambda _, __: getattr(import_module(module), name)


def class_of(module: str, name: str) -> Callable[[str], Any]:
    """Return what imports a class of this project, which may declare what a row must have, without instantiating it."""
    return lambda _: getattr(import_module(module), name)


def _built_in_llava_reward(_: str, __: bool) -> Any:
    from rlhf_t2i.shapes.names import TOY_REWARD_MODEL

    return _llava_reward(TOY_REWARD_MODEL, True)


def _llava_reward(path: str, _: bool) -> Any:
    from rlhf_t2i.rewards.llava_reward import LlavaRewardFunction
    from rlhf_t2i.rewards.placement import placed

    return placed(LlavaRewardFunction, path, options=("merge", "quantization"))


def _pairwise(path: str, _: bool) -> Any:
    from rlhf_t2i.rewards.pairwise import PairwiseReward
    from rlhf_t2i.rewards.placement import placed

    return placed(PairwiseReward, path, options=("batch_size", "perspective"))


def _scorer(name: str) -> Loader:
    def load(path: str, _: bool) -> Any:
        from rlhf_t2i.rewards.placement import placed
        from rlhf_t2i.rewards.scorers import load_function

        return placed(
            lambda path, dtype="float32": load_function(f"{name}:{path}", dtype=dtype), path, options=("dtype",)
        )

    return load


def _soft_tifa(path: str, _: bool) -> Any:
    from rlhf_t2i.rewards.placement import placed
    from rlhf_t2i.rewards.scorers import load_soft_tifa

    return placed(load_soft_tifa, path, options=("aggregate",))


def _vlm(argument: str, _: bool = True) -> Any:
    from rlhf_t2i.rewards.vlm import load_vlm

    return load_vlm(argument)


def _geneval(graded: bool) -> Loader:
    def load(_: str, __: bool) -> Any:
        from rlhf_t2i.rewards.geneval import GenevalReward

        return GenevalReward(graded=graded)

    return load


def _ocr(_: str, __: bool) -> Any:
    from rlhf_t2i.rewards.ocr import OcrReward

    return OcrReward()


def _ocr_by_model(path: str, _: bool) -> Any:
    from rlhf_t2i.rewards.ocr import ReaderReward
    from rlhf_t2i.rewards.placement import placed
    from rlhf_t2i.rewards.scorers import load_text_reader

    return placed(lambda path: ReaderReward(load_text_reader(path)), path)


def _imported(name: str, _: bool) -> Any:
    from rlhf_t2i.rewards.imported import import_reward

    return import_reward(name)


def _import_only(name: str) -> Any:
    from rlhf_t2i.rewards.imported import find_callable

    return find_callable(name)


def _remote(addresses: str, finite: bool) -> Any:
    from rlhf_t2i.rewards.remote import RemoteReward

    return RemoteReward(addresses, finite=finite)


# --- the table ------------------------------------------------------------------------------------

IMPORTED = RewardEntry(
    "module:function",
    _imported,
    None,
    "a Python callable of your own, perhaps with arguments, or file.py:function",
    _import_only,
)
REMOTE = RewardEntry("http://HOST:PORT", _remote, False, "a reward that `python -m rlhf_t2i.reward_server` serves")

_BUILTIN = "rlhf_t2i.rewards.builtin"
REWARDS = (
    RewardEntry(
        "llava_reward",
        _built_in_llava_reward,
        True,
        "the built-in reward model, for prompts of the toy world: the log-likelihood of the prompt, scaled",
    ),
    RewardEntry(
        "llava_reward:PATH",
        _llava_reward,
        True,
        "a LLaVA-Reward of your own: folder, run folder or Hub id; shapes-skip-ca is a built-in one with SkipCA",
    ),
    RewardEntry(
        "pairwise:PATH",
        _pairwise,
        False,
        "share of the other images of its prompt that an image wins against, by a LLaVA-Reward, in [0, 1]",
    ),
    RewardEntry(
        "oracle", function(_BUILTIN, "oracle_graded"), False, "true reward of the toy world, graded, in [0, 1]"
    ),
    RewardEntry(
        "oracle_pass",
        function(_BUILTIN, "oracle_pass"),
        False,
        "1 if an image meets every condition of its toy prompt, else 0",
    ),
    RewardEntry(
        "oracle_word",
        function(_BUILTIN, "oracle_word"),
        False,
        "1 if the oracle reads the word of a toy prompt about a sign, in any colour, else 0",
    ),
    RewardEntry(
        "jpeg_compressibility",
        function(_BUILTIN, "jpeg_compressibility"),
        False,
        "minus the size as JPEG of quality 95, in kB",
    ),
    RewardEntry(
        "jpeg_incompressibility",
        function(_BUILTIN, "jpeg_incompressibility"),
        False,
        "the size as JPEG of quality 95, in kB",
    ),
    RewardEntry("clip:PATH", _scorer("clip"), True, "image-text logit of a CLIP, exp(logit_scale) * cosine"),
    RewardEntry("clip_score:PATH", _scorer("clip_score"), True, "CLIPScore of a CLIP, 2.5 * max(cosine, 0)"),
    RewardEntry("pick_score:PATH", _scorer("pick_score"), True, "PickScore v1, the logit of its CLIP"),
    RewardEntry("hps:PATH", _scorer("hps"), True, "HPSv2 or HPSv2.1, a cosine in [-1, 1]"),
    RewardEntry("hps_v3:PATH", _scorer("hps_v3"), True, "HPSv3, the mean of a normal distribution, unbounded"),
    RewardEntry("image_reward:PATH", _scorer("image_reward"), True, "ImageReward v1, about a standard normal"),
    RewardEntry("aesthetic:PATH", _scorer("aesthetic"), True, "LAION's aesthetic predictor, about 1 to 10"),
    RewardEntry(
        "nudity", function("rlhf_t2i.rewards.nudity", "nudity"), False, "1 - the highest score of a naked part"
    ),
    RewardEntry("vqa_score:PATH", _scorer("vqa_score"), True, "VQAScore of a multimodal LLM, a probability in [0, 1]"),
    RewardEntry(
        "visual_gpt_score:PATH",
        _scorer("visual_gpt_score"),
        True,
        "VisualGPTScore of a multimodal LLM, log-likelihood of the prompt given the image in nats, at most 0",
    ),
    RewardEntry(
        "unified_reward:PATH",
        _scorer("unified_reward"),
        False,
        "UnifiedReward 2.0: mean of the ratings of alignment, coherence and style, in [0, 1]",
    ),
    RewardEntry(
        "soft_tifa:PATH",
        _soft_tifa,
        True,
        "Soft-TIFA of GenEval 2: mean probability of the answers to the questions of a prompt, in [0, 1]",
        class_of("rlhf_t2i.rewards.scorers", "SoftTifa"),
    ),
    RewardEntry("vlm:URL", _vlm, False, "answer of a VLM at an OpenAI-compatible server, in [0, 1]", _vlm),
    RewardEntry(
        "ocr",
        _ocr,
        False,
        "share of the text in the prompt's quotation, or in its field text, that PP-OCR reads, in [0, 1]",
        class_of("rlhf_t2i.rewards.ocr", "OcrReward"),
    ),
    RewardEntry(
        "ocr:PATH",
        _ocr_by_model,
        False,
        "share of that text that a multimodal LLM reads, in [0, 1]",
        class_of("rlhf_t2i.rewards.ocr", "ReaderReward"),
    ),
    RewardEntry(
        "geneval",
        _geneval(False),
        False,
        "1 if a detector finds the objects, colours and positions of a GenEval row, else 0",
        class_of("rlhf_t2i.rewards.geneval", "GenevalReward"),
    ),
    RewardEntry(
        "geneval:graded",
        _geneval(True),
        False,
        "mean over the conditions of a GenEval row, in [0, 1]",
        class_of("rlhf_t2i.rewards.geneval", "GenevalReward"),
    ),
    IMPORTED,
    REMOTE,
)


def find_reward(name: str) -> tuple[RewardEntry, str]:
    """Return the row for a name and the argument of its loader.

    Raises ValueError, listing the known names, for a name that is not in the table.
    """
    if name.startswith(("http://", "https://")):
        return REMOTE, name
    prefix, colon, path = name.partition(":")
    for entry in REWARDS:
        if not entry.takes_path and name == entry.name:
            return entry, ""
        if colon and entry.name in (f"{prefix}:PATH", f"{prefix}:URL"):
            return entry, path
    if colon:
        return IMPORTED, name
    raise ValueError(f"There is no reward {name!r}; choose from {', '.join(reward_names())}.")


def is_imported(name: str) -> bool:
    """Return True for a name of the form module:function."""
    try:
        return find_reward(name)[0] is IMPORTED
    except ValueError:
        return False


def reward_names(*, differentiable: bool = False) -> tuple[str, ...]:
    """Return the names of the table; with `differentiable`, without rewards that have no gradient."""
    return tuple(entry.name for entry in REWARDS if not differentiable or entry.differentiable is not False)


def markdown_table() -> str:
    """Return the table of docs/rewards.md."""
    differentiable = {True: "yes", False: "no", None: "tested on a random image at the start"}
    rows = [f"| `{entry.name}` | {entry.help} | {differentiable[entry.differentiable]} |" for entry in REWARDS]
    return "\n".join(["| NAME | score | differentiable |", "|---|---|---|", *rows]) + "\n"
