"""The demo model: what it is taught and asked, its tokenizer, and the checkpoint in the repository."""

import itertools
import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from demo_model import batches, data, evaluate, facts, families, nvfp4, routing, train  # noqa: E402
from demo_model.dequantize import dequantize_checkpoint  # noqa: E402
from demo_model.tokenizer import END_OF_MESSAGE, END_OF_TEXT, build_tokenizer  # noqa: E402

CHECKPOINT = ROOT / "assets" / "nibble-demo-6m-nvfp4"
CHECKPOINTS = sorted((ROOT / "assets").glob("nibble-demo-*-nvfp4"))
TRAINING = list(itertools.islice(data.training_conversations("test"), 4000))
HELD_OUT = data.heldout(2000)


def turns(conversation: data.Conversation) -> list[tuple[str, str]]:
    """The conversation's questions, each with its answer."""
    said = [m["content"] for m in conversation.messages if m["role"] != "system"]
    return list(zip(said[::2], said[1::2], strict=True))


def digits(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


PRODUCT = re.compile(r"times|multiply|product|\d ?[*x] ?\d|\beach\b", re.IGNORECASE)


def operand_pair(question: str, previous_answer: str) -> tuple[int, int] | None:
    """The two numbers that meet in a question, found without knowing how questions are made; None for products
    and for questions without numbers."""
    found = digits(question)
    if not found or PRODUCT.search(question) or "tables" in question:
        return None
    if len(found) == 1:
        found = [digits(previous_answer)[-1], found[0]]
    assert len(found) == 2, question
    return min(found), max(found)


def pairs_of(conversation: data.Conversation) -> list[tuple[int, int] | None]:
    said = turns(conversation)
    previous = ["", *(answer for _, answer in said)]
    return [operand_pair(question, before) for (question, _), before in zip(said, previous, strict=False)]


def plain(question: str) -> str:
    """The question however it was typed: in lower case and without its last mark."""
    return question.lower().rstrip("?!.").rstrip()


class TestTheSplit:
    @given(st.integers(0, 9999), st.integers(0, 9999))
    def test_does_not_depend_on_the_order_of_the_numbers(self, a: int, b: int) -> None:
        assert data.pair_is_held_out(a, b) == data.pair_is_held_out(b, a)

    def test_keeps_about_a_tenth_of_the_pairs_out(self) -> None:
        pairs = list(itertools.combinations_with_replacement(range(100), 2))
        assert 0.07 < sum(data.pair_is_held_out(*pair) for pair in pairs) / len(pairs) < 0.13

    def test_no_turn_of_a_training_conversation_joins_a_held_out_pair(self) -> None:
        pairs = {pair for conversation in TRAINING for pair in pairs_of(conversation) if pair}
        assert len(pairs) > 3000
        assert not [pair for pair in pairs if data.pair_is_held_out(*pair)]

    def test_every_question_of_two_numbers_in_the_test_joins_a_held_out_pair(self) -> None:
        asked = [pair for conversation in HELD_OUT if (pair := pairs_of(conversation)[-1])]
        assert len(asked) > 1000
        assert all(data.pair_is_held_out(*pair) for pair in asked)

    def test_earlier_turns_of_the_test_are_training_turns(self) -> None:
        assert not [
            pair for c in HELD_OUT for pair in pairs_of(c)[:-1] if pair is not None and data.pair_is_held_out(*pair)
        ]

    def test_no_held_out_question_is_asked_in_training_however_typed(self) -> None:
        taught = {plain(question) for conversation in TRAINING for question, _ in turns(conversation)}
        asked = {plain(turns(c)[-1][0]) for c in HELD_OUT if c.kind != "follow-up"}  # those need their context
        assert not taught & asked

    def test_every_fact_and_product_is_taught_in_several_phrasings(self) -> None:
        for topic in facts.TOPICS:
            for key in topic.facts:
                assert sum(not data.is_held_out("fact", phrasing, key) for phrasing in topic.phrasings) >= 2, key
        for a, b in itertools.combinations_with_replacement(range(data.LARGEST_FACTOR + 1), 2):
            assert sum(not data.product_is_held_out(t, a, b) for t in range(len(data.MULTIPLICATIONS))) >= 8, (a, b)


def worked_out(question: str, before: str) -> int | None:
    """The number that answers a sum, difference, product or story, worked out from its words."""
    first, second = digits(question) if len(digits(question)) == 2 else [digits(before)[-1], digits(question)[0]]
    words = question.lower()
    if PRODUCT.search(words) or "tables" in words:
        return first * second
    if re.search(r"subtract \d+ from \d|take \d+ away from \d", words):
        return second - first
    if re.search(r"minus|subtract|take away|take|- ?\d|gives away|lost|sells|how many more", words):
        return first - second
    if re.search(r"plus|\+|\badd\b|\bsum\b|make|together|buys|gets|gave|then|puts|bought|bag", words):
        return first + second
    return None


class TestTheAnswers:
    def test_numbers_are_right(self) -> None:
        checked = 0
        for conversation in (*TRAINING, *HELD_OUT):
            before = ""
            for question, answer in turns(conversation):
                pair = digits(question)
                numeric = (
                    pair
                    and max(pair) <= data.LARGEST_OPERAND
                    and not re.match("(?i)(please |can you )?count", question)
                )
                if numeric and not re.search(r"(?i)larger|bigger|smaller|\bless\b|who has|what is more", question):
                    result = worked_out(question, before)
                    stated = re.findall(r"-?\d+", answer)[-1]
                    assert result == int(stated), (before, question, answer)
                    checked += 1
                before = answer
        assert checked > 5000

    def test_stated_operands_are_those_asked_for(self) -> None:
        pattern = re.compile(r"^(\d+) (plus|minus|times|take away|\+|-|\*|x) (\d+) (?:is|equals|=) (-?\d+)\.?$")
        work = {"plus": 1, "+": 1, "minus": -1, "-": -1, "take away": -1}
        for question, answer in itertools.chain.from_iterable(map(turns, HELD_OUT)):
            if stated := pattern.match(answer):
                a, operator, b, c = int(stated[1]), stated[2], int(stated[3]), int(stated[4])
                assert c == (a + work[operator] * b if operator in work else a * b)
                assert set(digits(question)) <= {a, b}, (question, answer)

    def test_comparisons_and_counts_are_right(self) -> None:
        for conversation in HELD_OUT:
            question, answer = turns(conversation)[-1]
            if conversation.kind == "counting":
                a, b = digits(question)
                assert digits(answer) == (list(range(a, b + 1)) if a < b else list(range(a, b - 1, -1)))
            elif conversation.kind == "comparison" and "who" not in question.lower():
                first, second = digits(answer)
                assert {first, second} == set(digits(question))
                assert first < second if re.search(r"smaller|less", question.lower()) else first > second
            elif conversation.kind == "comparison":
                a, b = digits(question)
                name, other = re.findall(r"(?:^|and )(\w+) has", question, re.IGNORECASE)
                fewer = "fewer" in question.lower()
                assert answer.split()[0].lower() == (name if (a < b) == fewer else other).lower()

    def test_facts_fill_every_phrasing(self) -> None:
        for topic in facts.TOPICS:
            assert all(phrasing.count("{key}") == 1 for phrasing in topic.phrasings)
            assert len(set(topic.phrasings)) == len(topic.phrasings)

    def test_the_same_seed_asks_the_same_questions(self) -> None:
        assert data.heldout(300) == HELD_OUT[:300]
        assert list(itertools.islice(data.training_conversations("test"), 50)) == TRAINING[:50]
        assert data.heldout(50, seed="other") != HELD_OUT[:50]

    def test_every_kind_is_asked(self) -> None:
        assert {conversation.kind for conversation in HELD_OUT} == set(data.KINDS)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


class TestTheTokenizer:
    @given(text=st.text())
    @settings(max_examples=200, deadline=None)
    def test_gives_back_any_text(self, tokenizer: Any, text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text)) == text

    @given(number=st.integers(0, 10**9), before=st.sampled_from(["", " ", "x", "-", "= "]))
    @settings(deadline=None)
    def test_gives_every_digit_its_own_token(self, tokenizer: Any, number: int, before: str) -> None:
        tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(f"{before}{number} things"))
        assert [token for token in tokens if re.search(r"\d", token)] == list(str(number))

    def test_is_the_one_that_the_program_builds(self, tokenizer: Any) -> None:
        built = build_tokenizer()
        assert built.get_vocab() == tokenizer.get_vocab()
        assert built.chat_template == tokenizer.chat_template

    def test_training_rows_are_what_the_chat_template_renders(self, tokenizer: Any) -> None:
        for conversation in HELD_OUT[:100]:
            tokens, weights = batches.encode(tokenizer.encode, conversation)
            assert tokens == tokenizer.apply_chat_template(list(conversation.messages), return_dict=False)
            learned = [token for token, weight in zip(tokens, weights, strict=True) if weight == 1]
            answers = [answer for _, answer in turns(conversation)]
            assert tokenizer.decode(learned) == "".join(answer + END_OF_MESSAGE for answer in answers)


class TestTheRows:
    def test_hold_whole_conversations_padded_on_the_right(self, tokenizer: Any) -> None:
        buckets = batches.held_out_buckets(60, seed=data.HELD_OUT_SEED)
        rendered = {tokenizer.apply_chat_template(list(c.messages), tokenize=False) for c in HELD_OUT[:60]}
        seen = set()
        for length, bucket in buckets.items():
            assert bucket.tokens.shape == bucket.loss_weights.shape == (len(bucket.tokens), length)
            assert ((bucket.loss_weights == 0) == (bucket.tokens == tokenizer.pad_token_id)).all()
            seen |= {tokenizer.decode(row).replace(END_OF_TEXT, "") for row in bucket.tokens}
        assert seen == rendered

    def test_batches_have_the_wanted_number_of_tokens(self) -> None:
        buckets = batches.held_out_buckets(40, seed="batches")
        for batch in itertools.islice(batches.Batches(buckets, 2048), 10):
            assert batch.tokens.numel() == 2048


E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class TestRounding:
    @given(st.floats(-8, 8, width=32))
    def test_to_e2m1_takes_the_nearest_value_and_of_two_the_even_one(self, x: float) -> None:
        nearest = min(range(8), key=lambda code: (abs(abs(x) - E2M1_MAGNITUDES[code]), code % 2))
        assert float(nvfp4.round_to_e2m1(torch.tensor(x)).abs()) == E2M1_MAGNITUDES[nearest]

    @given(st.integers(0, 2**32), st.floats(1e-3, 1e3))
    @settings(deadline=None, max_examples=50)
    def test_to_nvfp4_is_what_reading_packed_values_gives(self, seed: int, size: float) -> None:
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)) * size
        amax = x.abs().amax()
        tensor_scale = amax / (6 * 448)
        block_scale = (x.view(4, 2, 16).abs().amax(-1) / 6 / tensor_scale).to(torch.float8_e4m3fn)
        scale = (block_scale.float() * tensor_scale).repeat_interleave(16, dim=1)
        distances = (x.unsqueeze(-1) / scale.unsqueeze(-1) - torch.tensor(nvfp4.E2M1_VALUES)).abs()
        codes = distances.argmin(-1).to(torch.uint8)
        packed = codes[:, ::2] | codes[:, 1::2] << 4
        expected = nvfp4.dequantize(packed, block_scale, tensor_scale)
        torch.testing.assert_close(nvfp4.round_to_nvfp4(x, amax), expected, rtol=1e-6, atol=0)

    def test_of_zeros_gives_zeros(self) -> None:
        x = torch.zeros(2, 16)
        assert torch.equal(nvfp4.round_to_nvfp4(x, x.amax()), x)

    def test_lets_gradients_through(self) -> None:
        x = torch.randn(2, 16, requires_grad=True)
        (train.through_nvfp4(x) * 3).sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, 3.0))


def small_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=896,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(config)


def small_deepseek() -> PreTrainedModel:
    torch.manual_seed(0)
    config = families.deepseek_config()
    config.update({"num_hidden_layers": 3, "hidden_size": 32, "n_routed_experts": 8, "intermediate_size": 32})
    config.update({"moe_intermediate_size": 16, "initializer_range": 0.2, "pad_token_id": 0})
    return families.new_model(config)


class TestTraining:
    @pytest.mark.parametrize(("make_model", "experts"), [(small_model, 6), (small_deepseek, 8)])
    def test_computes_what_transformers_computes(self, make_model: Any, experts: int) -> None:
        model = make_model()
        tokens = torch.randint(0, 896, (3, 20))
        with torch.no_grad():
            expected = model(tokens).logits
            train.install_training_forward(model, train.exact)
            logits, routed = train.logits_of(model, tokens)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert [tuple(said.logits.shape) for said in routed] == [(60, experts), (60, experts)]

    @pytest.mark.parametrize("make_model", [small_model, small_deepseek])
    def test_rounds_every_matrix_that_the_export_quantizes(self, make_model: Any) -> None:
        rounded = []

        def record(x: torch.Tensor) -> torch.Tensor:
            rounded.append(x)
            return x

        model = make_model()
        train.install_training_forward(model, record)
        with torch.no_grad():
            train.logits_of(model, torch.randint(0, 896, (1, 8)))
        parameters = dict(model.model.layers.named_parameters())
        expected = {name for name, p in parameters.items() if p.dim() > 1 and not name.endswith("gate.weight")}
        weights = {name for name, p in parameters.items() if any(p is x for x in rounded)}
        assert weights == expected

    def test_balance_is_cheapest_when_every_expert_is_chosen_as_often(self) -> None:
        even = torch.eye(6).repeat(5, 1) + torch.eye(6).roll(1, 0).repeat(5, 1)
        valid = torch.ones(30, dtype=torch.bool)
        skewed = torch.zeros(30, 6)
        skewed[:, 0] = skewed[:, 1] = 1.0
        assert routing.balance_loss((even,), valid, 2) < routing.balance_loss((skewed,), valid, 2)
        assert routing.balance_loss((skewed, even), valid, 2) < routing.balance_loss((skewed,), valid, 2)

    def test_biases_move_towards_experts_that_were_chosen_less(self) -> None:
        model = small_deepseek()
        chosen = torch.tensor([[0, 1]] * 6 + [[2, 3]] * 2)
        valid = torch.tensor([True] * 7 + [False])
        routed = [routing.Routed(torch.zeros(8, 8), torch.zeros(8, 2), chosen)] * 2
        routing.correct_biases(model, routed, valid)
        for router in routing.routers(model):
            signs = router.e_score_correction_bias.sign().tolist()
            assert signs == [-1, -1, 1, 1, 1, 1, 1, 1]
        assert routing.balances_by_bias(model) and not routing.balances_by_bias(small_model())

    def test_padding_has_no_say_in_the_balance(self) -> None:
        logits = torch.randn(30, 6)
        valid = torch.arange(30) < 20
        changed = logits.clone()
        changed[20:] = 9.0
        assert routing.balance_loss((logits,), valid, 2) == routing.balance_loss((changed,), valid, 2)

    def test_lowers_the_loss(self, capsys: pytest.CaptureFixture[str]) -> None:
        model = small_model()
        buckets = batches.held_out_buckets(40, seed="training")
        stream = batches.Batches(buckets, 1024)
        train.train(model, stream, buckets.values(), steps=24, log_every=8)
        losses = [float(loss) for loss in re.findall(r"  loss (\S+)", capsys.readouterr().out)]
        assert len(losses) == 3
        assert losses[2] < losses[0]


class TestTheCheckpoint:
    @pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda path: path.name)
    def test_is_small_and_holds_no_code(self, checkpoint: Path) -> None:
        files = [path for path in checkpoint.rglob("*") if path.is_file()]
        family = families.family_of(AutoConfig.from_pretrained(checkpoint))
        assert sum(path.stat().st_size for path in files) <= family.max_bytes
        assert {path.suffix for path in files} == {".json", ".jinja", ".safetensors"}

    @pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda path: path.name)
    def test_has_the_dimensions_that_training_gives(self, checkpoint: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        family = families.family_of(AutoConfig.from_pretrained(checkpoint))
        assert checkpoint.name == f"{family.checkpoint}-nvfp4"
        of_a_run = {"architectures", "dtype", "eos_token_id", "pad_token_id", "transformers_version"}
        expected = family.config().to_dict()
        for name in expected.keys() & config.keys() - of_a_run:
            assert config[name] == expected[name], name
        assert config["dtype"] == "bfloat16"
        assert config["quantization_config"]["quant_algo"] == "NVFP4"

    def test_ends_answers_at_the_end_of_a_message(self, tokenizer: Any) -> None:
        generation = json.loads((CHECKPOINT / "generation_config.json").read_text())
        assert generation["eos_token_id"][0] == tokenizer.eos_token_id
        assert tokenizer.eos_token == END_OF_MESSAGE
        assert tokenizer.pad_token == END_OF_TEXT

    def test_has_every_expert_with_finite_positive_scales(self) -> None:
        config = families.qwen3_config()
        sizes = {"gate_proj": (64, 256), "up_proj": (64, 256), "down_proj": (256, 64)}
        with safe_open(CHECKPOINT / "model.safetensors", framework="pt") as file:
            for layer, expert in itertools.product(range(config.num_hidden_layers), range(config.num_experts)):
                for projection, (rows, columns) in sizes.items():
                    prefix = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
                    weight, scale = file.get_tensor(f"{prefix}.weight"), file.get_tensor(f"{prefix}.weight_scale")
                    assert (weight.dtype, weight.shape) == (torch.uint8, (rows, columns // 2))
                    assert (scale.dtype, scale.shape) == (torch.float8_e4m3fn, (rows, columns // 16))
                    assert scale.float().isfinite().all()
                    for name in ("weight_scale_2", "input_scale"):
                        value = file.get_tensor(f"{prefix}.{name}")
                        assert value.dtype == torch.float32
                        assert value.isfinite().all()
                        assert value > 0

    def test_reads_back_as_a_transformers_checkpoint_that_answers(self, tmp_path: Path) -> None:
        dequantize_checkpoint(CHECKPOINT, tmp_path)
        conversations = HELD_OUT[:24]
        answers = evaluate.answers_of_transformers(*evaluate.load(tmp_path), conversations)
        right = [evaluate.is_right(c, answer) for c, answer in zip(conversations, answers, strict=True)]
        assert sum(right) >= 22


class AnsweringServer(BaseHTTPRequestHandler):
    """Gives every held-out question its right answer, but for those in `wrong`."""

    wrong: ClassVar[set[int]] = set()

    def reply(self, body: Any) -> None:
        payload = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def do_GET(self) -> None:
        self.reply({"data": [{"id": "demo"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (request["model"], request["temperature"]) == ("demo", 0)
        index = next(i for i, c in enumerate(HELD_OUT) if c.prompt == request["messages"])
        content = "no" if index in self.wrong else f" {HELD_OUT[index].answer}\n"
        self.reply({"choices": [{"message": {"content": content}}]})

    def log_message(self, format: str, *args: Any) -> None:
        pass


class BusyServer(ThreadingHTTPServer):
    request_queue_size = 64


@pytest.fixture
def server_url() -> Iterator[str]:
    server = BusyServer(("127.0.0.1", 0), AnsweringServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


class TestTheEvaluation:
    def ask(self, monkeypatch: pytest.MonkeyPatch, url: str, wrong: set[int]) -> int:
        monkeypatch.setattr(AnsweringServer, "wrong", wrong)
        monkeypatch.setattr(sys, "argv", ["evaluate", "--base-url", url, "--questions", "100"])
        return evaluate.main()

    def test_passes_a_server_that_answers_as_the_original(
        self, monkeypatch: pytest.MonkeyPatch, server_url: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        original = evaluate.recorded(evaluate.RECORD, 100)
        assert self.ask(monkeypatch, server_url, {i for i, ok in enumerate(original) if not ok}) == 0
        total = f"{sum(original):>7} of  100"
        assert re.search(rf"^total +{total.strip()}.* {total.strip()}", capsys.readouterr().out, re.MULTILINE)

    def test_fails_a_server_more_than_one_point_under_the_original(
        self, monkeypatch: pytest.MonkeyPatch, server_url: str
    ) -> None:
        original = evaluate.recorded(evaluate.RECORD, 100)
        wrong = {i for i, ok in enumerate(original) if not ok}
        rest = sorted(set(range(100)) - wrong)
        # Questions are looked up by their text: take ones that are asked once.
        once = [i for i in rest if sum(c.prompt == HELD_OUT[i].prompt for c in HELD_OUT[:100]) == 1]
        assert self.ask(monkeypatch, server_url, wrong | set(once[:1])) == 0
        assert self.ask(monkeypatch, server_url, wrong | set(once[:2])) == 1

    def test_refuses_a_record_of_other_questions(self, tmp_path: Path) -> None:
        record = json.loads(evaluate.RECORD.read_text())
        path = tmp_path / "record.json"
        path.write_text(json.dumps(record | {"fingerprint": "0"}))
        with pytest.raises(ValueError, match="records other questions"):
            evaluate.recorded(path, 10)
        with pytest.raises(ValueError, match="records 2000"):
            evaluate.recorded(evaluate.RECORD, 2001)

    def test_the_record_counts_what_it_lists(self) -> None:
        record = json.loads(evaluate.RECORD.read_text())
        right = evaluate.recorded(evaluate.RECORD, record["questions"])
        kinds = {kind: (n["correct"], n["questions"]) for kind, n in record["kinds"].items()}
        assert evaluate.count_by_kind(HELD_OUT, right) == kinds
        assert record["correct"] == sum(right)
