"""Write the report of finished or running runs and searches, and print its path.

python -m rlhf_t2i.report --runs runs/ddpo-DATE,runs/best_of_n-DATE

With --serve, serve a page of all runs under a folder, which refreshes while they train, and the report of each:

python -m rlhf_t2i.report --runs runs --serve
"""

from contextlib import suppress
from pathlib import Path

from rlhf_t2i.config import parse_config, run_command
from rlhf_t2i.output.run_folder import is_reward_model, is_search
from rlhf_t2i.settings.lists import names
from rlhf_t2i.settings.report import Config


def main(config: Config) -> None:
    """Write the reports and print their paths, or serve all runs of a folder until Ctrl-C or SIGTERM."""
    if config.serve:
        serve(Path(names(config.runs)[0]), config)
        return
    for folder in map(Path, names(config.runs)):
        if is_search(folder):
            from rlhf_t2i.report.search import write_report  # imports torch, which the report of a run does not need
        elif is_reward_model(folder):
            from rlhf_t2i.report.reward_model import write_report
        else:
            from rlhf_t2i.report.page import write_report
        print(write_report(folder))  # noqa: T201


def serve(root: Path, config: Config) -> None:
    """Print the address of the page of all runs, and serve it."""
    from rlhf_t2i.access import listen, token
    from rlhf_t2i.http_server import listens_on_loopback, make_server
    from rlhf_t2i.report.overview import create_app

    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder; --runs with --serve is a folder that contains runs.")
    with listen(config.host, config.port) as listener:
        app = create_app(root, loopback=listens_on_loopback(listener), secret=token())
        listener.listen()  # whoever reads the address may connect at once
        host, port = listener.getsockname()[:2]
        print(f"runs      {root}\npage      http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)  # noqa: T201
        with suppress(KeyboardInterrupt):
            make_server(app, log_level="warning").run(sockets=[listener])


if __name__ == "__main__":
    run_command(main, parse_config(Config, __doc__))
