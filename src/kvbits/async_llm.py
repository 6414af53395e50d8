"""``kvbits.AsyncLLM``: generate text from asyncio, many requests at once in one engine."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from kvbits.engine.outputs import CompletionOutput, Delta, RequestOutput
from kvbits.engine.params import SamplingParams
from kvbits.engine.text import encode, encode_chat
from kvbits.errors import KVBitsError, RequestError
from kvbits.llm import LLM, Message, Prompt
from kvbits.models import LoadedModel

Item = Delta | BaseException


class _Stream:
    """Where a request's deltas go: the queue of the event loop that asked."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.items: asyncio.Queue[Item] = asyncio.Queue()

    def put(self, item: Item) -> None:
        """From any thread; nobody listens to a loop that is closed."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.items.put_nowait, item)


class AsyncLLM:
    """A model with a quantized KV cache, under the names of vLLM's ``AsyncLLM``; the options are those of ``LLM``.

    A thread of its own runs the engine; requests of all tasks run together. Use it in ``async with``, or call
    :meth:`shutdown`.
    """

    def __init__(self, model: str | LoadedModel, **options: Any) -> None:
        self.llm = LLM(model, progress=False, **options)
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._numbers = itertools.count()
        self._broken: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvbits-async-llm", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"Async{self.llm!r}"

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Complete ``prompt`` (text or token ids): yields all that there is so far whenever there is more.

        Leaving the loop, or :meth:`abort` with the ``request_id``, ends the request. Raises ``RequestError`` for one
        that cannot be served.
        """
        self._check_open()
        llm = self.llm
        params = sampling_params or llm.get_default_sampling_params()
        tokens = await asyncio.to_thread(encode, llm.loaded, prompt) if isinstance(prompt, str) else list(prompt)
        name = f"async-{next(self._numbers)}" if request_id is None else request_id
        text = prompt if isinstance(prompt, str) else None
        result = RequestOutput(name, text, tokens, [CompletionOutput(i) for i in range(params.n)])
        stream = _Stream()

        def add() -> None:
            try:
                llm.engine.add_request(tokens, params, request_id=name, priority=priority)
                self._streams[name] = stream
            except KVBitsError as error:
                stream.put(error)

        self._commands.put(add)
        try:
            while not result.finished:
                for item in await _waiting(stream.items):
                    if isinstance(item, BaseException):
                        raise item
                    result.add(item)
                if result.error is not None:
                    raise RequestError(result.error)
                outputs = [replace(o, token_ids=list(o.token_ids)) for o in result.outputs]
                yield replace(result, outputs=outputs)
        finally:
            if not result.finished:
                self._drop(name, stream)

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **template: Any,
    ) -> AsyncIterator[RequestOutput]:
        """Answer a conversation in the model's chat template, as :meth:`generate` completes a prompt."""
        return self.generate(encode_chat(self.llm.loaded, messages, **template), sampling_params, request_id)

    async def abort(self, request_id: str) -> None:
        """End a request; whoever reads it gets ``RequestError``. An unknown id is fine."""
        self._drop(request_id, None, RequestError(f"the request '{request_id}' was aborted"))

    async def get_tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer."""
        return self.llm.get_tokenizer()

    async def reset_prefix_cache(self) -> bool:
        """Forget the pages that no running request holds."""
        done = _Stream()

        def reset() -> None:
            self.llm.engine.pages.clear_cache()
            done.put(StopAsyncIteration())

        self._check_open()
        self._commands.put(reset)
        await done.items.get()
        return True

    def shutdown(self) -> None:
        """End all requests and the thread, and give the memory back."""
        if not self._closed:
            self._closed = True
            self._commands.put(None)
            self._thread.join()
            self.llm.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.shutdown)

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("this AsyncLLM is shut down")
        if self._broken is not None:
            raise RequestError("the engine has stopped after an internal error") from self._broken

    def _drop(self, request_id: str, stream: _Stream | None, why: KVBitsError | None = None) -> None:
        def command() -> None:
            known = self._streams.get(request_id)
            # Another request may have the id by now.
            if known is None or (stream is not None and known is not stream):
                return
            del self._streams[request_id]
            self.llm.engine.abort(request_id)
            if why is not None:
                known.put(why)

        self._commands.put(command)

    # The thread, which alone touches the engine

    def _run(self) -> None:
        error: BaseException = RequestError("this AsyncLLM is shut down")
        try:
            while self._obey():
                for delta in self.llm.engine.step() if self.llm.engine.has_unfinished() else ():
                    stream = self._streams.get(delta.request_id)
                    if stream is not None:
                        stream.put(delta)
                        if not self.llm.engine.is_unfinished(delta.request_id):
                            self._streams.pop(delta.request_id, None)
        # Whatever it is, it belongs to those who wait.
        except BaseException as failure:
            error = self._broken = failure
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            stream.put(error)

    def _obey(self) -> bool:
        """Run the commands that are there, waiting for one while nothing runs; false: the thread must end."""
        wait = not self.llm.engine.has_unfinished()
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False


async def _waiting(items: asyncio.Queue[Item]) -> list[Item]:
    """The next item, and all that are there by then."""
    found = [await items.get()]
    while not items.empty():
        found.append(items.get_nowait())
    return found
