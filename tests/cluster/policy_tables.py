"""Truth tables of policy: who is answered by whom, asked of every pod about every pod with real connections.

Nine pods, x/a to z/c, three protocols, two ports, two families, each directly and by way of the pod's Service: each pod
has a process that asks all its questions at once, so that a table takes about a second.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

from tests.lab.polling import until
from tests.lab.prober import ACKNOWLEDGED
from tests.lab.processes import Place, end, program

NAMESPACES = ("x", "y", "z")
NAMES = ("a", "b", "c")
PODS = tuple(f"{namespace}/{name}" for namespace, name in product(NAMESPACES, NAMES))
PROTOCOLS = ("tcp", "udp", "sctp")
PORTS = (80, 81)
SERVICE_PORTS = {80: 1080, 81: 1081}
"""Policy is to see the pod's port, not the Service's."""
SILENCE_S = 0.3
SECOND_LOOK_S = 1.2
"""Longer than TCP waits before it sends a second SYN."""
_LIMIT_S = 5.0
_MOST_LINES = 16


class Question(NamedTuple):
    """Whether one pod is answered by another, at a port of that pod, in a family: 4 or 6."""

    source: str
    destination: str
    protocol: str
    port: int
    family: int
    is_by_service: bool

    @property
    def from_namespace(self) -> str:
        """The namespace of who asks."""
        return self.source[0]

    @property
    def to_namespace(self) -> str:
        """The namespace of who is asked."""
        return self.destination[0]

    @property
    def is_within(self) -> bool:
        """Whether both are of one namespace."""
        return self.from_namespace == self.to_namespace

    @property
    def answer(self) -> str:
        """What the right server says."""
        return ACKNOWLEDGED if self.protocol == "sctp" else f"{self.destination} {self.port}"

    def __str__(self) -> str:
        way = ", by Service" if self.is_by_service else ""
        return f"{self.source} → {self.destination} {self.protocol} {self.port}, IPv{self.family}{way}"


QUESTIONS = tuple(Question(*it) for it in product(PODS, PODS, PROTOCOLS, PORTS, (4, 6), (False, True)))
Allows = Callable[[Question], bool]
Target = tuple[str, int]


class Prober:
    """A process at a place that asks many servers at once."""

    def __init__(self, place: Place) -> None:
        self._process = place.start(*program("prober"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def send(self, targets: Sequence[tuple[str, str, int]], silence_s: float = SILENCE_S) -> None:
        """Begin to ask: by what protocol, at which address and port."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps((silence_s, targets)) + "\n")
        self._process.stdin.flush()

    def hear(self) -> list[str]:
        """Return what was heard of each target: the server's name and port, an error's name, or nothing."""
        assert self._process.stdout
        heard: list[str] = json.loads(self._process.stdout.readline())
        return heard

    def close(self) -> None:
        """End it."""
        end(self._process)


class Tables:
    """Asks; ``target`` says at which address and port."""

    def __init__(self, places: Mapping[str, Place], target: Callable[[Question], Target]) -> None:
        self._probers = {name: Prober(place) for name, place in places.items()}
        self._target = target
        self._allowed: set[Question] = set()
        """When last seen."""

    def expect(self, allows: Allows, limit_s: float = _LIMIT_S) -> None:
        """Wait until what is to change has changed, and see that the whole table is as it should be, and stays so.

        A pod is always to be answered by itself. Raises: AssertionError, TimeoutError; both name what is wrong.
        """
        expected = {it: it.source == it.destination or allows(it) for it in QUESTIONS}
        changing = [it for it in QUESTIONS if not expected[it] or it not in self._allowed]
        self._allowed = set()
        self._wait_for(expected, changing, limit_s)
        wrong = self.wrong(expected, QUESTIONS)
        # An answer is an answer. Silence may have been haste; or with socketLB off, a question with the source port of
        # an earlier one to the same pod by its Service, which are not told apart (docs/compatibility.md).
        if wrong and not any(wrong.values()):
            wrong = self.wrong(expected, wrong, SECOND_LOOK_S)
        assert not wrong, "\n".join(_describe(wrong))
        self._allowed = {it for it in QUESTIONS if expected[it]}

    def ask(self, questions: Iterable[Question], silence_s: float = SILENCE_S) -> dict[Question, str]:
        """Ask, all at once; returns what the prober heard."""
        shares: dict[str, list[Question]] = {}
        for question in questions:
            shares.setdefault(question.source, []).append(question)
        for name, share in shares.items():
            self._probers[name].send([(it.protocol, *self._target(it)) for it in share], silence_s)
        heard = ((share, self._probers[name].hear()) for name, share in shares.items())
        return {it: said for share, answers in heard for it, said in zip(share, answers, strict=True)}

    def wrong(
        self, expected: Mapping[Question, bool], questions: Collection[Question], silence_s: float = SILENCE_S
    ) -> dict[Question, str]:
        """Ask; returns what was heard where it is not the expected: the right server, or silence."""
        heard = self.ask(questions, silence_s)
        return {it: said for it, said in heard.items() if said != (it.answer if expected[it] else "")}

    def close(self) -> None:
        """End the probers."""
        for prober in self._probers.values():
            prober.close()

    def _wait_for(self, expected: Mapping[Question, bool], changing: Collection[Question], limit_s: float) -> None:
        wrong: dict[Question, str] = {}

        def is_so() -> bool:
            nonlocal wrong
            wrong = self.wrong(expected, changing)
            return not wrong

        try:
            until(is_so, "the table is as expected", limit_s)
        except TimeoutError as error:
            raise TimeoutError("\n".join((str(error), *_describe(wrong)))) from error


def _describe(wrong: Mapping[Question, str]) -> Iterator[str]:
    """Name what is wrong, as much as one may want to read."""
    for question, said in list(wrong.items())[:_MOST_LINES]:
        expected = "silence" if said == question.answer else "an answer or silence" if said else "an answer"
        yield f"{question}: {said or 'silence'} instead of {expected}"
    if len(wrong) > _MOST_LINES:
        pairs = {(it.source, it.destination) for it in wrong}
        yield f"... {len(wrong)} in all, between {len(pairs)} pairs of pods"
