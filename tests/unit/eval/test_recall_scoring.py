"""Scores of the recall tasks, by likelihood and by generation, against loops that do one thing at a time."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from relinear.eval import recall as R
from relinear.eval.tasks.document import Answer, Writer
from relinear.eval.tasks.generation import GENERATED, generated, judge, plain_greedy
from relinear.eval.tasks.likelihood import choose, option_logits, read_off, score
from relinear.eval.tasks.summary import Score, above_chance, chances, summarised
from relinear.eval.tasks.tasks import TASKS, task_documents


@pytest.fixture(scope="module", params=["bytes", "words"])
def tokenizer(request, byte_tokenizer):
    return byte_tokenizer() if request.param == "bytes" else byte_tokenizer(R.KEYS + R.VALUES)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def documents(tokenizer, name, length=400, samples=2):
    made = task_documents(TASKS[name], Writer(tokenizer), (length,), samples, limit=None)
    return [document for own in made.values() for document in own][:4]


@torch.no_grad()
def logprob(model, prefix, ids):
    logits = model(input_ids=torch.tensor([[*prefix, *ids]]), use_cache=False).logits[0].log_softmax(-1)
    return sum(float(logits[len(prefix) - 1 + i, token]) for i, token in enumerate(ids))


@pytest.mark.parametrize("name", ["needle", "needle-number", "multi-value", "variables"])
def test_scores_are_those_of_one_pass_per_option(model, tokenizer, name):
    made = documents(tokenizer, name, 600)[1:3]
    for document, scores in zip(made, score(model, tokenizer, made), strict=True):
        for answer, found in zip(document.answers, scores, strict=True):
            prefix, ids = document.ids[: answer.start], document.ids[answer.start : answer.end]
            right = [logprob(model, prefix, option) for option in (ids, *answer.also)]
            wrong = [logprob(model, prefix, option) for option in answer.rivals]
            assert found.logprob == pytest.approx(right[0], abs=1e-3)
            if len(ids) == 1 or len(document.answers) == 1:
                assert found.rank == 1 + sum(value >= max(right) for value in wrong)
                assert found.choice == (found.rank == 1)
            else:
                assert found.choice is None and found.rank is None


def test_scores_are_the_same_alone_and_in_a_batch_of_unequal_lengths(model, tokenizer):
    made = documents(tokenizer, "pairs", 600, 1)[:2] + documents(tokenizer, "needle-number")[:2]
    alone = [score(model, tokenizer, [document])[0] for document in made]
    for one, other in zip(score(model, tokenizer, made), alone, strict=True):
        assert [(x.exact, x.credit, x.choice, x.rank) for x in one] == [
            (x.exact, x.credit, x.choice, x.rank) for x in other
        ]
        assert [x.logprob for x in one] == pytest.approx([x.logprob for x in other], abs=1e-3)


def test_without_a_cache_options_give_the_same_logits(model):
    prefixes, options = torch.randint(3, 200, (2, 20)), torch.randint(3, 200, (2, 3, 4))

    class Cacheless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=self.inner(input_ids=input_ids, use_cache=False).logits)

    with torch.no_grad():
        wanted = option_logits(model, prefixes, options)
        torch.testing.assert_close(option_logits(Cacheless(), prefixes, options), wanted, atol=1e-4, rtol=1e-4)
        row = model(input_ids=torch.cat([prefixes[1], options[1, 2]])[None], use_cache=False).logits[0, 19:23]
    assert wanted.shape == (2, 3, 4, model.config.vocab_size)
    torch.testing.assert_close(wanted[1, 2], row, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["needle-number", "multi-query"])
def test_generation_says_what_the_forced_arg_max_says(model, tokenizer, name):
    """A model whose answers are right now and then: those that it gives are put in as the true ones."""
    made = documents(tokenizer, name)
    forced, said = score(model, tokenizer, made), generated(model, tokenizer, made, batch_size=3)
    assert [len(scores) for scores in said] == [min(GENERATED, len(document.answers)) for document in made]
    for document, ours, theirs in zip(made, forced, said, strict=True):
        assert [x.exact for x in ours[:GENERATED]] == [x.exact for x in theirs]
        answer = document.answers[0]
        length = answer.end - answer.start
        ids = document.ids[: answer.start]
        with torch.no_grad():
            for _ in range(length):
                ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        own = type(document)(ids, (Answer(answer.start, answer.end, 0.5),))
        assert score(model, tokenizer, [own])[0][0].exact
        assert generated(model, tokenizer, [own, made[0]])[0][0] == Score(True, 1.0)


def test_generation_ignores_what_the_checkpoint_asks_for(model):
    before = model.generation_config
    model.generation_config = mine = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    try:
        with plain_greedy(model, 0):
            ids = torch.randint(3, 200, (1, 12))
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
        assert model.generation_config is mine
    finally:
        model.generation_config = before
    for _ in range(4):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids)


def test_partial_credit(byte_tokenizer):
    tokenizer = byte_tokenizer()
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    number, word = Answer(0, 6, 0.1, number=True), Answer(0, 6, 0.1)
    assert read_off(tokenizer, number, ids(" 48213"), ids(" 48213")) == (True, 1.0)
    assert read_off(tokenizer, number, ids(" 48213"), ids(" 48273")) == (False, 3 / 5)
    assert read_off(tokenizer, number, ids(" 48213"), ids("x48213")) == (False, 0.0)
    assert read_off(tokenizer, word, ids(" 48213"), ids(" 48273")) == (False, 4 / 6)
    assert judge(tokenizer, number, ids(" 48213"), ids(" 48273")) == Score(False, 3 / 5)
    assert judge(tokenizer, number, ids(" 48213"), ids(" 48213.")) == Score(True, 1.0)


def test_partial_credit_of_tokens_that_hold_several_digits(byte_tokenizer):
    tokenizer = byte_tokenizer(["482", "13", "17"])
    one, two, other = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" 482", " 13", " 17"))
    assert [len(one), len(two), len(other)] == [1, 1, 1]
    answer = Answer(0, 2, 0.1, number=True)
    # Read with spaces between, as these tokens have them: "482 13" against "482 17".
    assert read_off(tokenizer, answer, [*one, *two], [*one, *other]) == (False, 5 / 6)


def test_any_of_several_right_answers_will_do(byte_tokenizer):
    tokenizer = byte_tokenizer()
    ids = lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    answer = Answer(0, 5, 0.1, also=(ids(" budi"), ids(" deki")))
    assert read_off(tokenizer, answer, ids(" duni"), ids(" duni")) == (True, 1.0)
    assert read_off(tokenizer, answer, ids(" duni"), ids(" bxxx")) == (True, 1.0)  # turned to budi, as far as is known
    assert judge(tokenizer, answer, ids(" duni"), ids(" bxxx")) == Score(False, 2 / 5)
    assert judge(tokenizer, answer, ids(" duni"), ids(" budi")) == Score(True, 1.0)
    assert read_off(tokenizer, answer, ids(" duni"), ids(" xuni")) == (False, 1 / 5)
    assert choose([-3.0, -1.0], [-2.0, -4.0]) == (True, 1)
    assert choose([-3.0], [-2.0, -3.0, -4.0]) == (False, 3)


def test_summary_clusters_by_document_and_knows_chance():
    right, wrong = Score(True, 1.0, -1.0, True, 1), Score(False, 0.5, -3.0, False, 3)
    made = summarised([[right, right], [wrong, wrong]])
    assert made == {
        "exact": 0.5, "exact_stderr": 0.5, "credit": 0.75, "credit_stderr": 0.25, "choice": 0.5, "choice_stderr": 0.5,
        "logprob": -2.0, "rank": 2.0, "n": 4, "documents": 2,
    }  # fmt: skip
    assert "choice" not in summarised([[Score(True, 1.0)]])
    figures = {"exact": 0.3, "exact_stderr": 0.01, "choice": 0.3, "choice_stderr": 0.05, "n": 400}
    assert above_chance(figures, {"exact": 0.1, "choice": 0.25}) == ["exact"]
    assert above_chance({"exact": 1.0, "exact_stderr": 0.0, "n": 2}, {"exact": 0.5}) == []


def test_chance_is_that_of_saying_anything_seen():
    answers = (
        Answer(1, 2, 0.25, rivals=((1,), (2,), (3,), (4,), (5,), (6,), (7,))),
        Answer(2, 3, 0.01, rivals=((1,),)),
    )
    assert chances([SimpleNamespace(answers=answers)]) == {"exact": 0.13, "choice": (0.25 + 0.5) / 2}


def test_needles_per_cell_and_document(model, tokenizer):
    made = R.needles(model, tokenizer, (200, 300), (0.0, 1.0), n_per_cell=3, batch_size=2, number=True)
    assert [(cell["length"], cell["depth"]) for cell in made["cells"]] == [
        (200, 0.0),
        (200, 1.0),
        (300, 0.0),
        (300, 1.0),
    ]
    assert len(made["documents"]) == made["n"] == 12
    assert made["accuracy"] == sum(right for right, _ in made["documents"]) / 12
    assert all(cell["n"] == 3 and 0 <= cell["credit"] <= 1 for cell in made["cells"])
    again = R.needles(model.train(), tokenizer, (300,), (1.0,), n_per_cell=3, number=True)
    assert again["cells"] == made["cells"][-1:]
    assert model.training
    model.eval()
