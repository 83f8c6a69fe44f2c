"""A student in transformers' pipeline and under peft: LoRA on mixers and on kept attention."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "g_proj"]


def test_pipeline(stories: Any) -> None:
    """Text in, the text of `generate` out: alone, and in a batch whose shorter row is padded on the left."""
    from transformers import AutoTokenizer, pipeline

    made = pipeline("text-generation", model=str(stories.folder), trust_remote_code=True, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(stories.folder)
    prompts = ["Once upon a time", "Lily wanted to play with the big red ball"]
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "return_full_text": False}
    alone = [made(prompt, **settings)[0]["generated_text"] for prompt in prompts]
    model = stories.load()
    for prompt, text in zip(prompts, alone, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
        assert text.strip() == tokenizer.decode(tokens, skip_special_tokens=True).strip() != ""
    made.tokenizer.padding_side = "left"
    batch = [row[0]["generated_text"] for row in made(prompts, batch_size=2, **settings)]
    assert batch == alone


def test_peft_lora(stories: Any, tmp_path: Path) -> None:
    """Adapters on the mixers' projections and the kept layer's learn; saved, loaded, merged they give the same."""
    from peft import LoraConfig, PeftModel, get_peft_model

    settings = LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = get_peft_model(stories.load(), settings)
    adapted = {name.split(".layers.")[1].split(".")[0] for name, _ in model.named_parameters() if "lora_B" in name}
    assert adapted == {"0", "1", "2", "3", "4"}
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses, backwards = [], stories.ids.flip(1)
    for _ in range(8):
        loss = model(backwards, labels=backwards).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.2
    still = [name for name, value in model.named_parameters() if "lora_B" in name and not value.abs().max()]
    assert still == []
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(stories.ids).logits
        again = PeftModel.from_pretrained(stories.load(), tmp_path / "adapter").eval()
        assert torch.equal(again(stories.ids).logits, expected)
        merged = copy.deepcopy(again).merge_and_unload()
        torch.testing.assert_close(merged(stories.ids).logits, expected, atol=2e-5, rtol=1e-5)
        assert not torch.allclose(expected, stories.logits, atol=1e-2)
    merged.save_pretrained(tmp_path / "merged")
    loaded = stories._replace(folder=tmp_path / "merged").load()
    with torch.no_grad():
        torch.testing.assert_close(loaded(stories.ids).logits, expected, atol=2e-5, rtol=1e-5)
    start = stories.ids[:, :8]
    made = [m.generate(start, max_new_tokens=10, do_sample=False).tolist() for m in (again, loaded)]
    assert made[0] == made[1]
