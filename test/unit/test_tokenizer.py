"""The tokenizer: text both ways, the bytes of single tokens, chat templates, and what it refuses."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.tokenizer.tokenizer import Tokenizer
from nibble.utils.errors import ConfigError, RequestError
from tiny_tokenizer import (
    SPECIAL_TOKENS,
    byte_level_tokenizer,
    tiny_sentencepiece_tokenizer,
    tiny_tokenizer,
)

TOKENIZER = tiny_tokenizer()
SENTENCEPIECE = tiny_sentencepiece_tokenizer()


@given(text=st.text(max_size=50))
@settings(max_examples=200, deadline=None)
def test_any_text_survives_the_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special_tokens=False) == text


def test_special_tokens_are_one_token_in_text_and_left_out_of_it_on_request():
    tokens = TOKENIZER.encode("a<|im_end|>b<think>")
    assert len(tokens) == 4
    assert TOKENIZER.decode(tokens) == "ab<think>"
    assert TOKENIZER.decode(tokens, skip_special_tokens=False) == "a<|im_end|>b<think>"
    assert {TOKENIZER.decode([token], False) for token in TOKENIZER.special_token_ids} == set(SPECIAL_TOKENS)
    assert {TOKENIZER.decode([token], False) for token in TOKENIZER.eos_token_ids} == {"<|im_end|>"}


def test_the_vocabulary_ends_after_the_largest_token():
    last = TOKENIZER.vocab_size - 1
    assert TOKENIZER.decode([last], skip_special_tokens=False) == "<think>"
    assert TOKENIZER.decode([last + 1]) == ""


@pytest.mark.parametrize("tokenizer", [TOKENIZER, SENTENCEPIECE], ids=["byte level", "sentencepiece"])
def test_the_bytes_of_the_tokens_add_up_to_the_text(tokenizer):
    text = "Stop it, 世界 😀 now"
    tokens = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, tokens)).decode().removeprefix(" ") == text
    assert any("\N{REPLACEMENT CHARACTER}" in tokenizer.decode([token]) for token in tokens), "characters are split"


def test_text_with_a_lone_surrogate_is_refused():
    with pytest.raises(RequestError, match="lone surrogate at character 2"):
        TOKENIZER.encode("ab\ud800")


def test_a_prompt_over_the_byte_limit_is_refused_with_both_numbers():
    tokenizer = Tokenizer(byte_level_tokenizer(), max_prompt_bytes=10)
    assert tokenizer.encode("é" * 5)
    with pytest.raises(RequestError, match="12 bytes, more than the limit of 10"):
        tokenizer.encode("é" * 6)


def test_threads_may_share_a_tokenizer():
    texts = [f"text number {i} " * 200 for i in range(16)]
    expected = [TOKENIZER.encode(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(TOKENIZER.encode, texts)) == expected


def test_truncation_and_padding_that_a_checkpoint_configures_are_not_applied():
    hf_tokenizer = byte_level_tokenizer()
    hf_tokenizer.backend_tokenizer.enable_truncation(3)
    hf_tokenizer.backend_tokenizer.enable_padding(length=50)
    assert Tokenizer(hf_tokenizer).encode("Hello, world") == TOKENIZER.encode("Hello, world")


def test_a_chat_is_rendered_up_to_where_the_assistant_begins():
    tokens = TOKENIZER.apply_chat_template([{"role": "user", "content": "Hi"}])
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert TOKENIZER.decode(tokens, skip_special_tokens=False) == text


def test_variables_reach_the_template():
    messages = [{"role": "user", "content": "Hi"}]
    assert TOKENIZER.render_chat_template(messages, {"enable_thinking": False}).endswith("<think></think>")


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "continue_final_message", "messages", "conversations"])
def test_variables_cannot_replace_the_template_or_its_settings(name):
    with pytest.raises(RequestError):
        TOKENIZER.render_chat_template([{"role": "user", "content": "Hi"}], {name: "x"})


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ 'a' + 1 }}",
        "{{ messages[7].content }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{% if %}",
    ],
)
def test_whatever_goes_wrong_in_a_template_is_a_request_error(template):
    tokenizer = Tokenizer(byte_level_tokenizer(chat_template=template))
    with pytest.raises(RequestError, match="chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_a_model_without_chat_template_says_so():
    tokenizer = Tokenizer(byte_level_tokenizer(chat_template=None))
    with pytest.raises(RequestError, match="no chat template; use /v1/completions"):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_a_saved_tokenizer_is_loaded_again(tmp_path):
    byte_level_tokenizer().save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(str(tmp_path))
    text = "Hello, 世界<|im_end|>"
    assert loaded.encode(text) == TOKENIZER.encode(text)
    messages = [{"role": "user", "content": "Hi"}]
    assert loaded.apply_chat_template(messages) == TOKENIZER.apply_chat_template(messages)


def test_a_folder_without_tokenizer_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match="can't be loaded"):
        Tokenizer.from_pretrained(str(tmp_path))


def test_code_that_comes_with_a_tokenizer_does_not_run_unless_allowed(tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: ...\n")
    auto_map = {"AutoTokenizer": ["evil.Evil", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map, "tokenizer_class": "Evil"}))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        Tokenizer.from_pretrained(str(tmp_path))
    assert not ran.exists()
