"""Where it is done: in this process, or by the workers of a Ray cluster. Both run the same `Worker`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from pic_rag.bulk.corpus import Corpus, Item
from pic_rag.bulk.worker import Job, Worker

Engine = Literal["local", "ray"]


def start(
    engine: Engine, corpus: Corpus, job: Job, *, workers: int | None = None, ray_address: str | None = None
) -> Iterator[list[Item]]:
    """What became of each group, in no particular order, as soon as it is done.

    Raises:
        ValueError: there is no such engine, or an option of the ray engine was given to the local one.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {', '.join(get_args(Engine))}, got {engine!r}.")
    if engine == "ray":
        from pic_rag.bulk.on_ray import map_on_ray

        return map_on_ray(corpus, job, workers=workers, address=ray_address)
    for name, value in (("workers", workers), ("ray_address", ray_address)):
        if value is not None:
            raise ValueError(f"{name} must be left out with engine='local', got {value!r}. Set engine='ray'.")
    return map(Worker(job), corpus.groups())
