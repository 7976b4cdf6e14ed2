"""The int8 digits bundle against its parent: weight bytes, and throughput at batch 1 on one thread, in turns.

Uses what `make demo` made. The bars: at most 27 % of the parent's weight bytes, at least 2 × its throughput.
"""

import sys

from machine import ROOT, bar, heading

from modelyard.bundle.format import Bundle, read_bundle
from modelyard.bundle.store import LocalStore
from modelyard.compress.measure import compare_cost
from modelyard.inference.runtime import open_engine


def latest_pair(store: LocalStore) -> tuple[Bundle, Bundle] | None:
    """Return the newest int8 bundle with its parent."""
    bundles = [read_bundle(store.fetch("digits", version)) for version in store.versions("digits")]
    by_digest = {bundle.digest: bundle for bundle in bundles}
    for child in reversed(bundles):
        if child.manifest.lineage.parent in by_digest:
            return by_digest[child.manifest.lineage.parent], child
    return None


def main() -> int:
    heading("int8 digits against its parent", "onnxruntime")
    store = LocalStore(ROOT / "demo" / "store")
    pair = latest_pair(store) if "digits" in store.names() else None
    if pair is None:
        print("  no int8 digits bundle with its parent in demo/store; run make demo first")
        return 1
    parent, child = pair
    cost = compare_cost(
        open_engine(parent).run,
        open_engine(child).run,
        parent.cases().inputs,
        parent_bytes=parent.graph.weight_bytes,
        child_bytes=child.graph.weight_bytes,
    )
    share = cost.child_bytes / cost.parent_bytes
    quiet = "" if cost.quiet else "; the machine was busy"
    met = bar(f"weights: {cost.child_bytes:,} of {cost.parent_bytes:,} bytes, {share:.1%}; at most 27 %", share <= 0.27)
    met &= bar(
        f"throughput: {cost.speedup.text('×')} the parent's, {cost.n_pairs} pairs{quiet}; at least 2",
        cost.speedup.value >= 2,
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
