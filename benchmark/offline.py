"""Generated tokens per second of the engine, beside transformers' generate on a BF16 checkpoint, in one run.

    python benchmark/offline.py --model-path assets/nibble-demo-6m-nvfp4 --ranks 2

Every request gets a different prompt of PROMPT_TOKENS tokens and generates exactly --new-tokens greedy tokens; the
same prompts go to both sides, all at once. transformers gets them as one batch, on all cores, in BF16 and in fp32. Each
figure is the best of --repeats. Prints a table and one line of JSON.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import nibble

sys.path.insert(0, str(Path(__file__).parents[1]))

PROMPT_TOKENS = 24
CONCURRENCY = (1, 8, 32)


def prompts(count: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocab_size, (count, PROMPT_TOKENS), generator=generator).tolist()


def best_rate(tokens: int, repeats: int, run: Callable[[], None]) -> float:
    """Tokens per second of the fastest of `repeats` runs, after one that warms up."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return tokens / min(seconds)


def measure_transformers(folder: Path, dtype: torch.dtype, new_tokens: int, repeats: int) -> dict[int, float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    rates = {}
    for count in CONCURRENCY:
        batch = torch.tensor(prompts(count, model.config.vocab_size))

        def run(batch: torch.Tensor = batch) -> None:
            out = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
            )
            assert out.shape[1] == PROMPT_TOKENS + new_tokens

        rates[count] = best_rate(count * new_tokens, repeats, run)
    return rates


def measure_engine(model_path: Path, ranks: int, new_tokens: int, repeats: int) -> dict[int, float]:
    rates = {}
    with nibble.Engine(
        model_path=str(model_path),
        tp_size=ranks,
        dp_size=ranks,
        ep_size=ranks,
        enable_dp_attention=True,
        enable_flashinfer_cutlass_moe=True,
        disable_radix_cache=True,  # every repetition computes its prompts, as transformers does
        log_level="warning",
    ) as engine:
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        for count in CONCURRENCY:
            batch = prompts(count, engine.config.model.vocab_size)

            def run(batch: list[list[int]] = batch) -> None:
                outputs = engine.generate(input_ids=batch, sampling_params=sampling)
                assert all(output["meta_info"]["completion_tokens"] == new_tokens for output in outputs)

            rates[count] = best_rate(count * new_tokens, repeats, run)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, default=Path("assets/nibble-demo-6m-nvfp4"))
    parser.add_argument("--bf16-path", type=Path, help="BF16 checkpoint for transformers; default: dequantized")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        bf16 = args.bf16_path
        if bf16 is None:
            from tools.demo_model.dequantize import dequantize_checkpoint

            bf16 = Path(scratch)
            dequantize_checkpoint(args.model_path, bf16)
        reference = {
            str(dtype).removeprefix("torch."): measure_transformers(bf16, dtype, args.new_tokens, args.repeats)
            for dtype in (torch.bfloat16, torch.float32)
        }
    engine = measure_engine(args.model_path, args.ranks, args.new_tokens, args.repeats)
    print("tokens per second")
    print(f"{'requests':>8} {'nibble':>8} {'transformers bf16':>18} {'fp32':>8} {'to bf16':>9} {'to fp32':>9}")
    for count in CONCURRENCY:
        bf16_rate, fp32_rate = (reference[name][count] for name in ("bfloat16", "float32"))
        ratios = f"{engine[count] / bf16_rate:>8.1f}x {engine[count] / fp32_rate:>8.1f}x"
        print(f"{count:>8} {engine[count]:>8.0f} {bf16_rate:>18.0f} {fp32_rate:>8.0f} {ratios}")
    print(
        json.dumps(
            {
                "benchmark": "offline",
                "machine": platform.processor() or platform.machine(),
                "ranks": args.ranks,
                "new_tokens": args.new_tokens,
                "nibble": engine,
                "transformers": reference,
            }
        )
    )


if __name__ == "__main__":
    main()
