"""Tokenizers made on the spot."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A function: words -> tokenizer of bytes, plus each word with its leading space as one token."""

    def make(words=()):
        """Bytes, plus each word with its leading space as one token."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
        merges = []
        for word in words:
            left = "Ġ"
            for letter in word:
                if left + letter not in vocab:
                    vocab[left + letter] = len(vocab)
                    merges.append((left, letter))
                left += letter
        raw = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")

    return make
