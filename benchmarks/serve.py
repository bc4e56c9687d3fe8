"""Load on `coatrt serve`: throughput of one stream and of eight, and whether company changes a token.

python benchmarks/serve.py BUNDLE    # writes results/serve.json
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
from common import save_result

PROMPTS = [
    "The state of the union is",
    "Once upon a time there was a",
    "Congress has passed a law that",
    "The treasury reports that revenue",
    "Our relations with other nations",
    "The farmers of this country",
    "I recommend that the army",
    "In the last year, commerce",
]
_TOKENS = 64


async def complete(client: httpx2.AsyncClient, model: str, prompt: str, tokens: int) -> Any:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    response = await client.post("/v1/completions", json={**body, "logprobs": 0})
    response.raise_for_status()
    return response.json()["choices"][0]["logprobs"]["tokens"]


async def first_and_rest(client: httpx2.AsyncClient, model: str, prompt: str) -> tuple[float, float, int]:
    """Return when the first and the last chunk of a stream came, and how many tokens there were."""
    body = {"model": model, "prompt": prompt, "max_tokens": _TOKENS, "temperature": 0, "ignore_eos": True}
    times, count = [], 0
    async with client.stream("POST", "/v1/completions", json={**body, "logprobs": 0, "stream": True}) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                table = json.loads(line[6:])["choices"][0]["logprobs"]
                count += len(table["tokens"]) if table else 0
                times.append(time.perf_counter())
    return times[0], times[-1], count


async def throughput(client: httpx2.AsyncClient, model: str, streams: int) -> float:
    """Return decoded tokens/s of some streams together, from the last first token to the first end."""
    done = await asyncio.gather(*(first_and_rest(client, model, PROMPTS[i]) for i in range(streams)))
    seconds = max(last for _, last, _ in done) - min(first for first, _, _ in done)
    return sum(count - 1 for _, _, count in done) / seconds


async def load(client: httpx2.AsyncClient, model: str, alone: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Ask with eight clients at once, each with its own lengths, and compare every token with `alone`."""
    end, wrong, errors, requests, tokens = time.monotonic() + seconds, 0, 0, 0, 0

    async def ask(number: int) -> None:
        nonlocal wrong, errors, requests, tokens
        turn = number
        while time.monotonic() < end:
            prompt, count = PROMPTS[turn % len(PROMPTS)], _TOKENS // 4 + 7 * (turn % 7)
            turn += 3
            requests += 1
            try:
                answer = await complete(client, model, prompt, count)
            except httpx2.HTTPError:
                errors += 1
                continue
            tokens += len(answer)
            wrong += sum(a != b for a, b in zip(answer, alone[prompt], strict=False))

    began = time.monotonic()
    await asyncio.gather(*(ask(i) for i in range(8)))
    rate = tokens / (time.monotonic() - began)
    return {
        "clients": 8,
        "seconds": seconds,
        "requests": requests,
        "tokens": tokens,
        "errors": errors,
        "tokens_that_differ": wrong,
        "tokens_per_second": round(rate, 1),
    }


async def measure(url: str, model: str, seconds: float, rounds: int) -> dict[str, Any]:
    async with httpx2.AsyncClient(base_url=url, timeout=600) as client:
        alone = {prompt: await complete(client, model, prompt, _TOKENS) for prompt in PROMPTS}
        streams: dict[int, list[float]] = {1: [], 2: [], 4: [], 8: []}
        for _ in range(rounds):  # in turns, as other work on the machine comes and goes
            for count, rates in streams.items():
                rates.append(await throughput(client, model, count))
        best = {str(count): round(max(rates), 1) for count, rates in streams.items()}
        ratios = sorted(eight / one for one, eight in zip(streams[1], streams[8], strict=True))
        return {
            "tokens_per_second": best,
            "eight_streams_to_one": {"median": round(ratios[len(ratios) // 2], 2), "least": round(ratios[0], 2)},
            "load": await load(client, model, alone, seconds),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "coatrt", "serve", f"model={arguments.bundle}", "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "COATRT_API_KEY"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        if not line.startswith("listening on "):
            raise SystemExit(line + process.stderr.read())
        url = line.removeprefix("listening on ").strip()
        result = asyncio.run(measure(url, "model", arguments.seconds, arguments.rounds))
    finally:
        process.terminate()
        process.wait()
    manifest = json.loads((arguments.bundle / "manifest.json").read_text())
    facts = {"model": Path(manifest["model"]["source"]).name.rsplit("-", 1)[0], "device": arguments.bundle.name}
    save_result("serve", "python benchmarks/serve.py BUNDLE", {"bundle": facts, **result})


if __name__ == "__main__":
    main()
