"""The harness's model: its three kinds of request, answered by the engine with all requests batched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from kvbits.config import AUTO
from kvbits.engine.outputs import RequestOutput
from kvbits.engine.params import SamplingParams
from kvbits.errors import ConfigError, RequestError
from kvbits.llm import LLM
from kvbits.lm_eval.arguments import Generation

_CHUNK = 256
"""Requests handed to the engine at once; the log-probabilities of all their tokens are held until they are summed."""

_SCORE = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, ignore_eos=True)
_BATCHES = ("auto", "", None)

Scored = tuple[Any, list[int], list[int]]
"""A request of the harness's base class: its cache key, tokens of the context, tokens to score."""


class KVBitsLM(TemplateLM):  # type: ignore[misc]
    """``--model kvbits``, on the CPU whatever ``--device`` is (lm-eval's default is ``cuda:0``).

    ``pretrained``, ``dtype``, ``kv_cache_dtype``, ``kv_cache_memory``, ``state_dtype``, ``disable_mla``,
    ``max_model_len`` are those of ``kvbits.LLM``;
    ``batch_size`` (or ``auto``) is the most sequences in a step; ``add_bos_token``, ``prefix_token_id``,
    ``max_gen_toks`` mean what they mean for lm-eval's ``hf`` model. Raises ``ConfigError`` for any other argument.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        kv_cache_dtype: str = "int8",
        kv_cache_memory: str | int = "1GiB",
        state_dtype: str = AUTO,
        disable_mla: bool = False,
        dtype: str = "bfloat16",
        max_model_len: int | None = None,
        max_num_batched_tokens: int | None = None,
        enable_prefix_caching: bool = True,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ConfigError(f"--model_args has '{next(iter(unknown))}', which --model kvbits does not know")
        self.llm = LLM(
            pretrained,
            kv_cache_dtype=str(kv_cache_dtype),
            kv_cache_memory=kv_cache_memory,
            state_dtype=state_dtype,
            disable_mla=disable_mla,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=_sequences(batch_size, max_batch_size),
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
        )
        self.tokenizer = self.llm.tokenizer
        self._max_gen_toks = max_gen_toks
        self._add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id

    # What the harness asks about the model

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end token."""
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: the given token, else the tokenizer's first or end token."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        return self.eot_token_id if self.tokenizer.bos_token_id is None else int(self.tokenizer.bos_token_id)

    @property
    def max_length(self) -> int:
        """Tokens that may be read to predict others: the last of these must be read too, with room for one more."""
        return self.llm.engine.max_model_len - 2

    @property
    def tokenizer_name(self) -> str:
        """For the harness's request cache."""
        return str(self.tokenizer.name_or_path or self.llm.loaded.name).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results."""
        pool = self.llm.engine.pool
        return {
            "model_fingerprint": self.llm.loaded.fingerprint,
            "kv_cache_dtype": pool.policy.name,
            "kv_cache_bits_per_element": pool.bits_per_element(),
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of ``string``; no first token is added to one that begins with it."""
        if add_special_tokens is None:
            add_special_tokens = self._add_bos_token
            if string.startswith(self.tokenizer.decode(self.prefix_token_id)):
                add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        tokens: list[int] = self.tokenizer.encode(string, **options)
        return tokens

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one text, in the model's chat template."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    # The three kinds of request; ``loglikelihood`` is the base class's, on top of ``_loglikelihood_tokens``

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each request the sum of log-probabilities of its tokens, and whether each was the likeliest one."""
        answers = []
        prompts = [(context + tokens)[-(self.max_length + 1) :] for _, context, tokens in requests]
        results = self._run(prompts, [_SCORE] * len(prompts), disable_tqdm)
        for (key, _, tokens), prompt, result in zip(requests, prompts, results, strict=True):
            first = max(len(prompt) - len(tokens), 1)  # nothing predicts a prompt's first token
            entries = (result.prompt_logprobs or [])[first:]
            chosen = [e[token] for e, token in zip(entries, prompt[first:], strict=True) if e is not None]
            answer = (sum(c.logprob for c in chosen), all(c.rank == 1 for c in chosen))
            answers.append(answer)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows as long as the context."""
        windows: list[Scored] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, tokens in map(make_disjoint_window, rolling):
                windows.append((None, context, tokens))
                owners.append(index)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[owner] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to their stop strings; contexts that are too long lose their beginning."""
        prompts, generations = [], []
        for request in requests:
            context, options = request.args
            generation = Generation.of(options, self._max_gen_toks)
            room = self.max_length - generation.max_tokens
            if room <= 0:
                raise RequestError(
                    f"the task generates up to {generation.max_tokens} tokens; the context of "
                    f"{self.llm.loaded.name} has room for {self.max_length}"
                )
            prompts.append(self.tok_encode(context)[-room:])
            generations.append(generation)
        end = self.tokenizer.decode(self.eot_token_id)
        texts = []
        results = self._run(prompts, [g.sampling() for g in generations], disable_tqdm)
        for request, generation, result in zip(requests, generations, results, strict=True):
            texts.append(generation.cut(result.outputs[0].text, end))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _run(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], disable_tqdm: bool
    ) -> Iterator[RequestOutput]:
        """Results in the order of the prompts; raises ``RequestError`` for one that cannot be served."""
        for start in range(0, len(prompts), _CHUNK):
            part = slice(start, start + _CHUNK)
            for result in self.llm.generate(list(prompts[part]), list(params[part]), use_tqdm=not disable_tqdm):
                if result.error is not None:
                    raise RequestError(f"a request of {len(result.prompt_token_ids)} tokens failed: {result.error}")
                yield result


def _sequences(batch_size: int | str | None, most: int | None) -> int:
    """Sequences in a step."""
    if batch_size in _BATCHES or str(batch_size).startswith("auto"):
        return most or 64
    try:
        return int(batch_size)
    except ValueError as error:
        raise ConfigError(f"--batch_size is '{batch_size}'; it must be a number or auto") from error
