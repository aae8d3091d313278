#!/usr/bin/env python3
"""Prints the table of a run of scripts/bench-peers: medians over its rounds, ours beside the best peer's, and the aims.

usage: table.py FOLDER        (FOLDER: <round>-<runtime>.json and curve-<pods>.json, as bench/cribench writes them)
Ends with the names of the rows that miss their aim. `x` is ours divided by the best peer's; `above the floor` is the same with
what the network's plugins and crun need by themselves taken off both.
"""
import collections, json, os, statistics, sys

folder = sys.argv[1]
values = collections.defaultdict(list)  # (runtime, suite, scenario, op) -> one value for each round
curve = {}  # number of pods -> (suite, op) -> median
for name in sorted(os.listdir(folder)):
    if name.startswith("curve-") and name.endswith(".json"):
        with open(os.path.join(folder, name)) as f:
            told = json.load(f)
        # Of the memory alone the state with all pods up: it is told before and after as well.
        rows = [r for r in told["rows"] or [] if r["Scenario"].startswith(f"{told['label']} pods") and "restarted" not in r["Scenario"]]
        curve[int(told["label"])] = {(r["Suite"], r["Op"]): r["P50"] for r in rows}
    elif name.endswith(".json"):
        with open(os.path.join(folder, name)) as f:
            told = json.load(f)
        for row in told["rows"] or []:
            what = "P99" if row["Suite"] == "records" else "P50"
            values[told["label"], row["Suite"], row["Scenario"], row["Op"]].append(row[what])
runtimes = list(dict.fromkeys(k[0] for k in values))
peers = [r for r in runtimes if r not in ("ours", "floor")]


def value(runtime, suite, scenario, op):
    """Median over the rounds. A scenario that ends in * is the first that begins so."""
    for key in values:
        if key[:2] == (runtime, suite) and key[3] == op:
            if key[2] == scenario or (scenario.endswith("*") and key[2].startswith(scenario[:-1])):
                return statistics.median(values[key])
    return None



# name, unit, (suite, scenario, op), floor's (scenario, op), aims: times the best peer, times above the floor, or absolute
ROWS = [
    ("pod and container to RUNNING, CNI bridge, one at a time", "ms", ("lifecycle", "bridge c=1", "pod+container to RUNNING"), ("bridge", "pod+container to RUNNING"), dict(times=0.6, above=0.3)),
    ("CPU of a whole pod life, bridge", "cpu-ms", ("lifecycle", "bridge c=1", "CPU per pod life"), ("bridge", "CPU per pod life"), dict(times=0.65, above=0.3)),
    ("pod and container to RUNNING, host network", "ms", ("lifecycle", "host c=1", "pod+container to RUNNING"), ("host", "pod+container to RUNNING"), dict(times=0.35)),
    ("CPU of a whole pod life, host network", "cpu-ms", ("lifecycle", "host c=1", "CPU per pod life"), ("host", "CPU per pod life"), dict(times=0.4)),
    ("100 pods, ten at a time, until all run", "s", ("density", "*", "all RUNNING"), None, dict(times=0.6)),
    ("whole teardown, bridge", "ms", ("lifecycle", "bridge c=1", "whole teardown"), ("bridge", "whole teardown"), dict(times=0.5)),
    ("whole teardown, host network", "ms", ("lifecycle", "host c=1", "whole teardown"), ("host", "whole teardown"), dict(times=0.3)),
    ("ExecSync true", "ms", ("exec", "c=1", "ExecSync true"), ("exec", "crun exec true"), dict(times=0.6, floor=1.3)),
    ("memory of helpers per pod", "KiB", ("memory", "*", "helpers PSS per pod"), None, dict(most=200)),
    ("growth of the daemon per pod", "KiB", ("memory", "*", "daemon PSS growth per pod"), None, dict(most=50)),
    ("daemon PSS, no pod", "MiB", ("memory", "0 pods", "daemon PSS"), None, dict(most=12)),
    ("daemon PSS, 100 pods", "MiB", ("memory", "100 pods c=10", "daemon PSS"), None, dict(most=17)),
    ("ListContainerStats, 100 containers", "ms", ("density", "*", "ListContainerStats"), None, dict(most=10)),
    ("ListContainers, 1,000 containers, p99", "ms", ("records", "*", "ListContainers"), None, dict(most=5)),
    ("ListPodSandbox beside them, p99", "ms", ("records", "*", "ListPodSandbox"), None, dict(most=5)),
    ("kill -9 to answering, 100 pods", "ms", ("density", "*", "kill -9 to answering"), None, dict(most=130)),
    ("CPU idle with 100 pods", "cpu-ms/s", ("density", "*", "CPU while idle"), None, dict(most=0.1)),
    ("pull of 8 gzip layers", "ms", ("pull", "*", "PullImage"), None, dict(times=0.5)),
    ("CPU of that pull", "cpu-ms", ("pull", "*", "CPU per pull"), None, dict(times=0.5)),
    ("exec stream stdin to stdout, SPDY", "MB/s", ("stream", "spdy", "stdin to stdout"), ("exec", "stdin to stdout"), dict(least=1000, or_times=3)),
    ("exec stream stdin to stdout, WebSocket", "MB/s", ("stream", "websocket", "stdin to stdout"), ("exec", "stdin to stdout"), dict(least=1000, or_times=3)),
    ("log lines, one at a time, none lost", "lines/s", ("logs", "*", "lines"), ("*", "lines"), dict(or_times=3)),
    ("CPU of a million log lines", "cpu-ms", ("logs", "*", "CPU per million lines"), None, {}),
]


def number(v):
    if v is None:
        return "-"
    return f"{v:,.0f}" if abs(v) >= 100 else f"{v:.1f}" if abs(v) >= 1 else f"{v:.2f}"


def judge(aims, ours, best, floor):
    """What was reached, as text, and whether each aim was."""
    told, met = [], []
    if best and "times" in aims:
        met.append(ours <= aims["times"] * best)
        told.append(f"aim {aims['times']} x")
    if best and floor is not None and "above" in aims:
        x = (ours - floor) / (best - floor) if best > floor else float("inf")
        met.append(x <= aims["above"])
        told.append(f"above the floor {x:.2f} x, aim {aims['above']} x")
    if floor and "floor" in aims:
        met.append(ours <= aims["floor"] * floor)
        told.append(f"{ours / floor:.2f} x the floor, aim {aims['floor']} x")
    if "most" in aims:
        met.append(ours <= aims["most"])
        told.append(f"aim {aims['most']}")
    if "least" in aims or "or_times" in aims:
        enough = "least" in aims and ours >= aims["least"]
        times = best is not None and best > 0 and ours >= aims["or_times"] * best
        met.append(enough or times)
        told.append("aim " + " or ".join([str(aims[k]) for k in ("least",) if k in aims] + [f"{aims['or_times']} x"]))
    return "; ".join(told), all(met)


more_is_better = {"MB/s", "lines/s"}
print("| what | ours | " + " | ".join(peers) + " | floor | x | |")
print("|---|---|" + "---|" * (len(peers) + 3))
missed = []
for name, unit, key, floor_key, aims in ROWS:
    ours = value("ours", *key)
    theirs = [value(p, *key) for p in peers]
    floor = value("floor", "floor", *floor_key) if floor_key else None
    there = [v for v in theirs if v is not None]
    best = (max if unit in more_is_better else min)(there) if there else None
    if ours is None:
        told, met, x = "not measured", False, "-"
    else:
        told, met = judge(aims, ours, best, floor)
        x = f"{ours / best:.2f}" if best else "-"
    if not met:
        missed.append(name)
        told += " **missed**"
    print(f"| {name}, {unit} | {number(ours)} | " + " | ".join(number(v) for v in theirs) + f" | {number(floor)} | {x} | {told} |")
CURVE = [
    ("all run, ten at a time, s", "density", "all RUNNING"),
    ("CPU of a pod's start, cpu-ms", "density", "CPU per pod start"),
    ("RunPodSandbox, ms", "density", "RunPodSandbox"),
    ("ListContainers, ms", "density", "ListContainers"),
    ("ListContainerStats, ms", "density", "ListContainerStats"),
    ("ExecSync true, ms", "density", "ExecSync true"),
    ("kill -9 to answering, ms", "density", "kill -9 to answering"),
    ("CPU idle, cpu-ms/s", "density", "CPU while idle"),
    ("daemon PSS, MiB", "memory", "daemon PSS"),
    ("helpers per pod, KiB", "memory", "helpers PSS per pod"),
    ("all removed, s", "density", "all removed"),
]
if curve:
    print("\n| pods | " + " | ".join(str(n) for n in sorted(curve)) + " |")
    print("|---|" + "---|" * len(curve))
    for name, suite, op in CURVE:
        print(f"| {name} | " + " | ".join(number(curve[n].get((suite, op))) for n in sorted(curve)) + " |")
print()
print("missed: " + ("; ".join(missed) if missed else "nothing"))
