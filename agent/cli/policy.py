"""`ebproxy policy list` and `policy show`: the policies as the agent has them."""

from __future__ import annotations

import argparse
from typing import Any

from agent.cli.output import print_json, print_table
from agent.errors import ConfigError, EbproxyError
from agent.observe.control import ask

HELP = "list the policies that are enforced and the pods of this node that they concern, or show one with its rules"

_IN_FORCE = {
    "former": "what it said before",
    "part": "what of it can be read",
    "none": "nothing of it",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to do."""
    parser.add_argument(
        "verb", choices=("list", "show"), metavar="list|show", help="a line for each policy, or one with its rules"
    )
    parser.add_argument(
        "name", nargs="?", metavar="NAMESPACE/NAME", help="the policy to show; a cluster's by its name alone"
    )


def run(args: argparse.Namespace) -> int:
    """Print policies. Raises: EbproxyError when the one asked for is not there, or nobody can say."""
    if args.verb == "show" and not args.name:
        raise ConfigError(["policy show: say which: NAMESPACE/NAME, or NAME of a ClusterNetworkPolicy"])
    if args.verb == "list" and args.name:
        raise ConfigError([f"policy list: takes no name; `ebproxy policy show {args.name}` shows one"])
    policies: list[dict[str, Any]] = ask(args.state_dir, "policies")
    if args.verb == "show":
        policies = [policy for policy in policies if _name(policy) == args.name]
        if not policies:
            hint = (
                ""
                if "/" in args.name
                else " (a name alone is a ClusterNetworkPolicy's, a NetworkPolicy is NAMESPACE/NAME)"
            )
            message = f"policy {args.name} is not known{hint}; `ebproxy policy list` shows what is"
            raise EbproxyError(message)
    if args.output == "json":
        print_json(policies)
    elif args.verb == "list":
        header = ("policy", "kind", "subject", "directions", "rules", "pods here", "in force", "fault")
        print_table(header, [_row(policy) for policy in policies])
    else:
        for policy in policies:
            _show(policy)
    return 0


def _name(policy: dict[str, Any]) -> str:
    return "/".join(filter(None, (policy["namespace"], policy["name"])))


def _kind(policy: dict[str, Any]) -> str:
    return f"{policy['kind']}, {policy['tier']} {policy['priority']}" if policy["tier"] else str(policy["kind"])


def _row(policy: dict[str, Any]) -> tuple[object, ...]:
    directions = ",".join(policy["directions"]) or "-"
    pods = len(policy["pods"])
    return (
        _name(policy),
        _kind(policy),
        policy["subject"] or "-",
        directions,
        len(policy["rules"]),
        pods,
        policy["in_force"],
        "; ".join(_faults(policy)) or "-",
    )


def _faults(policy: dict[str, Any]) -> list[str]:
    missing = (f"not in force: {text}" for text in policy["not_enforced"])
    return [*filter(None, (policy["fault"],)), *policy["not_understood"], *missing]


def _action(rule: dict[str, Any]) -> str:
    if not rule["closed"]:
        return str(rule["action"])
    unknown = rule["not_understood"]
    return f"{rule['action'] or '?'}, closed ({f'not understood: {unknown}' if unknown else 'cannot be read'})"


def _show(policy: dict[str, Any]) -> None:
    rows = [
        ("policy", _name(policy)),
        ("kind", _kind(policy)),
        ("subject", policy["subject"] or "-"),
        ("directions", ", ".join(policy["directions"]) or "-"),
        *(("pod here", pod) for pod in policy["pods"]),
    ]
    if policy["fault"]:
        rows += [("fault", policy["fault"]), ("in force", _IN_FORCE[policy["in_force"]])]
    rows += [("fault", text) for text in policy["not_understood"]]
    rows += [("not in force", text) for text in policy["not_enforced"]]
    print_table(("what", "value"), rows)
    if rules := [*_rules(policy), *_denials(policy)]:
        print_table(("rule", "name", "is", "peer", "ports of the destination"), rules)


def _rules(policy: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (f"{rule['direction']} {rule['index']}", rule["name"] or "-", _action(rule), peer, ports)
        for rule in policy["rules"]
        for ports in [" ".join(rule["ports"]) or "-"]
        for peer in rule["peers"] or [rule["comes_to"]]
    ]


def _denials(policy: dict[str, Any]) -> list[tuple[str, ...]]:
    """Lay out the directions that a NetworkPolicy isolates without a rule."""
    ruled = {rule["direction"] for rule in policy["rules"]}
    return [(it, "-", "no rule", "allows nobody", "-") for it in policy["directions"] if it not in ruled]
