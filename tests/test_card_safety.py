"""A publication names no path of the machine that trained, and no text of a run breaks its card."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from recipes import publish as recipe
from rlhf_t2i.hub.local_paths import LocalPaths
from rlhf_t2i.hub.model_card import shell_text, yaml_text
from rlhf_t2i.hub.publication import list_files
from tests.publications import BASE

# --- local paths ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("accelerate launch /home/ada/code/recipes/ddpo.py --seed 1", "accelerate launch ddpo.py --seed 1"),
        ("x.py --model=/data/sd15 --prompts ~/p.txt", "x.py --model=sd15 --prompts p.txt"),
        ("llava_reward:/home/ada/runs/a/reward_model=0.5,hps:/d/hps", "llava_reward:reward_model=0.5,hps:hps"),
        ("--model '/home/ada/sd15'", "--model 'sd15'"),
        ("--weights ../runs/ddpo-1/lora", "--weights lora"),
        (r"--model C:\Users\ada\sd15", "--model sd15"),
        ("recipes/ddpo.py --model owner/name --rewards my_rewards:brightness", None),
        ("https://huggingface.co/owner/name hf:owner/name@train 1/2 and/or", None),
        ("http://localhost:8000/score", None),
    ],
)
def test_a_path_becomes_its_last_part_and_names_stay(text: str, public: str | None) -> None:
    assert LocalPaths([text]).hidden(text) == (text if public is None else public)


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("<code>/code</code> and/code /code-2", "<code>code</code> and/code /code-2"),
        ("/coded /code.py /code/x.py", "/coded /code.py code/x.py"),
        ("in /code. '/code' |/code| &quot;/code&quot; \\n/code", "in code. 'code' |code| &quot;code&quot; \\ncode"),
        ("/home/ada2 /home/ada/run2 /home/ada /code/../code", "/home/ada2 ada/run2 ada code/../code"),
    ],
)  # fmt: skip
def test_only_whole_paths_are_replaced(text: str, public: str) -> None:
    assert LocalPaths(["--x /code --y /home/ada"]).hidden(text) == public


def test_two_paths_with_one_name_stay_different() -> None:
    """Otherwise two rewards of one run would become one. A name of the toy world is never used."""
    paths = LocalPaths(["/a/reward_model", "/b/reward_model", "/models/shapes", "/a/reward_model/"])
    assert paths.hidden("/a/reward_model /b/reward_model") == "reward_model reward_model-2"
    assert paths.hidden("/models/shapes") == "shapes-2"


def test_a_path_with_blanks_and_commas_is_found_whole(tmp_path: Path) -> None:
    folder = tmp_path / "my models, old" / "sd15"
    folder.mkdir(parents=True)
    assert LocalPaths([str(folder)]).hidden({"model": [str(folder)]}) == {"model": ["sd15"]}


def test_files_are_searched_in_the_form_in_which_they_write_a_path(tmp_path: Path) -> None:
    path = "/home/ada & co/m\u00fcller/sd15"
    (tmp_path / "a.json").write_text(json.dumps({"model": path}))
    (tmp_path / "b.html").write_text(f"<pre>{path.replace('&', '&amp;')}</pre>")
    (tmp_path / "c.safetensors").write_text(path)
    paths = LocalPaths([])
    paths.names[path] = "sd15"
    paths.hide_in_files(tmp_path)
    assert json.loads((tmp_path / "a.json").read_text()) == {"model": "sd15"}
    assert (tmp_path / "b.html").read_text() == "<pre>sd15</pre>"
    assert (tmp_path / "c.safetensors").read_text() == path


def assert_without_paths(folder: Path, *, run: Path) -> None:
    roots = {str(run.parent), str(Path.home()), "/tmp/"}
    for name in list_files(folder):
        if not name.endswith((".safetensors", ".png", "SHA256SUMS")):
            text = (folder / name).read_text()
            assert not [root for root in roots if root in text], name


@pytest.mark.parametrize("merge_lora", [False, True], ids=["LoRA", "pipeline"])
def test_a_publication_names_no_path_of_this_machine(lora_run: Path, tmp_path: Path, merge_lora: bool) -> None:
    run = shutil.copytree(lora_run, tmp_path / "run")
    info = json.loads((run / "run.json").read_text())
    command = f"{info['command']} {run}/x.py --run_folder {run}"
    (run / "run.json").write_text(json.dumps({**info, "command": command}))
    folder = recipe.main(recipe.Config(run=str(run), folder=str(tmp_path / "out"), base=BASE, merge_lora=merge_lora))
    assert_without_paths(folder, run=run)
    assert " x.py --run_folder run\n" in (folder / "README.md").read_text()


def test_the_publication_of_a_reward_model_names_no_path_of_this_machine(
    reward_model_run: Path, tmp_path: Path
) -> None:
    folder = recipe.main(recipe.Config(run=str(reward_model_run), folder=str(tmp_path / "out"), license="mit"))
    assert_without_paths(folder, run=reward_model_run)
    assert {"report.html", "training/history.json", "training/metrics.json"} <= set(list_files(folder))


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("--rewards http://10.0.0.5:8000|http://10.0.0.6:8000", "--rewards http://host:8000|http://host-2:8000"),
        ("http://gpu1:8000 http://node.lan/x me@vault.lan", "http://host:8000 http://host-2/x me@host-3"),
        ("http://[fd00::1]:80 192.168.1.7", "http://host:80 host-2"),
        ("http://127.0.0.1:8000 http://localhost https://huggingface.co/x 8.8.8.8 torch 2.13.0.1", None),
    ],
)
def test_private_hosts_are_hidden_and_public_ones_are_not(text: str, hidden: str | None) -> None:
    assert LocalPaths([text]).hidden(text) == (text if hidden is None else hidden)


# --- texts of a run in the card -------------------------------------------------------------------

EVIL = "accelerate launch x\n```\n<script>alert(1)</script>\n```"


def test_a_command_cannot_leave_its_block_of_code(lora_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(lora_run, tmp_path / "run")
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**info, "command": EVIL, "device": "a\n# b <script>"}))
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "prompts": EVIL}))
    folder = recipe.main(recipe.Config(run=str(run), folder=str(tmp_path / "out"), base=BASE))
    card = (folder / "README.md").read_text()
    assert "<script" not in card
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", card, flags=re.M | re.S)
    assert [kind for kind, _ in blocks] == ["python", "python", "", "yaml"]
    assert blocks[2][1].startswith("accelerate launch x ")
    assert yaml.safe_load(blocks[3][1])["prompts"] == EVIL


def test_an_ordinary_command_is_unchanged() -> None:
    command = "accelerate launch recipes/ddpo.py --prompts 'my prompts.txt' --seed 1"
    assert shell_text(command) == command


@pytest.mark.parametrize("word", ["a`b", "a<b", "line\nbreak", "it's <b>", "back\\slash`"])
def test_a_quoted_word_is_read_back_by_a_shell(word: str) -> None:
    """$'...' of bash; Python's strings have the same escapes."""
    text = shell_text(shlex.join(["run", word, "plain"]))
    assert not set(text) & set("`<\n")
    quoted = re.fullmatch(r"run \$('.*') plain", text)
    assert quoted is not None
    assert eval(quoted[1]) == word


def test_settings_with_markup_are_yaml() -> None:
    config = {"prompts": "a ``` b <script>", "seed": 1, "model": "plain: text"}
    text = yaml_text(config)
    assert not set(text) & set("`<")
    assert yaml.safe_load(text) == config
