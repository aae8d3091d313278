#!/usr/bin/env python3
"""Makes the images whose pull is measured, bench/big:1 and bench/big:2, and pushes them to a registry.

usage: image.py USR_FOLDER REGISTRY_URL
Eight gzip layers each, some 200 MB packed in all: half of what is packed are files below USR_FOLDER, half is bytes that don't
compress. The second image has six of the first one's layers and two of its own.
"""
import hashlib, os, sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../tests/critest-images"))
import imagelib  # noqa: E402

USR, URL = sys.argv[1], sys.argv[2].rstrip("/")
FILES, NOISE = 32_000_000, 13_000_000  # bytes of a layer before packing: of files, and of noise


def usr_files():
    n = 0
    while True:
        for d, dirs, names in os.walk(USR):
            dirs.sort()
            for name in sorted(names):
                p = os.path.join(d, name)
                if os.path.isfile(p) and not os.path.islink(p) and os.path.getsize(p) < 20_000_000:
                    n += 1
                    yield f"{n:06}-{name}", p


files = usr_files()


def layer(i):
    content, total = {}, 0
    while total < FILES:
        name, path = next(files)
        with open(path, "rb") as f:
            content[f"big/{i}/{name}"] = data = f.read()
        total += len(data)
    noise = b"".join(hashlib.shake_128(b"%d %d" % (i, n)).digest(1 << 20) for n in range(NOISE >> 20))
    content[f"big/{i}/noise"] = noise
    return imagelib.pack(files=content)


layers = [layer(i) for i in range(10)]
print("bytes packed:", sum(len(packed) for _, packed in layers[:8]))
imagelib.push(URL, "bench/big", ["1"], layers[:8], Cmd=["sh"])
imagelib.push(URL, "bench/big", ["2"], layers[:6] + layers[8:], Cmd=["sh"])
