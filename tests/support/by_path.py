#!/usr/bin/env python3
"""by_path.py PROGRAM MOUNTPOINT CONFIG STATE KILLS: a program that writes by path while the daemon is killed again and again.

Every write must land in the volume or fail; what was fsynced must be there; nothing may lie below the mountpoint.
"""
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

program, mountpoint, config, state, kills = sys.argv[1:5] + [int(sys.argv[5])]
LIMIT = 170
stop, synced, failed, longest = threading.Event(), [], 0, 0.0


def ask(*words):
    return subprocess.run([program, *words], capture_output=True, text=True, timeout=LIMIT)


def pid():
    until = time.time() + LIMIT
    while time.time() < until:
        answer = ask("status", mountpoint, "--json")
        if answer.returncode == 0:
            return json.loads(answer.stdout)["pid"]
        time.sleep(0.02)
    sys.exit("no daemon answers")


def write():
    global failed, longest
    n, good = 0, time.time()
    while not stop.is_set():
        name = f"f{n}"
        n += 1
        try:
            fd = os.open(f"{mountpoint}/{name}", os.O_CREAT | os.O_WRONLY, 0o600)
            try:
                os.write(fd, name.encode())
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError:
            failed += 1
            time.sleep(0.001)
            continue
        longest, good = max(longest, time.time() - good), time.time()
        synced.append(name)


def ended(process):
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rpartition(") ")[2][:1] in ("Z", "X")
    except OSError:
        return True


mounted = ask("mount", mountpoint, "--config", config, "--state", state)
if mounted.returncode != 0:
    sys.exit(mounted.stderr)
writer = threading.Thread(target=write)
writer.start()
seed = int(os.environ.get("MIRRORFS_SEED", "7"))
print("seed", seed)
chance = random.Random(seed)
try:
    for _ in range(kills):
        daemon = pid()
        time.sleep(chance.random() * 0.3)
        os.kill(daemon, signal.SIGKILL)
        while not ended(daemon):
            time.sleep(0.01)
    pid()
    time.sleep(0.2)
finally:
    stop.set()
    writer.join()
print(f"{kills} kills: {len(synced)} files fsynced, {failed} writes failed, longest outage {longest:.2f} s")
if not failed:
    sys.exit("no kill was noticed: the test shows nothing")
for name in synced:
    with open(f"{mountpoint}/{name}") as file:
        if file.read() != name:
            sys.exit(f"{name} was fsynced, and is wrong")
unmounted = ask("umount", mountpoint)
if unmounted.returncode != 0:
    sys.exit(unmounted.stderr)
below = os.listdir(mountpoint)
if below:
    sys.exit(f"written below the mountpoint: {below[:5]} and so on, {len(below)}")
print("nothing lies below")
