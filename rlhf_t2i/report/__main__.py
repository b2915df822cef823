"""Write the report of finished or running runs and searches, and print its path.

python -m rlhf_t2i.report --runs runs/ddpo-DATE,runs/best_of_n-DATE
"""

from pathlib import Path

from rlhf_t2i.config import parse_config, run_command
from rlhf_t2i.output.run_folder import is_reward_model, is_search
from rlhf_t2i.settings.lists import names
from rlhf_t2i.settings.report import Config


def main(config: Config) -> None:
    """Write the reports and print their paths."""
    for folder in map(Path, names(config.runs)):
        if is_search(folder):
            from rlhf_t2i.report.search import write_report  # imports torch, which the report of a run does not need
        elif is_reward_model(folder):
            from rlhf_t2i.report.reward_model import write_report
        else:
            from rlhf_t2i.report.page import write_report
        print(write_report(folder))  # noqa: T201


if __name__ == "__main__":
    run_command(main, parse_config(Config, __doc__))
