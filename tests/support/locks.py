"""What locks do in a directory, one line for each question. Run in two directories, the answers must be the same.

usage: locks.py DIR
"""
import ctypes, errno, fcntl, os, signal, struct, sys, time

os.chdir(sys.argv[1])
OFD_GETLK, OFD_SETLK, OFD_SETLKW = 36, 37, 38
SETLEASE, GETLEASE = 1024, 1025
EX, SH, UN, NB = fcntl.LOCK_EX, fcntl.LOCK_SH, fcntl.LOCK_UN, fcntl.LOCK_NB
RD, WR, UL = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
FLOCK = "hhqqi4x"
signal.alarm(60)


class Interrupted(Exception):
    pass


armed = False


def interrupt(*_):
    if armed:
        raise Interrupted


def say(what, outcome):
    print(f"{what}: {outcome}", flush=True)


def attempt(call, *arguments):
    """`ok`, or the name of the error."""
    global armed
    try:
        armed = True
        result = call(*arguments)
        armed = False
        return "ok" if result is None or isinstance(result, (bytes, int)) else result
    except OSError as e:
        return errno.errorcode[e.errno]
    except Interrupted:
        return "interrupted"
    finally:
        armed = False


def with_signals(call):
    """What `call` answers while signals come in."""
    parent, helper = os.getpid(), os.fork()
    if helper == 0:
        while True:
            time.sleep(0.1)
            os.kill(parent, signal.SIGUSR1)
    outcome = call()
    os.kill(helper, signal.SIGKILL)
    os.waitpid(helper, 0)
    return outcome


def fopen(name="f", flags=os.O_RDWR | os.O_CREAT):
    return os.open(name, flags, 0o644)


def flock(fd, how):
    return attempt(fcntl.flock, fd, how)


def lk(fd, kind, start=0, length=0, cmd=fcntl.F_SETLK, whence=0):
    return attempt(fcntl.fcntl, fd, cmd, struct.pack(FLOCK, kind, whence, start, length, 0))


def getlk(fd, kind, start=0, length=0, cmd=fcntl.F_GETLK, who=None):
    """Who is in the way; the process as the word that `who` has for it."""
    kind, whence, start, length, pid = struct.unpack(
        FLOCK, fcntl.fcntl(fd, cmd, struct.pack(FLOCK, kind, 0, start, length, 0)))
    return (kind, whence, start, length, (who or {}).get(pid, pid if pid <= 0 else "?")) if kind != UL else "free"


def child(work, *arguments):
    """Runs `work` in another process, which stays until it is told to go; answers its pid, its first words, and how to end it."""
    words, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(words[0]), os.close(go[1])
        try:
            os.write(words[1], str(work(*arguments)).encode())
            os.read(go[0], 1)
        finally:
            os._exit(0)
    os.close(words[1]), os.close(go[0])
    said = os.read(words[0], 200).decode()
    os.close(words[0])

    def end(sig=None):
        if sig:
            os.kill(pid, sig)
        os.close(go[1])
        os.waitpid(pid, 0)

    return pid, said, end


def other(work, *arguments):
    """What another process answers, which then ends."""
    _, said, end = child(work, *arguments)
    end()
    return said


def flock_there(how, name="f"):
    return flock(fopen(name), how)


# --- flock ---------------------------------------------------------------------------------------------------------------
a, b = fopen(), fopen()
say("flock ex", flock(a, EX | NB))
say("flock ex, other descriptor", flock(b, EX | NB))
say("flock sh, other descriptor", flock(b, SH | NB))
say("flock sh, other process", other(flock_there, SH | NB))
say("flock downgrade", flock(a, SH | NB))
say("flock sh beside it", flock(b, SH | NB))
say("flock upgrade against a reader", flock(a, EX | NB))
flock(b, UN)
# A failed upgrade may lose the lock: whoever asks finds out.
say("flock after a failed upgrade, other process", other(flock_there, EX | NB))
say("flock upgrade", flock(a, EX | NB))
c = os.dup(a)
os.close(a)
say("flock survives the close of a duplicate's origin", other(flock_there, EX | NB))
say("flock unlock through the duplicate", flock(c, UN))
say("flock is gone", other(flock_there, EX | NB))
flock(c, EX)
os.close(c)
say("flock goes with the last close", other(flock_there, EX | NB))
a = fopen()
flock(a, EX)
_, said, end = child(lambda: "inherited")
os.close(a)
say("flock lives on in a forked process", flock(b, EX | NB))
end()
say("flock goes with that process", flock(b, EX | NB))
flock(b, UN)
_, said, end = child(flock_there, EX)
say("flock held elsewhere", f"{said} {flock(b, EX | NB)}")
end(signal.SIGKILL)
say("flock goes when its holder is killed", flock(b, EX | NB))
flock(b, UN)
_, said, end = child(flock_there, EX)
signal.signal(signal.SIGUSR1, interrupt)
say("flock wait, with a signal", with_signals(lambda: flock(b, EX)))
end()


def wait_for(lock, hold, free):
    """Waits for a lock that another process gives up after a while."""
    for pause in (0.3, 1, 3):
        r, w = os.pipe()
        pid = os.fork()
        if pid == 0:
            fd = fopen()
            hold(fd)
            os.write(w, b"x")
            time.sleep(pause)
            free(fd)
            time.sleep(60)
            os._exit(0)
        os.read(r, 1)
        begin = time.monotonic()
        outcome = lock()
        waited = time.monotonic() - begin > 0.1
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if waited:
            break
        # This machine was busy: it was free before it was asked for.
    return f"{outcome} {waited}"


say("flock wait until it is free", wait_for(lambda: flock(b, EX), lambda fd: flock(fd, EX), lambda fd: flock(fd, UN)))
os.rename("f", "g")
say("flock stays with a renamed file", other(flock_there, EX | NB, "g"))
fopen()
say("flock is not that of a new file", other(flock_there, EX | NB))
os.unlink("g")
say("flock of an unlinked file, kept", flock(b, SH | NB))
os.close(b)
d = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
say("flock of a directory", flock(d, EX | NB))
say("flock of a directory, elsewhere", other(lambda: flock(os.open(".", os.O_RDONLY), EX | NB)))
os.close(d)
r = fopen(flags=os.O_RDONLY)
say("flock ex without the right to write", flock(r, EX | NB))
say("fcntl ex without the right to write", lk(r, WR))
say("fcntl sh without the right to write", lk(r, RD))
say("fcntl and flock do not meet", other(flock_there, EX | NB))
os.close(r)
r = fopen(flags=os.O_WRONLY)
say("fcntl sh without the right to read", lk(r, RD))
os.close(r)

# --- POSIX ---------------------------------------------------------------------------------------------------------------
os.unlink("f")
a = fopen()
me = {os.getpid(): "parent"}


def lk_there(*arguments, **words):
    return lk(fopen(), *arguments, **words)


def getlk_there(*arguments, **words):
    return getlk(fopen(), *arguments, who=me, **words)


say("fcntl ex 10+10", lk(a, WR, 10, 10))
for start, length in ((0, 10), (9, 2), (15, 1), (20, 0), (0, 0)):
    say(f"fcntl ex {start}+{length} elsewhere", other(lk_there, WR, start, length))
say("getlk elsewhere", other(getlk_there, WR, 0, 0))
say("getlk here", getlk(a, WR))
say("fcntl sh within, splitting", lk(a, RD, 13, 2))
for at in range(9, 21):
    say(f"getlk sh {at}", other(getlk_there, RD, at, 1))
say("fcntl unlock the middle", lk(a, UL, 12, 4))
for at in (11, 12, 15, 16):
    say(f"getlk ex {at}", other(getlk_there, WR, at, 1))
say("fcntl join again", lk(a, WR, 10, 10))
say("getlk joined", other(getlk_there, WR, 0, 0))
os.close(fopen())
say("fcntl goes with the close of any descriptor", other(getlk_there, WR, 0, 0))
lk(a, WR)
say("fcntl is not inherited", other(lambda: lk(a, WR)))
say("fcntl whole file", other(getlk_there, RD, 1 << 40, 1))
os.rename("f", "g")
say("fcntl stays with a renamed file", other(lambda: lk(fopen("g"), WR)))
os.rename("g", "f")
lk(a, UL)
os.write(a, b"x" * 100)
say("fcntl from the end", lk(a, WR, -10, 0, whence=2))
say("getlk from the end", other(getlk_there, WR))
say("fcntl negative length", lk(a, WR, 50, -10))
say("getlk negative length", other(getlk_there, WR, 0, 50))
say("fcntl before the start", lk(a, WR, 5, -10))
say("fcntl beyond the end", lk(a, WR, (1 << 63) - 1, 1))
lk(a, UL)
lk(a, RD)
_, said, end = child(lk_there, RD)
say("fcntl shared by two", said)
say("fcntl upgrade against a reader", lk(a, WR))
end()
say("fcntl upgrade", lk(a, WR))
say("fcntl downgrade", lk(a, RD))
say("fcntl sh after that, elsewhere", other(lk_there, RD))
lk(a, UL)
_, said, end = child(lk_there, WR)
say("fcntl held elsewhere", f"{said} {lk(a, WR)}")
end(signal.SIGKILL)
say("fcntl goes when its holder is killed", lk(a, WR))
lk(a, UL)
pid, said, end = child(lk_there, WR)
say("getlk names the process", getlk(a, RD, who={pid: "child"}))
say("fcntl wait, with a signal", with_signals(lambda: lk(a, WR, cmd=fcntl.F_SETLKW)))
end()
say("fcntl wait until it is free", wait_for(
    lambda: lk(a, WR, cmd=fcntl.F_SETLKW), lambda fd: lk(fd, WR), lambda fd: lk(fd, UL)))
lk(a, UL)
# Two processes that wait for each other: whoever asks last is told, and the other one gets what it wants.
lk(a, WR, 0, 1)
words = os.pipe()
pid = os.fork()
if pid == 0:
    fd = fopen()
    lk(fd, WR, 1, 1)
    os.write(words[1], b"x")
    os.write(words[1], lk(fd, WR, 0, 1, cmd=fcntl.F_SETLKW).encode())
    os._exit(0)
os.read(words[0], 1)
outcomes = [lk(a, WR, 1, 1, cmd=fcntl.F_SETLKW)]
lk(a, UL)
os.waitpid(pid, 0)
say("fcntl deadlock", sorted(outcomes + [os.read(words[0], 20).decode()]))

# --- of open files --------------------------------------------------------------------------------------------------------
b = fopen()
say("ofd ex", lk(a, WR, 0, 10, cmd=OFD_SETLK))
say("ofd ex, other descriptor", lk(b, WR, 5, 1, cmd=OFD_SETLK))
say("ofd sh, other descriptor", lk(b, RD, 5, 1, cmd=OFD_SETLK))
say("ofd getlk", getlk(b, WR, cmd=OFD_GETLK))
say("fcntl against it, same process", lk(b, WR, 5, 1))
say("getlk against it", getlk(b, WR))
os.close(fopen())
say("ofd survives the close of another descriptor", lk(b, WR, 5, 1, cmd=OFD_SETLK))
c = os.dup(a)
os.close(a)
say("ofd survives in a duplicate", lk(b, WR, 5, 1, cmd=OFD_SETLK))
_, said, end = child(lambda: "inherited")
os.close(c)
say("ofd lives on in a forked process", lk(b, WR, 5, 1, cmd=OFD_SETLK))
end()
say("ofd goes with that process", lk(b, WR, 5, 1, cmd=OFD_SETLK))
_, said, end = child(lk_there, WR, 20, 5, OFD_SETLK)
say("ofd held elsewhere", f"{said} {lk(b, WR, 20, 1, cmd=OFD_SETLK)}")
end(signal.SIGKILL)
say("ofd goes when its holder is killed", lk(b, WR, 20, 1, cmd=OFD_SETLK))
say("ofd wait until it is free", wait_for(
    lambda: lk(b, WR, 50, 1, cmd=OFD_SETLKW),
    lambda fd: lk(fd, WR, 50, 1, cmd=OFD_SETLK), lambda fd: lk(fd, UL, 50, 1, cmd=OFD_SETLK)))
os.close(b)

# --- nothing is mandatory -------------------------------------------------------------------------------------------------
a = fopen("m")
os.fchmod(a, 0o2644)
lk(a, WR)
say("mandatory", other(lambda: attempt(os.write, fopen("m", os.O_WRONLY), b"x")))
os.close(a)

# --- leases ---------------------------------------------------------------------------------------------------------------
a = fopen("l")
say("lease ex", attempt(fcntl.fcntl, a, SETLEASE, WR))
say("lease is", fcntl.fcntl(a, GETLEASE))
os.close(a)
a = fopen("l", os.O_RDONLY)
say("lease sh", attempt(fcntl.fcntl, a, SETLEASE, RD))
say("lease is", fcntl.fcntl(a, GETLEASE))
heard = []
signal.signal(signal.SIGIO, lambda *_: heard.append("broken"))
say("lease, opened to read elsewhere", other(lambda: attempt(os.open, "l", os.O_RDONLY)))
say("lease, opened to write elsewhere", other(lambda: attempt(os.open, "l", os.O_WRONLY | os.O_NONBLOCK)))
while not heard:
    time.sleep(0.01)
say("lease holder hears", heard)
say("lease given up", attempt(fcntl.fcntl, a, SETLEASE, UL))
say("lease, opened to write then", other(lambda: attempt(os.open, "l", os.O_WRONLY | os.O_NONBLOCK)))
