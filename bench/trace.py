#!/usr/bin/env python3
"""Draws the last pod life of a traced run (TRACE=1 bench/inside) as an SVG: the calls of the CRI, and below them every program
that ran meanwhile, from its execve to its end, on one axis of milliseconds.

usage: trace.py STRACE EVENTS > PICTURE.svg     (STRACE: `strace -f -ttt -e trace=execve,exit_group`; EVENTS: cribench --events)
"""
import html, os, re, sys

FIRST, LAST = "RunPodSandbox", "RemovePodSandbox"


def last_life(path):
    """[(begin, end, call)] in seconds, from the last FIRST to the LAST after it."""
    calls = []
    with open(path) as f:
        for line in f:
            begun, ended, call = line.rstrip("\n").split(" ", 2)
            calls.append((int(begun) / 1e9, int(ended) / 1e9, call))
    begun = max(i for i, c in enumerate(calls) if c[2] == FIRST)
    ended = next(i for i in range(begun, len(calls)) if calls[i][2] == LAST)
    return calls[begun : ended + 1]


def programs(path):
    """[(begin, end, name)] of what was executed; a program that did not end has the end None."""
    running, done = {}, []
    with open(path, errors="replace") as f:
        for line in f:
            m = re.match(r"(\d+) +(\d+\.\d+) (.*)", line)
            if not m:
                continue
            pid, at, what = m[1], float(m[2]), m[3]
            if what.startswith("execve(") and not what.endswith("= -1 ENOENT (No such file or directory)"):
                args = re.findall(r'"((?:[^"\\]|\\.)*)"', what)
                if not args:
                    continue
                if pid in running:
                    begun, name = running[pid]
                    done.append((begun, at, name))
                running[pid] = at, label(args)
            elif what.startswith(("+++ exited", "+++ killed", "exit_group")) and pid in running:
                begun, name = running.pop(pid)
                done.append((begun, at, name))
    done += [(begun, None, name) for begun, name in running.values()]
    return sorted(done)


def label(args):
    """A program's name, with the verb for those that have one."""
    name = os.path.basename(args[0])
    # A copy in memory: its name is its first argument.
    if args[0].startswith("/proc/self/fd/") and os.path.basename(args[1]) == "crun":
        name = "crun"
    if name == "crun":
        return "crun " + next((a for a in args[2:] if a in ("create", "start", "exec", "delete", "kill", "state", "run")), "")
    if name.isdigit() or "monitor" in name:
        return "monitor"
    return name


def draw(calls, ran):
    t0, t1 = calls[0][0], calls[-1][1]
    ms = lambda t: (t - t0) * 1000
    ran = [(b, e, n) for b, e, n in ran if t0 <= b <= t1]
    left, top, row, width = 190, 30, 16, 1100
    x = lambda t: left + ms(t) / ms(t1) * (width - left - 60)
    height = top + row * (len(ran) + 2) + 20
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    step = next(s for s in (5, 10, 20, 50, 100, 200, 500, 1000) if ms(t1) / s <= 20)
    for n in range(int(ms(t1) / step) + 1):
        at = x(t0 + n * step / 1000)
        out.append(f'<line x1="{at:.1f}" y1="{top - 6}" x2="{at:.1f}" y2="{height - 14}" stroke="#e0e0e0"/>')
        out.append(f'<text x="{at:.1f}" y="{height - 2}" fill="#666" text-anchor="middle">{n * step} ms</text>')
    colours = ["#4e79a7", "#f28e2b", "#59a14f", "#b07aa1"]
    for i, (b, e, call) in enumerate(calls):
        w = max(x(e) - x(b), 1)
        out.append(f'<rect x="{x(b):.1f}" y="{top - 14}" width="{w:.1f}" height="14" fill="{colours[i % 4]}"><title>{html.escape(call)} {ms(e) - ms(b):.1f} ms</title></rect>')
        if w > 60:
            out.append(f'<text x="{x(b) + 2:.1f}" y="{top - 4}" fill="#fff" font-size="9">{html.escape(call)}</text>')
    for i, (b, e, name) in enumerate(ran):
        y = top + row * (i + 1)
        end = min(e or t1, t1)
        took = "" if e is None or e > t1 else f"{(e - b) * 1000:.1f} ms"
        out.append(f'<text x="{left - 6}" y="{y + 10}" text-anchor="end">{html.escape(name)}</text>')
        out.append(f'<rect x="{x(b):.1f}" y="{y + 1}" width="{max(x(end) - x(b), 0.7):.1f}" height="11" fill="{"#76b7b2" if took else "#bab0ac"}"/>')
        out.append(f'<text x="{x(end) + 3:.1f}" y="{y + 10}" fill="#444">{took}</text>')
    out.append("</svg>")
    return "\n".join(out)


if __name__ == "__main__":
    print(draw(last_life(sys.argv[2]), programs(sys.argv[1])))
