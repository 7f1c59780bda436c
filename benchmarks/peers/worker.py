"""One peer in a process of its own: `python -m peers.worker FOLDER PEER --threads 2`, started by `Worker`.

It loads the peer, answers the first batch, then takes orders on stdin, a line of JSON each, and answers each with one
line of JSON: `{"warm": case, "batches": n, "save": path}`, which saves the logits, and `{"run": case, "batches": n}`.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import resource
import selectors
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from . import PEERS
from .cases import Batch, read

FIRST = "batch1"  # the case that the first answer is for
_TURN = 0.1  # seconds that a turn takes at least
_CALLS = 200  # and how often it runs the batches at most


class Worker:
    """The process of a peer, as its parent sees it: stopped except while it carries out an order.

    A runtime's idle threads spin for a while, and would take time from whoever has the next turn. Runtimes can be told
    not to, but that makes some of them slower; a stopped process keeps the settings that users have.

    Args:
        name (`str`): a key of `PEERS`.
        folder (`Path`): the files of `peers.files`.
        threads (`int`): for the peer's own pool.

    Raises:
        `RuntimeError`: from `ask`, if the peer fails, dies or takes too long; it says why.
    """

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        self.log = folder / "logs" / f"{name}.txt"
        self.log.parent.mkdir(exist_ok=True)
        cache = folder / "compiled" / name
        self.compiled_before = cache.is_dir()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
            "TRANSFORMERS_OFFLINE": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peers.worker", str(folder), name, "--threads", str(threads)],
            cwd=Path(__file__).resolve().parents[1],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            start_new_session=True,  # a group of its own: its helpers stop and end with it
        )

    def ask(self, order: dict[str, Any], timeout: float = 300) -> dict[str, Any]:
        """Carry out an order and return the answer; an empty order waits for the first answer after loading."""
        assert self.process.stdin is not None
        try:
            if order:
                self._signal(signal.SIGCONT)
                self.process.stdin.write(json.dumps(order) + "\n")
                self.process.stdin.flush()
            answer = self._answer(timeout)
        except BrokenPipeError:
            raise RuntimeError(f"its process ended with status {self.process.wait()}; see {self.log}") from None
        if "error" in answer:
            raise RuntimeError(answer["error"])
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _answer(self, timeout: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout):
                raise RuntimeError(f"no answer within {timeout:.0f} s; see {self.log}")
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"its process ended with status {self.process.wait()}; see {self.log}")
        return json.loads(line)

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        module, function, argument = PEERS[arguments.name].load.split(":")
        load = getattr(importlib.import_module(f"peers.{module}"), function)
        predict = load(arguments.folder, arguments.threads, argument)
        case = functools.cache(lambda name: read(arguments.folder / "cases" / f"{name}.npz"))
        predict(case(FIRST)[0])
        say({"memory_mb": memory_mb()})
        for line in sys.stdin:
            order = json.loads(line)
            batches = case(order.get("warm") or order["run"])[: order["batches"]]
            if "warm" in order:
                np.save(order["save"], np.concatenate([predict(batch) for batch in batches]), allow_pickle=False)
                say({"memory_mb": memory_mb()})
            else:
                say({"seconds": turn(predict, batches)})
    except Exception as error:
        traceback.print_exc()
        say({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def turn(predict: Any, batches: list[Batch]) -> float:
    """Seconds for the batches, run until a turn is long enough: the median, without the first.

    Whoever had the turn before has filled the caches; to load the weights anew says nothing of a server at work.
    """
    times: list[float] = []
    while len(times) < 2 or (sum(times) < _TURN and len(times) < _CALLS):
        start = time.perf_counter()
        for batch in batches:
            predict(batch)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def memory_mb() -> float:
    """Resident memory now, where the system says it, otherwise its peak."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmRSS:")[1].split()[0]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


if __name__ == "__main__":
    main()
