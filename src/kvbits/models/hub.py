"""The files of weights of a model on the Hugging Face hub, or of its copy in the hub's cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from kvbits.models.locate import Source
from kvbits.models.safetensors.file import INDEX, SINGLE, file_names


def checkpoint(source: Source) -> Path | None:
    """The directory that holds the safetensors of ``source.path``, fetched unless it says offline.

    ``None`` where the model has none. Raises as the hub's client does.
    """
    for name in (SINGLE, INDEX):
        try:
            found = Path(hf_hub_download(source.path, name, local_files_only=source.offline))
        except EntryNotFoundError:  # offline: not in the cache
            continue
        if name == INDEX:
            shards = [str(shard) for shard in file_names(found)]
            snapshot_download(source.path, allow_patterns=shards, local_files_only=source.offline)
        return found.parent
    return None
