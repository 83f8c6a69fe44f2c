"""What every test shares: offline, one thread, fixed seeds, no network, and tiny teachers of each family."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Before anything imports torch or huggingface_hub: both read these once. xdist's workers inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="relinear-tests-hf-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""The families on which everything is tested, with every mixer; the others of `PECULIAR` have their own suite."""
BOS = ("llama", "mistral", "mixtral", "gemma2", "gemma3_text")
TIED = ("llama", "qwen2", "gemma2", "gemma3_text", "smollm3", "starcoder2", "cohere2")
SEED = 20261120

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<assistant>{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}<{{ m['role'] }}>{{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers in every test, whatever ran before it."""
    random.seed(SEED)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(SEED)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.set_num_threads(1)
        torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anything but this machine fails at once, naming the address."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        local = self.family == getattr(socket, "AF_UNIX", None) or address[0] in ("127.0.0.1", "::1", "localhost")
        if not local:
            raise RuntimeError(f"a test tried to reach {address}: tests are offline")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded)


@pytest.fixture
def nan_empty():
    """Uninitialised memory reads as NaN, so that what is read before it is written shows."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real teachers and texts that may stand beside the checkout; without it the test is skipped."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real teachers and texts (../shared/data) are not on this machine")
    return folder


def story(number: int) -> str:
    """One short made-up story; the text of tests that need no real one."""
    rng = random.Random(number)
    who, other = rng.sample(["Tom", "Mia", "Ben", "Lily", "Sam", "Anna"], 2)
    thing, place = rng.choice(["ball", "kite", "red box", "small dog"]), rng.choice(["park", "house", "garden", "lake"])
    lines = [
        f"Once upon a time {who} went to the {place} with {other}.",
        f"{who} had a {thing}.",
        f'"Can I see the {thing}?" said {other}.',
        f"They played in the {place} until it was dark.",
        f"The number on the {thing} was {rng.randrange(100, 1000)}.",
        f"{other} was happy, and {who} was happy too.",
    ]
    return " ".join(lines[: rng.randrange(3, 7)])


@pytest.fixture(scope="session")
def story_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 short stories in one plain text file, `<|endoftext|>` between them, about 80 kB."""
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(story(i) for i in range(400)) + "\n", encoding="utf-8")
    return path


def save_tokenizer(folder: Path, bos: bool) -> None:
    """A byte-level BPE tokenizer of 320 tokens; Llama-like (BOS in front of every text) or Qwen-like (no BOS)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>"] if bos else ["<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((story(i) for i in range(200)), trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    if bos:
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    else:  # as Qwen's base models: one token ends and pads
        names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **names)
    fast.save_pretrained(folder)


# What is special in a family, turned on; windows are shorter than the tests' sequences.
PECULIAR: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {
        **{"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        **{"norm_topk_prob": True, "mlp_only_layers": [1]},
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "gemma2": {
        **{"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24},
        **{"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    },
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 24},
    "phi3": {"sliding_window": 8, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 256},
    "smollm3": {"no_rope_layer_interval": 2, "mlp_bias": True},
    "granite": {
        **{"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 4.0},
        "attention_bias": True,
    },
    "gpt_neox": {"rotary_pct": 0.5},
    "starcoder2": {"sliding_window": 8},
    "cohere2": {"sliding_window": 8, "logit_scale": 0.25},
}


def tiny_config(family: str, **overrides: Any) -> Any:
    """A config of four small layers with grouped heads, where the family has them, and with what is special in it."""
    import transformers

    from relinear.distill.families import FAMILIES as KNOWN

    bos = family in BOS
    values: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": family in TIED,
        "pad_token_id": 0,
        "bos_token_id": 1 if bos else None,
        "eos_token_id": 2 if bos else 0,
    }
    if family == "gpt_neox":
        del values["num_key_value_heads"]
    return getattr(transformers, KNOWN[family].config_class)(**values | PECULIAR[family] | overrides)


def save_teacher(folder: Path, family: str, **overrides: Any) -> Path:
    """A teacher with random weights, every one of them away from its default, biases and norms too."""
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, **overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.15 * noise)
    model.save_pretrained(folder)
    save_tokenizer(folder, bos=family in BOS)
    return folder


@pytest.fixture(scope="session")
def make_teacher(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_teacher(family, **config) -> folder of a tiny random teacher with its tokenizer.

    Made once and shared: do not write to it. `config` are keys of config.json, e.g. `num_hidden_layers=2`.
    """
    made: dict[str, Path] = {}

    def make(family: str, **config: Any) -> Path:
        key = f"{family} {sorted(config.items())}"
        if key not in made:
            made[key] = save_teacher(tmp_path_factory.mktemp(family), family, **config)
        return made[key]

    return make


@pytest.fixture(scope="session", params=FAMILIES)
def any_teacher(request: pytest.FixtureRequest, make_teacher: Callable[..., Path]) -> Path:
    """A tiny teacher of each of the `FAMILIES` above in turn."""
    return make_teacher(request.param)


@pytest.fixture(scope="session")
def llama(make_teacher: Callable[..., Path]) -> Path:
    """A tiny llama teacher: tied embeddings, BOS in front of every text."""
    return make_teacher("llama")


@pytest.fixture(scope="session")
def mistral(make_teacher: Callable[..., Path]) -> Path:
    """A tiny mistral teacher: untied embeddings."""
    return make_teacher("mistral")


@pytest.fixture(scope="session")
def qwen2(make_teacher: Callable[..., Path]) -> Path:
    """A tiny qwen2 teacher: biases on q, k and v, tied embeddings, a tokenizer without BOS."""
    return make_teacher("qwen2")


@pytest.fixture(scope="session")
def qwen3(make_teacher: Callable[..., Path]) -> Path:
    """A tiny qwen3 teacher: norms on queries and keys, head_dim 16 at width 32 with 4 heads."""
    return make_teacher("qwen3")


@pytest.fixture
def scattered(tmp_path: Path) -> Callable[..., Path]:
    """scattered(teacher, mixer, options) -> export of a conversion in which every new parameter is moved at random."""

    import torch

    from relinear.distill.export import export_student
    from relinear.distill.student import assemble, transfer
    from relinear.distill.teacher import load_teacher

    def build(teacher: Path, mixer: str, options: dict[str, Any]) -> Path:
        loaded = load_teacher(teacher)
        mixers, _ = transfer(loaded, dict.fromkeys(range(loaded.num_layers), (mixer, options)))
        student = assemble(loaded, mixers)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for module in mixers.values():
                for row in module.table():
                    if row.source == "new":
                        value = module.get_parameter(row.name)
                        value.add_(torch.randn(value.shape, generator=generator) * (0.06 if value.dim() > 1 else 0.2))
        return export_student(student, teacher, tmp_path / f"{mixer}-export")

    return build


@pytest.fixture(scope="session")
def real_conversion(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """real_conversion(mixer, options, *changes) -> the run of a short conversion of all layers of stories260k.

    `changes` are the recipe's; `teacher="embedded"` takes the teacher and the text that come with the package.
    """
    made: dict[str, Path] = {}

    from relinear.recipes import loader, runner

    def convert(mixer: str, options: str, *changes: str, teacher: str = "stories260k") -> Path:
        key = f"{mixer} {options} {changes} {teacher}"
        if key not in made:
            source = teacher
            if teacher != "embedded":
                shared = request.getfixturevalue("shared")
                teacher, source = f"{shared}/teachers/{teacher}", f"{shared}/corpora/tinystories/valid.txt"
            out = tmp_path_factory.mktemp("runs") / mixer
            given = [f"teacher.model={teacher}", f"data.source={source}", f"save.dir={out}", f"layers.mixer={mixer}"]
            given += [
                f"mixers.{mixer}={options}",
                "data.seq_len=128",
                "engine.device=cpu",
                "stages.calibrate.tokens=2k",
            ]
            given += [f"stages.{stage}" for stage in ("calibrate.tokens=2k", "align.tokens=6k", "glue.tokens=6k")]
            given += changes
            runner.run(loader.load("convert", given))
            made[key] = out
        return made[key]

    return convert
