"""A server on a tiny model whose tokens are bytes, in this process."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.tiny import tiny_model
from kvbits import SamplingParams
from kvbits.auto.loss import Loss
from kvbits.engine.config import EngineConfig
from kvbits.engine.engine import Engine
from kvbits.kernels import Backend
from kvbits.models import LoadedModel
from kvbits.models.fused import FusedModel, fuse
from kvbits.models.load import wrap
from kvbits.models.packed import pack_linears
from kvbits.server.app import create_app
from kvbits.server.options import ServerOptions
from kvbits.server.run import http_config
from kvbits.server.service import Service

MODEL = "tiny"
CONTEXT = 1024
TEMPLATE = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and three special ones: any text has tokens, and any tokens have a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: i for i, letter in enumerate(letters, start=3)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def byte_model(**changes: object) -> LoadedModel:
    model = tiny_model("llama", **{"vocab_size": 259, "max_position_embeddings": CONTEXT, **changes})
    return wrap(model, byte_tokenizer(), MODEL)


def packed_byte_model(
    weight_format: str = "bf16", fused: bool = True, family: str = "llama", **changes: object
) -> LoadedModel:
    """The byte model in bfloat16 with packed layers: a row's bits do not depend on the rows beside it.

    ``fused``: as one native call a step, as real models run; else transformers' code around the packed layers.
    """
    model = tiny_model(family, vocab_size=259, max_position_embeddings=CONTEXT, **changes).bfloat16()
    loaded = wrap(model, byte_tokenizer(), MODEL)
    if not pack_linears(loaded.model, weight_format):
        pytest.skip("this processor has only portable kernels: layers are torch's")
    if not fused:
        return loaded
    found = fuse(loaded.model, loaded.geometry)
    assert isinstance(found, FusedModel), found
    return dataclasses.replace(loaded, fused=found)


def engine_of(loaded: LoadedModel, backend: Backend | None = None, **changes: object) -> Engine:
    options = {"kv_cache_dtype": "int8", "kv_cache_memory": 4 << 20, "max_num_batched_tokens": 256, **changes}
    return Engine(loaded, EngineConfig(**options), backend)


class Running:
    """A server that listens, with its parts at hand."""

    def __init__(self, engine: Engine, url: str, service: Service, server: uvicorn.Server) -> None:
        self.engine = engine
        self.url = url
        self.service = service
        self.server = server

    def idle(self, seconds: float = 20.0) -> None:
        """Wait until no request is left, then check that no page is."""
        end = time.monotonic() + seconds
        while self.engine.has_unfinished() or self.service.worker.open_requests:
            assert time.monotonic() < end, (self.engine.load(), self.service.worker.open_requests)
            time.sleep(0.01)
        self.engine.pages.check()
        stats = self.engine.pages.stats()
        assert (stats.open, stats.sealed) == (0, 0), stats


@contextmanager
def running(engine: Engine, loss: Loss | None = None, **options: object) -> Iterator[Running]:
    """A real uvicorn in a thread, on a free port; ``loss`` is what the KV cache was measured to lose."""
    chosen = ServerOptions(**{"served_model_name": MODEL, **options})
    app = create_app(engine, chosen, loss)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server = uvicorn.Server(http_config(app, "127.0.0.1", port, chosen))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            end = time.monotonic() + 20
            while not server.started:
                assert thread.is_alive()
                assert time.monotonic() < end
                time.sleep(0.01)
            yield Running(engine, f"http://127.0.0.1:{port}", app.state.service, server)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def greedy(engine: Engine, prompt: list[int], tokens: int = 8, salt: str = "") -> tuple[list[int], int]:
    """The greedy answer, and how much of the prompt was cached; the pages are checked afterwards."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    engine.add_request(prompt, params, salt=salt)
    found, cached = [], 0
    while engine.has_unfinished():
        for delta in engine.step():
            assert delta.error is None
            found += delta.token_ids
            cached = delta.num_cached_tokens
    engine.pages.check()
    return found, cached
