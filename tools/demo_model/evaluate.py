"""Asks the held-out questions and counts exact answers, beside those of the recorded BF16 original.

    python -m tools.demo_model.evaluate --base-url http://127.0.0.1:30000/v1
    python -m tools.demo_model.evaluate --transformers build/nibble-demo-6m-bf16

Exits with 1 when accuracy is more than one point under the original's on the same questions.
"""

import argparse
import asyncio
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from .data import KINDS, Conversation, heldout

RECORD = Path(__file__).parents[2] / "assets" / "nibble-demo-6m-bf16.json"
LONGEST_ANSWER = 96
"""Tokens; the longest right answer has 63."""
MAX_POINTS_LOST = 1.0
MAX_SHOWN = 10


def is_right(conversation: Conversation, answer: str) -> bool:
    """Exact match, but for white space around the answer."""
    return answer.strip() == conversation.answer


def fingerprint(conversations: Sequence[Conversation]) -> str:
    """Hash of the questions and their answers: two runs compare only when it is the same."""
    messages = [conversation.messages for conversation in conversations]
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]


# ---- Asking ----


def load(checkpoint: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A BF16 checkpoint as transformers has it: in BF16 on a GPU where there is one, else in fp32 on the CPU."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device)
    return model, AutoTokenizer.from_pretrained(checkpoint)


@torch.inference_mode()
def answers_of_transformers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    conversations: Sequence[Conversation],
    batch_size: int = 128,
) -> list[str]:
    """Greedy answers of `model`, on the device where it is."""
    prompts = [
        tokenizer.apply_chat_template(c.prompt, tokenize=False, add_generation_prompt=True) for c in conversations
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    answers = [""] * len(prompts)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        inputs = tokenizer(
            [prompts[i] for i in chosen], return_tensors="pt", padding=True, return_token_type_ids=False
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text
    return answers


async def answers_of_server(
    base_url: str, model: str | None, conversations: Sequence[Conversation], concurrency: int
) -> list[str]:
    """Greedy chat completions of an OpenAI-compatible server, `concurrency` at a time.

    `model` None asks the server for the one that it serves. Raises httpx.HTTPError when an answer fails.
    """
    limit = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=f"{base_url.rstrip('/')}/", timeout=300) as client:
        served = model or (await _json(client, "GET", "models"))["data"][0]["id"]

        async def ask(conversation: Conversation) -> str:
            request = {
                "model": served,
                "messages": conversation.prompt,
                "temperature": 0,
                "max_tokens": LONGEST_ANSWER,
            }
            async with limit:
                reply = await _json(client, "POST", "chat/completions", request)
            return str(reply["choices"][0]["message"]["content"])

        return list(await asyncio.gather(*map(ask, conversations)))


async def _json(client: httpx.AsyncClient, method: str, path: str, body: Any = None) -> Any:
    response = await client.request(method, path, json=body)
    response.raise_for_status()
    return response.json()


# ---- Counting ----


def count_by_kind(conversations: Sequence[Conversation], right: Sequence[bool]) -> dict[str, tuple[int, int]]:
    """Kind -> (right answers, questions), in the order of KINDS, kinds without a question left out."""
    asked = Counter(c.kind for c in conversations)
    correct = Counter(c.kind for c, ok in zip(conversations, right, strict=True) if ok)
    return {kind: (correct[kind], asked[kind]) for kind in KINDS if asked[kind]}


def write_record(path: Path, conversations: Sequence[Conversation], answers: Sequence[str], **run: str) -> None:
    """Writes what a run answered, with how, where and when (`run`: command, machine, date)."""
    right = [is_right(c, a) for c, a in zip(conversations, answers, strict=True)]
    record = run | {
        "questions": len(right),
        "fingerprint": fingerprint(conversations),
        "correct": sum(right),
        "kinds": {
            kind: {"correct": correct, "questions": asked}
            for kind, (correct, asked) in count_by_kind(conversations, right).items()
        },
        "wrong": [i for i, ok in enumerate(right) if not ok],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def recorded(path: Path, count: int) -> list[bool]:
    """Whether the recorded run answered each of the first `count` questions right.

    Raises ValueError when the record is of fewer questions or of others than this program asks.
    """
    record = json.loads(path.read_text())
    if count > record["questions"]:
        raise ValueError(f"--questions {count}: {path} records {record['questions']}; ask at most as many")
    if record["fingerprint"] != fingerprint(heldout(record["questions"])):
        raise ValueError(f"{path} records other questions than data.py makes now; train and record again")
    wrong = set(record["wrong"])
    return [i not in wrong for i in range(count)]


def print_accuracy(
    conversations: Sequence[Conversation], answers: Sequence[str], original: Sequence[bool] | None = None
) -> float:
    """Prints right answers by kind and some wrong ones; returns the points lost to `original` (0 without it)."""
    right = [is_right(c, a) for c, a in zip(conversations, answers, strict=True)]
    here = count_by_kind(conversations, right) | {"total": (sum(right), len(right))}
    there = count_by_kind(conversations, original) | {"total": (sum(original), len(original))} if original else {}
    print(f"{'held-out questions':<20}{'exact':>22}{'BF16 original':>22}" if there else "held-out questions")
    for kind, counts in here.items():
        columns = [counts, there[kind]] if there else [counts]
        print(f"{kind:<20}" + "".join(f"{c:>7} of {n:>4}  {c / n:>6.1%}" for c, n in columns))
    failures = [(c, a) for c, a, ok in zip(conversations, answers, right, strict=True) if not ok]
    for conversation, answer in failures[:MAX_SHOWN]:
        question = conversation.prompt[-1]["content"]
        print(f"  {question!r}: expected {conversation.answer!r}, got {answer!r}")
    return 100 * (sum(original) - sum(right)) / len(right) if original else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--base-url", help="an OpenAI-compatible server, with its /v1")
    where.add_argument("--transformers", type=Path, metavar="PATH", help="a BF16 checkpoint, asked in this process")
    parser.add_argument("--model", help="model name to ask the server for (default: the one it serves)")
    parser.add_argument("--record", type=Path, default=RECORD, help="answers of the original, as train.py wrote them")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=32)
    args = parser.parse_args()

    conversations = heldout(args.questions)
    try:
        original = recorded(args.record, args.questions)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.transformers:
        answers = answers_of_transformers(*load(args.transformers), conversations)
    else:
        asked = answers_of_server(args.base_url, args.model, conversations, args.concurrency)
        try:
            answers = asyncio.run(asked)
        except httpx.HTTPError as error:
            parser.error(f"--base-url {args.base_url}: {error or type(error).__name__}")
    lost = print_accuracy(conversations, answers, original)
    print(f"{abs(lost):.2f} points {'under' if lost > 0 else 'over'} the BF16 original")
    return 1 if lost > MAX_POINTS_LOST else 0


if __name__ == "__main__":
    sys.exit(main())
