"""Who gets what, with the in-process executor and with one of several ranks in this process."""

import pickle
from dataclasses import dataclass

import pytest

from hybridrl.cluster.dispatch import Shares, WorkerGroup, dispatch
from hybridrl.cluster.local import LocalExecutor


@dataclass(frozen=True)
class Place:
    """As far as WorkerGroup reads coordinates."""

    dp_rank: int
    dp: int
    is_collector: bool


class Echo:
    """Answers with who it is and what it was given. settings: a Place a rank."""

    def __init__(self, rank: int, settings: list[Place]):
        self.rank, self.place, self.calls, self.closed = rank, settings[rank], [], False

    @dispatch("first")
    def rendezvous(self) -> str:
        return f"met by {self.rank}"

    @dispatch("all")
    def setup(self, init: str) -> Place:
        self.init = init
        return self.place

    @dispatch("all")
    def everyone(self, *args):
        return self.rank, args

    @dispatch("first")
    def one(self, x):
        self.calls.append(x)
        return self.rank, x

    @dispatch("dp")
    def shared(self, *args):
        return self.rank, args

    @dispatch("all")
    def fails(self):
        raise RuntimeError(f"rank {self.rank}")

    def private(self):
        return "not dispatched"

    def close(self):
        self.closed = True


class InProcess:
    """Several workers in this process; the order of the calls is kept."""

    def __init__(self, places: list[Place]):
        self.world, self.workers, self.stored, self.log = len(places), [], [], []
        self.workers = [Echo(rank, places) for rank in range(self.world)]

    def put(self, value):
        self.stored.append(value)
        return value

    def run(self, rank, name, *args):
        self.log.append((rank, name))
        return lambda: getattr(self.workers[rank], name)(*args)

    def wait(self, pending):
        return [call() for call in pending]

    def shutdown(self):
        for worker in self.workers:
            worker.close()


# TP 2, PP 2, DP 2 in Megatron's order: tensor-parallel neighbours, then data-parallel, then stages.
PLACES = [Place(dp_rank=(r // 2) % 2, dp=2, is_collector=r % 2 == 0 and r >= 4) for r in range(8)]


@pytest.fixture
def group():
    return WorkerGroup(InProcess(PLACES), Echo).start()


def test_start_meets_at_rank_0(group):
    assert group.coords == PLACES and group.dp == 2
    assert all(w.init == "met by 0" for w in group.executor.workers)


def test_all(group):
    assert group.everyone(1, "a") == [(r, (1, "a")) for r in range(8)]


def test_first(group):
    assert group.one("x") == (0, "x")
    assert [w.calls for w in group.executor.workers] == [["x"]] + [[]] * 7


def test_dp_gives_each_rank_its_share_and_takes_one_answer_each(group):
    answers = group.shared("name", Shares(["left", "right"]), 3)
    assert answers == [(4, ("name", "left", 3)), (6, ("name", "right", 3))]
    assert len(group.executor.log) == 1 + 8 + 8, "every rank ran: collectives need them all"


def test_dp_stores_each_share_once(group):
    """However many ranks of a model-parallel group read it."""
    group.shared(Shares(["left", "right"]), Shares([1, 2]))
    assert group.executor.stored == ["left", "right", 1, 2]


def test_a_plain_list_is_not_shared_out(group):
    assert group.shared(["left", "right"]) == [(4, (["left", "right"],)), (6, (["left", "right"],))]
    assert isinstance(pickle.loads(pickle.dumps(Shares([1, 2]))), Shares)


def test_submit_returns_before_the_answer(group):
    wait = group.submit("everyone", 5)
    assert group.executor.log[-8:] == [(r, "everyone") for r in range(8)]
    other = group.submit("one", "while it runs")
    assert other() == (0, "while it runs") and wait()[7] == (7, (5,))


def test_failure_reaches_the_caller(group):
    with pytest.raises(RuntimeError, match="rank 0"):
        group.fails()


@pytest.mark.parametrize("name", ["private", "no_such_method", "_hidden", "close"])
def test_only_marked_methods_can_be_called(group, name):
    with pytest.raises(AttributeError, match=name):
        getattr(group, name)


def test_shutdown(group):
    group.shutdown()
    assert all(w.closed for w in group.executor.workers)


def test_local_executor():
    group = WorkerGroup(LocalExecutor(Echo, [Place(0, 1, True)]), Echo).start()
    assert group.coords == [Place(0, 1, True)] and group.dp == 1
    assert group.everyone(2) == [(0, (2,))] and group.one(3) == (0, 3)
    assert group.shared(Shares(["mine"]), "too") == [(0, ("mine", "too"))]
    assert group.submit("everyone", 4)() == [(0, (4,))]
    with pytest.raises(RuntimeError, match="rank 0"):
        group.fails()
    group.shutdown()
    assert group.executor.worker.closed


def test_every_method_of_the_trainer_worker_says_who_runs_it():
    from hybridrl.trainer.worker import TrainWorker

    public = {n: m for n, m in vars(TrainWorker).items() if callable(m) and not n.startswith("_")}
    assert public and all(getattr(m, "dispatch_mode", None) in ("all", "first", "dp") for m in public.values())
    assert TrainWorker.rendezvous.dispatch_mode == "first" and TrainWorker.update.dispatch_mode == "dp"
