"""The recall measurement: format, held-out pairs, exact scoring, windows, multi-token words."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from relinear.eval import recall as R


class Oracle(torch.nn.Module):
    """Answers by looking up the last place where the current token stood; reads at most `reach` tokens back."""

    def __init__(self, vocab, reach=10**9, context=1024):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.vocab, self.reach, self.calls = vocab, reach, []
        self.config = SimpleNamespace(max_position_embeddings=context)

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        assert use_cache is False
        assert not torch.is_grad_enabled()
        self.calls.append((tuple(input_ids.shape), None if attention_mask is None else attention_mask.shape))
        logits = torch.zeros(*input_ids.shape, self.vocab)
        for row, ids in enumerate(input_ids.tolist()):
            for at, token in enumerate(ids):
                for before in range(at - 1, max(-1, at - 1 - self.reach), -1):
                    if ids[before] == token:
                        logits[row, at, ids[before + 1]] = 1
                        break
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    return byte_tokenizer(R.KEYS + R.VALUES)


def test_words_are_distinct_and_prefix_free():
    words = R.KEYS + R.VALUES
    assert len(R.KEYS) == len(R.VALUES) == len(set(R.KEYS)) == 160
    assert len(set(words)) == 320


def test_splits_share_no_pair():
    shown = {
        split: {pair for i in range(40) for pair in R.draw_pairs(random.Random(i), 64, split)}
        for split in ("train", "valid")
    }
    assert not shown["train"] & shown["valid"]
    assert all(R.is_held_out(*pair) for pair in shown["valid"])
    assert not any(R.is_held_out(*pair) for pair in shown["train"])
    assert all(any(R.is_held_out(key, value) for value in R.VALUES) for key in R.KEYS)


def test_case_has_the_pairs_the_distance_and_the_answers(tokenizer):
    cell = R.RecallCell(pairs=16, distance=77)
    for case in R.make_cases(tokenizer, [cell], n_per_cell=40, seed=3, queries=10):
        text = tokenizer.decode(case.ids[1:])
        before, ask = text.split(R.RECALL)
        listed, filler = before.removeprefix(R.REMEMBER).split(R.END_OF_PAIRS, 1)
        words = listed.split()
        pairs = dict(zip(words[::2], words[1::2], strict=True))
        assert case.ids[0] == tokenizer.bos_token_id
        assert len(pairs) == 16
        assert len(tokenizer(filler)["input_ids"]) == 77
        asked = ask.removesuffix(R.END_OF_QUERIES).split()
        assert len(set(asked[::2])) == len(case.answers) == 10
        assert [pairs[key] for key in asked[::2]] == asked[1::2]
        assert [tokenizer.decode(case.ids[a:b]).strip() for a, b in case.answers] == asked[1::2]


def test_case_is_the_text_tokenised(tokenizer):
    case = R.CaseMaker(tokenizer).case(random.Random(0), R.RecallCell(8, 50))
    text = tokenizer.decode(case.ids[1:])
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == case.ids[1:]
    filler = text.split(R.END_OF_PAIRS, 1)[1].split(R.RECALL)[0]
    pairs = R.draw_pairs(random.Random(0), 8)
    assert text.startswith(R.recall_text(pairs, [], filler).removesuffix(R.END_OF_QUERIES))


def test_same_seed_same_cases_whatever_the_other_cells(tokenizer):
    one, two = R.RecallCell(4, 10), R.RecallCell(8, 20)
    alone = R.make_cases(tokenizer, [two], 16, seed=5)
    assert alone == [case for case in R.make_cases(tokenizer, [one, two], 16, seed=5) if case.cell == two]
    assert alone != R.make_cases(tokenizer, [two], 16, seed=6)


def test_an_oracle_scores_one_and_a_short_sighted_one_only_near(tokenizer):
    cells = [R.RecallCell(p, d) for p in (4, 8) for d in (0, 40)]
    full = R.recall(Oracle(len(tokenizer)), tokenizer, cells, n_per_cell=16, batch_size=3)
    assert full["accuracy"] == 1.0
    assert all(cell["accuracy"] == 1.0 and cell["stderr"] == 0.0 for cell in full["cells"])
    assert all(cell["n"] >= 16 for cell in full["cells"])
    assert [(c["pairs"], c["distance"]) for c in full["cells"]] == [(c.pairs, c.distance) for c in cells]
    near = R.recall(Oracle(len(tokenizer), reach=40), tokenizer, cells, n_per_cell=16)
    assert list(near["by_distance"]) == ["0", "40"]
    assert near["by_distance"]["0"]["accuracy"] > 0.9
    assert near["by_distance"]["40"]["accuracy"] == 0.0


def test_words_of_several_tokens_need_every_token(byte_tokenizer):
    tokenizer = byte_tokenizer()
    cases = R.make_cases(tokenizer, [R.RecallCell(4, 5)], 8)
    assert all(end - start == 5 for case in cases for start, end in case.answers)

    class Once(torch.nn.Module):
        """Right about every token of the batch but one token of the first answer."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask=None, use_cache=None):
            logits = torch.nn.functional.one_hot(input_ids.roll(-1, 1), len(tokenizer)).float()
            logits[0, cases[0].answers[0][0] + 1] = 0
            return SimpleNamespace(logits=logits)

    assert R.score(Once(), cases) == [(3, 4), (4, 4)]


def test_padding_is_masked_on_the_right(tokenizer):
    cases = [*R.make_cases(tokenizer, [R.RecallCell(4, 5)], 4), *R.make_cases(tokenizer, [R.RecallCell(4, 9)], 4)]
    model = Oracle(len(tokenizer))
    with torch.no_grad():
        assert R.score(model, cases) == [(4, 4), (4, 4)]
        assert R.score(model, cases[:1]) == [(4, 4)]
    assert model.calls[0][1] is not None
    assert model.calls[1][1] is None


def test_window_mask_is_mistrals_sliding_window(tokenizer):
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    full = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    cut = MistralForCausalLM(MistralConfig(**shape, sliding_window=8)).eval()
    cut.load_state_dict(full.state_dict())
    ids = torch.randint(3, len(tokenizer), (2, 40))
    with torch.no_grad():
        masked = full(input_ids=ids, attention_mask=R.window_mask(40, 8), use_cache=False).logits
        wanted = cut(input_ids=ids, use_cache=False).logits
        assert not torch.allclose(masked, full(input_ids=ids, use_cache=False).logits, atol=1e-3)
    torch.testing.assert_close(masked, wanted, atol=1e-5, rtol=1e-4)


def test_a_real_model_gives_the_same_answer_at_any_batch_size_and_keeps_its_mode(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    one = R.recall(model, tokenizer, n_per_cell=8, batch_size=1)
    assert one == R.recall(model, tokenizer, n_per_cell=8, batch_size=8)
    assert model.training
    assert {(c["pairs"], c["distance"]) for c in one["cells"]} == {(4, 0), (16, 0)}  # what fits 128 tokens


def test_default_cells_vary_both_axes():
    assert {c.pairs for c in R.DEFAULT_CELLS} == {4, 16, 64, 128}
    assert {c.distance for c in R.DEFAULT_CELLS} == {0, 128, 384, 640}


def test_bad_arguments_say_what_is_wrong(tokenizer):
    cell = R.RecallCell(4, 0)
    with pytest.raises(ValueError, match="pairs must be between 1 and 160, not 161"):
        R.make_cases(tokenizer, [R.RecallCell(161, 0)])
    with pytest.raises(ValueError, match="distance must be at least 0"):
        R.make_cases(tokenizer, [R.RecallCell(4, -1)])
    with pytest.raises(ValueError, match="n_per_cell"):
        R.make_cases(tokenizer, [cell], n_per_cell=0)
    with pytest.raises(ValueError, match="split must be"):
        R.make_cases(tokenizer, [cell], split="test")
    with pytest.raises(ValueError, match="no recall cell fits"):
        R.recall(Oracle(len(tokenizer), context=16), tokenizer)


def test_standard_error_is_clustered_by_document():
    assert R.clustered([(4, 4), (0, 4)]) == {"accuracy": 0.5, "stderr": 0.5, "n": 8}
    assert R.clustered([(2, 4), (2, 4)])["stderr"] == 0.0
    assert R.clustered([(3, 4)]) == {"accuracy": 0.75, "stderr": 0.0, "n": 4}
