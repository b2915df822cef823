"""Serve rewards over HTTP to trainers on other machines: images in, scores out.

    RLHF_T2I_TOKEN=... python -m rlhf_t2i.reward_server --rewards llava_reward --port 8000

A trainer then takes `--rewards http://HOST:8000`. `POST /score` is described in rlhf_t2i/rewards/wire_format.py,
`GET /health` responds once the rewards are loaded, `GET /metrics` is in the format of Prometheus. If RLHF_T2I_TOKEN is
set, all requests but /health need that token; otherwise only this machine can be served. SIGTERM or Ctrl-C finishes the
requests that were accepted.
"""

from rlhf_t2i.config import parse_config, require, run_command
from rlhf_t2i.settings.reward_server import Config

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    config = parse_config(Config, __doc__)
    require("fastapi", "uvicorn", "prometheus_client", extra="serve")

    from rlhf_t2i.reward_server.server import main

    run_command(main, config)
