#!/usr/bin/env python3
"""Writes the golden containers beside this file, from the facts of the format alone (docs/bfc.md).

It shares no code with the program that reads them. Needs PyNaCl and zstandard; run by hand when a variant is added:
    python3 tests/bfc/make-golden.py
The same input gives the same bytes, so a run without a change changes no file.
"""

import struct
from pathlib import Path

import nacl.bindings as sodium
import zstandard

HERE = Path(__file__).parent
KEY = bytes(range(32))
PASSWORD = b"correct horse"
SALT = bytes(range(100, 132))
MTIME = 1_700_000_000_123_456_789

TABLE = []
for n in range(256):
    c = n
    for _ in range(8):
        c = (c >> 1) ^ 0x82F63B78 if c & 1 else c >> 1
    TABLE.append(c)


def crc(data, standard):
    """Castagnoli's CRC: raw (initial value and final xor 0), or as in RFC 3720."""
    c = 0xFFFFFFFF if standard else 0
    for byte in data:
        c = (c >> 8) ^ TABLE[(c ^ byte) & 0xFF]
    return c ^ 0xFFFFFFFF if standard else c


def pad(data, align=16):
    return data + bytes(-len(data) % align)


# type, path, mode, content or target
TREE = [
    (2, "dir", 0o040755, b""),
    (1, "dir/empty", 0o100600, b""),
    (1, "dir/hello.txt", 0o100644, b"hello\n"),
    (2, "dir/sub", 0o040700, b""),
    (1, "dir/sub/repeat", 0o100755, b"the same line again\n" * 400),
    (1, "dir/sub/zeros", 0o100644, bytes(5000)),
    (1, "dir-x", 0o100644, bytes(range(256))),
    (3, "link", 0o120777, b"dir/hello.txt"),
    (3, "out", 0o120777, b"../../etc/passwd"),
    (1, "ends.", 0o100444, b"a name that ends in a dot"),
    (1, "uml\u00e4ut", 0o100644, b"\x00\x01\x02"),
]


def container(standard=False, zstd=False, key=None, salt=bytes(32)):
    data = bytearray(4096)
    index = []
    nonces = 0
    for kind, path, mode, content in TREE:
        name = path.encode()
        comp = enc = 0
        stored = content
        check = crc(content, standard) if kind != 2 else 0
        if kind == 1 and zstd and len(content) >= 64:
            small = zstandard.ZstdCompressor(level=3).compress(content)
            if len(small) < len(content):
                comp, stored = 1, small
        if kind == 1 and key:
            nonces += 1
            nonce = struct.pack("<IQ", 7, nonces)
            enc = 1
            stored = nonce + sodium.crypto_aead_chacha20poly1305_ietf_encrypt(stored, name, nonce, key)
        offset = len(data)
        head = struct.pack("<BBBBHHIQQQI", kind, comp, enc, 0, len(name), 0, mode, MTIME, len(content), len(stored), check)
        assert len(head) == 40
        data += pad(head + name)
        data += pad(stored) if kind == 3 else stored
        index.append((name, struct.pack("<QQIQIIQI", offset, len(data) - offset, mode, MTIME, comp, enc, len(content), check)))
    index.sort()
    blob = struct.pack("<II", 1, len(index))
    for name, fixed in index:
        assert len(fixed) == 48
        blob += struct.pack("<I", len(name)) + name + fixed
    footer = b"BFCFIDX\0" + struct.pack("<QIQI", len(blob), crc(blob, standard), len(data), 0) + bytes(16) + b"BFCFEND\0"
    assert len(footer) == 56
    features = (1 if zstd else 0) | (2 if key else 0)
    uuid = bytes.fromhex("00112233445546778899aabbccddeeff")
    rest = struct.pack("<IQ", 4096, features) + uuid + salt
    rest += bytes(4096 - 12 - len(rest))
    data[:4096] = b"BFCFv1\0\0" + struct.pack("<I", crc(rest, standard)) + rest
    return bytes(data) + blob + footer


password_key = sodium.crypto_pwhash_alg(
    32, PASSWORD, SALT[:16], opslimit=3, memlimit=64 << 20, alg=sodium.crypto_pwhash_ALG_ARGON2ID13
)
VARIANTS = {
    "plain": {},
    "plain-standard-crc": {"standard": True},
    "zstd": {"zstd": True},
    "zstd-standard-crc": {"zstd": True, "standard": True},
    "key": {"key": KEY},
    "key-zstd": {"key": KEY, "zstd": True},
    "key-zstd-standard-crc": {"key": KEY, "zstd": True, "standard": True},
    "password": {"key": password_key, "salt": SALT},
    "password-zstd": {"key": password_key, "salt": SALT, "zstd": True},
}
for name, how in VARIANTS.items():
    (HERE / f"{name}.bfc").write_bytes(container(**how))
(HERE / "key").write_bytes(KEY)
