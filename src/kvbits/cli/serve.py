"""``kvbits serve``: an OpenAI-compatible server."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from kvbits.cli import options
from kvbits.cli.choosing import chosen
from kvbits.cli.cluster import check_ray, serve_cluster
from kvbits.cli.extras import require
from kvbits.cli.keys import server_keys
from kvbits.cli.output import readable
from kvbits.cli.session import load
from kvbits.config import AUTO
from kvbits.errors import ConfigError


def serve(
    model: options.Model,
    host: Annotated[str, typer.Option(metavar="HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", help="Port to listen on.")] = 8000,
    kv_cache_dtype: options.KVCacheDtype = AUTO,
    max_kl: options.MaxKL = None,
    text: options.MeasuredText = None,
    kv_policy: options.KVPolicy = None,
    kv_cache_memory: options.KVCacheMemory = "1GiB",
    state_dtype: options.StateDtype = AUTO,
    disable_mla: options.DisableMLA = False,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = 64,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    enable_prefix_caching: Annotated[
        bool, typer.Option(help="Keep sealed pages after a request for prompts that begin alike.")
    ] = True,
    kv_offload_size: options.KVOffloadSize = None,
    kv_offload_path: options.KVOffloadPath = None,
    cache_file: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Start with pages of 'kvbits cache save'; may repeat.")
    ] = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="Answers that do not depend on batch, chunk or cache hits.")
    ] = False,
    served_model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name in the API. Default: MODEL.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Clients must send one of these; may repeat. Other users can see it in ps."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keys, one a line, each with name=NAME and permissions if wanted (priority, operator). Without this "
            "and --api-key, the key in KVBITS_API_KEY.",
        ),
    ] = None,
    allow_priority: Annotated[
        bool, typer.Option("--allow-priority", help="Every client may set 'priority', not only keys that permit it.")
    ] = False,
    share_prefix_cache: Annotated[
        bool,
        typer.Option(
            "--share-prefix-cache",
            help="Keys find each other's cached prompts: saves work, and lets each key find out, by guessing, what the "
            "others' prompts begin with.",
        ),
    ] = False,
    allowed_origins: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="CORS: web pages from here may ask; '*' for all.")
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Also answer to this name, '*.name' or '*'; localhost and addresses are fine."
        ),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(metavar="N", help="Sequences that may wait beyond --max-num-seqs; more get 429.")
    ] = 256,
    request_timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="A request that takes longer ends with 503.")
    ] = None,
    drain_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long running requests may go on after SIGTERM.")
    ] = 30.0,
    max_body: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest request body; a larger one gets 413.")
    ] = "8MiB",
    speculative_config: options.Speculative = None,
    dtype: options.Dtype = "bfloat16",
    weights: options.Weights = "auto",
    device: options.Device = "cpu",
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="Serve from replicas on Ray (pip install 'kvbits\\[ray]').")
    ] = False,
    ray_replicas: Annotated[
        str | None,
        typer.Option(metavar="N|MIN-MAX", help="Replicas with --ray: 1; a range scales by queue and cache usage."),
    ] = None,
    ray_routing: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="With --ray: 'prefix', the default (to the replica with the prompt's pages), or 'random'.",
        ),
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="The Ray cluster to join. Default: this machine alone.")
    ] = None,
    log_level: Annotated[str, typer.Option(metavar="LEVEL", help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve the model over HTTP as OpenAI does; a live page is at /, metrics are at /metrics."""
    require("server")
    from kvbits.auto.wanted import Wanted
    from kvbits.config import parse_bytes
    from kvbits.engine.config import EngineConfig, step_tokens
    from kvbits.server.hosts import names_of
    from kvbits.server.logs import check_level, set_up
    from kvbits.server.options import ServerOptions

    if not 0 < port < 65536:
        raise ConfigError(f"port is {port}; it must be from 1 to 65535")
    check_level(log_level)
    served = ServerOptions(
        served_model_name=model if served_model_name is None else served_model_name,
        api_keys=server_keys(api_key, api_key_file),
        allow_priority=allow_priority,
        share_prefix_cache=share_prefix_cache,
        allowed_origins=tuple(allowed_origins or ()),
        allowed_hosts=(*names_of(host), *(allowed_hosts or ())),
        max_queue=max_queue,
        request_timeout=request_timeout,
        drain_timeout=drain_timeout,
        max_body=parse_bytes(max_body),
    )
    wanted = Wanted(options.cache_dtype(kv_cache_dtype, kv_policy), max_kl, text)
    config = EngineConfig.of(
        kv_cache_dtype=wanted.dtype,
        kv_cache_memory=kv_cache_memory,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=step_tokens(max_num_batched_tokens, device),
        enable_prefix_caching=enable_prefix_caching,
        batch_invariant=batch_invariant,
        kv_offload_size=kv_offload_size,
        kv_offload_path=kv_offload_path,
        state_dtype=state_dtype,
        disable_mla=disable_mla,
    )
    from kvbits.engine.precheck import check_engine, check_no_states, engine_check
    from kvbits.engine.speculation.config import SpeculativeConfig

    speculative = SpeculativeConfig.of(speculative_config)
    cluster = None
    for name, value in (("replicas", ray_replicas), ("routing", ray_routing), ("address", ray_address)):
        if value is not None and not ray:
            raise ConfigError(f"--ray-{name} goes with --ray")
    if ray:
        if cache_file:
            raise ConfigError("--cache-file loads pages into one server; with --ray replicas take them from each other")
        if speculative is not None:
            raise ConfigError("--speculative-config goes with one server; --ray replicas do not guess tokens")
        cluster = check_ray(ray_replicas, ray_routing, drain_timeout)
    for path in cache_file or ():
        readable(path)
    outline = check_engine(model, config, speculative, dtype=dtype, weights=weights, device=device)
    if cache_file:
        check_no_states(outline, "a bundle of pages")
    set_up(log_level)
    log = logging.getLogger(__name__)
    if cluster is not None:
        from kvbits.ray.options import ReplicaOptions

        replica = ReplicaOptions(model, config, served, dtype, threads, device, trust_remote_code, weights)
        if wanted.auto:
            replica = replica.with_choice(chosen(replica.load(log.info), wanted, log.info))
        serve_cluster(replica, cluster, host, port, ray_address)
        return
    from kvbits.server.address import take_address

    sockets = take_address(host, port)
    loaded = load(
        model, dtype, threads, weights, device, trust_remote_code, progress=log.info, max_model_len=max_model_len,
        disable_mla=disable_mla, check=engine_check(config, speculative),
    )  # fmt: skip
    from kvbits.engine.setup import check_fit
    from kvbits.kernels import choose_backend

    check_fit(loaded, config, choose_backend(None, str(loaded.device)))
    choice = chosen(loaded, wanted, log.info)
    from kvbits.engine.engine import Engine
    from kvbits.engine.transfer import load_pages
    from kvbits.server.run import serve as run
    from kvbits.server.run import start_line

    engine = Engine(loaded, replace(config, kv_cache_dtype=choice.policy), speculative=speculative)
    for path in cache_file or ():
        # Where clients are kept apart, each one needs them under its own salt.
        tokens = [load_pages(engine, path, salt) for salt in served.salts]
        log.info("Loaded %d tokens from '%s' for %d clients", tokens[0], path, len(tokens))
    # stderr is the log, in JSON.
    print(start_line(engine, served, host, port), flush=True)
    run(engine, served, sockets, host, port, choice.loss)
