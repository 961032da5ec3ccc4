"""The loop on fakes: in which order things happen, who has the devices, and what a stop or a failure leads to."""

from __future__ import annotations

import contextlib

from stare_megatron.run import loop
from stare_megatron.types import EntropyReading, Measured, ScoreSummary, StepStats

SUMMARY = ScoreSummary((), 10)


class Everything:
    """Every part of a run at once; writes down what is asked of it."""

    def __init__(
        self, restored=0, stop_at=None, evaluate=(), save=(), export=(), offload=False, none_at=None, completes=True
    ):
        self.said: list[str] = []
        self._offload, self.engines_sleep, self._completes = offload, False, completes
        self.asked = False
        self._restored, self._stop_at = restored, stop_at
        self._evaluate, self._save, self._export, self._none_at = evaluate, save, export, none_at
        self.stop_evaluating = None

    # sampler
    def next_batch(self, version):
        self.said.append(f"sample {version}")
        return None if version == self._none_at else f"batch {version}"

    def drain(self):
        self.said.append("drain")

    busy = True

    def settle(self):
        self.said.append("settle")

    def state(self): ...

    # trainer
    def load(self, batch):
        self.said.append(f"load {batch}")

    def score(self):
        return EntropyReading(10, 0.3)

    def update(self, control, *, keep_tokens):
        self.said.append(f"update {control}{' keep' if keep_tokens else ''}")
        return StepStats(SUMMARY, ())

    # controller
    def observe(self, reading):
        return f"H={reading.entropy}"

    # residency
    def __enter__(self): ...

    def __exit__(self, *_): ...

    def to_trainer(self):
        self.said.append("devices: trainer")

    @property
    def saves_first(self):
        return self._offload

    def to_checkpoint(self):
        self.said.append("devices: checkpoint")
        self.engines_sleep = self._offload

    @contextlib.contextmanager
    def to_engines(self):
        self.said.append("devices: both")
        yield
        self.engines_sleep = False
        self.said.append("devices: engines")

    # weights
    def push(self, version):
        self.said.append(f"push {version}")

    def score_probe(self, version):
        self.said.append(f"score probe {version}")
        return f"ours of {version}"

    def probe(self, version, ours):
        self.said.append(f"probe {version}")
        assert ours == f"ours of {version}"
        return 1e-6 * version

    # recorder
    @contextlib.contextmanager
    def phase(self, name):
        yield

    def shows_tokens(self, step):
        return step == 2

    def remember(self, control, done):
        assert done.scores is SUMMARY

    told = Measured("sync/compared", 3, 4)

    def record(self, step, batch, control, done, probe):
        gap, told = probe
        assert (gap.name, told) == ("sync/probe", self.told)
        self.said.append(f"record {step} {batch} {control} {gap.value:.0e}")
        self.asked = self.asked or step == self._stop_at

    def note(self, text):
        self.said.append(text)

    # stop
    @contextlib.contextmanager
    def calling(self, then):
        self.then = then
        yield

    def close(self, step=None):
        self.said.append("give up" if step is None else f"close {step}")

    # saving
    def restore(self):
        return self._restored

    def learned(self, step):
        self.said.append(f"learned {step}")

    def stopped(self, step):
        self.said.append(f"stopped {step}")

    def poll(self):
        self.said.append("poll")

    def save(self, step, *, last):
        self.said.append(f"save {step}{' last' if last else ''}")

    def begin(self, step):
        self.said.append(f"begin to save {step}")

    def complete(self, step, *, last):
        self.said.append(f"complete {step}{' last' if last else ''}")
        return self._completes

    def export_due(self, step):
        return step in self._export

    def export(self, step):
        self.said.append(f"export {step}")


class Evaluations:
    def __init__(self, parts, steps):
        self._parts, self._left = parts, set(steps)
        self._given_up = False

    def due(self, step):
        return step in self._left

    def evaluate(self, step):
        self._parts.said.append(f"evaluate {step}")
        if step == self._parts.stop_evaluating:
            self._parts.asked = True
            self._parts.then()
        if not self._given_up:
            self._left.remove(step)

    def give_up(self):
        self._given_up = True


class Saving:
    """`due` is evaluations' too, so this one has its own. What happens when the loop fails: test_loop_rescue.py."""

    def __init__(self, parts, steps):
        self._parts, self._steps = parts, steps

    def due(self, step):
        return step in self._steps

    def __enter__(self): ...

    def __exit__(self, *_): ...

    def __getattr__(self, name):
        return getattr(self._parts, name)


def run(parts: Everything, steps: int = 2) -> int:
    return loop.train(
        loop.Run(
            steps=steps,
            sampler=parts,
            trainers=parts,
            controller=parts,
            residency=parts,
            weights=parts,
            recorder=parts,
            evaluations=Evaluations(parts, parts._evaluate),
            saving=Saving(parts, parts._save),
            stop=parts,
        )
    )


STEP_1 = [
    "sample 0",
    "devices: trainer",
    "load batch 0",
    "update H=0.3",
    "learned 1",
    "settle",
    "devices: both",
    "push 1",
    "score probe 1",
    "devices: engines",
    "probe 1",
    "record 1 batch 0 H=0.3 1e-06",
    "poll",
]


PUSH_0 = ["devices: both", "push 0", "score probe 0", "devices: engines", "probe 0"]


def test_the_order_of_a_run():
    parts = Everything(evaluate=(0, 2), save=(2,), export=(2,))
    assert run(parts) == 2
    before = ["devices: checkpoint", *PUSH_0, "drain", "evaluate 0", "close 0"]
    step_2 = [
        "sample 1",
        "devices: trainer",
        "load batch 1",
        "update H=0.3 keep",
        "learned 2",
        "settle",
        "devices: both",
        "push 2",
        "score probe 2",
        "devices: engines",
        "probe 2",
        "record 2 batch 1 H=0.3 2e-06",
        "poll",
        "drain",
        "evaluate 2",
        "devices: checkpoint",
        "save 2 last",
        "devices: checkpoint",
        "export 2",
        "close 2",
        "give up",
    ]
    assert parts.said == [*before, *STEP_1, "close 1", *step_2]


def test_a_wish_to_stop_is_granted_after_the_step_which_is_saved_and_not_evaluated():
    parts = Everything(stop_at=1, evaluate=(0, 1))
    assert run(parts, steps=5) == 1
    left = "the evaluation of step 1 is not waited for: the run that goes on makes it"
    assert parts.said[-len(STEP_1) - 5 :] == [*STEP_1, left, "devices: checkpoint", "save 1 last", "close 1", "give up"]


def test_an_evaluation_is_given_up_when_an_end_is_wanted_and_the_step_before_it_saved():
    parts = Everything(evaluate=(1,))
    parts.stop_evaluating = 1
    assert run(parts, steps=5) == 1
    left = "the evaluation of step 1 is not waited for: the run that goes on makes it"
    saved = ["devices: checkpoint", "save 1 last", "close 1", "give up"]
    assert parts.said[-len(STEP_1) - 7 :] == [*STEP_1, "drain", "evaluate 1", left, *saved]


def test_nothing_is_evaluated_that_had_to_wait_until_an_end_was_wanted():
    parts = Everything(evaluate=(0,))

    def drain():
        parts.asked = True

    parts.drain = drain
    assert run(parts) == 0
    assert parts.said[-3:-1] == ["the evaluation of step 0 is not waited for: the run that goes on makes it", "close 0"]


def test_a_batch_that_is_not_waited_for_ends_the_run():
    parts = Everything(none_at=1)
    assert run(parts, steps=5) == 1
    assert parts.said[-5:] == ["close 1", "sample 1", "devices: checkpoint", "stopped 1", "give up"]


def test_what_is_away_is_saved_before_the_push_and_engines_sleep_once():
    parts = Everything(save=(1, 2), offload=True)
    assert run(parts) == 2
    push = STEP_1.index("devices: both")
    step_1 = [*STEP_1[:push], "begin to save 1", *STEP_1[push:], "complete 1", "close 1", "sample 1"]
    assert parts.said[len(PUSH_0) + 2 :][: len(step_1)] == step_1
    assert parts.said[-4:] == ["poll", "complete 2 last", "close 2", "give up"]


def test_engines_that_slept_for_an_export_get_their_weights_again_if_anybody_samples():
    parts = Everything(export=(1, 2), offload=True)
    assert run(parts) == 2
    hand_over = ["devices: both", "push 1", "score probe 1", "devices: engines"]
    after_1 = ["devices: checkpoint", "export 1", *hand_over, "close 1", "sample 1"]
    assert parts.said[len(PUSH_0) + 2 + len(STEP_1) :][: len(after_1)] == after_1
    assert parts.said[-4:] == ["devices: checkpoint", "export 2", "close 2", "give up"]


def test_a_save_that_is_the_last_after_all_and_not_where_that_belongs_is_done_again():
    parts = Everything(stop_at=1, save=(1,), offload=True, completes=False)
    assert run(parts, steps=5) == 1
    assert parts.said[-5:] == ["complete 1 last", "devices: checkpoint", "save 1 last", "close 1", "give up"]


def test_a_restored_run_goes_on_where_it_was():
    parts = Everything(restored=3)
    assert run(parts, steps=4) == 4
    assert [said for said in parts.said if said.startswith(("push", "sample"))] == ["push 3", "sample 3", "push 4"]


def test_a_run_that_is_done_only_pushes():
    parts = Everything(restored=2)
    assert run(parts) == 2
    assert [said for said in parts.said if said.startswith(("push", "sample"))] == ["push 2"]
