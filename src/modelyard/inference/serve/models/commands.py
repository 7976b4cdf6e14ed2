"""What changes which models are served, as commands: every worker of a server gets the same ones in the same order.

    a call (repository_api.py), a signal, a change in the store (`watch`) → broadcast → `obey` in every worker → keeper.py

    {"command": "load", "model": NAME, "policy": as in serve.toml, or absent}    serve what its policy wants, failed ones again
    {"command": "unload", "model": NAME}                                         serve it no more, until it is loaded again
    {"command": "traffic", "model": NAME, "traffic": Traffic}                    share its requests out
    {"command": "traffic counts", "model": NAME}                                 tell how they were shared out
    {"command": "reload"}                                                        look at the store, try what failed again
    {"command": "refresh"}                                                       look at the store, do not wait for loads

Each may be repeated and then changes nothing more. An answer has "error" and "status", an HTTP code, where it went wrong.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

from modelyard.errors import ModelyardError, NotInStore, RequestError, StoreError, UnknownModel
from modelyard.inference.serve.models.keeper import Keeper
from modelyard.inference.serve.models.served_model import Entry, ServedModel
from modelyard.inference.serve.models.traffic import Traffic
from modelyard.inference.serve.models.versions import Listing, VersionPolicy, read_policy, wanted
from modelyard.schema import convert, to_builtins

Json = dict[str, Any]
Broadcast = Callable[[Json], Awaitable[Sequence[tuple[int, Json]]]]
"""Has every worker, this one included, obey a command; returns (worker, answer) of each."""

RELOAD: Json = {"command": "reload"}
REFRESH: Json = {"command": "refresh"}
STICKY = frozenset({"load", "unload", "traffic"})
"""Commands that a worker which replaces a dead one has to obey too."""


async def watch(keeper: Keeper, every_s: float, broadcast: Broadcast) -> None:
    """Look at the store again and again, and have all workers look when it changed. One worker of a server does it."""
    seen: Mapping[str, Listing] | None = None
    while True:
        await asyncio.sleep(every_s)
        found = await keeper.look_only()
        if found is None or (found == seen and not await asyncio.to_thread(keeper.has_touched_failures)):
            continue
        answers = await broadcast(REFRESH)
        if not any("error" in answer for _, answer in answers):
            seen = found


async def obey(keeper: Keeper, command: Json) -> Json:
    """Do what a command says and return the answer; raises nothing that the asker could have meant."""
    try:
        match command:
            case {"command": "load", "model": str(name)}:
                return await _load(keeper, name, command.get("policy"))
            case {"command": "unload", "model": str(name)}:
                return await _unload(keeper, name)
            case {"command": "traffic", "model": str(name), "traffic": dict(traffic)}:
                return await _share(keeper, name, traffic)
            case {"command": "traffic counts", "model": str(name)}:
                return _shared(_served(keeper, name))
            case {"command": "reload"}:
                return await _reload(keeper)
            case {"command": "refresh"}:
                return await _refresh(keeper)
        return {"error": f"unknown command {command.get('command')!r}", "status": 400}
    except NotInStore as exc:
        return {"error": str(exc), "status": 404}
    except StoreError as exc:
        return {"error": str(exc), "status": 503}
    except ModelyardError as exc:
        return {"error": str(exc), "status": exc.status}
    except OSError as exc:
        return {"error": f"the store cannot be read: {exc}", "status": 503}


async def _load(keeper: Keeper, name: str, policy: Any) -> Json:
    listing = await keeper.look_at(name)
    asked = None if policy is None else read_policy(tuple(policy) if isinstance(policy, list) else policy, "versions")
    if listing is not None:
        if asked is not None:
            _require(name, asked, listing)
        keeper.models.setdefault(name, ServedModel(name)).listing = listing
    model = keeper.models.get(name)
    if model is None:
        raise _unknown(keeper, name)
    if asked is not None:
        model.policy = asked
    model.is_off = False
    keeper.plan(model)
    if not model.wanted.versions:
        raise NotInStore(
            f"no version of model {name!r} to serve: the store has no {_shown(model.wanted.missing)}; publish or tag one"
        )
    keeper.retry(model, everything=True)
    keeper.reconcile(model, urgent=True)
    await keeper.until(lambda: not keeper.is_pending(model))
    return _outcome(keeper, model)


def _require(name: str, policy: VersionPolicy, listing: Listing) -> None:
    """Raise RequestError where a policy names what the store has not: half of what was asked for would be no answer."""
    missing = wanted(policy, listing).missing
    if missing:
        raise RequestError(
            f"versions: {name} has no version {_shown(missing)}; there are versions {_shown(listing.versions)}; "
            "leave out what is not there, or publish it first"
        )


def _outcome(keeper: Keeper, model: ServedModel) -> Json:
    """Return the entries of what is served; an error where one of them failed."""
    entries = [keeper.entry(model, version) for version in model.needed()]
    told: Json = {"models": [_told(entry) for entry in entries]}
    failed = [entry for entry in entries if entry.state == "failed"]
    if failed:
        reasons = "; ".join(f"version {entry.version}: {entry.reason}" for entry in failed)
        answers = [entry for entry in entries if entry.version == model.default and entry.state == "ready"]
        standing_in = f"; version {model.default} keeps answering" if answers else ""
        told["error"] = f"failed to load {model.name!r}: {reasons}{standing_in}"
        told["status"] = 503 if all(model.failures[entry.version].passing for entry in failed) else 400
    return told


async def _unload(keeper: Keeper, name: str) -> Json:
    model = keeper.models.get(name)
    if model is None:
        raise _unknown(keeper, name)
    model.is_off = True
    keeper.reconcile(model, cause="requested")

    def is_gone() -> bool:
        loading = keeper.memory.loading
        return not any(keeper.in_memory(name)) and (loading is None or loading[0] != name)

    await keeper.until(lambda: is_gone() or not model.is_off)
    return {"models": []}


async def _share(keeper: Keeper, name: str, fields: Json) -> Json:
    model = _served(keeper, name)
    traffic = convert(fields, Traffic, source="traffic", error=RequestError)
    model.listing = await keeper.look_at(name) or model.listing
    known = model.needed() if model.listing is None else model.listing.versions
    unknown = [version for version in traffic.versions if version not in known]
    if unknown:
        raise NotInStore(f"{name} has no version {unknown[0]}; there are versions {_shown(known)}")
    before, model.traffic = model.traffic, traffic  # from here on its versions are needed
    for version in traffic.versions:
        keeper.memory.want((name, version), urgent=True)
    await keeper.until(lambda: not keeper.is_pending(model))
    failed = [version for version in traffic.versions if version in model.failures]
    if failed:  # a share of the requests must not go where nobody answers
        reason = model.failures[failed[0]].reason
        model.traffic = before
        keeper.reconcile(model)
        return {"error": f"version {failed[0]} cannot take traffic: {reason}", "status": 400}
    if traffic != before:
        model.share(traffic)
    keeper.reconcile(model)
    return _shared(model)


def _shared(model: ServedModel) -> Json:
    counts = {} if model.fork is None else model.fork.counts
    told: Json = {
        "traffic": to_builtins(model.traffic),
        "split": {str(version): count for version, count in sorted(counts.items())},
    }
    if model.traffic.shadow is not None:
        seen = model.shadow_counts
        told["shadow"] = {
            "version": model.traffic.shadow,
            "agreed": seen.n_agreed,
            "differed": seen.n_differed,
            "failed": seen.n_failed,
            "skipped": seen.n_skipped,
            "rows": seen.n_rows,
            "rows_agreed": seen.n_rows_agreed,
            "max_abs_difference": seen.max_abs_difference,
            "error": model.shadow_trouble or seen.last_error,
        }
    return told


async def _reload(keeper: Keeper) -> Json:
    if keeper.library is not None:
        await keeper.look()
    for model in keeper.models.values():
        keeper.retry(model, everything=True)
        keeper.reconcile(model)
    await keeper.until(lambda: not any(map(keeper.is_pending, keeper.models.values())))
    if keeper.trouble:
        return {"error": keeper.trouble, "status": 503}
    entries = [keeper.entry(model, version) for model in keeper.models.values() for version in model.needed()]
    return {"models": [_told(entry) for entry in entries]}


async def _refresh(keeper: Keeper) -> Json:
    if keeper.library is not None:
        await keeper.look()
    for model in keeper.models.values():
        keeper.reconcile(model)
    return {"error": keeper.trouble, "status": 503} if keeper.trouble else {}


def _served(keeper: Keeper, name: str) -> ServedModel:
    model = keeper.models.get(name)
    if model is None or model.is_off:
        raise _unknown(keeper, name)
    return model


def _unknown(keeper: Keeper, name: str) -> UnknownModel:
    known = [model.name for model in keeper.models.values() if not model.is_off]
    return UnknownModel(f"no model {name[:200]!r} is served here; there are: {_shown(known[:20])}", name=name)


def _told(entry: Entry) -> Json:
    return {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason}


def _shown(items: Iterable[object]) -> str:
    return ", ".join(map(str, items)) or "none"
