"""The ray engine: one task reads the corpus, actors compress its groups and write them to the store themselves.

Only groups of texts and counts travel through Ray, as JSON; memories go straight from an actor to the store. A group
that Ray runs again, because an actor died, finds in the store what was written before.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from pic_rag.bulk.corpus import Corpus, Item
from pic_rag.bulk.worker import Job, Worker
from pic_rag.store import StoreError

CPUS_A_WORKER = 4
"""CPUs of a worker by default: with more, one forward pass gains less than another worker does."""

_FAILURES: Mapping[str, type[Exception]] = {
    kind.__name__: kind for kind in (StoreError, FileNotFoundError, TypeError, ValueError)
}

_WHERE_MODELS_ARE = ("PIC_RAG_CACHE", "PIC_RAG_GENERATOR", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE")
"""Variables that actors of a running cluster would not inherit. No secrets: Ray shows them on its dashboard."""


def map_on_ray(corpus: Corpus, job: Job, *, workers: int | None, address: str | None) -> Iterator[list[Item]]:
    """What became of each group, in the order they are done.

    Args:
        corpus: read by one task; its files must be where this process sees them.
        job: of every worker; its store likewise.
        workers: None: one for each GPU, or one for `CPUS_A_WORKER` CPUs.
        address: of a running cluster; None: the one Ray finds, else one started here until all is done.

    Raises:
        ImportError: ray is not installed.
        FileNotFoundError: a worker did not find a model.
        RuntimeError: a worker failed in another way.
        StoreError: a worker could not read or write the store.
        ValueError: there are no GPUs for a job that asks for them, or fewer CPUs than workers.
    """
    ray = _import_ray()
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of every plan and every run
    with _cluster(ray, address), ray.data.DataContext.current(_context(ray)):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        count, share = plan_workers(nodes, device=job.device, workers=workers)
        folder = os.getcwd()
        groups = (
            ray.data.from_items([{"id": 0}])
            .flat_map(_read, fn_args=(corpus, folder), num_cpus=0)  # 0: mostly, it waits for the workers
            .map_batches(
                _Actor,
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=count),
                fn_constructor_args=(job, folder),
                **share,
            )
        )
        for row in groups.iter_rows():
            if row["failure"]:
                kind, message = json.loads(row["failure"])
                raise _FAILURES.get(kind, RuntimeError)(message)
            yield _unpack(row["group"])


def plan_workers(
    nodes: Sequence[Mapping[str, float]], *, device: str | None, workers: int | None
) -> tuple[int, dict[str, float]]:
    """How many workers there are, and what each gets of its machine.

    Args:
        nodes: "CPU" and "GPU" of every machine.
        device: "cuda" asks for GPUs, None takes them where there are some, anything else leaves them.
        workers: None for as many as fit.

    >>> plan_workers([{"CPU": 16.0, "GPU": 2.0}], device=None, workers=None)
    (2, {'num_gpus': 1.0})
    >>> plan_workers([{"CPU": 16.0, "GPU": 2.0}], device=None, workers=3)
    (3, {'num_gpus': 0.5})
    >>> plan_workers([{"CPU": 16.0}, {"CPU": 4.0}], device="cpu", workers=None)
    (5, {'num_cpus': 4.0})

    Raises:
        ValueError: no machine has what is asked for.
    """
    gpus = sum(node.get("GPU", 0) for node in nodes)
    if gpus and (device is None or device.startswith("cuda")):
        workers = workers or int(gpus)
        return workers, {"num_gpus": 1 / math.ceil(workers / gpus)}
    if device is not None and device.startswith("cuda"):
        raise ValueError(f"device must be cpu on a cluster without GPUs, got {device!r}.")
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    workers = workers or max(1, sum(own // CPUS_A_WORKER for own in cpus))
    fitting = [part for part in range(1, max(cpus) + 1) if sum(own // part for own in cpus) >= workers]
    if not fitting:
        raise ValueError(f"workers must be at most {sum(cpus)}, the CPUs of the cluster, got {workers}.")
    return workers, {"num_cpus": float(max(fitting))}


def _read(_: dict[str, int], corpus: Corpus, folder: str) -> Iterator[dict[str, str]]:
    """Every group as a row, given any one row."""
    os.chdir(folder)  # relative paths mean what they mean to the user
    for group in corpus.groups():
        yield {"group": _pack(group)}


class _Actor:
    """A `Worker` that speaks Ray's batches: columns of values.

    What goes wrong is an answer as well: what an actor raises, Ray wraps in a long account of its own.
    """

    def __init__(self, job: Job, folder: str) -> None:
        os.chdir(folder)
        self._job = job
        self._worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """One group, or why it could not be done."""
        [group] = batch["group"]
        try:
            if self._worker is None:
                self._worker = Worker(self._job)
            return {"group": [_pack(self._worker(_unpack(group)))], "failure": [""]}
        except Exception as error:
            return {"group": [_pack([])], "failure": [json.dumps([type(error).__name__, str(error)])]}


def _pack(items: Sequence[Item]) -> str:
    return json.dumps([asdict(item) for item in items])


def _unpack(group: str) -> list[Item]:
    return [Item(**values) for values in json.loads(group)]


def _import_ray() -> Any:  # noqa: ANN401 - a module
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked for reports to Ray's makers
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("engine='ray' needs the extra 'ray'. Install it: pip install 'pic-rag[ray]'.") from error
    return ray


@contextmanager
def _cluster(ray: Any, address: str | None) -> Iterator[None]:  # noqa: ANN401 - a module
    """A connection to Ray: the one there is, or one for the time being."""
    if ray.is_initialized():
        yield
        return
    variables = {name: os.environ[name] for name in _WHERE_MODELS_ARE if name in os.environ}
    ray.init(
        address,
        runtime_env={"env_vars": variables},
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()


def _context(ray: Any) -> Any:  # noqa: ANN401 - a module
    """Ray Data without bars of its own, which hands on every group at once."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # a group at a time, not 128 MiB of them
    return context
