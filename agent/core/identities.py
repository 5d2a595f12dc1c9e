"""Identities: which there are, their numbers, and which of them each selector means.

An identity is what policy can tell of a pod: pods that differ only in what no policy looks at share one. Numbers are
local to the node and stay with the name as long as something has it.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable, Mapping

from agent.core.abi import FIRST_IDENTITY, PEER_WORLD
from agent.core.addresses import IPV4_PREFIX, family_of
from agent.core.policy_records import Labels, NamedPort, PodRecord, Prefix
from agent.core.records import Family
from agent.core.selectors import WORLD, IdentityName, Matcher, Token, is_within, tokens_of

Interest = tuple[str, str] | Prefix
"""Something that a policy looks at: a label's key, a namespace, a port's name, or a block."""
_ADDRESS_BITS = 128
_NAMES_LIMIT = 16_384
ALL_IPV4 = Prefix(IPV4_PREFIX + bytes(4), 96)


class Interests:
    """What the policies look at, and the names that addresses have by that."""

    def __init__(self, wanted: Iterable[Interest] = ()) -> None:
        self.wanted = frozenset(wanted)
        self.blocks = tuple(sorted(it for it in self.wanted if isinstance(it, Prefix)))
        words = [it for it in self.wanted if not isinstance(it, Prefix)]
        self._namespaces, self._namespace_keys, self._keys, self._ports = (
            frozenset(word for kind, word in words if kind == which)
            for which in ("namespace", "namespace label", "label", "port")
        )
        self._by_bits: dict[Family, dict[int, dict[int, Prefix]]] = {family: {} for family in Family}
        for block in sorted(self.blocks, key=lambda block: -block.bits):
            by_bits = self._by_bits[family_of(block.address)].setdefault(block.bits, {})
            by_bits[int.from_bytes(block.address, "big") >> (_ADDRESS_BITS - block.bits)] = block
        self._names: dict[tuple[str, Labels, Labels, tuple[NamedPort, ...], Prefix | None], IdentityName] = {}
        self._block_names = {block: IdentityName(is_pod=False, block=block) for block in self.blocks}

    def name_of(self, pod: PodRecord, namespace_labels: Labels, address: bytes) -> IdentityName:
        """Name the identity that a pod has with one of its addresses."""
        block = self.block_of(address) if self.blocks else None
        known = (pod.key.namespace, namespace_labels, pod.labels, pod.ports, block)
        name = self._names.get(known)
        if name is None:
            if len(self._names) >= _NAMES_LIMIT:
                self._names.clear()  # of pods that came and went; those that exist are made again
            name = self._names[known] = IdentityName(
                namespace=pod.key.namespace if pod.key.namespace in self._namespaces else "",
                namespace_labels=_of_keys(namespace_labels, self._namespace_keys),
                labels=_of_keys(pod.labels, self._keys),
                ports=tuple(sorted({port for port in pod.ports if port.name in self._ports})),
                block=block,
            )
        return name

    def block_of(self, address: bytes) -> Prefix | None:
        """Find the longest block that holds an address."""
        number = int.from_bytes(address, "big")
        for bits, blocks in self._by_bits[family_of(address)].items():
            if block := blocks.get(number >> (_ADDRESS_BITS - bits)):
                return block
        return None

    def block_names(self) -> dict[Prefix, IdentityName]:
        """Name what is no pod, by prefix.

        A range of IPv6 that holds the form IPv4 has in the maps does not mean IPv4: that is the world then.
        """
        names = dict(self._block_names)
        if any(block.bits < ALL_IPV4.bits and _covers_ipv4(block) for block in self.blocks):
            names.setdefault(ALL_IPV4, WORLD)
        return names


def _covers_ipv4(block: Prefix) -> bool:
    shift = _ADDRESS_BITS - block.bits
    return int.from_bytes(ALL_IPV4.address, "big") >> shift == int.from_bytes(block.address, "big") >> shift


def _of_keys(labels: Labels, keys: frozenset[str]) -> Labels:
    return tuple(label for label in labels if label[0] in keys)


class Selection:
    """The identities that a matcher means; kept up to date as identities come and go."""

    __slots__ = ("matcher", "numbers", "uses")

    def __init__(self, matcher: Matcher) -> None:
        self.matcher = matcher
        self.numbers: set[int] = set()
        self.uses = 0


class Identities:
    """Every identity by number; ``version`` moves when a number is given or taken back."""

    def __init__(self, restored: Mapping[int, IdentityName], last: int) -> None:
        """``restored``: numbers of before, kept by whoever still has the name. ``last``: the highest ever given."""
        self.names: dict[int, IdentityName] = {}
        self.last = max(last, FIRST_IDENTITY - 1)
        self.version = 0
        self.begun: list[int] = []
        """Numbers that came to be in use, for whoever takes them out."""
        self._numbers = {WORLD: PEER_WORLD} | {name: number for number, name in restored.items()}
        self._restored = dict(restored)
        self._uses: Tally[int] = Tally()
        self._having: dict[Token, set[int]] = {}
        self._selections: dict[Matcher, Selection] = {}
        self._by_token: dict[Token, set[Matcher]] = {}

    def __len__(self) -> int:
        return len(self.names)

    def number_of(self, name: IdentityName) -> int:
        """Look up a name's number; gives one out where it has none. It is kept from ``hold`` to ``release``."""
        number = self._numbers.get(name)
        if number is None:
            self.last += 1
            self.version += 1
            number = self._numbers[name] = self.last
        if number not in self.names and number != PEER_WORLD:
            self._restored.pop(number, None)
            self.begun.append(number)
            self._begin(number, name)
        return number

    def hold(self, number: int) -> None:
        """Count one address more that has it."""
        self._uses[number] += 1

    def release(self, number: int) -> bool:
        """Count one address less; returns whether it was the last. It is forgotten only when told."""
        self._uses[number] -= 1
        return self._uses[number] == 0 and number != PEER_WORLD

    def is_held(self, number: int) -> bool:
        """Tell whether any address has it."""
        return self._uses[number] > 0

    def rename(self, weights: Mapping[IdentityName, Mapping[int, tuple[int, ...]]]) -> dict[IdentityName, int]:
        """Have numbers stand for what their addresses are to be called, where that weighs most; returns which, by name.

        ``weights``: for each name, by the number that addresses have which are to have the name. No matcher that is
        kept up to date may tell the name a number has from those its addresses are to have.
        """
        kept: dict[IdentityName, int] = {}
        taken: set[int] = set()
        wishes = [(weight, -number, name) for name, having in weights.items() for number, weight in having.items()]
        for _, lesser, name in sorted(wishes, key=lambda it: it[:2], reverse=True):
            number = -lesser
            if name not in kept and number not in taken:
                kept[name] = number
                taken.add(number)
        renamed = {name: number for name, number in kept.items() if self.names[number] != name}
        for number in renamed.values():
            self._unbind(number, self.names[number])
        for name, number in renamed.items():
            self._numbers[name] = number
            before, self.names[number] = set(tokens_of(self.names[number])), name
            after = set(tokens_of(name))
            self._lose(number, before - after)
            self._gain(number, after - before)
        self.version += bool(renamed)
        return kept

    def forget(self, number: int) -> None:
        """Take back a number that no address has."""
        name = self.names.pop(number)
        self._unbind(number, name)
        self._lose(number, tokens_of(name))
        del self._uses[number]
        self.version += 1

    def forget_restored(self) -> None:
        """Take back the numbers of before that nothing came to have."""
        for number, name in self._restored.items():
            self._unbind(number, name)
        self.version += bool(self._restored)
        self._restored.clear()

    def persistent(self) -> dict[int, IdentityName]:
        """List what is to be known after a restart."""
        return self.names | self._restored

    def select(self, matcher: Matcher) -> Selection:
        """Begin to keep who is meant; each is to be dropped once."""
        selection = self._selections.get(matcher)
        if selection is None:
            selection = self._selections[matcher] = Selection(matcher)
            for token in matcher.tokens():
                self._by_token.setdefault(token, set()).add(matcher)
                candidates = self._having.get(token, ())
                selection.numbers.update(number for number in candidates if matcher.matches(self.names[number]))
        selection.uses += 1
        return selection

    def drop(self, selection: Selection) -> None:
        """Keep it no more, if nobody else does."""
        selection.uses -= 1
        if selection.uses:
            return
        del self._selections[selection.matcher]
        for token in selection.matcher.tokens():
            self._by_token[token].discard(selection.matcher)
            if not self._by_token[token]:
                del self._by_token[token]

    def _begin(self, number: int, name: IdentityName) -> None:
        self.names[number] = name
        self._gain(number, tokens_of(name))

    def _gain(self, number: int, tokens: Iterable[Token]) -> None:
        name = self.names[number]
        for token in tokens:
            self._having.setdefault(token, set()).add(number)
            for matcher in self._by_token.get(token, ()):
                if matcher.matches(name):
                    self._selections[matcher].numbers.add(number)

    def _lose(self, number: int, tokens: Iterable[Token]) -> None:
        for token in tokens:
            self._having[token].discard(number)
            if not self._having[token]:
                del self._having[token]
            for matcher in self._by_token.get(token, ()):
                self._selections[matcher].numbers.discard(number)

    def _unbind(self, number: int, name: IdentityName) -> None:
        """Take a name from a number, unless another has it by now; both have it while addresses change hands."""
        if self._numbers.get(name) == number:
            del self._numbers[name]


def interests_of(matcher: Matcher) -> set[Interest]:
    """List what has to be known of an identity to tell whether a matcher means it."""
    if matcher.block is not None:
        return {
            matcher.block.prefix,
            *(hole for hole in matcher.block.excepts if is_within(hole, matcher.block.prefix)),
        }
    wanted: set[Interest] = {("namespace", matcher.namespace)} if matcher.namespace else set()
    for scope, selector in (("namespace label", matcher.namespaces), ("label", matcher.pods)):
        wanted |= {(scope, requirement.key) for requirement in (selector.requirements if selector else ())}
    return wanted | ({("port", matcher.port)} if matcher.port else set())
