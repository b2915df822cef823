"""A VLM reward against a real server, `transformers serve`, with a tiny LLaVA that always writes the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rlhf_t2i.rewards.load import load_reward
from tests.reward_models import backbone_folder
from tests.servers import free_port, until

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red fox", "a fox", "a blue cat on a fox"]


def save_llava_that_writes(text: str, folder: Path) -> None:
    """Save a model to which every token is the same, but for the token of the text, after which it stops."""
    source = backbone_folder("llava")
    model, tokenizer = LlavaForConditionalGeneration.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([text])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    words, written = model.model.language_model, len(tokenizer) - 1
    with torch.no_grad():
        for layer in words.layers:  # a layer adds nothing
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        words.embed_tokens.weight.copy_(torch.eye(words.embed_tokens.embedding_dim)[0])
        words.embed_tokens.weight[written] = torch.eye(words.embed_tokens.embedding_dim)[1]
        words.norm.weight.fill_(1)
        model.lm_head.weight.zero_()
        model.lm_head.weight[written, 0] = model.lm_head.weight[tokenizer.eos_token_id, 1] = 1
    model.save_pretrained(folder)
    processor = LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(source), tokenizer, patch_size=14, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=tokenizer.chat_template,
    )  # fmt: skip
    processor.save_pretrained(folder)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of `transformers serve` with such a model in the folder `vlm`."""
    pytest.importorskip("openai", reason="the server of transformers needs openai, which the extra dev installs")
    from transformers.cli.serve import Serve

    save_llava_that_writes("Style: 4\nAlignment (1-5): 2/5", tmp_path / "vlm")
    port = free_port()
    served = Serve(str(tmp_path / "vlm"), host="127.0.0.1", port=port, device="cpu", non_blocking=True)
    try:
        until(lambda: served.server.started)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        served.kill_server()


@pytest.mark.slow
def test_the_server_of_transformers_answers_a_rubric_and_is_refused_where_log_probabilities_are_needed(
    server: str, tmp_path: Path
) -> None:
    (tmp_path / "rubric.yaml").write_text(
        f"form: rubric\nquestion: Rate {{prompt}}.\naspects: [Style, Alignment]\nmodel: {tmp_path / 'vlm'}\n"
    )
    reward = load_reward(f'vlm:{server}(template="{tmp_path}/rubric.yaml")')
    assert reward(IMAGES, PROMPTS).tolist() == [pytest.approx((3 / 4 + 1 / 4) / 2)] * 3
    for form in ("yes_no", "digits"):
        (tmp_path / f"{form}.yaml").write_text(f"form: {form}\nquestion: '{{prompt}}?'\nmodel: {tmp_path / 'vlm'}\n")
        with pytest.raises(RuntimeError, match=r"no log-probabilities .*use a server that returns them or the form"):
            load_reward(f'vlm:{server}(template="{tmp_path}/{form}.yaml")')(IMAGES, PROMPTS)
