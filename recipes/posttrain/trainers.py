"""A recipe as a trainer of TRL: what is said to it, and what it takes for granted that does not hold here."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...distill.errors import MachineError, UserError
from ...distill.lora import lora_config, require_peft, settings_of
from .examples import Examples, Record, tokenised
from .measure import encode
from .rewards import reward_function
from .schema import PosttrainRecipe

CHECKPOINTS = "checkpoints"


def require_trl(recipe: PosttrainRecipe) -> None:
    """Refuse where a library is missing, or the machine has more GPUs in sight than one process can use.

    Raises:
        MachineError: with what to type.
    """
    if find_spec("trl") is None:
        raise MachineError(
            "relinear posttrain: the package trl is not installed. Install it: pip install 'relinear[posttrain]'. "
            "Without it, glue trains on text or conversations too: relinear run, with stages.glue.loss={ce: 1.0}"
        )
    if recipe.train == "lora":
        require_peft(recipe.place("train"))
    import torch

    if recipe.engine.device != "cpu" and torch.cuda.is_available() and torch.cuda.device_count() > 1:
        raise MachineError(
            f"{torch.cuda.device_count()} GPUs are in sight, and this is one process on one of them. Hide the others: "
            "CUDA_VISIBLE_DEVICES=0 relinear posttrain …"
        )


@contextmanager
def quiet(tied: Sequence[str] = ()) -> Iterator[None]:
    """TRL and datasets without telemetry, without progress bars, and without warnings meant for TRL's authors.

    Args:
        tied: names of weights that no file holds, as they are others' too: of these alone transformers need not say
            that a saved step lacks them.
    """
    import datasets
    from huggingface_hub import constants

    bars, sent = datasets.is_progress_bar_enabled(), constants.HF_HUB_DISABLE_TELEMETRY
    datasets.disable_progress_bar()
    constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL reports every trainer that is made
    logger, expected = logging.getLogger("transformers.trainer"), f"missing keys in the checkpoint model loaded: {tied}"

    def unexpected(record: logging.LogRecord) -> bool:
        return expected not in record.getMessage()

    logger.addFilter(unexpected)
    try:
        with warnings.catch_warnings():
            # TRL says gradient_checkpointing where transformers 5.24 says activation_checkpointing.
            warnings.filterwarnings("ignore", message=r".*gradient_checkpointing.*", category=FutureWarning)
            yield
    finally:
        logger.removeFilter(unexpected)
        constants.HF_HUB_DISABLE_TELEMETRY = sent
        if bars:
            datasets.enable_progress_bar()


def open_trainer(
    recipe: PosttrainRecipe,
    model: Any,
    tokenizer: Any,
    examples: Examples,
    folder: Path,
    reference: Callable[[], Any],
    callbacks: list[Any],
) -> Any:
    """TRL's trainer for a recipe.

    Args:
        recipe: checked.
        model: a RelinearForCausalLM in fp32; what trains has `requires_grad`. TRL patches its forward; see `plain`.
        tokenizer: its own, with a chat template where examples are chats.
        examples: already limited.
        folder: the run's.
        reference: loads the model as it began, for dpo and grpo's KL term; not called with adapters, which are
            switched off instead.
        callbacks: of the Trainer.
    """
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    adapters = None
    if recipe.train == "lora" and recipe.lora is not None:
        adapters = lora_config(model, settings_of(recipe.lora.model_dump()), recipe.place("lora"))
    make = {"sft": _sft, "dpo": _dpo, "grpo": _grpo}[recipe.method]
    shared = {"model": model, "processing_class": tokenizer, "callbacks": callbacks, "peft_config": adapters}
    trainer = make(recipe, shared, examples, arguments(recipe, folder, model.device.type), reference)
    for dataset, what in ((trainer.train_dataset, "to train on"), (trainer.eval_dataset, "held out")):
        if dataset is not None and not len(dataset):
            raise UserError(
                f"{recipe.place('max_length')}: of the examples {what}, no prompt leaves room for a completion in "
                f"{length(recipe, model)} tokens. Give shorter ones, or more: max_length=512"
            )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    return trainer


def arguments(recipe: PosttrainRecipe, folder: Path, device: str) -> dict[str, Any]:
    """What every trainer is told: the recipe in the Trainer's words."""
    from transformers import TrainingArguments

    micro = recipe.micro_batch or recipe.batch
    known = TrainingArguments.__dataclass_fields__
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {
        "output_dir": str(folder / CHECKPOINTS),
        "max_steps": recipe.steps,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": recipe.batch // micro,
        "learning_rate": recipe.lr,
        "lr_scheduler_type": "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        "warmup_steps": recipe.warmup,
        "adam_beta1": recipe.betas[0],
        "adam_beta2": recipe.betas[1],
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": 0.0 if recipe.clip is None else recipe.clip,
        "seed": recipe.seed,
        # TRL asks for bfloat16 and checkpointing unless told otherwise.
        "bf16": recipe.engine.precision == "bf16",
        checkpointing: recipe.engine.checkpointing,  # renamed in transformers 5.24
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # on, a loss that is NaN is logged as the one before it
        "save_strategy": "no",  # `saving.Keeper` asks for it
        "eval_strategy": "no",
    }


def plain(model: Any) -> None:
    """Give a model its own forward back, after TRL."""
    vars(model).pop("forward", None)


def _sft(
    recipe: PosttrainRecipe, shared: dict[str, Any], examples: Examples, said: dict[str, Any], _: Callable[[], Any]
) -> Any:
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    model, tokenizer = shared["model"], shared["processing_class"]
    train, valid = examples.train, examples.valid
    if "messages" in train[0]:
        train, valid = tokenised(train, tokenizer), tokenised(valid, tokenizer)
    config = SFTConfig(**said, max_length=length(recipe, model))
    return SFTTrainer(args=config, train_dataset=_dataset(train), eval_dataset=_dataset(valid), **shared)


def _dpo(
    recipe: PosttrainRecipe,
    shared: dict[str, Any],
    examples: Examples,
    said: dict[str, Any],
    reference: Callable[[], Any],
) -> Any:
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    assert recipe.dpo is not None
    config = DPOConfig(
        **said, max_length=length(recipe, shared["model"]), beta=recipe.dpo.beta, loss_type=[recipe.dpo.loss]
    )
    return DPOTrainer(
        args=config,
        ref_model=None if shared["peft_config"] is not None else reference(),
        train_dataset=_dataset(examples.train),
        eval_dataset=_dataset(examples.valid),
        **shared,
    )


def _grpo(
    recipe: PosttrainRecipe,
    shared: dict[str, Any],
    examples: Examples,
    said: dict[str, Any],
    reference: Callable[[], Any],
) -> Any:
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    asked = recipe.grpo
    assert asked is not None
    said = {**said, "per_device_train_batch_size": said["per_device_train_batch_size"] * asked.generations}
    said["per_device_eval_batch_size"] = said["per_device_train_batch_size"]
    own = asked.beta > 0 and shared["peft_config"] is None
    config = GRPOConfig(
        **said,
        num_generations=asked.generations,
        max_completion_length=asked.max_new_tokens,
        temperature=asked.temperature,
        beta=0.0 if own else asked.beta,
        epsilon=asked.epsilon,
    )
    rows = fitting(recipe, shared["model"], shared["processing_class"], examples.train)
    trainer = GRPOTrainer(args=config, reward_funcs=reward_function(asked), train_dataset=_dataset(rows), **shared)
    if own:
        _refer(trainer, reference(), asked.beta)
    return trainer


def _refer(trainer: Any, reference: Any, beta: float) -> None:
    """A reference model for GRPO. TRL loads one by its path, which would run the code that lies there."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(reference, temperature=trainer.temperature)
    trainer.ref_model = trainer.accelerator.prepare_model(reference, evaluation_mode=True)
    trainer.beta = trainer.args.beta = beta


def fitting(recipe: PosttrainRecipe, model: Any, tokenizer: Any, records: list[Record]) -> list[Record]:
    """Those whose prompt and longest completion fit `max_length`.

    Raises:
        UserError: none does.
    """
    assert recipe.grpo is not None
    room = length(recipe, model) - recipe.grpo.max_new_tokens
    kept = [record for record in records if int(encode([record["prompt"]], tokenizer)["attention_mask"].sum()) <= room]
    if not kept:
        raise UserError(
            f"{recipe.place('grpo.max_new_tokens')}: {recipe.grpo.max_new_tokens} tokens of completion leave no room "
            f"for any prompt in max_length, which is {length(recipe, model)}. Write fewer: grpo.max_new_tokens="
            f"{max(1, length(recipe, model) // 2)}"
        )
    return kept


def length(recipe: PosttrainRecipe, model: Any) -> int:
    """`max_length` in tokens."""
    context = int(model.config.max_position_embeddings)
    return context if recipe.max_length == "auto" else min(int(recipe.max_length), context)


def _dataset(records: list[Record]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(records)
