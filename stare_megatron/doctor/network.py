"""What can be wrong between the nodes: Ray, versions, names, ports, clocks, settings, files that all must see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from stare_megatron.config import Config
from stare_megatron.doctor.facts import ClusterFacts, Finding
from stare_megatron.host import packages
from stare_megatron.host.packages import MISSING

_MAX_CLOCK_S = 2.0
_ENVIRONMENT_CURE = "install the driver's environment there, and start Ray again from it"
_TOKEN_CURE = (
    "before `ray start` and here, set RAY_AUTH_MODE=token and copy the head's ~/.ray/auth_token to every node, or set "
    "RAY_AUTH_MODE=disabled everywhere"
)
_UNKNOWN_CURE = (
    "see `ray status` and the newest logs in /tmp/ray on the head, and compare the versions of Python and Ray there "
    "and here"
)
# Words of what Ray says -> the cure.
_REFUSALS = {
    "ersion": "use the cluster's versions of Python and Ray here",
    "running Ray instance": "start Ray on this machine (`ray start`), or set cluster.address=HOST:6379",
    **dict.fromkeys(("token", "Token", "nauthenticated", "AuthenticationError"), _TOKEN_CURE),
}
_EXPORT_CURE = "export one value on every node before `ray start`"


def no_answer(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    if not facts.no_answer:
        return
    if facts.address == "auto":
        what = f"nothing answers at RAY_ADDRESS = {facts.ray_address} ({facts.no_answer})"
        yield Finding("this machine", what, "unset RAY_ADDRESS, which an earlier cluster left, or start Ray there")
    else:
        what = f"nothing answers at cluster.address = {facts.address} ({facts.no_answer})"
        yield Finding("this machine", what, "start Ray there (`ray start --head`), or open that port in the firewall")


def refusal(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    if not facts.refusal:
        return
    if facts.address == "local":
        cure = "see the newest session's logs in /tmp/ray, and end what else runs Ray here"
    else:
        cure = next((cure for word, cure in _REFUSALS.items() if word in facts.refusal), _UNKNOWN_CURE)
    yield Finding("this machine", facts.refusal.partition(" Set RAY_AUTH_MODE")[0].rstrip(".;"), cure)


def second_ray(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    if facts.address == "local" and facts.ray_address:
        what = f'RAY_ADDRESS = {facts.ray_address} is set, and cluster.address = "local" starts another Ray here'
        yield Finding("this machine", what, "set cluster.address=auto, or unset RAY_ADDRESS")


def silent(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    for name, reason in facts.silent.items():
        cure = _ENVIRONMENT_CURE if "ModuleNotFoundError" in reason else "start Ray there again, or take the node out"
        yield Finding(name, f"runs nothing of ours: {reason}", cure)


def versions(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    """As ranks and engines are held to them when they start; a node that can have none runs a sandbox at most."""
    for node in facts.nodes:
        other = packages.differences(node.versions, facts.driver.versions, ranks=node in facts.hosts)
        if other:
            yield Finding(node.name, "; ".join(other), _ENVIRONMENT_CURE)


def authentication(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    """Within a cluster that runs: the next `ray start` or driver will be refused."""
    modes = {node.name: node.auth_mode or "disabled" for node in facts.nodes}
    if differ := _differ(modes):
        yield Finding("RAY_AUTH_MODE", differ, _TOKEN_CURE)
    elif "token" in modes.values() and (differ := _differ({node.name: node.token or "none" for node in facts.nodes})):
        yield Finding("Ray's tokens (digests)", differ, _TOKEN_CURE)


def loopback(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    for node in facts.nodes if facts.several else ():
        if node.address.startswith("127."):
            cure = "start Ray there with --node-ip-address and the address that others reach it by"
            yield Finding(node.name, "Ray uses an address that other nodes cannot reach", cure)


def interface(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    for node in facts.nodes if facts.several else ():
        if not node.interface:
            cure = "start Ray there with --node-ip-address and an address of this node (`ip address` lists them)"
            yield Finding(node.name, f"no network interface carries {node.address}, the address that Ray uses", cure)


def host_name(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    for node in facts.nodes if facts.several else ():
        if node.resolved == node.address or "GLOO_SOCKET_IFNAME" in node.environment:
            continue
        what = f"its name resolves to {node.resolved or 'nothing'}, not to {node.address}"
        device = node.interface or "its interface"
        cure = f"mend /etc/hosts there, or export GLOO_SOCKET_IFNAME={device} before `ray start`"
        yield Finding(node.name, what, cure)


def gloo_interface(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    yield from _named_interfaces(facts, "GLOO_SOCKET_IFNAME", lambda name, there: name in there)


def nccl_interface(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    """Its names are beginnings, unless after "="; "^" excludes."""

    def known(name: str, there: Sequence[str]) -> bool:
        return name[1:] in there if name.startswith("=") else any(i.startswith(name) for i in there)

    yield from _named_interfaces(facts, "NCCL_SOCKET_IFNAME", known)


def _named_interfaces(
    facts: ClusterFacts, variable: str, known: Callable[[str, Sequence[str]], bool]
) -> Iterator[Finding]:
    for node in facts.nodes:
        value = node.environment.get(variable, "")
        names = [] if value.startswith("^") else [n.strip() for n in value.split(",") if n.strip()]
        exact = value.startswith("=")
        if names and not any(known("=" + n.lstrip("=") if exact else n, node.interfaces) for n in names):
            there = ", ".join(node.interfaces)
            cure = f"export the name of one of its interfaces ({there}) before `ray start`, or unset it"
            yield Finding(node.name, f"{variable} = {value} names no interface there", cure)


def ports(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    """One line for each node that some cannot reach."""
    for target in dict.fromkeys(b.target for b in facts.blocked):
        closed = [b for b in facts.blocked if b.target == target]
        numbers = ", ".join(map(str, closed[0].ports))
        sources = closed[0].source + (f" and {len(closed) - 1} others" if len(closed) > 1 else "")
        cure = "let all TCP ports through between the nodes (rendezvous, NCCL, gloo and Ray choose theirs)"
        yield Finding(target, f"{sources} cannot connect to its ports {numbers} ({closed[0].reason})", cure)


def clock(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    for node in facts.nodes:
        if abs(node.clock) > _MAX_CLOCK_S:
            way = "ahead of" if node.clock > 0 else "behind"
            cure = "set it by NTP (chrony, systemd-timesyncd): files of a shared folder get times of both"
            yield Finding(node.name, f"its clock is {abs(node.clock):.1f} s {way} the driver's", cure)


def environment(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    """Between nodes, and what was set for the driver only: its environment does not travel."""
    # Which GPUs Ray may use is each node's own; `ray_gpus` looks at their number.
    names = sorted({name for node in facts.nodes for name in node.environment} - {"CUDA_VISIBLE_DEVICES"})
    for name in names:
        if differ := _differ({node.name: node.environment.get(name, "not set") for node in facts.nodes}):
            yield Finding(name, differ, _EXPORT_CURE)
    for name, value in facts.driver.environment.items() if facts.address != "local" and facts.nodes else ():
        if name.startswith(("NCCL_", "GLOO_", "HF_")) and name not in names:
            what = f"{value} for the driver, not set on any node"
            yield Finding(name, what, "export it on every node before `ray start`: the driver's environment stays here")


def shared_folder(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    for node in () if facts.driver.shared_error else facts.hosts:
        if not node.shared_visible:
            what = f"what the driver wrote into {facts.shared} is not seen there ({node.shared_error})"
            yield Finding(node.name, what, "put run.dir on a file system that every node has at the same path")


def shared_writable(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    for node in (facts.driver,) if facts.driver.shared_error else facts.hosts:
        if node.shared_visible and node.shared_error:
            what = f"writing and renaming in {facts.shared} fails: {node.shared_error}"
            cure = "choose a run.dir that Ray's user may write on every node, on a file system with POSIX renames"
            yield Finding(node.name, what, cure)


def local_folder(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    name = f"checkpoint.local = {config.checkpoint.local!r}" if config is not None else ""
    for node in facts.hosts:
        if node.local_error:
            cure = "name a folder that Ray's user may make and write on every node, or leave checkpoint.local empty"
            yield Finding(node.name, f"{name}: nothing can be written there ({node.local_error})", cure)
        elif node.local_with:
            cure = "name a folder on each node's own disk, or leave checkpoint.local empty"
            yield Finding(node.name, f"{name} is the same folder as on {', '.join(node.local_with)}", cure)


def paths_missing(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    if facts.address == "local" or any(found == MISSING for found in facts.driver.paths.values()):
        nodes, where = (facts.driver,), "this machine"
    else:
        nodes, where = facts.hosts, ""
    for node in nodes:
        for path in (path for path, found in node.paths.items() if found == MISSING):
            yield Finding(where or node.name, f"{path} is not there", "copy or mount it at the same path on every node")


def paths_differ(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    for node in facts.hosts:
        for path, found in node.paths.items():
            if MISSING not in (found, facts.driver.paths[path]) and found != facts.driver.paths[path]:
                yield Finding(node.name, f"{path} is not what the driver has", "copy the driver's there")


def _differ(values: dict[str, str]) -> str:
    """ "A on x; B on y and 2 others" where values by node are not all the same; else ""."""
    counts = Counter(values.values())
    if len(counts) < 2:
        return ""
    parts = []
    for value, count in counts.most_common():
        first = next(node for node, v in values.items() if v == value)
        parts.append(f"{value} on {first}" + (f" and {count - 1} others" if count > 1 else ""))
    return "; ".join(parts)
