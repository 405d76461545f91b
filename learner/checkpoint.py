"""Saves and loads the learner through torch's distributed checkpoint: exact, and for any rank count.

A save copies the state, which takes as long as a copy in memory does, and writes the copy in a thread
while the learner goes on. The copy's memory is kept for the next one: to get new memory from the system
takes several times as long as to copy.

The folder's manifest (cluster side) is written last and names every file's digest; a folder is opened
only after its digests were verified, because torch's metadata file holds a pickle.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from learner.ppo_update import PPOUpdate


class _ModelState:
    """A model with its optimizer, as one entry of a checkpoint."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        fresh = not self._optimizer.state
        model, optimizer = get_state_dict(self._model, self._optimizer)
        if fresh:  # torch filled the state by a step with gradient 0, which is not to be counted
            for state in self._optimizer.state.values():
                state["step"].zero_()
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Weights and moments; what the config says of the optimizer stays as it says now."""
        settings = [{**group, "params": None} for group in self._optimizer.param_groups]
        set_state_dict(
            self._model,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        for group, own in zip(self._optimizer.param_groups, settings, strict=True):
            group.update(own, params=group["params"])


class _RunState:
    """What else decides the next step: the KL coefficient and torch's random state."""

    def __init__(self, update: PPOUpdate) -> None:
        self._update = update

    def state_dict(self) -> dict[str, Any]:
        return {"kl_coef": self._update.kl_coef, "rng": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._update.go_on_with(state["kl_coef"])
        torch.set_rng_state(state["rng"])


class Copy(AsyncStager):
    """What is written: a copy on the CPU, in the same memory at every save."""

    should_synchronize_after_execute = False  # it is made when `stage` returns

    def __init__(self) -> None:
        self._kept: dict[str, Any] | None = None

    @torch.no_grad()
    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        if self._kept is None:
            first = DefaultStager(StagingOptions(False, False, False, False)).stage(state_dict)
            assert isinstance(first, dict)
            self._kept = first
        else:
            self._kept = _copied(state_dict, self._kept)
        return self._kept

    def synchronize_staging(self) -> None:
        pass

    def close(self) -> None:
        pass


def _copied(now: Any, kept: Any) -> Any:
    """`now`, its tensors in the memory of those of `kept`, which has the same ones."""
    if isinstance(now, dict):
        return {key: _copied(value, kept[key]) for key, value in now.items()}
    if isinstance(now, list | tuple):
        return [_copied(one, old) for one, old in zip(now, kept, strict=True)]
    if isinstance(now, Tensor):
        _local(kept).copy_(_local(now))
        return kept
    return now


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Save:
    """Every rank's shards on their way into `folder`, which must be new. Made on all ranks alike.

    `copy`: the same for all saves. `group`: of gloo and for saves alone, since the threads' collectives
    must not mix with the learner's. One save must have ended before the next begins.
    """

    def __init__(
        self, folder: Path, update: PPOUpdate, copy: Copy, group: dist.ProcessGroup
    ) -> None:
        with _plain():
            writing = dcp.async_save(
                _parts(update),
                checkpoint_id=str(folder),
                process_group=group,
                async_stager=copy,
            )
        assert isinstance(writing, Future)
        self._folder, self._writing = folder, writing
        # The writing is done before `_make_room` is, which another thread runs.
        self._over = threading.Event()
        writing.add_done_callback(self._make_room)

    def _make_room(self, writing: Future[Any]) -> None:
        """What was refused has filled the disk, perhaps, and the run's other files need it at once."""
        try:
            if writing.exception(timeout=0) is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
        finally:
            self._over.set()

    def ended(self) -> bool:
        """Whether all ranks have written theirs. OSError on all of them if the disk refused one."""
        if not self._over.is_set():
            return False
        with _plain():
            self._writing.result(timeout=0)
        return True


def load(folder: Path, update: PPOUpdate) -> None:
    """A collective. The caller has verified the folder's digests."""
    with _plain():
        dcp.load(_parts(update), checkpoint_id=str(folder))


def _parts(update: PPOUpdate) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "policy": _ModelState(update.models.policy, update.policy_optimizer.adamw),
        "run": _RunState(update),
    }
    if update.models.value is not None and update.value_optimizer is not None:
        parts["value"] = _ModelState(update.models.value, update.value_optimizer.adamw)
    return parts


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    """Without warnings, and with exceptions that handlers catch: torch's is no Exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a group of one is no mistake
        try:
            yield
        except CheckpointException as error:
            raise _in_words([failure for failure, _ in error.failures.values()]) from None


def _in_words(failures: list[BaseException]) -> Exception:
    """The disk's refusal, if there is one. torch's C++ writer tells of it in words alone."""
    for failure in failures:
        if isinstance(failure, OSError):
            return failure
    text = " ".join(str(failures[0]).split())[:300]
    if "PytorchStreamWriter" in text or "inline_container" in text:
        return OSError(errno.EIO, text)
    return RuntimeError(f"{type(failures[0]).__name__}: {text}")
