"""`nibble eval`: questions with known answers, asked of a running server."""

import argparse
import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
from tqdm import tqdm

from nibble.cli.sse_client import SseClient
from nibble.utils.errors import ConfigError

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_MAX_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument(
        "data",
        type=Path,
        help='JSON lines with "question" and "answer"; where the answer ends in "#### number", as in GSM8K, '
        "the last number of the reply counts, otherwise the reply must be the answer",
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:30000", help="(default: %(default)s)")
    parser.add_argument("--api-key", help="key of the server")
    parser.add_argument("--limit", type=int, help="ask only the first so many")
    parser.add_argument("--concurrency", type=int, default=32, help="questions at once (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest reply (default: %(default)s)")
    parser.add_argument("--min-accuracy", type=float, default=0.0, help="exit with 1 below it, from 0 to 1")


@dataclass(frozen=True)
class Question:
    text: str
    answer: str

    def is_answered_by(self, reply: str) -> bool:
        _, marker, number = self.answer.rpartition("####")
        if not marker:
            return reply.strip() == self.answer.strip()
        found = _NUMBER.findall(reply)
        return bool(found) and _as_number(found[-1]) == _as_number(number.strip())


def _as_number(text: str) -> float:
    return float(text.replace(",", ""))


def read_questions(path: Path) -> list[Question]:
    """Raises ConfigError with the line that is not as it should be."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    questions = []
    for number, line in enumerate(lines, 1):
        try:
            content = orjson.loads(line)
            questions.append(Question(str(content["question"]), str(content["answer"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number}: not an object with question and answer ({error!r})") from error
    if not questions:
        raise ConfigError(f"{path} holds no question")
    return questions


def run(args: argparse.Namespace) -> int:
    """0, or 1 when the accuracy is below --min-accuracy."""
    questions = read_questions(args.data)[: args.limit]
    try:
        replies = asyncio.run(_ask(args, questions))
    except OSError as error:
        raise ConfigError(f"the server at {args.base_url} does not answer: {error}") from error
    wrong = [(q, r) for q, r in zip(questions, replies, strict=True) if not q.is_answered_by(r)]
    for question, reply in wrong[:_MAX_SHOWN]:
        print(f"wrong: {question.text!r}\n  reply:  {reply!r}\n  answer: {question.answer!r}")
    right = len(questions) - len(wrong)
    print(f"{right} of {len(questions)} right ({100 * right / len(questions):.1f} %)")
    return 1 if right < args.min_accuracy * len(questions) else 0


async def _ask(args: argparse.Namespace, questions: Sequence[Question]) -> list[str]:
    client = SseClient(args.base_url, args.api_key)
    slots = asyncio.Semaphore(args.concurrency)
    with tqdm(total=len(questions), unit="question") as bar:

        async def ask(question: Question) -> str:
            messages = [{"role": "user", "content": question.text}]
            body = {"model": "served", "messages": messages, "temperature": 0, "max_tokens": args.max_tokens}
            async with slots:
                answer = await client.request("POST", "/v1/chat/completions", body)
            if answer.status != 200:
                raise ConfigError(f"the server answers {answer.status}: {answer.error()}")
            bar.update()
            return orjson.loads(answer.body)["choices"][0]["message"]["content"] or ""

        return list(await asyncio.gather(*map(ask, questions)))
