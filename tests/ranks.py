"""Runs functions of a test file on several processes at once: the ranks of torch.distributed groups.

    with Ranks(3, tmp_path, __file__) as ranks:
        results = ranks(2, "rank_forward", x)    # [what `rank_forward(group, x)` returned on rank 0 and 1 of 2]

The processes import the test file by path and wait for calls, so that many tests share one start, and a smaller group
is made of the first ranks. Whatever fails on any rank fails the call, with that rank's traceback, and so does a call
that takes longer than TIMEOUT: then all ranks are killed, and the next call starts new ones. tests/conftest.py puts
this folder on the path.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import pickle
import subprocess
import sys
import traceback
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any, cast

TIMEOUT = 120.0


# Plain pickles: torch teaches `Connection.send` to share the memory of tensors, which needs a key in common.
class Ranks:
    """`size` processes in gloo groups of 1 .. size; the store and the socket lie in `folder`."""

    _number = itertools.count()

    def __init__(self, size: int, folder: Path, test_file: str) -> None:
        self.size, self.folder, self.test_file = size, folder, test_file
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        name = self.folder / str(next(self._number))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTEST_XDIST_WORKER", None)
        with Listener(str(name.with_suffix(".socket")), "AF_UNIX", backlog=self.size) as listener:
            self._processes = [
                subprocess.Popen(
                    [sys.executable, __file__, listener.address, str(name), str(rank), str(self.size), self.test_file],
                    env=environment,
                )
                for rank in range(self.size)
            ]
            # A rank that cannot start must not leave this one waiting.
            listener._listener._socket.settimeout(TIMEOUT)  # type: ignore[attr-defined]
            arrived = [listener.accept() for _ in range(self.size)]
        by_rank = {connection.recv(): connection for connection in arrived}
        self._connections = [by_rank[rank] for rank in range(self.size)]

    def __call__(self, world: int, function: str, *args: Any) -> list[Any]:
        """What `function(group, *args)` of the test file returned on each rank of the group of the first `world`.

        Raises: AssertionError if one failed or hung.
        """
        if not self._processes:
            self._start()
        for connection in self._connections[:world]:
            connection.send_bytes(pickle.dumps((world, function, args)))
        waiting = {connection: rank for rank, connection in enumerate(self._connections[:world])}
        results, wrong, left = [None] * world, [], TIMEOUT
        while waiting and (ready := wait(list(waiting), left)):
            for connection in cast(list[Connection], ready):
                rank = waiting.pop(connection)
                try:
                    ok, results[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    ok, results[rank] = False, "the process ended"
                if not ok:
                    # The others are likely to wait for this one in vain.
                    wrong, left = [*wrong, f"rank {rank}:\n{results[rank]}"], 2.0
        wrong += [f"rank {rank} gave no answer" for rank in waiting.values()]
        if wrong:
            self._kill()
        assert not wrong, "\n".join(wrong)
        return results

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []

    def close(self) -> None:
        """Lets the ranks end by themselves, so that coverage can write what it has."""
        for connection in self._connections:
            connection.send_bytes(pickle.dumps(None))
        for process in self._processes:
            try:
                process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
        self._kill()


def serve(address: str, store: str, rank: int, size: int, test_file: str) -> None:
    """A rank: joins the groups, then answers calls until it is told to stop or its parent is gone."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    with Client(address, "AF_UNIX") as connection:
        connection.send(rank)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT / 2),
        )
        groups = {world: dist.new_group(list(range(world))) for world in range(1, size + 1)}
        spec = importlib.util.spec_from_file_location("rank_functions", test_file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        while (call := pickle.loads(connection.recv_bytes())) is not None:
            world, function, args = call
            try:
                answer = True, getattr(module, function)(groups[world], *args)
            except Exception:
                answer = False, traceback.format_exc()
            connection.send_bytes(pickle.dumps(answer))
        dist.destroy_process_group()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
