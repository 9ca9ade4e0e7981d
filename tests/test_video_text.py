"""Captions to tokens."""

import pytest
import torch

from dit_kernels.video.digits import CAPTION_WORDS
from dit_kernels.video.model import ModelConfig, TextToVideo
from dit_kernels.video.sampling import generate
from dit_kernels.video.text import (
    PADDING,
    START,
    PretrainedText,
    TextEncoder,
    WordTokenizer,
    words_of,
)
from dit_kernels.video.training import Trainer, TrainingConfig, train


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


SPECIAL = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}


def save_tokenizer(folder, ends=True):
    """A tokenizer of whole words, as Hugging Face keeps them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL.values(), *CAPTION_WORDS]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", words.index("</s>"))]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)


def save_t5(folder):
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=40, **sizes)).save_pretrained(folder)
    save_tokenizer(folder)


def save_clip(folder):
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    config = CLIPTextConfig(vocab_size=40, max_position_embeddings=12, eos_token_id=2, **sizes)
    CLIPTextModel(config).save_pretrained(folder)
    save_tokenizer(folder)


@pytest.mark.parametrize("save", [save_t5, save_clip], ids=["t5", "clip"])
@pytest.mark.parametrize("text_mode", ["pooled", "cross"])
def test_a_pretrained_encoder_conditions_a_model(tmp_path, save, text_mode):
    torch.manual_seed(0)
    save(tmp_path / "encoder")
    config = ModelConfig(
        text_encoder=str(tmp_path / "encoder"), text_mode=text_mode, size=16, frames=4, hidden_size=32,
        depth=1, num_heads=2,
    )  # fmt: skip
    run = TrainingConfig(steps=2, batch_size=4, checkpoint_every=1, caption_dropout=0.5)
    trainer = Trainer(config, run)
    encoder = trainer.model.pretrained_text
    before = {name: p.clone() for name, p in encoder.module.named_parameters()}
    path = train(trainer, tmp_path / "run")
    for name, parameter in encoder.module.named_parameters():  # used as it is
        assert torch.equal(parameter, before[name])
    model = TextToVideo.load(path)
    assert model.config.text_dim == 24
    assert not [name for name in model.state_dict() if name.startswith("text.")]
    tokens, mask = model.encode_text(["a seven moving left", ""])
    assert tokens.shape == (2, 5, 24)
    assert mask.sum(1).tolist() == [5, 1]  # an end token each
    alone, _ = model.encode_text(["a seven moving left"])
    torch.testing.assert_close(tokens[:1], alone)
    long, _ = model.encode_text(["a seven moving left " * 300])
    assert long.shape[1] == (12 if save is save_clip else 512)
    videos = generate(model, ["a seven moving left", "a one moving up"], steps=1)
    assert videos.isfinite().all()


def test_an_encoder_whose_empty_caption_has_no_token(tmp_path):
    save_t5(tmp_path)
    save_tokenizer(tmp_path, ends=False)
    encoder = PretrainedText(tmp_path)
    tokens, mask = encoder(["", ""], torch.device("cpu"))
    assert tokens.shape == (2, 1, 24)
    assert not mask.any()
    config = ModelConfig(
        text_encoder=str(tmp_path), size=16, frames=4, hidden_size=32, depth=1, num_heads=2
    )
    assert generate(TextToVideo(config).eval(), [""], steps=1).isfinite().all()


def test_a_folder_without_an_encoder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no text encoder at .*config.json is needed"):
        PretrainedText(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ValueError, match="holds no text encoder that can be read"):
        PretrainedText(tmp_path)


def test_words_are_read_without_punctuation():
    assert words_of("A man, talking: it's a half-open 2nd door!") == [
        "a", "man", "talking", "it's", "a", "half-open", "2nd", "door",
    ]  # fmt: skip
    assert words_of("Ein Mädchen läuft.") == ["ein", "mädchen", "läuft"]
    many = WordTokenizer([f"w{i}" for i in range(100)])
    with pytest.raises(ValueError, match=r'unknown word "cat"; .* w59 and 40 more$'):
        many(["cat"])
