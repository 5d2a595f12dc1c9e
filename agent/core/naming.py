"""What addresses are called: by which identity each pod's address and each block is known, and to be known.

What the policies look at changes how identities are told apart. Numbers do not follow names then, they stay with the
addresses: of those that are to share a name most keep the number they have, and it comes to mean that name. A label
that every pod has splits no identity, or each into a few, and as few addresses as can be change hands.
"""

from __future__ import annotations

from collections.abc import Mapping

from agent.core.abi import ADDRESS_RANGE, PEER_WORLD, U32
from agent.core.addresses import AddressRange
from agent.core.identities import ALL_IPV4, Identities, Interest, Interests
from agent.core.policy_model import PolicyModel
from agent.core.policy_plan import PolicyPlan, PolicySizes, PolicyState
from agent.core.policy_records import PodRecord, Prefix
from agent.core.selectors import IdentityName
from agent.core.subjects import Subjects


class Naming:
    """``addresses`` and ``blocks``: by number, once every plan so far is carried out."""

    def __init__(
        self, model: PolicyModel, sizes: PolicySizes, found: PolicyState, identities: Identities, subjects: Subjects
    ) -> None:
        self.addresses = _numbers(found.identities)
        self.blocks = _numbers(found.blocks)
        self.dirty: set[bytes] = set()
        """Addresses that may have changed hands."""
        self.unplaced: dict[bytes, int] = {}
        """Addresses that there is no room for, with the numbers they would have."""
        self.unplaced_blocks: set[bytes] = set()
        self.is_first = True
        self._model = model
        self._sizes = sizes
        self._identities = identities
        self._subjects = subjects
        self._interests = Interests()
        self._vacated: set[int] = set()
        for number in (*self.addresses.values(), *self.blocks.values()):
            identities.hold(number)

    @property
    def is_behind(self) -> bool:
        """Whether addresses changed hands, or something may find the room now that it lacked."""
        return bool(self.dirty or self.unplaced or self.unplaced_blocks)

    def looks_at(self, wanted: frozenset[Interest]) -> bool:
        """Tell whether names are made by this already."""
        return not self.is_first and wanted == self._interests.wanted

    def rename(self, wanted: frozenset[Interest], plan: PolicyPlan) -> list[int]:
        """Plan what everything is to be called where policies look at this; returns the numbers that are new."""
        if not self.looks_at(wanted):
            self._interests = Interests(wanted)
            self.dirty |= self._model.pods_by_address.keys() | self.addresses.keys() if self.is_first else self._share()
            self._rename_blocks(plan)
        elif self.unplaced_blocks:
            self._rename_blocks(plan)
        dirty, self.dirty = self.dirty | self.unplaced.keys(), set()
        for address in sorted(dirty):
            self._rename_address(address, plan)
        begun, self._identities.begun = self._identities.begun, []
        self._vacated.update(begun)
        return [number for number in begun if number in self._identities.names]

    def take_vacated(self) -> set[int]:
        """Take out the numbers that came to be nobody's."""
        vacated, self._vacated = self._vacated, set()
        return {number for number in vacated if not self._identities.is_held(number)}

    def identity_of(self, address: bytes) -> int:
        """Look up by which number an address is known."""
        number = self.addresses.get(address)
        if number is not None:
            return number
        return self._of_block(self._interests.block_of(address))

    def mistaken(self) -> set[tuple[int, int]]:
        """List which identities are taken for which others, as there is no room for an address that has them."""
        interests = self._interests
        if self.unplaced and self.unplaced_blocks:
            interests = Interests(Prefix(address, bits) for bits, address in map(_bits_of, self.blocks))
        return {(number, self._of_block(interests.block_of(it))) for it, number in self.unplaced.items()}

    def unplaced_prefixes(self) -> set[Prefix]:
        """List the blocks that policies look at for which there is no room."""
        unplaced = {Prefix(address, bits) for bits, address in map(_bits_of, self.unplaced_blocks)}
        if ALL_IPV4 in unplaced:  # it says where wider ranges end
            unplaced.update(block for block in self._interests.blocks if block.bits < ALL_IPV4.bits)
        return unplaced

    def _of_block(self, block: Prefix | None) -> int:
        return PEER_WORLD if block is None else self.blocks.get(_block_key(block), PEER_WORLD)

    def _share(self) -> set[bytes]:
        """Have numbers mean what most of their addresses are to be called; returns those that others are called.

        This node's pods weigh more: all entries of a subject are under its number, and of a peer one in each row.

        No policy in force can tell the old names from the new ones, as what it looks at is in both: whom its selectors
        mean stays the same. What changed hands as well is left out, because of that it may not hold.
        """
        called: dict[IdentityName, dict[int, set[bytes]]] = {}
        for address in self.addresses.keys() - self.dirty:
            pod = self._model.owner(address)
            if pod is not None:
                having = called.setdefault(self._name_of(pod, address), {})
                having.setdefault(self.addresses[address], set()).add(address)
        local = self._subjects.pods.keys()
        kept = self._identities.rename(
            {
                name: {number: (len(local & addresses), len(addresses)) for number, addresses in having.items()}
                for name, having in called.items()
            }
        )
        return {
            address
            for name, having in called.items()
            for number, addresses in having.items()
            if kept.get(name) != number
            for address in addresses
        }

    def _rename_address(self, address: bytes, plan: PolicyPlan) -> None:
        pod, before = self._model.owner(address), self.addresses.get(address)
        taken = len(self.addresses) + len(plan.removed_identities)  # room that is let go is free behind the plan
        is_placed = pod is not None and (before is not None or taken < self._sizes.identities)
        number = None if pod is None else self._identities.number_of(self._name_of(pod, address))
        self._settle_local(address, pod, number)
        self._settle_unplaced(address, None if is_placed else number)
        if not is_placed:
            number = None
        if number == before:
            return
        if number is None:
            del self.addresses[address]
            plan.removed_identities.append(address)
        else:
            self.addresses[address] = number
            plan.identities[address] = U32.packer.pack(number)
            self._identities.hold(number)
        self._let_go(before)

    def _name_of(self, pod: PodRecord, address: bytes) -> IdentityName:
        return self._interests.name_of(pod, self._model.namespace_labels(pod.key.namespace), address)

    def _settle_local(self, address: bytes, pod: PodRecord | None, number: int | None) -> None:
        key = pod.key if pod is not None and pod.is_local else None
        if key is not None and number is not None:
            self._identities.hold(number)
        self._let_go(self._subjects.settle(address, key, number or 0, is_first=self.is_first))

    def _settle_unplaced(self, address: bytes, number: int | None) -> None:
        before = self.unplaced.pop(address, None)
        if number is not None:
            self._identities.hold(number)
            self.unplaced[address] = number
        self._let_go(before)

    def _let_go(self, number: int | None) -> None:
        if number is not None and self._identities.release(number):
            self._vacated.add(number)

    def _rename_blocks(self, plan: PolicyPlan) -> None:
        """Plan the blocks, and what is called after them."""
        names = {_block_key(block): name for block, name in self._interests.block_names().items()}
        self.unplaced_blocks.clear()
        for block in sorted(self.blocks.keys() - names.keys(), key=_bits_of):
            self._let_go(self.blocks.pop(block))
            plan.removed_blocks.append(block)
        for block, name in sorted(names.items(), key=lambda it: _bits_of(it[0]), reverse=True):
            before = self.blocks.get(block)
            if before is None and len(self.blocks) + len(plan.removed_blocks) >= self._sizes.blocks:
                self.unplaced_blocks.add(block)
                continue
            number = self._identities.number_of(name)
            if number == before:
                continue
            self.blocks[block] = number
            plan.blocks[block] = U32.packer.pack(number)
            self._identities.hold(number)
            self._let_go(before)
        plan.bumps_generation = plan.bumps_generation or bool(plan.blocks or plan.removed_blocks)


def block_text(block: bytes) -> str:
    """Write a block's key as an address range."""
    bits, address = _bits_of(block)
    return str(AddressRange(address, bits))


def _block_key(block: Prefix) -> bytes:
    return ADDRESS_RANGE.packer.pack(block.bits, block.address)


def _bits_of(block: bytes) -> tuple[int, bytes]:
    """Rank blocks: the longest is written first and removed last, so that none is judged as what it is cut from."""
    bits, address = ADDRESS_RANGE.packer.unpack(block)
    return bits, address


def _numbers(found: Mapping[bytes, bytes]) -> dict[bytes, int]:
    return {key: U32.packer.unpack(value)[0] for key, value in found.items()}
