"""`python -m rlhf_t2i.reward_server` keeps a reward in memory and answers requests for it over HTTP."""

from rlhf_t2i.config import parse_config
from rlhf_t2i.reward_server import server

if __name__ == "__main__":
    server.main(parse_config(server.Config, description=server.__doc__ or ""))
