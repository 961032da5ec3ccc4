"""Write a rank's shards of a distributed checkpoint in threads of its own process, and hash them.

Upstream plans what goes where and seals the whole (`.metadata`, `metadata.json`); its own writers fork, and report to a
manager process of 267 MB a rank that takes seconds to start. Threads do without: the time goes into the file system,
which does not hold Python's lock.
"""

from __future__ import annotations

import concurrent.futures
import inspect
import queue
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from stare_megatron.errors import RunError
from stare_megatron.host import manifest
from stare_megatron.host.files import free_bytes

_MOST_THREADS = 4  # of a rank; each writes a file of its own, and a file system serves a few streams of a rank best

_File = tuple[list[Any], str, manifest.FileEntry]  # upstream's records of what is where in it, its name, its entry


class Writing:
    """A save under way on this rank."""

    def __init__(
        self,
        folder: Path,
        request: Any,
        results: queue.SimpleQueue[Any],
        pool: concurrent.futures.ThreadPoolExecutor,
        copies: Sequence[concurrent.futures.Future[Any]],
        files: Sequence[concurrent.futures.Future[_File]],
        *,
        began: float,
    ) -> None:
        self._folder = folder
        self._request = request
        self._results = results
        self._pool = pool
        self._copies = copies
        self._files = files
        self._began = self._last = began
        for file in files:
            file.add_done_callback(self._note)

    def _note(self, _: concurrent.futures.Future[_File]) -> None:
        self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """From the beginning to the last of this rank's files that is written."""
        return self._last - self._began

    def copied(self) -> None:
        """Wait until the state may change."""
        concurrent.futures.wait(self._copies)

    def written(self) -> bool:
        """Whether this rank's files are on disk; False for a moment longer when one failed."""
        return all(file.done() for file in self._files)

    def finish(self) -> dict[str, manifest.FileEntry]:
        """Wait for the files of all ranks and seal the checkpoint. A collective.

        Returns this rank's files, by path relative to the folder.

        Raises:
            RunError: a file of some rank could not be written.
        """
        entries: dict[str, manifest.FileEntry] = {}
        outcome: Any = {}
        for number, file in enumerate(self._files):
            try:
                done, name, entry = file.result()
            except (OSError, RuntimeError) as e:
                outcome = e  # upstream tells every rank of it
                break
            outcome[number] = done
            entries[name] = entry
        self._pool.shutdown()
        if self._files:
            self._results.put(outcome)
        try:
            for step in self._request.finalize_fns:
                step()
        except CheckpointException as e:
            free = f"{free_bytes(self._folder) / 1e6:,.0f} MB free on its disk"
            raise RunError(f"{self._folder}: the checkpoint could not be written ({free}): {outcome or e}") from e
        return entries


class Writer:
    """Writes the state of one model and optimizer, again and again; the structure of the state must stay as it is.

    `threads`: that may be busy with it at a time; `replicas`: ranks that hold all of the same state, which is dealt out
    to them, each tensor to one.
    """

    def __init__(self, threads: int, replicas: ProcessGroup | None = None) -> None:
        self._threads = max(1, min(threads, _MOST_THREADS))
        # Reuses its plan from the third save on, when the second has made the same as the first.
        self._strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=self._threads, cached_metadata=True)
        several = replicas is not None and replicas.size() > 1
        self._dealing = FullyParallelSaveStrategyWrapper(self._strategy, replicas, True) if several else None
        self._checked = False
        self._local: Path | None = None
        # A copy's memory, kept for the next: memory that is new to the process costs several times the copying.
        self._copies: dict[tuple[str, int], torch.Tensor] = {}

    def at(self, local: Path | None) -> Writer:
        """This writer, whose next saves have ranks' files in `local`, which is made, on the rank's own node, and in
        their folder links to them; None: all in their folder."""
        self._local = local
        return self

    def begin(self, folder: Path, state: dict[str, Any], content: dict[str, Any], live: set[int]) -> Writing:
        """Start to write `state`, a sharded state dict. A collective.

        `live`: addresses of the storages that may change before the writing has ended, but not before
        `Writing.copied`; what is in one of them is copied. The writing before must have been finished.
        """
        began = time.monotonic()
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        filesystem_async._results_queue = results  # instead of the manager's; the writer takes it when it plans
        save: Any = dist_checkpointing.save
        # From 0.19 on there is another implementation to choose from.
        options = {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(save).parameters else {}
        request: Any = save(
            state,
            str(folder),
            self._dealing or self._strategy,
            validate_access_integrity=not self._checked,
            async_sharded_save=True,
            content_metadata=content,
            **options,
        )
        self._checked = True
        pool = concurrent.futures.ThreadPoolExecutor(self._threads, thread_name_prefix="checkpoint")
        if request.async_fn is None:  # nothing for this rank to write
            return Writing(folder, request, results, pool, (), (), began=began)
        transforms, local = request.async_fn.args[0], self._local
        # Where the state is not in host memory this is a copy already.
        copies = [pool.submit(self._private, bucket, live) for bucket in request.preload_fn()]
        files = [pool.submit(_write_copy, transforms, number, copy, local) for number, copy in enumerate(copies)]
        return Writing(folder, request, results, pool, copies, files, began=began)

    def _private(self, bucket: Any, live: set[int]) -> Any:
        """The bucket with tensors in memory that nobody changes."""
        path, key, (data, tensors) = bucket
        kept = []
        for number, (item, tensor) in enumerate(tensors):
            changes = tensor.untyped_storage().data_ptr() in live
            kept.append((item, self._copy((key, number), tensor) if changes else tensor))
        return path, key, (data, kept)

    def _copy(self, key: tuple[str, int], tensor: torch.Tensor) -> torch.Tensor:
        old = self._copies.get(key)
        if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
            old = self._copies[key] = torch.empty_like(tensor)
        return old.copy_(tensor)


def _write_copy(transforms: list[Any], number: int, copy: concurrent.futures.Future[Any], local: Path | None) -> _File:
    path, key, content = copy.result()
    if local is None:
        return _write(transforms, number, (path, key, content))
    local.mkdir(parents=True, exist_ok=True)
    here = local / Path(path).name
    written = _write(transforms, number, (str(here), key, content))
    Path(path).symlink_to(here)  # last: who follows it finds all of the file
    return written


def _write(transforms: list[Any], number: int, bucket: Any) -> _File:
    results: Any = queue.SimpleQueue()
    counter: Any = queue.Queue()
    counter.put(number)
    # Positional but for what upstream itself names.
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(
        transforms,
        local_proc_idx=number,
        write_bucket=bucket,
        results_queue=results,
        count_queue=counter,
        use_fsync=True,
    )
    _, outcome = results.get_nowait()
    if isinstance(outcome, Exception):
        raise RuntimeError(str(outcome)) from outcome
    path = Path(bucket[0])
    return outcome, path.name, manifest.checksum(path)
