"""The training run: two processes with one BLAS thread each, which add up their gradients.

Each process owns a copy of the parameters and of the optimiser's moments; the copies stay equal
because both apply the same summed gradient. Gradients meet in shared memory, between two barriers.
Process 0 writes the checkpoints, from which a run goes on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from multiprocessing.synchronize import Barrier
from pathlib import Path

import mlx.core as mx
import numpy as np

from .batches import ROW_TOKENS, draw_batch, row_length
from .network import NetworkConfig, Parameters, Rope, loss, new_parameters
from .optimiser import Optimiser, rate_at
from .vocabulary import Encoder, load_tokenizer

NUM_PROCESSES = 2
# One BLAS thread each, and memory that is kept instead of being returned: on CPU, MLX allocates
# every array anew, and the page faults cost 12% of the time.
WORKER_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0"
    ":glibc.malloc.trim_threshold=8000000000:glibc.malloc.top_pad=268435456",
}


@dataclass(frozen=True)
class Run:
    """What defines a training run. `folder` holds the tokenizer and receives checkpoints."""

    folder: Path
    num_steps: int
    seed: int
    minutes: float = float("inf")  # stop after so long, to be continued
    decay_share: float = 0.585
    save_every: int = 100


def train(run: Run) -> bool:
    """Train until `num_steps` are done, or `minutes` are over; returns whether it is finished."""
    os.environ.update(WORKER_ENVIRONMENT)
    context = multiprocessing.get_context("spawn")
    size = sum(value.size for value in new_parameters(NetworkConfig(), run.seed).values()) + 3
    shared = SharedMemory(create=True, size=4 * size * NUM_PROCESSES)
    barrier = context.Barrier(NUM_PROCESSES)
    workers = [
        context.Process(target=_work, args=(run, rank, shared.name, barrier), daemon=True)
        for rank in range(NUM_PROCESSES)
    ]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise RuntimeError("a training process failed")
    finally:
        shared.close()
        shared.unlink()
    return saved_step(run.folder) >= run.num_steps


def saved_step(folder: Path) -> int:
    """Return how many steps the checkpoint in `folder` has behind it; 0 without one."""
    path = folder / "progress.json"
    return int(json.loads(path.read_text())["step"]) if path.exists() else 0


def load_parameters(folder: Path) -> Parameters:
    """Return the parameters of the checkpoint in `folder`."""
    loaded = mx.load(str(folder / "parameters.safetensors"))
    assert isinstance(loaded, dict)
    return loaded


def _save(folder: Path, parameters: Parameters, optimiser: Optimiser, step: int) -> None:
    for name, arrays in (("parameters", parameters), ("moments", optimiser.state)):
        mx.save_safetensors(str(folder / f"{name}.new.safetensors"), arrays)
    for name in ("parameters", "moments"):
        os.replace(folder / f"{name}.new.safetensors", folder / f"{name}.safetensors")
    (folder / "progress.json").write_text(json.dumps({"step": step}))


def _work(run: Run, rank: int, shared_name: str, barrier: Barrier) -> None:
    try:
        _train_as(run, rank, shared_name, barrier)
    except BaseException:
        barrier.abort()  # or the other process would wait for ever
        raise


def _train_as(run: Run, rank: int, shared_name: str, barrier: Barrier) -> None:
    config = NetworkConfig()
    encoder = Encoder(load_tokenizer(run.folder))
    parameters = new_parameters(config, run.seed)
    optimiser = Optimiser(parameters)
    start = saved_step(run.folder)
    if start:
        parameters = load_parameters(run.folder)
        moments = mx.load(str(run.folder / "moments.safetensors"))
        assert isinstance(moments, dict)
        optimiser.state = moments
    names = sorted(parameters)
    rope = Rope(config, ROW_TOKENS)
    shared = SharedMemory(shared_name)
    slots = np.ndarray((NUM_PROCESSES, shared.size // 4 // NUM_PROCESSES), np.float32, shared.buf)
    width = sum(parameters[name].size for name in names) + 3
    gradient_of = mx.value_and_grad(loss)
    began = time.monotonic()
    recent, recent_since, recent_tokens = [], began, 0
    for step in range(start, run.num_steps):
        length = row_length(run.seed, step)
        batch = draw_batch(encoder, run.seed, rank, step, length)
        total, gradients = gradient_of(
            parameters,
            config,
            rope,
            mx.array(batch.tokens),
            mx.array(batch.picked),
            mx.array(batch.targets),
            mx.array(batch.weights),
        )
        flat = mx.concatenate([gradients[name].reshape(-1) for name in names])
        mx.eval(flat, total)
        slots[rank, : width - 3] = np.array(flat, copy=False)
        is_late = time.monotonic() - began > 60 * run.minutes
        slots[rank, width - 3 : width] = total.item(), batch.weights.sum(), is_late
        barrier.wait()
        summed = slots[:, :width].sum(axis=0)
        barrier.wait()
        nats = float(summed[-3] / summed[-2])
        gradients = _unflattened(mx.array(summed[: width - 3] / summed[-2]), parameters, names)
        rate = rate_at(step, run.num_steps, run.decay_share)
        parameters = optimiser.updated(parameters, gradients, step, rate)
        mx.eval(parameters, optimiser.state)
        recent.append(nats)
        recent_tokens += NUM_PROCESSES * batch.tokens.size
        done = step + 1
        if rank == 0 and (done % run.save_every == 0 or done == run.num_steps):
            _save(run.folder, parameters, optimiser, done)
        if rank == 0 and done % 25 == 0:
            now = time.monotonic()
            print(
                f"step {done}/{run.num_steps} length {length} loss {np.mean(recent):.3f}"
                f" rate {rate:.3f} {recent_tokens / (now - recent_since):.0f} tokens/s"
                f" {(now - began) / 60:.1f} min",
                flush=True,
            )
            recent, recent_since, recent_tokens = [], now, 0
        if summed[-1] > 0 and done % run.save_every == 0:
            break  # both see the same sum, so neither waits for the other
    shared.close()


def _unflattened(flat: mx.array, like: Parameters, names: list[str]) -> Parameters:
    arrays: Parameters = {}
    at = 0
    for name in names:
        size = like[name].size
        arrays[name] = flat[at : at + size].reshape(like[name].shape)
        at += size
    return arrays
