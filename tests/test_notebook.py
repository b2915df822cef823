"""docs/notebook.ipynb: its cells run, in order, and it trains the pipeline that it samples from."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebook.ipynb"


def cells(kind: str) -> list[str]:
    """The sources of the cells of one kind."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def run_cell(source: str, namespace: dict[str, Any]) -> Any:
    """Run a cell as a notebook does; return the value of its last line, if that is an expression."""
    module = ast.parse(source)
    last = module.body.pop() if isinstance(module.body[-1], ast.Expr) else None
    exec(compile(module, str(NOTEBOOK), "exec"), namespace)
    return eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), namespace) if last else None


@pytest.mark.slow
def test_the_notebook_samples_scores_searches_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlhf_t2i.training.environment.set_num_threads", lambda count: None)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    shown = [run_cell(source, namespace) for source in cells("code")]
    before, scores, found, result, rewards, after, own = (value for value in shown if value is not None)
    assert scores.shape == (3,)
    assert scores.isfinite().all()
    for image in (before, found, after):
        assert isinstance(image, Image.Image)
    assert found.size == before.size
    assert namespace["found"].scores.reward.amax(dim=1).ge(namespace["found"].scores.reward[:, 0]).all()
    assert len(rewards) == 3
    assert repr(result).startswith("TrainingResult(3 steps, llava_reward -")
    assert namespace["before"][0].tobytes() != namespace["after"][0].tobytes(), "the pipeline is trained in place"
    assert repr(own).startswith("TrainingResult(1 step, colourful ")
    assert result.report.is_file()
    assert torch.is_grad_enabled()


def test_the_notebook_names_each_algorithm_and_imports_public_names() -> None:
    import rlhf_t2i

    public = {name: getattr(rlhf_t2i, name) for name in rlhf_t2i.__all__}
    algorithms = [name for name, value in public.items() if hasattr(value, "train")]
    assert len(algorithms) == 5
    text = "\n".join(cells("markdown"))
    assert [name for name in algorithms if f"`{name}`" not in text] == []
    imports = [node for node in ast.walk(ast.parse("\n".join(cells("code")))) if isinstance(node, ast.ImportFrom)]
    imported = [alias.name for node in imports if node.module == "rlhf_t2i" for alias in node.names]
    assert "ddpo" in imported
    assert set(imported) <= public.keys()
