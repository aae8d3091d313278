"""Turns `cargo metadata` (stdin) into a CycloneDX document of one package: sbom.py PACKAGE CARGO_LOCK.

Only what is linked in counts: normal dependencies, not those of builds and tests. Reproducible: no time, no random number.
Ends with a message when the package or a checksum is missing.
"""

import json
import sys
import tomllib
import uuid

package, lock = sys.argv[1:]
metadata = json.load(sys.stdin)
with open(lock, "rb") as f:
    sums = {(p["name"], p["version"]): p.get("checksum") for p in tomllib.load(f)["package"]}
packages = {p["id"]: p for p in metadata["packages"]}
nodes = {n["id"]: n for n in metadata["resolve"]["nodes"]}
roots = [p["id"] for p in packages.values() if p["name"] == package]
if len(roots) != 1:
    sys.exit(f"sbom: the workspace has {len(roots)} packages {package}")


def needs(node):
    return [d["pkg"] for d in nodes[node]["deps"] if any(k["kind"] is None for k in d["dep_kinds"])]


def purl(p):
    return f"pkg:cargo/{p['name']}@{p['version']}"


seen, todo = set(), list(roots)
while todo:
    node = todo.pop()
    if node not in seen:
        seen.add(node)
        todo.extend(needs(node))


def component(p):
    c = {"type": "library", "bom-ref": purl(p), "name": p["name"], "version": p["version"], "purl": purl(p)}
    if p["license"]:
        c["licenses"] = [{"expression": p["license"].replace("/", " OR ")}]
    if p["source"]:
        checksum = sums.get((p["name"], p["version"]))
        if not checksum:
            sys.exit(f"sbom: Cargo.lock has no checksum of {p['name']} {p['version']}")
        c["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    return c


listed = sorted((packages[n] for n in seen), key=lambda p: (p["name"], p["version"]))
main = component(packages[roots[0]]) | {"type": "application"}
parts = [component(p) for p in listed if p["id"] != roots[0]]
graph = [{"ref": purl(p), "dependsOn": sorted({purl(packages[n]) for n in needs(p["id"])})} for p in listed]
serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([main, parts], sort_keys=True))
document = {
    "bomFormat": "CycloneDX",
    "specVersion": "1.5",
    "serialNumber": f"urn:uuid:{serial}",
    "version": 1,
    "metadata": {"component": main},
    "components": parts,
    "dependencies": graph,
}
json.dump(document, sys.stdout, indent=1)
print()
