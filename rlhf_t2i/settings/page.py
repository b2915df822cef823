"""docs/options.md, made from the settings: `python -m rlhf_t2i.settings.page > docs/options.md`."""

from __future__ import annotations

import sys
from importlib import import_module

from rlhf_t2i.settings.base import options_of
from rlhf_t2i.settings.help import GROUPS, bounds_of, help_of

RECIPES = (
    "ddpo", "flow_grpo", "diffusion_nft", "draft", "diffusion_dpo", "best_of_n", "fk_steering", "evaluate_policy",
    "train_reward_model", "evaluate_reward_model", "collect_preferences", "live_preferences", "publish",
    "compare",
)  # fmt: skip
_HEAD = """# Options

All options of all recipes. `python recipes/RECIPE.py --help` shows those of one recipe, `--print_config` their values
as YAML. An option means the same in every recipe; where its range or default differs, it has a row for each. On the
command line `--flag` alone is true and `null` is no value.
"""


def options_page() -> str:
    """Return the page as Markdown: a table for each group, a row for each option and meaning."""
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for recipe in RECIPES:
        config_class = import_module(f"rlhf_t2i.settings.{recipe}").Config
        texts = help_of(config_class)
        for option in options_of(config_class):
            key = option.group, option.name, texts[option.name], bounds_of(option)
            rows.setdefault(key, []).append(recipe)
    lines = [_HEAD]
    for group in GROUPS:
        found = [(key, recipes) for key, recipes in rows.items() if key[0] == group]
        order = list(dict.fromkeys(name for (_, name, _, _), _ in found))
        lines += [
            f"## {group[0].upper()}{group[1:]}",
            "",
            "| option | meaning | range and default | recipes |",
            "|---|---|---|---|",
        ]
        for (_, name, text, bounds), recipes in sorted(found, key=lambda row: order.index(row[0][1])):
            cells = [f"`--{name}`", text, bounds, ", ".join(recipes)]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(options_page())
