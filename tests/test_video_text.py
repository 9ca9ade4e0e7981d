"""Captions to tokens."""

import pytest
import torch

from dit_kernels.video.digits import CAPTION_WORDS
from dit_kernels.video.text import PADDING, START, TextEncoder, WordTokenizer


@pytest.fixture
def tokenizer():
    return WordTokenizer(CAPTION_WORDS)


def test_captions_are_padded_and_masked(tokenizer):
    ids, mask = tokenizer(["a seven moving left", "", "A  One"])
    assert ids.shape == mask.shape == (3, 5)
    assert mask.sum(1).tolist() == [5, 1, 3]
    assert (ids[:, 0] == START).all()
    assert (ids[~mask] == PADDING).all()
    assert ids[2, 1] == ids[0, 1]  # upper case is the same word
    assert int(ids.max()) < tokenizer.vocabulary_size


def test_every_word_has_its_own_id(tokenizer):
    ids, _ = tokenizer(list(CAPTION_WORDS))
    assert sorted(ids[:, 1].tolist()) == list(range(START + 1, tokenizer.vocabulary_size))


def test_an_unknown_word_is_an_error_that_lists_the_known_ones(tokenizer):
    with pytest.raises(
        ValueError, match='unknown word "dog"; the known words are: a an moving zero'
    ):
        tokenizer(["a seven moving left", "a dog moving left"])


def test_padding_does_not_change_the_tokens(tokenizer):
    torch.manual_seed(0)
    encoder = TextEncoder(tokenizer.vocabulary_size, dim=32).double()
    alone = encoder(*tokenizer(["a one"]))
    padded = encoder(*tokenizer(["a one", "a seven moving left"]))
    assert padded.shape == (2, 5, 32)
    torch.testing.assert_close(padded[:1, :3], alone)


def test_order_matters_and_gradients_reach_every_parameter(tokenizer):
    torch.manual_seed(0)
    encoder = TextEncoder(tokenizer.vocabulary_size, dim=32, max_length=5)
    tokens = encoder(*tokenizer(["left seven moving a", "a seven moving left"]))
    assert not torch.allclose(tokens[0, 0], tokens[1, 0])
    tokens[..., 0].sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_caption_that_is_too_long_is_an_error(tokenizer):
    encoder = TextEncoder(tokenizer.vocabulary_size, dim=32, max_length=5)
    with pytest.raises(ValueError, match="at most 4 words; got 5"):
        encoder(*tokenizer(["a a a a a"]))
