"""Results as a table in Markdown, with ratios of ours to the best peer: `python report.py results.json`."""

import json
import random
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


def interval(ratios):
    """Bounds of the median with 95 % confidence, by drawing the rounds again 10,000 times."""
    draw = random.Random(1)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(10_000))
    return medians[250], medians[-251]


def changes(results):
    """Ours to an earlier commit's, round by round: above 1 is better now."""
    peers, about = results["peers"], results["about"]
    lines = [f"{about['date']}, commit {about['commit']}, {about['cores']} cores, Postgres {about['postgres']}, "
             f"{about['rounds']} rounds: now to before, median and 95 % interval; above 1 is better now.", "",
             "| | before | now | ratio | interval |", "|---|---|---|---|---|"]
    for ours in [peer for peer in peers if peer.startswith("ours")]:
        before = peers.get(ours.replace("ours", "before"), {})
        for measure, name, title in COLUMNS:
            pairs = [(now[name], then[name]) for now, then in zip(peers[ours].get(measure, []), before.get(measure, []))]
            pairs = [(now, then) for now, then in pairs if now and then]
            if pairs:
                ratios = [then / now if name in LESS_IS_BETTER else now / then for now, then in pairs]
                low, high = interval(ratios)
                worse = " **worse**" if high < 0.97 else ""
                then, now = (figure(statistics.median(side)) for side in ([b for _, b in pairs], [a for a, _ in pairs]))
                lines.append(f"| {ours[6:]}: {title} | {then} | {now} | {statistics.median(ratios):.3f} | "
                             f"{low:.3f} to {high:.3f}{worse} |")
    for what, errors in results["failed"].items():
        lines += ["", f"{what} failed {len(errors)} times: {errors[0]}"]
    return "\n".join(lines)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(table(json.load(file)))
