#!/usr/bin/env python3
"""Makes the big image of the pull tests, lxcri/big:1, and pushes it to a registry.

usage: bigimage.py BUSYBOX_TREE USR_FOLDER REGISTRY_URL
Seven gzip layers of about 200 MB in all (over 100 MB packed): busybox, four of files below USR_FOLDER, one of bytes that
don't compress, and one that takes away and replaces what is below it (whiteouts, an opaque folder, a file over a folder,
hard and symbolic links, a set-uid file, odd names). /big/SHA256SUMS lists what must be there in the end, /big/ABSENT what must not.
"""
import hashlib, io, os, sys, tarfile
import gzip
import imagelib
from imagelib import pack, sha

TREE, USR, URL = sys.argv[1], sys.argv[2], sys.argv[3].rstrip("/")
FOLDERS, FOLDER_BYTES, NOISE_BYTES = 4, 30_000_000, 80_000_000


def entry(t, name, data=b"", mode=0o644, kind=tarfile.REGTYPE, link=""):
    ti = tarfile.TarInfo(name)
    ti.mode, ti.type, ti.linkname, ti.size = mode, kind, link, len(data)
    t.addfile(ti, io.BytesIO(data))


def layer(fill):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as t:
        fill(t)
    raw = raw.getvalue()
    return sha(raw), gzip.compress(raw, 1, mtime=0)


def usr_files():
    for d, dirs, names in os.walk(USR):
        dirs.sort()
        for n in sorted(names):
            p = os.path.join(d, n)
            if os.path.isfile(p) and not os.path.islink(p) and os.path.getsize(p) < 20_000_000:
                yield p


sums, files = {}, usr_files()


def folder(i):
    def fill(t):
        total = 0
        entry(t, f"big/usr{i}", mode=0o755, kind=tarfile.DIRTYPE)
        for n, p in enumerate(files):
            data = open(p, "rb").read()
            name = f"big/usr{i}/{n:05}-{os.path.basename(p)}"
            entry(t, name, data, 0o755 if os.access(p, os.X_OK) else 0o644)
            sums["/" + name] = hashlib.sha256(data).hexdigest()
            total += len(data)
            if total > FOLDER_BYTES:
                break
        for n in range(5):
            entry(t, f"big/usr{i}/gone-{n}", b"in the lower layer\n" * 100)
        entry(t, f"big/opaque/from-layer-{i}", b"hidden by the opaque folder\n")
        if i == 0:
            entry(t, "big/folder-then-file/x/y", b"a file will be here\n")
            entry(t, "big/file-then-folder", b"a folder will be here\n")
    return fill


def noise(t):
    out, n = bytearray(), 0
    while len(out) < NOISE_BYTES:  # SHAKE gives a long stream for each seed
        out += hashlib.shake_128(b"noise %d" % n).digest(1 << 20)
        n += 1
    data = bytes(out[:NOISE_BYTES])
    entry(t, "big/noise", data)
    sums["/big/noise"] = hashlib.sha256(data).hexdigest()


def last(t):
    absent = []

    def keep(name, data, mode=0o644):
        entry(t, name, data, mode)
        sums["/" + name] = hashlib.sha256(data).hexdigest()
    for i in range(FOLDERS):
        for n in range(5):
            entry(t, f"big/usr{i}/.wh.gone-{n}")
            absent.append(f"/big/usr{i}/gone-{n}")
        absent.append(f"/big/opaque/from-layer-{i}")
    entry(t, "big/opaque", mode=0o755, kind=tarfile.DIRTYPE)
    entry(t, "big/opaque/.wh..wh..opq")
    keep("big/opaque/new", b"in the upper layer\n")
    keep("big/folder-then-file", b"now a file\n")
    keep("big/file-then-folder/z", b"now a folder\n")
    keep("big/set-uid", b"not a program\n", 0o4755)
    keep("big/a name with spaces and \u00fcml\u00e4uts", b"odd\n")
    keep("big/" + "long-" * 40 + "name", b"a name that needs a pax header\n")
    keep("big/first", b"linked\n")
    entry(t, "big/second", kind=tarfile.LNKTYPE, link="big/first")
    sums["/big/second"] = sums["/big/first"]
    entry(t, "big/third", kind=tarfile.SYMTYPE, link="first")
    sums["/big/third"] = sums["/big/first"]
    entry(t, "big/empty", mode=0o700, kind=tarfile.DIRTYPE)
    entry(t, "big/ABSENT", ("\n".join(absent) + "\n").encode())
    entry(t, "big/SHA256SUMS", "".join(f"{s}  {n}\n" for n, s in sorted(sums.items())).encode())


layers = [pack(TREE)] + [layer(folder(i)) for i in range(FOLDERS)] + [layer(noise), layer(last)]
print(len(layers), "layers,", sum(len(l[1]) for l in layers), "bytes packed,", len(sums), "files checked")
imagelib.push(URL, "lxcri/big", ["1"], layers, Cmd=["sh"], WorkingDir="/big", Env=["PATH=/bin:/usr/bin", "BIG=yes"])
