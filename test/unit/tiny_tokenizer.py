"""Small real tokenizers, built on the spot: byte-level BPE as Qwen and DeepSeek use, and SentencePiece-like BPE."""

import functools
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from nibble.tokenizer.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Stop! Hello, world; it's 1234 o'clock.\n",
    "<div>some markup</div> def f(x): return x + 1  # comment\n\n",
    "你好，世界。これは文です。 Привет, мир! Ünïcödé façade\n",  # noqa: RUF001
]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    backend = RustTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS * 4, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return wrap(backend, eos_token="<|im_end|>", chat_template=chat_template)


def sentencepiece_like_tokenizer() -> PreTrainedTokenizerFast:
    """Spaces written as U+2581, one dropped at the start of a text, unknown characters as byte tokens."""
    backend = RustTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(CORPUS[:2] * 4, trainer)
    # Training declares its byte tokens special; a real vocabulary has them as ordinary entries.
    state = backend.to_str().replace("\n", "")
    return wrap(_without_special_bytes(state), eos_token="</s>", chat_template=None)


def _without_special_bytes(state: str) -> RustTokenizer:
    import json

    content = json.loads(state)
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return RustTokenizer.from_str(json.dumps(content))


def wrap(backend: RustTokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **options)


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(byte_level_tokenizer())


@functools.cache
def tiny_sentencepiece_tokenizer() -> Tokenizer:
    return Tokenizer(sentencepiece_like_tokenizer())
