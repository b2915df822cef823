"""GenAI-Bench of TIGER-Lab (TIGER-Lab/GenAI-Bench, arXiv:2406.04485): votes on pairs in the GenAI-Arena.

    {"prompt": "a red fox", "left_model": "SDXL", "right_model": "Kandinsky", "left_image": .., "right_image": ..,
     "vote_type": "leftvote"}

`vote_type` is leftvote, rightvote, tievote or bothbad_vote. CMU's data set of the same name is `genai_bench`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from reward_model.benchmarks.read import find_files, image_taker, located_errors, read_records, require_keys
from reward_model.benchmarks.types import Benchmark, Comparison, Item
from reward_model.datasets.fields import BadRecordError, shortened, take_text

VOTES: dict[str, Literal[1, 0, -1]] = {"leftvote": 1, "rightvote": -1, "tievote": 0, "bothbad_vote": 0}
FILES = ("image_generation/test-*.parquet", "test-*.parquet", "test.parquet", "test.jsonl", "test.json")
RULE = (
    "agreement_tie_optimised with the threshold 0: RationalRewards (arXiv:2604.11626) counts tievote and bothbad_vote "
    "as ties, and a prediction as right if it is left, right or tie as the vote (its scoring.py, tolerance 0). "
    "TIGER-Lab asks a VLM for one of four labels. How HPSv3++ and DiNa-LRM count ties is not known; "
    "accuracy_ties_wrong leaves pairs that people tie out."
)


def load_genai_bench_tiger(path: Path, *, image_root: Path | None) -> list[Benchmark]:
    """Load the votes on image generation (1,735 in the paper): Parquet with images, or JSON with paths."""
    files = find_files(path, *FILES, benchmark="genai_bench_tiger")
    take_image = image_taker(image_root or files[0].parent)
    items: list[Item] = []
    comparisons: list[Comparison] = []
    prompts: dict[str, str] = {}
    bad = 0
    for where, fields in read_records(*files):
        with located_errors(where):
            require_keys(fields, "prompt", "left_image", "right_image", "vote_type")
            vote = fields["vote_type"]
            if not isinstance(vote, str) or vote not in VOTES:
                raise BadRecordError(f"'vote_type' is {shortened(vote)}; it must be {', '.join(VOTES)}.")
            bad += vote == "bothbad_vote"
            prompt = take_text(fields, "prompt")
            group = prompts.setdefault(prompt, str(len(prompts)))
            comparisons.append(Comparison(len(items), len(items) + 1, VOTES[vote]))
            for side in ("left", "right"):
                model = fields.get(f"{side}_model")
                tags = {"model": [model]} if isinstance(model, str) else {}
                items.append(Item(take_image(fields[f"{side}_image"], f"{side}_image"), prompt, group, tags))
    note = f"{bad} pairs of which both images are bad count as ties."
    return [Benchmark(name="genai_bench_tiger", rule=RULE, items=items, comparisons=comparisons, notes=[note])]
