"""Results as a table in Markdown, with ratios of ours to the best peer: `python report.py results.json`."""

import json
import statistics
import sys

COLUMNS = [
    ("spawn", "per_second", "spawns/s, 32 at once"), ("batch", "per_second", "spawns/s, 250 a call"),
    ("drain", "per_second", "drained/s"), ("steady", "per_second", "steady/s"), ("steps", "per_second", "tasks of 10 steps/s"),
    ("latency", "p50_ms", "latency, ms p50"), ("latency_quick", "p50_ms", "lowest, ms p50"),
    ("latency", "p99_ms", "latency, ms p99"), ("idle", "transactions_per_second", "idle, tx/s"),
    ("idle", "connections", "idle, connections"),
]
LESS_IS_BETTER = {"p50_ms", "p99_ms", "transactions_per_second", "connections"}


def median(values, name):
    found = [value[name] for value in values or [] if name in value]
    return statistics.median(found) if found else None


def figure(value):
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(peers, measure, name, ours):
    """Ours to the best peer of the same round, the median over the rounds."""
    others = [peer for peer in peers if not peer.startswith("ours")]
    rounds = []
    for number, value in enumerate(peers[ours].get(measure, [])):
        theirs = [peers[peer][measure][number][name] for peer in others if len(peers[peer].get(measure, [])) > number]
        if theirs and value[name]:
            best = min(theirs) if name in LESS_IS_BETTER else max(theirs)
            rounds.append(best / value[name] if name in LESS_IS_BETTER else value[name] / best)
    return statistics.median(rounds) if rounds else None


def table(results):
    peers, about = results["peers"], results["about"]
    lines = [f"{about['date']}, commit {about['commit']}, {about['cores']} cores, Postgres {about['postgres']}, "
             f"{about['rounds']} rounds, medians.", ""]
    lines.append("| | " + " | ".join(title for _, _, title in COLUMNS) + " |")
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for peer, found in peers.items():
        lines.append(f"| {peer} | " + " | ".join(figure(median(found.get(measure), name)) for measure, name, _ in COLUMNS) + " |")
    for ours in [peer for peer in peers if peer.startswith("ours")]:
        cells = [ratio(peers, measure, name, ours) for measure, name, _ in COLUMNS]
        lines.append(f"| {ours}: times the best peer | " + " | ".join(figure(cell) for cell in cells) + " |")
    if results["limits"]:
        lines += ["", "| limit | SQL | our store | share |", "|---|---|---|---|"]
        for name, found in results["limits"].items():
            sql = statistics.median(found["sql"])
            store = statistics.median(found["store"]) if found["store"] else None
            share = statistics.median(b / a for a, b in zip(found["sql"], found["store"])) if store else None
            lines.append(f"| {name} | {figure(sql)} | {figure(store)} | {figure(share)} |")
    for what, errors in results["failed"].items():
        lines += ["", f"{what} failed {len(errors)} times: {errors[0]}"]
    return "\n".join(lines)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(table(json.load(file)))
