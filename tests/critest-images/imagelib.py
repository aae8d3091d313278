"""Packs trees into layers and images (Docker schema 2) and pushes them to a registry. Used by mkimages.py and bigimage.py.

Deterministic: the same trees give the same digests. Standard library only.
"""
import gzip, hashlib, io, json, os, tarfile, urllib.request, urllib.error

LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
CONFIG = "application/vnd.docker.container.image.v1+json"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"


def sha(b):
    return "sha256:" + hashlib.sha256(b).hexdigest()


def pack(tree=None, files=None):
    """(diff_id, gzip bytes) of a layer made from a directory tree and/or {name: bytes}."""
    raw, seen = io.BytesIO(), {}
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as t:
        if tree:
            for d, dirs, names in os.walk(tree):
                dirs.sort()
                for n in ([""] if d != tree else []) + sorted(names):
                    p = os.path.join(d, n) if n else d
                    ti = t.gettarinfo(p, os.path.relpath(p, tree))
                    ti.uid = ti.gid = ti.mtime = 0
                    ti.uname = ti.gname = ""
                    st = os.lstat(p)
                    ti.type, ti.linkname = (ti.type, ti.linkname) if ti.issym() or ti.isdir() else (tarfile.REGTYPE, "")
                    if ti.isreg():
                        if st.st_ino in seen:
                            ti.type, ti.linkname, ti.size = tarfile.LNKTYPE, seen[st.st_ino], 0
                        else:
                            ti.size = st.st_size
                            if st.st_nlink > 1:
                                seen[st.st_ino] = ti.name
                    if ti.isreg():
                        with open(p, "rb") as f:
                            t.addfile(ti, f)
                    else:
                        t.addfile(ti)
        for name, data in (files or {}).items():
            ti = tarfile.TarInfo(name)
            ti.size, ti.mode = len(data), 0o644
            t.addfile(ti, io.BytesIO(data))
    raw = raw.getvalue()
    return sha(raw), gzip.compress(raw, 6, mtime=0)


def call(method, url, data=None, ctype=None, ok=(200, 201, 202)):
    r = urllib.request.Request(url, data=data, method=method)
    r.add_header("Content-Type", ctype or "application/octet-stream")
    try:
        with urllib.request.urlopen(r) as a:
            return a.status, a.headers
    except urllib.error.HTTPError as e:
        if e.code in ok:
            return e.code, e.headers
        raise SystemExit(f"{method} {url}: {e.code} {e.read()[:300]}")


def put_blob(url, repo, b):
    d = sha(b)
    if call("HEAD", f"{url}/v2/{repo}/blobs/{d}", ok=(404,))[0] == 200:
        return d
    _, h = call("POST", f"{url}/v2/{repo}/blobs/uploads/", b"")
    loc = h["Location"]
    loc = loc if loc.startswith("http") else url + loc
    call("PUT", loc + ("&" if "?" in loc else "?") + "digest=" + d, b)
    return d


def push(url, repo, tags, layers, **cfg):
    conf = {"architecture": "amd64", "os": "linux", "created": "2020-01-01T00:00:00Z",
            "config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], **cfg},
            "rootfs": {"type": "layers", "diff_ids": [l[0] for l in layers]},
            "history": [{"created": "2020-01-01T00:00:00Z", "created_by": "mkimages.py"} for _ in layers]}
    cb = json.dumps(conf, sort_keys=True).encode()
    man = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST,
                      "config": {"mediaType": CONFIG, "size": len(cb), "digest": put_blob(url, repo, cb)},
                      "layers": [{"mediaType": LAYER, "size": len(l[1]), "digest": put_blob(url, repo, l[1])} for l in layers]},
                     indent=1).encode()
    for t in tags:
        call("PUT", f"{url}/v2/{repo}/manifests/{t}", man, MANIFEST)
    print(f"{repo:55} {','.join(tags):40} {sha(man)}")
    return sha(man)


