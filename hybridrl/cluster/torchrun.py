"""The executor under torchrun: rank 0 drives, and is a rank itself; the others serve its method calls.

Calls travel over sockets of their own, apart from Megatron's groups, so that a rank may wait for its next call as long
as it takes. Rank 0 tells the others its address and a random key through torchrun's store. A rank that fails sends its
error and ends with status 1, and torchrun ends all others; a rank whose connection closes knows that its peer is gone.
"""

import os
import pickle
import secrets
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

import torch.distributed as dist

from hybridrl.errors import ProcessDied

_KEY = "hybridrl/calls"


class RemoteError(Exception):
    """What stands for an exception that cannot be pickled."""


class TorchrunExecutor:
    """Lives on rank 0. Waits until all other ranks have connected."""

    def __init__(self, worker_class: type, settings: Any, name: str):
        store, _, self.world = next(dist.rendezvous("env://"))
        assert self.world == settings.world, "rules.py compares torchrun's ranks with the pool's"
        self.name = name
        self._peers: dict[int, Connection] = {}
        if self.world > 1:
            authkey = secrets.token_bytes(32)
            with Listener((os.environ["MASTER_ADDR"], 0), backlog=self.world, authkey=authkey) as listener:
                store.set(_KEY, pickle.dumps((listener.address, authkey)))
                for _ in range(self.world - 1):
                    peer = listener.accept()
                    self._peers[peer.recv()] = peer
        for peer in self._peers.values():
            peer.send((worker_class, settings))
        os.environ["HYBRIDRL_NODE_IP"] = os.environ["MASTER_ADDR"]
        self.worker = worker_class(0, settings)

    def put(self, value: Any) -> Any:
        return value

    def run(self, rank: int, name: str, *args: Any) -> Any:
        """Sends the call; rank 0's own runs in `wait`, when all ranks have theirs."""
        if rank == 0:
            return lambda: getattr(self.worker, name)(*args)
        try:
            self._peers[rank].send((name, args))
        except OSError as error:
            raise self._died(rank) from error
        return rank

    def wait(self, pending: list) -> list:
        """Results in the order of `pending`. The first failure is raised at once. ProcessDied names a rank that ended
        without one."""
        results: dict[int, Any] = {}
        ranks = {self._peers[p]: p for p in pending if not callable(p)}
        try:
            own = [p() for p in pending if callable(p)]
        except Exception:
            self._receive(ranks, results, timeout=3.0)  # another rank's error may be the cause of this one's
            raise
        while ranks:
            self._receive(ranks, results, timeout=None)
        return [own[0] if callable(p) else results[p] for p in pending]

    def _receive(self, ranks: dict[Connection, int], results: dict[int, Any], timeout: float | None) -> None:
        for peer in wait(list(ranks), timeout):
            rank = ranks.pop(peer)
            try:
                result, error = peer.recv()
            except (EOFError, OSError):
                raise self._died(rank) from None
            if error is not None:
                raise error
            results[rank] = result

    def check(self) -> None:
        """ProcessDied if a rank has ended: nothing else comes from a rank that has no call."""
        for rank, peer in self._peers.items():
            if peer.poll():
                raise self._died(rank)

    def _died(self, rank: int) -> ProcessDied:
        return ProcessDied(f"rank {rank} of pool {self.name!r} died (killed, out of memory, or a crash)")

    def shutdown(self) -> None:
        """Lets the others end; leaves the groups."""
        for peer in self._peers.values():
            try:
                peer.send(None)
                peer.close()
            except OSError:
                pass  # ended already
        self._peers.clear()
        self.worker.close()


def serve() -> None:
    """Runs rank 0's calls on this rank until it says that there are no more. Raises what a call raised, after rank 0
    has been told; ProcessDied when rank 0 is gone."""
    store, rank, _ = next(dist.rendezvous("env://"))
    address, authkey = pickle.loads(_get(store))
    with Client(address, authkey=authkey) as driver:
        driver.send(rank)
        try:
            worker_class, settings = driver.recv()
            worker = worker_class(rank, settings)
            while (call := driver.recv()) is not None:
                name, args = call
                driver.send((getattr(worker, name)(*args), None))
        except (EOFError, ConnectionError):
            raise ProcessDied(f"rank 0 is gone, so rank {rank} ends") from None
        except Exception as error:
            driver.send((None, _portable(error)))
            raise
        worker.close()


def _get(store) -> bytes:
    """Rank 0's address. It reads and checks all data before it asks for ranks, which may take long."""
    while True:
        try:
            store.wait([_KEY])
            return store.get(_KEY)
        except dist.DistStoreError:
            continue  # the store's own timeout; torchrun ends this process if rank 0 fails


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RemoteError(f"{type(error).__name__}: {error}")
