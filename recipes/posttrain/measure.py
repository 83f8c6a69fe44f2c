"""What a method is judged by, on held-out examples: loss of completions, preferred pairs, right answers."""

from __future__ import annotations

from typing import Any

import torch

from ...distill.files import finite
from ...eval.fidelity import clustered_mean
from . import rewards
from .examples import Record
from .schema import PosttrainRecipe

METRIC = {
    "sft": ("completion loss", False),
    "dpo": ("preference accuracy", True),
    "grpo": ("right answers", True),
}
"""What each method has to move: its name, and whether more is better."""

SAMPLES = 8
"""Completions that are shown."""


def measure(
    recipe: PosttrainRecipe, trainer: Any, valid: list[Record], before: dict[str, Any] | None
) -> dict[str, Any]:
    """The method's metric on held-out examples, greedy or exact: no random number is used up.

    Args:
        recipe: for the method and its settings.
        trainer: TRL's, with held-out examples as it prepared them.
        valid: the same as records, for grpo.
        before: what this returned before training, None then.

    Returns:
        {"name", "value", "stderr" (clustered by example), "n" (examples)}, and what belongs to the method: sft
        `perplexity`; dpo `logps` of each pair, and once trained `implicit`: the share of pairs whose preference grew,
        which is DPO's own accuracy against the model as it began; grpo `reward`, `ended` and `samples`.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if recipe.method == "grpo":
                found = _answers(recipe, model, trainer.processing_class, valid)
            else:
                sums = _completions(trainer)
                found = _loss(sums) if recipe.method == "sft" else _preferred(sums, before)
    finally:
        model.train(training)
    return finite({"name": METRIC[recipe.method][0], **found})


def _completions(trainer: Any) -> list[tuple[float, int]]:
    """(log-probability in nats, tokens) of each completion; of pairs all chosen ones first, then the rejected."""
    chosen: list[tuple[float, int]] = []
    rejected: list[tuple[float, int]] = []
    for batch in trainer.get_eval_dataloader():
        labels = batch.get("labels")
        pairs = labels is None
        if pairs:
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        with trainer.compute_loss_context_manager():
            made = trainer.model(**inputs, labels=labels, fused_lm_head=True)
        rows = list(zip(made.log_probs.double().sum(-1).tolist(), made.label_mask.sum(-1).tolist(), strict=True))
        half = len(rows) // 2 if pairs else len(rows)
        chosen += rows[:half]
        rejected += rows[half:]
    return chosen + rejected


def _loss(sums: list[tuple[float, int]]) -> dict[str, Any]:
    table = torch.tensor(sums, dtype=torch.float64)
    value, stderr = clustered_mean(-table[:, 0], table[:, 1])
    return {"value": value, "stderr": stderr, "n": len(sums), "perplexity": float(torch.tensor(value).exp())}


def _preferred(sums: list[tuple[float, int]], before: dict[str, Any] | None) -> dict[str, Any]:
    half = len(sums) // 2
    pairs = [(a, b) for (a, _), (b, _) in zip(sums[:half], sums[half:], strict=True)]
    found = {**_share([_more(a, b) for a, b in pairs]), "logps": pairs}
    if before is not None:
        began = before["logps"]
        found["implicit"] = _share([_more(a - c, b - d) for (a, b), (c, d) in zip(pairs, began, strict=True)])
    return found


def _share(hits: list[float]) -> dict[str, Any]:
    value, stderr = clustered_mean(torch.tensor(hits, dtype=torch.float64), torch.ones(len(hits), dtype=torch.float64))
    return {"value": value, "stderr": stderr, "n": len(hits)}


def _more(a: float, b: float) -> float:
    return 0.5 if a == b else float(a > b)


def _answers(recipe: PosttrainRecipe, model: Any, tokenizer: Any, valid: list[Record]) -> dict[str, Any]:
    """Greedy completions of the held-out prompts, through the recurrent cache."""
    settings = recipe.grpo
    assert settings is not None
    right, rewarded, ended, samples = [], 0.0, 0, []
    exact = settings.model_copy(update={"reward": "exact"})
    size = recipe.micro_batch or recipe.batch
    for start in range(0, len(valid), size * settings.generations):
        part = valid[start : start + size * settings.generations]
        encoded = encode([record["prompt"] for record in part], tokenizer)
        encoded = {name: tensor.to(model.device) for name, tensor in encoded.items()}
        made = model.generate(
            **encoded,
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
        )[:, encoded["input_ids"].shape[1] :]
        ended += int((made == tokenizer.eos_token_id).any(-1).sum())
        for record, text in zip(part, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
            right.append(rewards.reward(text, record["answer"], exact))
            rewarded += rewards.reward(text, record["answer"], settings)
            if len(samples) < SAMPLES:
                samples.append({"prompt": record["prompt"], "completion": text, "answer": record["answer"]})
    return {
        **_share(right),
        "reward": rewarded / len(valid),
        "ended": ended / len(valid),
        "samples": samples,
    }


def encode(prompts: list[Any], tokenizer: Any) -> dict[str, Any]:
    """Prompts, texts or messages, as a batch padded on the left: {input_ids, attention_mask}."""
    if isinstance(prompts[0], str):
        ids = tokenizer(prompts)["input_ids"]
    else:
        ids = [
            tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=True)["input_ids"] for p in prompts
        ]
    padded = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    return {name: padded[name] for name in ("input_ids", "attention_mask")}
