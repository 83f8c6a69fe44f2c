"""How the embedded teacher was made: `python -m relinear.recipes.embedded.train --out DIR`.

A Llama of 0.7M parameters, on one CPU core, from weights that start as an induction circuit (`plant_induction`). Half
of the steps are the whole text, the others recall documents and random spans said again and again. First they climb:
the pairs double, and the filler grows, whenever 97 % of the answers are right. Then they settle: all numbers of pairs
and all distances, while the learning rate falls. Every batch is a pure function of seed, step and level, so a run that
was stopped resumes from its checkpoint to the same weights. Last they polish: mostly text, its answers (facts asked
for, sums) counted five times, while the rate falls once more. What came out is in docs/results/embedded-teacher.md.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from ...eval.recall import KEYS, VALUES, CaseMaker, RecallCell, is_held_out
from .text import CONTEXT, answers, documents

VOCAB = 1024
PAD, BOS, EOS, UNK = 0, 1, 2, 3
LEVELS = (2, 4, 8, 16, 32, 64, 128)  # pairs
REACH = (0, 0, 32, 64, 128, 256, 640)  # the longest filler at each level, tokens
SOLVED = 0.97
POLISH = {"story": 0.45, "chat": 0.2, "sums": 0.25, "recall": 0.07, "copy": 0.03}  # kinds in the last phase
THETA = 500_000.0  # slow enough that half of a head's 16 dimensions still match at a distance of 1,024
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Assistant:{% generation %}{{ ' ' + message['content'] + '\\n' }}"
    "{% endgeneration %}{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def train_tokenizer(seed: int = 0) -> Any:
    """A byte-level BPE of `VOCAB` tokens: lossless, one token per digit and per recall word, no BOS of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = ["".join(" " + word for word in KEYS + VALUES)] * 2000  # frequent enough to become tokens
    text = list(documents(seed, 8000, kinds={"story": 0.6, "chat": 0.3, "sums": 0.1}))
    raw.train_from_iterator(words + text + ["Remember: Recall: Say: Again: System: User: Assistant:"] * 4000, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = TEMPLATE
    long = [w for w in KEYS + VALUES if len(tokenizer(" " + w, add_special_tokens=False)["input_ids"]) != 1]
    if long:
        raise RuntimeError(f"the tokenizer splits recall words: {long}")
    return tokenizer


def new_model(seed: int = 0) -> Any:
    """The untrained teacher: LlamaForCausalLM, 4 layers, hidden 128, 8 query and 4 key/value heads of 16, tied."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config)
    plant_induction(model)
    return model


def plant_induction(model: Any) -> None:
    """Starts the first two layers as an induction circuit: find where this token stood before, say what came next.

    Left to chance the circuit takes millions of tokens to form, and most of a short run; planted, the run can spend
    itself on distance, on many pairs and on the text. Everything is trained afterwards like any other weight.

    Residual dimensions at the start: 0 a constant; 1 to 95 the token, as signs; 96 to 127 empty.
    Layer 0: key/value heads 0 and 1 look one token back (from the constant, so that rotary positions agree best at a
    distance of one) and write dimensions 1 to 32 of the token before into the empty ones. Layer 1: each of the four
    key/value heads compares eight signs of this token with those, in the slowly turning half of its dimensions, and
    adds 16 dimensions of the token found.

    Args:
        model: an untrained model of `new_model`'s shape; changed in place.
    """
    import torch

    size, half = model.config.head_dim, model.config.head_dim // 2
    spread, look, match, write, say = 0.15, 1.6, 2.8, 0.3, 0.8
    turn = THETA ** (-torch.arange(half) / half)
    slow = [*range(half // 2, half), *range(half + half // 2, size)]
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.copy_(embedding.sign() * spread)  # all of one length, so that no key is louder than another
        embedding[:, 0] = 5 * spread
        embedding[:, 96:] = 0
        back, find = model.model.layers[0].self_attn, model.model.layers[1].self_attn
        for head in range(2):
            keys, queries = slice(head * size, (head + 1) * size), slice(2 * head * size, (2 * head + 1) * size)
            query, key = back.q_proj.weight[queries].zero_(), back.k_proj.weight[keys].zero_()
            key[:half, 0] = look
            query[:half, 0], query[half:, 0] = look * turn.cos(), -look * turn.sin()
            value, out = back.v_proj.weight[keys].zero_(), back.o_proj.weight[:, queries].zero_()
            for i in range(size):
                value[i, 1 + head * size + i] = 1
                out[96 + head * size + i, i] = write
        for head in range(4):
            keys, queries = slice(head * size, (head + 1) * size), slice(2 * head * size, (2 * head + 1) * size)
            query, key = find.q_proj.weight[queries].zero_(), find.k_proj.weight[keys].zero_()
            value, out = find.v_proj.weight[keys].zero_(), find.o_proj.weight[:, queries].zero_()
            for i, at in enumerate(slow):
                query[at, 1 + half * head + i] = match
                key[at, 96 + half * head + i] = match
            for i in range(size):
                value[i, 1 + head * size + i] = 1
                out[1 + head * size + i, i] = say


class Batches:
    """Batches as (ids, weights): int64 and float32 [rows, length]; a weight counts the prediction of that id."""

    def __init__(self, tokenizer: Any, seed: int):
        import torch

        self.torch, self.tokenizer, self.seed = torch, tokenizer, seed
        self.maker = CaseMaker(tokenizer)
        key_ids = [self.maker.words[w][0] for w in KEYS]
        value_ids = [self.maker.words[w][0] for w in VALUES]
        self.every, self.words = torch.arange(UNK + 1, VOCAB), torch.tensor(key_ids + value_ids)
        self.hidden = torch.zeros(VOCAB, VOCAB, dtype=torch.bool)  # adjacent ids that would show a held-out pair
        for key, a in zip(KEYS, key_ids, strict=True):
            for value, b in zip(VALUES, value_ids, strict=True):
                self.hidden[a, b] = is_held_out(key, value)

    def spans(self, step: int, rows: int, length: int, longest: int) -> tuple[Any, Any]:
        """Random ids said again and again; each row has a period of its own (6 to `longest`), so that looking back a
        fixed way never helps and only finding the last place of the same token does. Repeats count."""
        torch = self.torch
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        pool = self.every if step % 16 == 7 else self.words
        period = torch.randint(6, longest + 1, (rows, 1), generator=g)
        place = torch.arange(length)[None] % period
        span = pool[torch.randint(len(pool), (rows, longest), generator=g)]
        while (bad := self.hidden[span.gather(1, place[:, :-1]), span.gather(1, place[:, 1:])]).any():
            row, at = bad.nonzero(as_tuple=True)
            span[row, place[row, at + 1]] = pool[torch.randint(len(pool), (len(row),), generator=g)]
        ids = torch.cat([torch.full((rows, 1), BOS), span.gather(1, place)], 1)
        weights = (torch.arange(length + 1)[None] > period + 1).float()
        return ids, weights

    def recall(self, step: int, cell: RecallCell, queries: int, rows: int, other: float = 0.0) -> tuple[Any, Any]:
        """Training documents of one cell; answers count 1, all else `other`."""
        rng = random.Random(f"batch {self.seed} {step}")
        cases = [self.maker.case(rng, cell, queries, "train") for _ in range(rows)]
        ids = self.torch.tensor([[*case.ids, EOS] for case in cases])
        weights = self.torch.full(ids.shape, other)
        for row, case in enumerate(cases):
            for start, end in case.answers:
                weights[row, start:end] = 1
        return ids, weights

    def text(
        self, step: int, tokens: int, kinds: dict[str, float] | None = None, answer: float = 1.0
    ) -> tuple[Any, Any]:
        """About `tokens` ids of whole documents of similar length, padded on the right; every real token counts 1,
        those of answers that follow from earlier text `answer`."""
        rng = random.Random(f"text {self.seed} {step}")
        texts = list(documents(rng.randrange(2**40), 48, kinds=kinds))
        every = [[BOS, *ids, EOS] for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        order = sorted(range(len(every)), key=lambda i: len(every[i]))
        lengths = [len(every[i]) for i in order]
        last = rng.choices(range(len(order)), lengths)[0]
        chosen = order[max(0, last + 1 - max(1, tokens // lengths[last])) : last + 1]
        ids = self.torch.full((len(chosen), lengths[last]), PAD)
        weights = self.torch.zeros(ids.shape)
        for row, index in enumerate(chosen):
            ids[row, : len(every[index])] = self.torch.tensor(every[index])
            weights[row, : len(every[index])] = 1
            if answer != 1.0:
                offsets = self.tokenizer(texts[index], add_special_tokens=False, return_offsets_mapping=True)
                spans = answers(texts[index])
                for at, (start, end) in enumerate(offsets["offset_mapping"]):
                    if any(end > first and start < after for first, after in spans):
                        weights[row, at + 1] = answer
        return ids, weights

    def draw(self, step: int, level: int, settled: bool, polish: bool = False) -> tuple[str, Any, Any]:
        """(kind, ids, weights) of this step."""
        rng = random.Random(f"kind {self.seed} {step}")
        kind = ("text", "recall")[step % 2] if step % 8 != 7 else "spans"
        if polish and step % 8 not in (1, 7):
            return "text", *self.text(step, 2048, POLISH, 5.0)
        if kind == "spans":
            length = rng.choice((96, 192, 640) if settled else (48, 96, 192))
            return kind, *self.spans(step, max(2, 2048 // length), length, length // 2)
        if kind == "text":
            return kind, *self.text(step, 2048)
        pairs, reach = LEVELS[level], REACH[level]
        if settled:
            pairs = min(len(KEYS) - 16, rng.choice((4, 8, 16, 32, 64, 96, 128, 128, 136)))
            reach = CONTEXT - 2 * pairs - 2 * min(pairs, 32) - 24
        distance = rng.randint(0, reach) if rng.random() < 0.6 else 0
        queries = min(pairs, 32) if settled else pairs
        if settled and distance < reach - 200:
            queries = min(pairs, 128)
        length = 12 + 2 * pairs + distance + 2 * queries
        return kind, *self.recall(step, RecallCell(pairs, distance), queries, max(2, 2048 // length), 0.1 * settled)


def train(out: Path, tokens: int, climb: int, polish: int, seed: int, lr: float, minutes: float) -> None:
    """Trains until `tokens` tokens, resuming from out/checkpoint.pt; writes out/metrics.jsonl and the teacher files.

    Args:
        out: folder; made if missing.
        tokens: of the first two phases, padding included; the rate falls from `lr` to lr / 30 over the last 45 %.
        climb: the first phase ends after so many tokens if the last level was not solved before.
        polish: tokens of the last phase; the rate starts again at lr * 3 / 4 and falls to lr / 40 over its last 60 %.
        seed: of weights and batches.
        lr: peak learning rate.
        minutes: stop (checkpointed, resumable) after so many minutes of wall-clock time.
    """
    import torch
    import torch.nn.functional as F

    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(seed)
    model = new_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    batches = Batches(tokenizer, seed)
    state: dict[str, Any] = {"step": 0, "tokens": 0, "level": 0, "right": 0.0, "settled": False, "seconds": 0.0}
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    begun, before, last = time.monotonic(), state["seconds"], {}
    while state["tokens"] < tokens + polish:
        polishing = state["tokens"] >= tokens
        state["step"] += 1
        kind, ids, weights = batches.draw(state["step"], state["level"], state["settled"], polishing)
        rate = lr * min(1.0, state["step"] / 100, max(1 / 30, (tokens - state["tokens"]) / (0.45 * tokens)))
        if polishing:
            rate = lr * min(0.75, max(1 / 40, 0.75 * (tokens + polish - state["tokens"]) / (0.6 * polish)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        counted = weights[:, 1:] > 0
        weight, target = weights[:, 1:][counted], ids[:, 1:][counted]
        logits = F.linear(hidden[counted], model.lm_head.weight)
        loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state["tokens"] += ids.numel()
        state["seconds"] = before + time.monotonic() - begun
        heavy = weight == weight.max()
        last[kind] = (loss.item(), (logits.argmax(-1) == target)[heavy].float().mean().item())
        if kind == "recall" and not state["settled"]:
            state["right"] = 0.9 * state["right"] + 0.1 * last[kind][1]
            if state["right"] > SOLVED:
                note(out, state, {"solved_pairs": LEVELS[state["level"]]})
                state["right"] = 0.0
                state["settled"] = state["level"] == len(LEVELS) - 1
                state["level"] = min(state["level"] + 1, len(LEVELS) - 1)
        if not state["settled"] and state["tokens"] > climb:
            note(out, state, {"climb_ended_at_pairs": LEVELS[state["level"]]})
            state["settled"] = True
        if state["step"] % 100 == 0:
            note(out, state, {"lr": rate, **{k: [round(x, 4) for x in v] for k, v in last.items()}})
        if state["step"] % 250 == 0:
            save(out, model, tokenizer, optimizer, state)
        if state["seconds"] - before > 60 * minutes:
            break
    save(out, model, tokenizer, optimizer, state)


def note(out: Path, state: dict[str, Any], more: dict[str, Any]) -> None:
    """Appends one line to out/metrics.jsonl."""
    line = {**state, "seconds": round(state["seconds"], 1), "right": round(state["right"], 4), **more}
    with (out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def save(out: Path, model: Any, tokenizer: Any, optimizer: Any, state: dict[str, Any]) -> None:
    """Writes the teacher folder out/teacher, then the checkpoint (whole or not at all)."""
    import torch
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    model.save_pretrained(out / "teacher")
    tokenizer.save_pretrained(out / "teacher")
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}, out / "checkpoint.new"
    )
    (out / "checkpoint.new").replace(out / "checkpoint.pt")


def main() -> None:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the teacher, checkpoint and metrics")
    parser.add_argument("--tokens", type=int, default=6_000_000, help="tokens of the first two phases")
    parser.add_argument("--climb", type=int, default=3_500_000, help="most tokens of the first phase")
    parser.add_argument("--polish", type=int, default=5_000_000, help="tokens of the last phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many minutes, resumable")
    args = parser.parse_args()
    train(args.out, args.tokens, args.climb, args.polish, args.seed, args.lr, args.minutes)


if __name__ == "__main__":
    main()
