"""``kvbits.LLM``: generate text from Python."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvbits.auto.choose import choose
from kvbits.auto.wanted import Wanted
from kvbits.codecs import Policy
from kvbits.config import AUTO
from kvbits.engine.bar import Bar, no_bar
from kvbits.engine.config import EngineConfig, step_tokens
from kvbits.engine.engine import Engine
from kvbits.engine.outputs import CompletionOutput, Delta, RequestOutput
from kvbits.engine.params import SamplingParams
from kvbits.engine.precheck import check_engine, engine_check
from kvbits.engine.progress import Progress
from kvbits.engine.prompts import Given, Prompt, read_chats, read_params, read_prompts
from kvbits.engine.setup import check_fit
from kvbits.engine.speculation import SpeculationStats, SpeculativeConfig
from kvbits.engine.text import encode, encode_chat
from kvbits.engine.transfer import PageBundle, export_pages, load_pages
from kvbits.engine.vllm_options import check_vllm_options
from kvbits.errors import CacheError, RequestError
from kvbits.kernels import Backend, choose_backend
from kvbits.memory import show
from kvbits.models import LoadedModel, load_model

log = logging.getLogger(__name__)

OnToken = Callable[[int, Delta], None]
Message = Mapping[str, Any]


class LLM:
    """A model with a quantized KV cache.

    ``model`` is a name that :func:`kvbits.models.load_model` knows, or what it returned. ``kv_cache_dtype`` is a dtype,
    ``policy:DIR``, a policy that was read already, or ``"auto"``: of a ladder of dtypes the one of the fewest bits
    whose measured KL to 16 bit stays under ``max_kl`` nats a token (default 0.001), on a text that the model writes or
    the file ``text``; that is measured once for a model and kept in the user's cache directory. :attr:`choice` says
    what was taken and what it loses. ``weights`` is as for :func:`~kvbits.models.load_model`. ``kv_cache_memory`` is
    bytes or text such as ``"256MiB"``.
    ``max_num_batched_tokens`` is the token budget of a step, 512 on a CPU and 2,048 on a GPU where it is not given.
    ``kv_offload_size`` bytes of host memory, or of ``kv_offload_path`` (a file or a directory), keep the pages that the
    pool gives up. ``speculative_config`` (the options of :class:`~kvbits.engine.speculation.SpeculativeConfig`) guesses
    tokens ahead; answers stay the same. ``disable_mla``: multi-head latent attention caches every head's keys and
    values, not latents (more bytes, fewer operations). ``device`` (``"cpu"``, ``"cuda"``, ...) is where a model that is
    named runs; ``backend`` (:data:`kvbits.kernels.BACKENDS`) goes by it. ``trust_remote_code`` runs Python code that
    comes with the model. ``progress`` shows a bar on stderr for work that takes more than two seconds. Threads may
    share an ``LLM``: one call runs after another. ``with`` or :meth:`close` gives its memory back. Options of vLLM's
    that ask for nothing here are accepted, others refused with what to use instead. Raises ``ConfigError`` or
    ``UnsupportedError`` at once for what cannot work.
    """

    def __init__(
        self,
        model: str | LoadedModel,
        *,
        kv_cache_dtype: str | Policy = AUTO,
        max_kl: float | None = None,
        text: str | Path | None = None,
        kv_cache_memory: str | int = "1GiB",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int | None = None,
        dtype: str = "bfloat16",
        weights: str = "auto",
        device: str = "cpu",
        trust_remote_code: bool = False,
        enable_prefix_caching: bool = True,
        batch_invariant: bool = False,
        kv_offload_size: str | int | None = None,
        kv_offload_path: str | None = None,
        state_dtype: str = AUTO,
        disable_mla: bool = False,
        speculative_config: SpeculativeConfig | Mapping[str, Any] | None = None,
        backend: Backend | str | None = None,
        progress: bool = True,
        **vllm: Any,
    ) -> None:
        check_vllm_options(vllm)
        dtype = "bfloat16" if dtype == "auto" else dtype
        wanted = Wanted(kv_cache_dtype, max_kl, text)
        config = EngineConfig.of(
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_memory=kv_cache_memory,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=step_tokens(
                max_num_batched_tokens, model.device.type if isinstance(model, LoadedModel) else device
            ),
            enable_prefix_caching=enable_prefix_caching,
            batch_invariant=batch_invariant,
            kv_offload_size=kv_offload_size,
            kv_offload_path=kv_offload_path,
            state_dtype=state_dtype,
            disable_mla=disable_mla,
        )
        speculative = SpeculativeConfig.of(speculative_config)
        if not isinstance(model, LoadedModel):
            check_engine(model, config, speculative, dtype=dtype, weights=weights, device=device)
            model = load_model(
                model, dtype, None, weights, device, trust_remote_code, max_model_len, disable_mla,
                engine_check(config, speculative),
            )  # fmt: skip
        self.loaded = model
        check_fit(model, config, choose_backend(backend, str(model.device)))
        self.choice = choose(model, wanted, Bar if progress else no_bar, log.warning, backend)
        log.info(self.choice.line)
        config = replace(config, kv_cache_dtype=self.choice.policy)
        self.engine = Engine(self.loaded, config, backend, speculative)
        self._progress = progress
        self._lock = threading.Lock()
        self._caller: int | None = None
        self._closed = False

    def __repr__(self) -> str:
        if self._closed:
            return f"LLM({self.loaded.name!r}, closed)"
        pool, engine = self.engine.pool, self.engine
        size = show(pool.layout.bytes_of(pool.num_frames))
        return (
            f"LLM({self.loaded.name!r}, kv_cache_dtype={pool.policy.label!r}: {pool.bits_per_element():.2f} bits per "
            f"element, {size} for {pool.sessions_capacity(engine.max_model_len):,} sessions of "
            f"{engine.max_model_len:,} tokens, on {self.loaded.device})"
        )

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory of the cache back; this ``LLM`` can do nothing more. Again is harmless."""
        with self._lock:
            self._closed = True
            self.__dict__.pop("engine", None)
        gc.collect()

    @property
    def tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer."""
        return self.loaded.tokenizer

    def get_tokenizer(self) -> Any:
        """The same, under vLLM's name."""
        return self.tokenizer

    def reset_prefix_cache(self) -> bool:
        """Forget the pages of earlier prompts."""
        with self._alone():
            self.engine.pages.clear_cache()
        return True

    def get_default_sampling_params(self) -> SamplingParams:
        """Parameters of the model's generation configuration; what it does not say has the default of the field."""
        return SamplingParams(**self.loaded.sampling_defaults)  # type: ignore[arg-type]

    @property
    def speculation(self) -> SpeculationStats | None:
        """What guessing tokens brought so far; ``None`` where none are guessed."""
        return self.engine.stats.speculation if self.engine.speculator is not None else None

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_token: OnToken | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete one or many prompts (:data:`Prompt`); the results are in the prompts' order.

        ``sampling_params``: one for all, or one for each prompt; ``None``: what the model's generation configuration
        says, as :meth:`get_default_sampling_params`. ``on_token(prompt_index, delta)`` is called for every
        piece of text as it comes; it must not call this ``LLM`` itself. A prompt that cannot be served gets a result
        with ``error`` set and the finish reason ``error``; the others are complete. Raises ``RequestError`` for what is
        no prompt, ``ConfigError`` when there are not as many parameters as prompts.
        """
        many = read_prompts(prompts)
        default = self.get_default_sampling_params() if sampling_params is None else None
        params = read_params(default or sampling_params, len(many))
        with self._alone():
            return self._generate(many, params, on_token, self._progress if use_tqdm is None else use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_token: OnToken | None = None,
        use_tqdm: bool | None = None,
        split_special_tokens: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, in the model's chat template; ``template`` goes to it (``tools=`` ...).

        A message is a mapping with ``role`` and ``content``, text or parts. Special tokens that it spells are text if
        ``split_special_tokens`` is on. Raises ``RequestError`` when the template refuses them.
        """
        prompts = [
            encode_chat(self.loaded, chat, split_special_tokens=split_special_tokens, **template)
            for chat in read_chats(messages)
        ]
        return self.generate(prompts, sampling_params, on_token=on_token, use_tqdm=use_tqdm)

    def save_cache(self, path: str | Path, prompt: str | Sequence[int], *, salt: str = "") -> PageBundle:
        """Write the full pages of ``prompt`` that are cached, for :meth:`load_cache` here or on another machine.

        Raises ``ConfigError`` when the file cannot be written, ``CacheError`` when no page of the prompt is cached.
        """
        tokens = encode(self.loaded, prompt) if isinstance(prompt, str) else list(prompt)
        with self._alone():
            bundle = export_pages(self.engine, tokens, salt)
        if not bundle.num_tokens:
            raise CacheError(f"no full page of the prompt of {len(tokens)} tokens is cached")
        bundle.save(Path(path))
        return bundle

    def load_cache(self, path: str | Path, *, salt: str = "") -> int:
        """Put the pages of a file into the prefix cache: prompts that begin with its tokens skip their computation.

        Returns the number of tokens.

        Raises ``ConfigError`` when the file is damaged or belongs to another model or KV cache dtype, ``CacheError``
        when the pool has no room for all of it.
        """
        with self._alone():
            return load_pages(self.engine, Path(path), salt)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One call at a time; raises ``RequestError`` for a call from inside another one."""
        if self._caller == threading.get_ident():
            raise RequestError("on_token must not call the LLM that calls it; do it when generate has returned")
        with self._lock:
            if self._closed:
                raise RequestError("this LLM is closed")
            self._caller = threading.get_ident()
            try:
                yield
            finally:
                self._caller = None

    def _generate(
        self, prompts: list[Given], params: list[SamplingParams], on_token: OnToken | None, show: bool
    ) -> list[RequestOutput]:
        results: list[RequestOutput] = []
        index_of: dict[str, int] = {}
        for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
            result = RequestOutput("", prompt.text, [], [])
            results.append(result)
            try:
                result.prompt_token_ids = prompt.token_ids
                if prompt.text is not None and not prompt.token_ids:
                    result.prompt_token_ids = encode(self.loaded, prompt.text)
                result.request_id = self.engine.add_request(result.prompt_token_ids, param, salt=prompt.salt)
            except RequestError as error:
                _refuse(result, error)
            else:
                result.outputs = [CompletionOutput(i) for i in range(param.n)]
                index_of[result.request_id] = index
        self._run(results, index_of, on_token, show)
        return results

    def _run(
        self, results: list[RequestOutput], index_of: dict[str, int], on_token: OnToken | None, show: bool
    ) -> None:
        running = set(index_of)
        with Progress(len(running), show, self.engine.stats) as progress:
            try:
                while running:
                    for delta in self.engine.step():
                        # Deltas of requests that an earlier, interrupted call left behind belong to nobody.
                        if delta.request_id not in running:
                            continue
                        index = index_of[delta.request_id]
                        results[index].add(delta)
                        if on_token is not None:
                            on_token(index, delta)
                        if results[index].finished:
                            running.remove(delta.request_id)
                            progress.done()
                    progress.update()
            finally:
                for request_id in running:
                    self.engine.abort(request_id)


def _refuse(result: RequestOutput, error: RequestError) -> None:
    result.error = str(error)
    result.outputs = [CompletionOutput(0, finish_reason="error")]
