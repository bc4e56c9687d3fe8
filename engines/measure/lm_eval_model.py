"""A bundle as a model of lm-eval (EleutherAI's lm-evaluation-harness), which scores it on anybody's tasks."""

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from inspect import signature as signature_of
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from coatrt.bundle import Bundle, SignaturePolicy
from coatrt.data.chat_template import Refusal, Rendering, chat_template
from coatrt.data.encoding import encode
from coatrt.engines.measure.likelihoods import Passage, likelihoods
from coatrt.engines.runtime.generate import generate
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.engines.runtime.options import AccuracyLevel, Backend, RuntimeOptions
from coatrt.engines.runtime.sampling import Sampling
from coatrt.errors import ConfigError
from coatrt.system.notices import warn_once

__all__ = ["BundleLM"]

_AUTO_BATCH = 8
_NOT_USED = ("device", "max_batch_size", "unknown")
_SAMPLING = {field.name for field in fields(Sampling)} - {"logit_bias"}
_DRAWING = {"temperature", "top_k", "top_p", "min_p", "seed"}  # without a meaning where the likeliest token is taken
_CONTINUED = "\x00coatrt\x00"  # marks the end of a message in a rendered conversation


class BundleLM(TemplateLM):  # type: ignore[misc] # lm-eval has no types
    """A bundle as lm-eval's model "coatrt"; the arguments are those of `--model_args`.

    Args:
        bundle: its directory; it decides the configuration.
        lora: "own" for the LoRA that was made for this configuration, "none" or None for none, else a LoRA file (see
            coatrt adapt).
        backend: "ort", "cuda" or "trt", see `RuntimeOptions`.
        accuracy_level: of int4 and int8 products on the CPU, see `RuntimeOptions`: 4 is what the other commands run
            with; 1 and 0 differ from torch by rounding in float32 only.
        threads: of the CPU; None for all usable cores.
        max_length: most tokens of context and answer together; longer texts lose their beginning. By default 2048, or
            less where the bundle has room for less.
        max_gen_toks: most tokens to generate where a task does not say.
        batch_size: sequences at once; on the CPU the next even number, see docs/guides/evaluate.md. "auto" for 8.
        add_bos_token: whether texts begin with the tokenizer's special tokens; None for what it does by itself.
        prefix_token_id: stands before a text that has no context; None for the start token, else the end token.
        seed: of sampled generation.
        strict_lora: refuse a LoRA of another configuration.
        key: public key file of the signer, see `Bundle.open`.
        signature: see `Bundle.open`.
        device: not used; lm-eval passes cuda:0 to every model, and here the backend says what computes.
        max_batch_size: not used; lm-eval passes it to every model.
        unknown: refused.

    Raises:
        ConfigError: an argument is unknown or out of range, or the tokenizer has no token to begin a text with.
        BundleError: not a bundle, altered, or not signed.
        BuildError: the backend cannot run here.
    """

    def __init__(
        self,
        bundle: str | Path | None = None,
        *,
        lora: str | Path | None = "own",
        backend: Backend = "ort",
        accuracy_level: AccuracyLevel = 4,
        threads: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
        strict_lora: bool = False,
        key: str | Path | None = None,
        signature: SignaturePolicy | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if bundle is None:
            raise ConfigError("no bundle; give --model_args bundle=DIRECTORY")
        if unknown:
            names = [name for name in signature_of(BundleLM).parameters if name not in _NOT_USED]
            raise ConfigError(f"unknown argument {', '.join(unknown)} of the model coatrt; it has {', '.join(names)}")
        self._bundle = Bundle.open(str(bundle), key=key, policy=signature)
        self._batch = _even(batch_size) if backend == "ort" else _number("batch_size", batch_size)
        options = RuntimeOptions(
            backend, threads, batch=self._batch, accuracy_level=accuracy_level, strict_lora=strict_lora
        )
        if max_length is not None:
            options = replace(options, context=_number("max_length", max_length, least=2))
        self._max_gen_toks = _number("max_gen_toks", max_gen_toks)
        self._sampling = Sampling(seed=seed)
        self._add_bos_token = add_bos_token
        self.tokenizer = self._bundle.tokenizer()
        self._stop = tuple(self._bundle.manifest["model"]["stop_tokens"])
        self._eos = self._special_token("eos_token")
        self._prefix = prefix_token_id if prefix_token_id is not None else self._find_prefix()
        self._decoder: Any = load_decoder(self._bundle, options)
        if max_length is not None and max_length > self._decoder.capacity:
            raise ConfigError(f"max_length must be at most {self._decoder.capacity} for this bundle, got {max_length}")
        self._lora = str(lora if lora is not None else "none")
        if self._lora != "none":
            path = self._bundle.path("lora.safetensors") if self._lora == "own" else Path(self._lora)
            self._decoder.set_lora(load_lora(path, self._bundle.contract))
        self._options = options

    def _special_token(self, name: str) -> int | None:
        text = self.tokenizer.special_tokens_map.get(name)
        ids = encode(self.tokenizer, [str(text)])[0] if text is not None else []
        return ids[0] if len(ids) == 1 else None

    def _find_prefix(self) -> int:
        for token in (self._special_token("bos_token"), self._eos, *self._stop):
            if token is not None:
                return token
        raise ConfigError("the bundle's tokenizer has neither a start nor an end token; give prefix_token_id=NUMBER")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._eos if self._eos is not None else self._prefix

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return self._prefix

    @property
    def max_length(self) -> int:
        """Most tokens of context and answer together."""
        return int(self._decoder.capacity)

    @property
    def max_gen_toks(self) -> int:
        """Most tokens to generate where a task does not say."""
        return self._max_gen_toks

    @property
    def batch_size(self) -> int:
        """Sequences at once."""
        return self._batch

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of requests calls the tokenizer: the bundle's model."""
        return f"coatrt-{self._bundle.manifest['model']['fingerprint']}"

    def get_model_info(self) -> dict[str, Any]:
        """Return what a reader of lm-eval's results has to know of the bundle."""
        configuration = self._bundle.manifest["configuration"]
        return {
            "coatrt_bundle": str(self._bundle.directory),
            "coatrt_configuration": configuration["hash"],
            "coatrt_average_bits": configuration["average_bits"],
            "coatrt_lora": self._lora,
            "coatrt_backend": self._options.backend,
            "coatrt_accuracy_level": self._options.accuracy_level if self._options.backend == "ort" else None,
            "coatrt_max_length": self.max_length,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text.

        Args:
            string: the text.
            add_special_tokens: whether to add the tokenizer's; None for what the tokenizer does by itself, unless the
                text begins with the start token already.
            kwargs: ignored; lm-eval's models have more.
        """
        if add_special_tokens is None:
            add_special_tokens = self._add_bos_token if self._add_bos_token is not None else True
            if string.startswith(self.tokenizer.decode([self._prefix]) or "\0"):
                add_special_tokens = False
        return encode(self.tokenizer, [string], special_tokens=add_special_tokens)[0]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text.

        Args:
            chat_history: its messages.
            add_generation_prompt: whether the assistant's next message is opened; else the last message stays open.

        Raises:
            ConfigError: there is no chat template, or it refuses the messages.
        """
        template = chat_template(self.tokenizer)
        if template is None:
            raise ConfigError("the bundle's tokenizer has no chat template; leave out --apply_chat_template")
        messages = [dict(message) for message in chat_history]
        if not add_generation_prompt:
            messages[-1]["content"] += f"{_CONTINUED} "
        (text,) = template.render([Rendering(messages, prompt=add_generation_prompt)])
        if isinstance(text, Refusal) and any(message["role"] == "system" for message in messages):
            warn_once(f"the chat template refuses the system message ({text.reason}); it is left out")
            messages = [message for message in messages if message["role"] != "system"]
            (text,) = template.render([Rendering(messages, prompt=add_generation_prompt)])
        if isinstance(text, Refusal):
            raise ConfigError(f"the chat template of {template.place} refuses the conversation ({text.reason})")
        if add_generation_prompt:
            return text
        before, mark, after = text.rpartition(_CONTINUED)
        if not mark:
            raise ConfigError(f"the chat template of {template.place} leaves out the last message, which is to go on")
        return before if after.startswith(" ") else before.rstrip()  # without the space the template trims messages

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether greedy decoding gives it."""
        passages, most, cut = [], self.max_length, 0
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= most:
                raise ConfigError(
                    f"an answer has {len(continuation)} tokens, it may have 1 to {most}; give a larger max_length"
                )
            tokens = tuple((context + continuation)[-(most + 1) :])
            cut += len(tokens) < len(context) + len(continuation)
            passages.append(Passage(tokens, len(continuation)))
        if cut:
            warn_once(f"{cut} texts have more than {most} tokens and lost their beginning; give a larger max_length")
        with tqdm(total=len(passages), desc="Scoring", disable=disable_tqdm) as bar:
            found = likelihoods(self._decoder, passages, bar.update)
        answers = [(likelihood.log_probability, likelihood.greedy) for likelihood in found]
        for (request, _, _), answer in zip(requests, answers, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in windows of `max_length` tokens that do not overlap."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            for window in utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context up to a stop string, the end token or the most tokens."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        texts = [""] * len(requests)
        drawn = 0
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as bar:
            for numbers in groups.values():
                until, most, sampling = self._generation(requests[numbers[0]].args[1])
                prompts = {n: self._prompt(requests[n].args[0], most) for n in numbers}
                order = sorted(numbers, key=lambda n: -len(prompts[n]))
                for begin in range(0, len(order), self._batch):
                    batch = order[begin : begin + self._batch]
                    draws = replace(sampling, seed=(sampling.seed + drawn) % 2**64)  # no two batches draw alike
                    answers = self._continue([prompts[n] for n in batch], until, most, draws)
                    for n, text in zip(batch, answers, strict=True):
                        texts[n] = text
                        self.cache_hook.add_partial("generate_until", requests[n].args, text)
                    drawn += 1
                    bar.update(len(batch))
        return texts

    def _prompt(self, context: str, most: int) -> list[int]:
        """Return a context's tokens, cut on the left so that `most` new ones have room."""
        room = self.max_length - most
        if room < 1:
            raise ConfigError(f"max_gen_toks must be less than max_length, {self.max_length}, got {most}")
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        if len(tokens) > room:
            warn_once(f"contexts of more than {room} tokens lost their beginning; give a larger max_length")
        return tokens[-room:]

    def _generation(self, gen_kwargs: dict[str, Any]) -> tuple[list[str], int, Sampling]:
        """Return stop strings, most new tokens and sampling of lm-eval's generation arguments.

        Raises:
            ConfigError: an argument is unknown or out of range.
        """
        known = dict(normalize_gen_kwargs(gen_kwargs, self._max_gen_toks))
        until, most, samples = known.pop("until"), known.pop("max_gen_toks"), known.pop("do_sample")
        if known.pop("num_beams", 1) != 1:
            raise ConfigError("num_beams must be 1: coatrt has no beam search")
        if unknown := sorted(set(known) - _SAMPLING):
            raise ConfigError(
                f"generation argument {', '.join(unknown)} is unknown; allowed: until, max_gen_toks, do_sample, "
                f"{', '.join(sorted(_SAMPLING))}"
            )
        if not samples:
            known = {name: value for name, value in known.items() if name not in _DRAWING}
        try:
            return [str(text) for text in until if text], int(most), replace(self._sampling, **known)
        except TypeError:
            raise ConfigError(f"generation arguments must be numbers, got {known}") from None

    def _continue(
        self, prompts: Sequence[Sequence[int]], until: Sequence[str], most: int, sampling: Sampling
    ) -> list[str]:
        rows: list[list[int]] = [[] for _ in range(self._batch)]

        def on_token(row: int, token: int) -> bool:
            rows[row].append(token)
            return row < len(prompts) and _cut(self._text(rows[row]), until) is None

        idle = [[self.prefix_token_id]] * (self._batch - len(prompts))
        stop = {*self._stop, self.eot_token_id}
        found = generate(
            self._decoder, [*prompts, *idle], max_tokens=most, sampling=sampling, stop=tuple(stop), on_token=on_token
        )
        texts = [self._text(result.tokens) for result in found[: len(prompts)]]
        return [text if (cut := _cut(text, until)) is None else cut for text in texts]

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def _cut(text: str, until: Sequence[str]) -> str | None:
    """Return a text up to the first stop string; None where it has none."""
    places = [text.find(stop) for stop in until if stop in text]
    return text[: min(places)] if places else None


def _number(name: str, value: object, least: int = 1) -> int:
    if isinstance(value, str) and name == "batch_size":
        value = _AUTO_BATCH if value.partition(":")[0] == "auto" else int(value) if value.isdecimal() else value
    if type(value) is not int or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def _even(batch_size: int | str) -> int:
    """Return the next even number: ONNX Runtime's int8 products give the last row of an odd number other sums."""
    number = _number("batch_size", batch_size)
    return number + number % 2
