"""One rank of the pool of `tests/distributed.py`: it serves calls, and no call leaves a trace for the next.

What a call can change is dealt with in four ways, so that a function finds what it would find in a process of its own
(but for the heat maps of TensorBoard, which took a fifth of a run's time and are drawn in tests/pipeline/monitoring):

* The modules of this repository are forgotten before each call, so that each call imports them anew.
* The names that modules and classes of torch, DeepSpeed, transformers and peft bind to functions and classes are bound
  again as they were; in DeepSpeed all names are, for it keeps process groups and settings in them.
* Environment, folder, arguments, signals, warnings, loggers, hooks, dtype, threads and seeds are put back.
* What only the end of a process undoes, a failure or a hang, ends it: the pool starts another.

The process group is the exception: torch's is made by the first call and stays.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
import threading
import traceback
import types
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# What a run imports late is imported here, once for all ranks: that took each of them 1.6 s.
import datasets  # noqa: F401
import deepspeed.module_inject.auto_ep_layer
import deepspeed.ops.op_builder.all_ops
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.muon_optimizer
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2
import deepspeed.utils.nvtx
import numpy as np
import peft
import pytest  # noqa: F401
import torch
import torch.distributed as dist
import torch.utils.tensorboard
import transformers.models.llama.modeling_llama
import transformers.optimization
from deepspeed.accelerator import get_accelerator
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

OURS = ("pipeline", "eval", "tests")
LIBRARIES = (torch, deepspeed, transformers, peft)

deepspeed.utils.nvtx.enable_nvtx = False  # marks for a GPU's profiler at each call, which took a twentieth of a run
gc.collect()
gc.freeze()  # a million objects of libraries: DeepSpeed collects garbage for each engine of ZeRO-3, half a second each


class Surroundings:
    """What a process is when this is made, but for the process group and the memory."""

    def __init__(self) -> None:
        self.environment, self.folder = dict(os.environ), os.getcwd()
        self.arguments, self.path = list(sys.argv), list(sys.path)
        self.signals = {number: signal.getsignal(number) for number in signal.valid_signals()}
        self.hooks = sys.excepthook, threading.excepthook, sys.stdout, sys.stderr
        self.warnings = list(warnings.filters), warnings.showwarning
        self.raise_exceptions = logging.raiseExceptions
        self.loggers = {logger: _state(logger) for logger in _loggers()}
        self.dtype, self.threads = torch.get_default_dtype(), torch.get_num_threads()
        self.seeds = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.accelerator = dict(vars(get_accelerator()))
        self.bound = {id(owner): (owner, _bound(owner)) for owner in _owners()}

    def restore(self) -> None:
        if os.environ != self.environment:
            os.environ.clear()
            os.environ.update(self.environment)
        os.chdir(self.folder)
        sys.argv[:], sys.path[:] = self.arguments, self.path
        signal.set_wakeup_fd(-1)
        for number, handler in self.signals.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        sys.excepthook, threading.excepthook, sys.stdout, sys.stderr = self.hooks
        warnings.filters[:], warnings.showwarning = self.warnings  # pyright: ignore[reportIndexIssue]
        logging.raiseExceptions = self.raise_exceptions
        for logger in _loggers():
            level, handlers, filters, propagate = self.loggers.get(logger, (logging.NOTSET, [], [], True))
            for handler in set(logger.handlers) - set(handlers):
                handler.close()
            logger.setLevel(level)
            logger.handlers[:], logger.filters[:], logger.propagate = handlers, filters, propagate
        torch.set_default_dtype(self.dtype)
        if torch.get_num_threads() != self.threads:  # or MKL would be set too, which chooses kernels by its settings
            torch.set_num_threads(self.threads)
        random.setstate(self.seeds[0])
        np.random.set_state(self.seeds[1])
        torch.set_rng_state(self.seeds[2])
        vars(get_accelerator()).clear()
        vars(get_accelerator()).update(self.accelerator)
        for owner, names in self.bound.values():
            now = vars(owner)
            for name, value in names.items():
                if now.get(name) is not value:
                    setattr(owner, name, value)
        unset_hf_deepspeed_config()  # else transformers loads the next model partitioned, as long as the last one lives
        for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
            del sys.modules[name]
        gc.collect()
        gc.freeze()  # what is left are modules that the call imported


def _loggers() -> list[logging.Logger]:
    named = logging.root.manager.loggerDict.values()
    return [logging.root, *(logger for logger in named if isinstance(logger, logging.Logger))]


def _state(logger: logging.Logger) -> tuple[int, list[logging.Handler], list[Any], bool]:
    return logger.level, list(logger.handlers), list(logger.filters), logger.propagate


def _owners() -> list[Any]:
    """The libraries' modules, and the classes that these define."""
    named = {library.__name__ for library in LIBRARIES}
    modules = [m for name, m in sys.modules.items() if m is not None and name.partition(".")[0] in named]
    classes = [
        thing
        for module in modules
        for thing in vars(module).values()
        if issubclass(type(thing), type) and thing.__module__ == module.__name__
    ]
    return [*modules, *classes]


CALLABLE = (types.FunctionType, types.BuiltinFunctionType, type, staticmethod, classmethod, property)


def _bound(owner: Any) -> dict[str, Any]:
    """Names and what they are bound to: of DeepSpeed's modules all, of everything else what can be called."""
    whole = isinstance(owner, types.ModuleType) and owner.__name__.partition(".")[0] == "deepspeed"
    return {
        name: value
        for name, value in vars(owner).items()
        if not name.startswith("__") and (whole or issubclass(type(value), CALLABLE))  # `isinstance` wakes lazy ones
    }


def _start_once(*arguments: Any, **options: Any) -> None:
    """Stands for `init_process_group`: the group of an earlier call is the group of this one."""
    if not dist.is_initialized():
        _INITIALISE(*arguments, **options)


_INITIALISE: Callable[..., None] = dist.init_process_group


def _leave_out_heat_maps() -> None:
    """Of the modules that a call has imported anew; a board without a figure is one of a run without layers."""
    from pipeline.monitoring import tensorboard

    tensorboard.heat_map = lambda history, name: None


def serve(rank: int, world_size: int, port: int, calls: Connection) -> None:
    """Answer every (function, arguments) with None, or with the traceback of what it raised, until the caller is gone.

    After a traceback the process ends: others may be waiting for it in a collective.
    """
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        LOCAL_SIZE=str(world_size),  # else DeepSpeed's CPU accelerator starts `numactl` again and again
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    dist.init_process_group = _start_once
    surroundings = Surroundings()
    while True:
        surroundings.restore()
        try:
            function, arguments = calls.recv()
        except (EOFError, ConnectionResetError):
            os._exit(0)  # gloo now and then aborts in the interpreter's own shutdown
        failed = None
        try:
            _leave_out_heat_maps()
            function(*arguments)
        except BaseException:
            failed = traceback.format_exc()
            print(f"rank {rank} of {world_size}: {failed}", file=sys.stderr)
        del function, arguments
        sys.stdout.flush()
        sys.stderr.flush()
        calls.send(failed)
        if failed is not None:
            os._exit(1)
