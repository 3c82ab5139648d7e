//! Content: writes of all kinds, mappings, direct I/O, limits.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use crate::Run;
use crate::sys::*;

pub const CASES: &[(&str, Run)] = &[
    ("direct_io", direct_io),
    ("direct_and_cached", direct_and_cached),
    ("direct_and_append", direct_and_append),
    ("mmap_at_the_end", mmap_at_the_end),
    ("mmap_and_truncate", mmap_and_truncate),
    ("mmap_and_write", mmap_and_write),
    ("mmap_of_holes", mmap_of_holes),
    ("private_mmap", private_mmap),
    ("truncate_rules", truncate_rules),
    ("truncate_zeros_the_tail", truncate_zeros_the_tail),
    ("limits_of_size", limits_of_size),
    ("rlimit_fsize", rlimit_fsize),
    ("vectors", vectors),
    ("rwf_flags", rwf_flags),
    ("appending", appending),
    ("pipes_and_sendfile", pipes_and_sendfile),
    ("copies", copies),
    ("advice", advice),
    ("descriptors", descriptors),
    ("syncing", syncing),
    ("races", races),
    ("busy_programs", busy_programs),
    ("inline_edge", inline_edge),
];

fn content(p: impl AsRef<Path>) -> String {
    runs(&fs::read(p).unwrap())
}

fn direct_io(t: &mut Case) {
    let f = new_file(t.p("f"));
    write(&f, &vec![1; 20_000]).unwrap();
    fsync(&f).unwrap();
    let d = open(t.p("f"), libc::O_RDWR | libc::O_DIRECT).unwrap();
    let mut room = Aligned::new(65536, 0);
    let read = |room: &mut [u8], at: i64| {
        ok(unsafe { libc::pread(d.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), at) } as i64)
    };
    t.note("page", read(&mut room.bytes()[..4096], 0));
    t.note("up to the end", read(&mut room.bytes()[..32768], 0));
    t.note("last part", read(&mut room.bytes()[..4096], 16384));
    t.note("at the end, aligned up", read(&mut room.bytes()[..4096], 20480));
    t.note("far behind", read(&mut room.bytes()[..4096], 1 << 20));
    // Alignment is the filesystem's affair; where unaligned works, bytes must be right.
    let odd = read(&mut room.bytes()[1..600], 513);
    t.note("unaligned is refused or right", odd.is_err() || room.bytes()[1..600].iter().all(|b| *b == 1));
    room.bytes().fill(2);
    t.note("write a page", pwrite(&d, &room.bytes()[..4096], 4096));
    t.note("write beyond the end", pwrite(&d, &room.bytes()[..4096], 40960));
    t.note("content", content(t.p("f")));
    t.note("size", fstat(&f).st_size);
    t.note("through a hole", {
        ftruncate(&f, 1 << 20).unwrap();
        read(&mut room.bytes()[..65536], 65536).map(|n| (n, runs(room.bytes())))
    });
}

fn direct_and_cached(t: &mut Case) {
    let f = new_file(t.p("f"));
    write(&f, &vec![1; 65536]).unwrap();
    let d = open(t.p("f"), libc::O_RDWR | libc::O_DIRECT).unwrap();
    let mut room = Aligned::new(8192, 0);
    let n = unsafe { libc::pread(d.as_raw_fd(), room.bytes().as_mut_ptr().cast(), 8192, 4096) };
    t.note("direct read sees what is cached", (n, runs(room.bytes())));
    room.bytes().fill(2);
    t.note("direct write", pwrite(&d, room.bytes(), 8192));
    t.note("cached read sees it", pread(&f, 65536, 0).map(|b| runs(&b)));
    let map = Map::new(&f, 65536).unwrap();
    t.note("mapping sees it", runs(&map.bytes(4096, 20000)));
    room.bytes().fill(3);
    pwrite(&d, room.bytes(), 16384).unwrap();
    t.note("mapping sees a later one", runs(&map.bytes(12288, 32768)));
    map.set(20_000, 9);
    let n = unsafe { libc::pread(d.as_raw_fd(), room.bytes().as_mut_ptr().cast(), 4096, 16384) };
    t.note("direct read sees the mapping", (n, runs(&room.bytes()[..4096])));
    // Into a buffer that is mapped from the same file.
    let n = unsafe { libc::pread(d.as_raw_fd(), map.at.add(40960).cast(), 4096, 0) };
    t.note("direct read into its own mapping", (n, runs(&map.bytes(40960, 45056))));
    let n = unsafe { libc::pwrite(d.as_raw_fd(), map.at.add(16384).cast(), 4096, 49152) };
    t.note("direct write out of its own mapping", n);
    drop(map);
    drop_caches(&t.root);
    t.note("at last", content(t.p("f")));
}

fn direct_and_append(t: &mut Case) {
    fs::write(t.p("f"), vec![1; 4096]).unwrap();
    let d = open(t.p("f"), libc::O_RDWR | libc::O_DIRECT | libc::O_APPEND).unwrap();
    let mut room = Aligned::new(4096, 2);
    t.note("append", write(&d, room.bytes()));
    t.note("pwrite appends too", pwrite(&d, room.bytes(), 0));
    t.note("position", seek(&d, 0, libc::SEEK_CUR));
    t.note("content", content(t.p("f")));
}

fn touch_byte(map: &Map, at: usize) -> String {
    let p = map.at as usize + at;
    in_child(|| {
        unsafe { (p as *mut u8).write_volatile(7) };
        0
    })
}

fn mmap_at_the_end(t: &mut Case) {
    let f = new_file(t.p("f"));
    write(&f, &[1; 5000]).unwrap();
    let map = Map::new(&f, 16384).unwrap();
    t.note("zeros behind the end", runs(&map.bytes(4990, 8192)));
    t.note("in the last page", touch_byte(&map, 8191));
    t.note("behind it", touch_byte(&map, 8192));
    map.set(6000, 5);
    map.sync().unwrap();
    t.note("size", fstat(&f).st_size);
    t.note("grown: what was behind the end is zero", {
        ftruncate(&f, 8192).unwrap();
        pread(&f, 8192, 0).map(|b| runs(&b))
    });
    t.note("in the mapping too", runs(&map.bytes(4990, 8192)));
    t.note("now in the third page", {
        ftruncate(&f, 12_288).unwrap();
        touch_byte(&map, 8192)
    });
    let n = Map::new(&open(t.p("f"), libc::O_RDONLY).unwrap(), 4096).map(drop);
    t.note("shared and writable of read only", n);
    let e = new_file(t.p("empty"));
    let map = Map::new(&e, 4096).unwrap();
    t.note("empty file", touch_byte(&map, 0));
}

fn mmap_and_truncate(t: &mut Case) {
    let f = new_file(t.p("f"));
    write(&f, &[1; 16384]).unwrap();
    let map = Map::new(&f, 16384).unwrap();
    map.get(16000);
    ftruncate(&f, 5000).unwrap();
    t.note("cut page", touch_byte(&map, 8192));
    t.note("tail of the last page", runs(&map.bytes(4096, 8192)));
    // Written behind the end through the mapping, then the file grows by write, truncate and fallocate.
    map.set(5500, 9);
    pwrite(&f, b"z", 9000).unwrap();
    t.note("after a write further on", pread(&f, 9001, 0).map(|b| runs(&b)));
    ftruncate(&f, 5000).unwrap();
    map.set(5600, 9);
    fallocate(&f, 0, 0, 9000).unwrap();
    t.note("after fallocate", pread(&f, 9000, 0).map(|b| runs(&b)));
    ftruncate(&f, 5000).unwrap();
    map.set(5700, 9);
    drop(map);
    fsync(&f).unwrap();
    drop_caches(&t.root);
    ftruncate(&f, 16384).unwrap();
    t.note("after all", pread(&f, 20000, 0).map(|b| runs(&b)));
}

fn mmap_and_write(t: &mut Case) {
    let f = new_file(t.p("f"));
    write(&f, &[1; 20_000]).unwrap();
    let map = Map::new(&f, 20_000).unwrap();
    map.set(100, 2);
    t.note("read sees the mapping", pread(&f, 200, 0).map(|b| runs(&b)));
    pwrite(&f, &[3; 10], 300).unwrap();
    t.note("mapping sees the write", runs(&map.bytes(290, 320)));
    map.set(19_999, 4);
    t.note("msync", map.sync());
    t.note("punch", fallocate(&f, libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE, 4000, 5000));
    t.note("mapping sees the hole", runs(&map.bytes(3900, 9100)));
    map.set(4096, 8);
    t.note("zero range", fallocate(&f, libc::FALLOC_FL_ZERO_RANGE, 12_000, 3000));
    t.note("mapping sees the zeros", runs(&map.bytes(11_000, 16_000)));
    // A write whose source is the mapping of the same place.
    let n = unsafe { libc::pwrite(f.as_raw_fd(), map.at.cast(), 8192, 4096) };
    t.note("write out of itself", n);
    drop(map);
    drop_caches(&t.root);
    t.note("after drop", content(t.p("f")));
    let (a, b) = (times_of(&f), {
        let m = Map::new(&f, 4096).unwrap();
        nap();
        m.set(0, 77);
        m.sync().unwrap();
        drop(m);
        times_of(&f)
    });
    t.note("mtime and ctime moved", (b.0 > a.0, b.1 > a.1));
}

type Moment = (i64, i64);

fn times_of(f: &OwnedFd) -> (Moment, Moment) {
    let s = fstat(f);
    ((s.st_mtime, s.st_mtime_nsec), (s.st_ctime, s.st_ctime_nsec))
}

fn mmap_of_holes(t: &mut Case) {
    let f = new_file(t.p("f"));
    ftruncate(&f, 3 << 20).unwrap();
    let map = Map::new(&f, 3 << 20).unwrap();
    t.note("zeros", runs(&map.bytes(1 << 20, (1 << 20) + 9000)));
    map.set((1 << 20) + 5, 7);
    map.set((3 << 20) - 1, 8);
    map.sync().unwrap();
    drop(map);
    forget_pages(&f);
    t.note("content", content(t.p("f")));
}

fn private_mmap(t: &mut Case) {
    let f = new_file(t.p("f"));
    write(&f, &[1; 8192]).unwrap();
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            8192,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE,
            f.as_raw_fd(),
            0,
        )
    };
    assert_ne!(at, libc::MAP_FAILED);
    unsafe { at.cast::<u8>().write(9) };
    pwrite(&f, &[2], 5000).unwrap();
    t.note("file", content(t.p("f")));
    t.note("mapping", unsafe { (at.cast::<u8>().read(), at.cast::<u8>().add(5000).read()) });
    unsafe { libc::munmap(at, 8192) };
}

fn truncate_rules(t: &mut Case) {
    let f = new_file(t.p("f"));
    mkdir(t.p("d"), 0o755).unwrap();
    t.note("negative", ftruncate(&f, -1));
    t.note("path negative", truncate(t.p("f"), -1));
    t.note("directory", truncate(t.p("d"), 0));
    t.note("missing", truncate(t.p("none"), 0));
    t.note("read only descriptor", ftruncate(&open(t.p("f"), libc::O_RDONLY).unwrap(), 0));
    chmod(t.p("f"), 0o444).unwrap();
    let p = t.p("f");
    t.note("no right", as_nobody(|| truncate(&p, 0)));
    t.note("root may", truncate(&p, 10));
    t.note("far", ftruncate(&f, 1 << 40));
    t.note("read at the end", pread(&f, 10, (1 << 40) - 4));
    t.note("back", (ftruncate(&f, 3), fstat(&f).st_size));
}

fn truncate_zeros_the_tail(t: &mut Case) {
    for (name, size) in [
        ("small", 3000_i64),
        ("page", 4096),
        ("inline edge", 4097),
        ("middle", 70_000),
        ("block", 1 << 20),
        ("more", (1 << 20) + 5000),
    ] {
        let f = new_file(t.p(name));
        write(&f, &vec![1; size as usize]).unwrap();
        if size % 2 == 0 {
            fsync(&f).unwrap();
        }
        ftruncate(&f, size / 2).unwrap();
        ftruncate(&f, size).unwrap();
        t.note(&format!("{name} down and up"), content(t.p(name)));
        pwrite(&f, &[2; 100], size + 5000).unwrap();
        t.note(&format!("{name} written further on"), content(t.p(name)));
        ftruncate(&f, 10).unwrap();
        pwrite(&f, &[3; 10], size).unwrap();
        forget_pages(&f);
        t.note(&format!("{name} cut and written"), content(t.p(name)));
    }
}

fn limits_of_size(t: &mut Case) {
    let f = new_file(t.p("f"));
    // ext4 ends at 16 TiB - 4 KiB; what is asked here must be the same for whoever goes further.
    let last = (1_i64 << 44) - 4096;
    for (key, at) in [("2 GiB", 1_i64 << 31), ("4 GiB", 1 << 32), ("1 TiB", 1 << 40), ("last", last - 100)] {
        t.note(key, pwrite(&f, b"0123456789", at));
        t.note(&format!("{key} back"), pread(&f, 20, at - 5));
        t.note(&format!("{key} size"), fstat(&f).st_size);
    }
    t.note("i64 max", pwrite(&f, b"x", i64::MAX));
    t.note("beyond i64", pwrite(&f, b"xyz", i64::MAX - 1).is_err());
    t.note("negative", pwrite(&f, b"x", -1));
    t.note("seek negative", seek(&f, -1, libc::SEEK_SET));
    t.note("read at i64 max", pread(&f, 1, i64::MAX));
    t.note("seek end", seek(&f, -5, libc::SEEK_END));
    t.note("whence", seek(&f, 0, 99));
    t.note("fallocate too far", fallocate(&f, 0, i64::MAX - 10, 100));
    t.note("fallocate nothing", fallocate(&f, 0, 0, 0));
    t.note("fallocate negative", fallocate(&f, 0, -1, 10));
    t.note(
        "read into bad memory",
        ok(unsafe { libc::pread(f.as_raw_fd(), 8 as *mut _, 10, 1 << 31) } as i64),
    );
    t.note("write from bad memory", ok(unsafe { libc::pwrite(f.as_raw_fd(), 8 as *const _, 10, 0) } as i64));
}

fn rlimit_fsize(t: &mut Case) {
    let f = new_file(t.p("f"));
    write(&f, &[1; 1000]).unwrap();
    let p = c(t.p("f"));
    let limited = |work: &dyn Fn() -> i64| {
        in_child(|| unsafe {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            let limit = libc::rlimit { rlim_cur: 5000, rlim_max: 5000 };
            libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit);
            if work() < 0 { *libc::__errno_location() } else { 0 }
        })
    };
    let data = [2_u8; 4096];
    let fd = f.as_raw_fd();
    t.note("write below", limited(&|| unsafe { libc::pwrite(fd, data.as_ptr().cast(), 4096, 0) } as i64));
    t.note(
        "write across",
        limited(&|| unsafe {
            if libc::pwrite(fd, data.as_ptr().cast(), 4096, 4096) == 904 { 0 } else { -1 }
        }),
    );
    t.note("size", fstat(&f).st_size);
    t.note("write at", limited(&|| unsafe { libc::pwrite(fd, data.as_ptr().cast(), 1, 5000) } as i64));
    t.note("ftruncate", limited(&|| unsafe { libc::ftruncate(fd, 5001) }.into()));
    t.note("truncate", limited(&|| unsafe { libc::truncate(p.as_ptr(), 5001) }.into()));
    t.note("ftruncate to it", limited(&|| unsafe { libc::ftruncate(fd, 5000) }.into()));
    t.note("fallocate", limited(&|| unsafe { libc::fallocate(fd, 0, 0, 6000) }.into()));
    t.note(
        "fallocate keep",
        limited(&|| unsafe { libc::fallocate(fd, libc::FALLOC_FL_KEEP_SIZE, 0, 6000) }.into()),
    );
    t.note(
        "signal",
        in_child(|| unsafe {
            libc::signal(libc::SIGXFSZ, libc::SIG_DFL);
            let limit = libc::rlimit { rlim_cur: 5000, rlim_max: 5000 };
            libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit);
            libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 });
            libc::pwrite(fd, data.as_ptr().cast(), 1, 9000);
            0
        }),
    );
    t.note(
        "copy_file_range",
        limited(&|| unsafe { libc::copy_file_range(fd, &mut 0, fd, &mut 8192, 100, 0) } as i64),
    );
    t.note("size at last", fstat(&f).st_size);
}

fn vectors(t: &mut Case) {
    let f = new_file(t.p("f"));
    let parts: [&[u8]; 4] = [b"one", b"", b"two", b"three"];
    let iov = parts.map(|p| libc::iovec { iov_base: p.as_ptr().cast_mut().cast(), iov_len: p.len() });
    t.note("writev", ok(unsafe { libc::writev(f.as_raw_fd(), iov.as_ptr(), 4) } as i64));
    t.note("pwritev", ok(unsafe { libc::pwritev(f.as_raw_fd(), iov.as_ptr(), 4, 4090) } as i64));
    let (mut a, mut b) = ([0_u8; 5], [0_u8; 20]);
    let iov = [
        libc::iovec { iov_base: a.as_mut_ptr().cast(), iov_len: 5 },
        libc::iovec { iov_base: b.as_mut_ptr().cast(), iov_len: 20 },
    ];
    t.note("preadv", (ok(unsafe { libc::preadv(f.as_raw_fd(), iov.as_ptr(), 2, 4088) } as i64), a, b));
    t.note("too many", ok(unsafe { libc::readv(f.as_raw_fd(), iov.as_ptr(), 1025) } as i64));
    t.note("none", ok(unsafe { libc::readv(f.as_raw_fd(), iov.as_ptr(), 0) } as i64));
    t.note("content", content(t.p("f")));
}

fn rwf_flags(t: &mut Case) {
    let f = new_file(t.p("f"));
    write(&f, &[1; 10_000]).unwrap();
    let data = [2_u8; 100];
    let put = |flags: i32, at: i64| {
        let iov = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: 100 };
        ok(unsafe { libc::pwritev2(f.as_raw_fd(), &raw const iov, 1, at, flags) } as i64)
    };
    t.note("dsync", put(libc::RWF_DSYNC, 0));
    t.note("sync", put(libc::RWF_SYNC, 200));
    t.note("hipri", put(libc::RWF_HIPRI, 300));
    t.note("append", put(libc::RWF_APPEND, 0));
    t.note("size", fstat(&f).st_size);
    t.note("unknown", put(1 << 20, 0));
    let mut room = [0_u8; 100];
    let mut get = |flags: i32, at: i64| {
        let iov = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: 100 };
        ok(unsafe { libc::preadv2(f.as_raw_fd(), &raw const iov, 1, at, flags) } as i64)
    };
    t.note("nowait, cached", get(libc::RWF_NOWAIT, 0));
    t.note("nowait at the end", get(libc::RWF_NOWAIT, 1 << 20));
    t.note("read dsync", get(libc::RWF_DSYNC, 0));
    t.note("nowait write", put(libc::RWF_NOWAIT, 0));
    t.note("atomic", put(0x40, 0));
    t.note("uncached", put(0x80, 0));
}

fn appending(t: &mut Case) {
    let p = t.p("f");
    let a = open(&p, libc::O_CREAT | libc::O_WRONLY | libc::O_APPEND).unwrap();
    let b = open(&p, libc::O_WRONLY | libc::O_APPEND).unwrap();
    write(&a, b"aaa").unwrap();
    write(&b, b"bb").unwrap();
    t.note("pwrite appends", pwrite(&a, b"c", 0));
    t.note("content", io(fs::read(&p)).map(|b| String::from_utf8(b).unwrap()));
    t.note("position", seek(&a, 0, libc::SEEK_CUR));
    t.note("after a truncate", {
        truncate(&p, 1).unwrap();
        write(&b, b"x").unwrap();
        io(fs::read(&p))
    });
    t.note("flag by fcntl", {
        let w = open(&p, libc::O_RDWR).unwrap();
        unsafe { libc::fcntl(w.as_raw_fd(), libc::F_SETFL, libc::O_APPEND) };
        write(&w, b"end").unwrap();
        io(fs::read(&p))
    });
    let f = t.p("shared");
    std::thread::scope(|s| {
        for i in 0..4_u8 {
            let f = &f;
            s.spawn(move || {
                let fd = open(f, libc::O_CREAT | libc::O_WRONLY | libc::O_APPEND).unwrap();
                (0..200).for_each(|_| assert_eq!(write(&fd, &[i; 37]), Ok(37)));
            });
        }
    });
    let all = fs::read(&f).unwrap();
    t.note("none lost", (all.len(), all.chunks(37).all(|c| c.iter().all(|b| *b == c[0]))));
}

fn pipes_and_sendfile(t: &mut Case) {
    let data: Vec<u8> = (0..200_000_u32).map(|i| (i / 1000) as u8).collect();
    fs::write(t.p("f"), &data).unwrap();
    let f = open(t.p("f"), libc::O_RDONLY).unwrap();
    let g = new_file(t.p("g"));
    let mut sent = 0;
    while sent < 200_000 {
        let n = unsafe { libc::sendfile(g.as_raw_fd(), f.as_raw_fd(), std::ptr::null_mut(), 200_000 - sent) };
        if n <= 0 {
            break;
        }
        sent += n as usize;
    }
    t.note("sendfile", (sent, fs::read(t.p("g")).unwrap() == data));
    let mut p = [0; 2];
    unit(unsafe { libc::pipe(p.as_mut_ptr()) }).unwrap();
    let h = new_file(t.p("h"));
    let (mut from, mut to) = (0_i64, 0_i64);
    while to < 200_000 {
        let n = unsafe { libc::splice(f.as_raw_fd(), &raw mut from, p[1], std::ptr::null_mut(), 60_000, 0) };
        if n <= 0 {
            break;
        }
        let mut left = n as usize;
        while left > 0 {
            let n = unsafe {
                libc::splice(
                    p[0],
                    std::ptr::null_mut(),
                    h.as_raw_fd(),
                    &raw mut to,
                    left,
                    libc::SPLICE_F_MOVE,
                )
            };
            assert!(n > 0);
            left -= n as usize;
        }
    }
    unsafe { (libc::close(p[0]), libc::close(p[1])) };
    t.note("splice", (to, fs::read(t.p("h")).unwrap() == data));
}

fn cfr(a: &OwnedFd, mut x: i64, b: &OwnedFd, mut y: i64, n: usize, flags: u32) -> R<i64> {
    ok(unsafe { libc::copy_file_range(a.as_raw_fd(), &raw mut x, b.as_raw_fd(), &raw mut y, n, flags) }
        as i64)
}

fn copies(t: &mut Case) {
    let data: Vec<u8> = (0..3_000_000_u32).map(|i| (i / 4096) as u8).collect();
    fs::write(t.p("a"), &data).unwrap();
    let a = open(t.p("a"), libc::O_RDWR).unwrap();
    let b = new_file(t.p("b"));
    mkdir(t.p("d"), 0o755).unwrap();
    mknod(t.p("fifo"), libc::S_IFIFO | 0o600, 0).unwrap();
    t.note("flags", cfr(&a, 0, &b, 0, 10, 1));
    t.note("nothing", cfr(&a, 0, &b, 0, 0, 0));
    t.note("behind the end", cfr(&a, 4_000_000, &b, 0, 10, 0));
    t.note("at the end", cfr(&a, 3_000_000, &b, 0, 10, 0));
    t.note("overlap", cfr(&a, 0, &a, 50, 100, 0));
    t.note("overlap of nothing", cfr(&a, 0, &a, 0, 0, 0));
    t.note("side by side", cfr(&a, 0, &a, 100, 100, 0));
    pwrite(&a, &data[100..200], 100).unwrap();
    t.note("to read only", cfr(&a, 0, &open(t.p("b"), libc::O_RDONLY).unwrap(), 0, 10, 0));
    t.note("from write only", cfr(&open(t.p("a"), libc::O_WRONLY).unwrap(), 0, &b, 0, 10, 0));
    t.note("to append", cfr(&a, 0, &open(t.p("b"), libc::O_WRONLY | libc::O_APPEND).unwrap(), 0, 10, 0));
    t.note("from directory", cfr(&open(t.p("d"), libc::O_RDONLY).unwrap(), 0, &b, 0, 10, 0));
    t.note("from fifo", cfr(&open(t.p("fifo"), libc::O_RDWR).unwrap(), 0, &b, 0, 10, 0));
    t.note("negative", cfr(&a, -1, &b, 0, 10, 0));
    // All of it, in as many calls as it takes.
    let mut done = 0;
    while done < 3_000_000 {
        match cfr(&a, done, &b, done, 3_000_000 - done as usize, 0) {
            Ok(n) if n > 0 => done += n,
            other => {
                t.note("stopped", other);
                break;
            }
        }
    }
    t.note("copy", fs::read(t.p("b")).unwrap() == data);
    // Independent afterwards, whatever was shared.
    pwrite(&a, &[255; 5000], 1_000_000).unwrap();
    t.note("independent", fs::read(t.p("b")).unwrap() == data);
    t.note("from another filesystem", {
        let elsewhere = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        fs::write(elsewhere.path(), b"abc").unwrap();
        let o = open(elsewhere.path(), libc::O_RDONLY).unwrap();
        cfr(&o, 0, &b, 0, 3, 0)
    });
    // Unaligned, over what is only in the page cache, and longer than the target.
    let s = new_file(t.p("s"));
    write(&s, &[1; 10_000]).unwrap();
    let d = new_file(t.p("t"));
    write(&d, &[2; 5000]).unwrap();
    t.note("unaligned", (cfr(&s, 100, &d, 3000, 9000, 0), content(t.p("t"))));
}

fn advice(t: &mut Case) {
    let f = new_file(t.p("f"));
    write(&f, &[1; 100_000]).unwrap();
    for a in 0..7 {
        t.note(&format!("fadvise {a}"), unsafe { libc::posix_fadvise(f.as_raw_fd(), 0, 0, a) });
    }
    t.note("readahead", unsafe { unit(libc::readahead(f.as_raw_fd(), 0, 50_000) as i64) });
    t.note("readahead of write only", unsafe {
        unit(libc::readahead(open(t.p("f"), libc::O_WRONLY).unwrap().as_raw_fd(), 0, 50_000) as i64)
    });
    t.note("sync_file_range", unsafe { unit(libc::sync_file_range(f.as_raw_fd(), 0, 0, 7)) });
    t.note("sync_file_range flags", unsafe { unit(libc::sync_file_range(f.as_raw_fd(), 0, 0, 64)) });
    t.note("posix_fallocate", unsafe { libc::posix_fallocate(f.as_raw_fd(), 0, 200_000) });
    t.note("size", fstat(&f).st_size);
    let map = Map::new(&f, 100_000).unwrap();
    for a in [
        libc::MADV_DONTNEED,
        libc::MADV_WILLNEED,
        libc::MADV_RANDOM,
        libc::MADV_REMOVE,
        libc::MADV_PAGEOUT,
        libc::MADV_POPULATE_WRITE,
    ] {
        t.note(&format!("madvise {a}"), unsafe { unit(libc::madvise(map.at.cast(), 8192, a)) });
    }
    t.note("removed by madvise", runs(&map.bytes(0, 10_000)));
    t.note("mincore", {
        let mut v = [0_u8; 25];
        unsafe { unit(libc::mincore(map.at.cast(), 100_000, v.as_mut_ptr())) }
    });
    t.note("mlock", unsafe { unit(libc::mlock(map.at.cast(), 8192)) });
}

fn descriptors(t: &mut Case) {
    let f = new_file(t.p("f"));
    write(&f, b"0123456789").unwrap();
    let g = f.try_clone().unwrap();
    seek(&f, 3, libc::SEEK_SET).unwrap();
    t.note("dup shares the position", seek(&g, 0, libc::SEEK_CUR));
    drop(f);
    t.note("and outlives", pread(&g, 3, 3));
    unlink(t.p("f")).unwrap();
    t.note("without a name", (pread(&g, 3, 3), fstat(&g).st_nlink));
    forget_pages(&g);
    t.note("after drop", pread(&g, 3, 3));
    let all: Vec<_> = (0..300).map(|i| new_file(t.p(&format!("n{i}")))).collect();
    all.iter().for_each(|f| assert_eq!(write(f, b"x"), Ok(1)));
    (0..300).for_each(|i| unlink(t.p(&format!("n{i}"))).unwrap());
    t.note("300 open without names", all.iter().all(|f| pread(f, 2, 0) == Ok(b"x".to_vec())));
    t.note(
        "fd flags",
        unsafe { libc::fcntl(g.as_raw_fd(), libc::F_GETFL) } & (libc::O_APPEND | libc::O_ACCMODE),
    );
    t.note("lease read", unit(unsafe { libc::fcntl(g.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) }));
    t.note("pipe size of a file", unit(unsafe { libc::fcntl(g.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) }));
    let mut p = libc::pollfd { fd: g.as_raw_fd(), events: libc::POLLIN | libc::POLLOUT, revents: 0 };
    t.note("poll", (unsafe { libc::poll(&raw mut p, 1, 0) }, p.revents));
    t.note("epoll", unsafe {
        let e = libc::epoll_create1(0);
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 };
        let done = unit(libc::epoll_ctl(e, libc::EPOLL_CTL_ADD, g.as_raw_fd(), &raw mut event));
        libc::close(e);
        done
    });
    t.note("f_getown_ex etc", unit(unsafe { libc::fcntl(g.as_raw_fd(), libc::F_SETOWN, libc::getpid()) }));
}

fn syncing(t: &mut Case) {
    let f = new_file(t.p("f"));
    write(&f, b"x").unwrap();
    t.note("fsync", fsync(&f));
    t.note("fdatasync", unsafe { unit(libc::fdatasync(f.as_raw_fd())) });
    t.note("fsync read only", fsync(&open(t.p("f"), libc::O_RDONLY).unwrap()));
    let d = open(&t.dir, libc::O_RDONLY | libc::O_DIRECTORY).unwrap();
    t.note("fsync directory", fsync(&d));
    t.note("fdatasync directory", unsafe { unit(libc::fdatasync(d.as_raw_fd())) });
    t.note("syncfs", unsafe { unit(libc::syncfs(f.as_raw_fd())) });
    t.note("syncfs of directory", unsafe { unit(libc::syncfs(d.as_raw_fd())) });
    t.note("fsync O_PATH", fsync(&open(t.p("f"), libc::O_PATH).unwrap()));
    mknod(t.p("fifo"), libc::S_IFIFO | 0o600, 0).unwrap();
    t.note("fsync fifo", fsync(&open(t.p("fifo"), libc::O_RDWR).unwrap()));
    unlink(t.p("f")).unwrap();
    t.note("fsync without a name", fsync(&f));
    rmdir_while_open(t);
}

fn rmdir_while_open(t: &mut Case) {
    mkdir(t.p("d"), 0o755).unwrap();
    let d = open(t.p("d"), libc::O_RDONLY).unwrap();
    rmdir(t.p("d")).unwrap();
    t.note("fsync of a removed directory", fsync(&d));
}

fn races(t: &mut Case) {
    // Truncation against writes: never foreign bytes, never a size between.
    let f = new_file(t.p("f"));
    std::thread::scope(|s| {
        s.spawn(|| (0..300).for_each(|_| assert_eq!(pwrite(&f, &[1; 9000], 0), Ok(9000))));
        s.spawn(|| (0..300).for_each(|i| ftruncate(&f, i % 9000).unwrap()));
        s.spawn(|| (0..300).for_each(|_| assert!(pread(&f, 9000, 0).unwrap().iter().all(|b| *b <= 1))));
    });
    t.note("truncate and write", fs::read(t.p("f")).unwrap().iter().all(|b| *b <= 1));
    // Create and unlink of one name by many.
    let p = t.p("name");
    std::thread::scope(|s| {
        for _ in 0..3 {
            s.spawn(|| {
                for _ in 0..100 {
                    drop(open(&p, libc::O_CREAT | libc::O_WRONLY));
                    let _ = unlink(&p);
                }
            });
        }
    });
    t.note("name is gone", stat(&p).map(|_| ()));
    let (a, b) = (t.p("ra"), t.p("rb"));
    drop(new_file(&a));
    drop(new_file(&b));
    std::thread::scope(|s| {
        s.spawn(|| (0..200).for_each(|_| drop(rename(&a, &b, libc::RENAME_EXCHANGE))));
        s.spawn(|| (0..200).for_each(|_| assert!(stat(&a).is_ok() && stat(&b).is_ok())));
    });
    t.note("exchange is never seen half", true);
}

fn busy_programs(t: &mut Case) {
    fs::copy("/bin/sleep", t.p("sleep")).unwrap();
    let mut child = std::process::Command::new(t.p("sleep")).arg("60").spawn().unwrap();
    t.note("write to a running program", open(t.p("sleep"), libc::O_WRONLY).map(drop));
    t.note("truncate it", truncate(t.p("sleep"), 0));
    t.note("unlink it", unlink(t.p("sleep")));
    child.kill().unwrap();
    child.wait().unwrap();
    fs::copy("/bin/true", t.p("true")).unwrap();
    let f = open(t.p("true"), libc::O_WRONLY).unwrap();
    t.note(
        "run what is being written",
        io(std::process::Command::new(t.p("true")).status()).map(|s| s.success()),
    );
    drop(f);
    chmod(t.p("true"), 0o644).unwrap();
    t.note(
        "run what is no program",
        io(std::process::Command::new(t.p("true")).status()).map(|s| s.success()),
    );
}

fn inline_edge(t: &mut Case) {
    for n in [4095_usize, 4096, 4097, 8191, 8192] {
        let name = format!("{n}");
        fs::write(t.p(&name), vec![1; n]).unwrap();
        let f = open(t.p(&name), libc::O_RDWR).unwrap();
        pwrite(&f, &[2; 3], n as i64 - 1).unwrap();
        fsync(&f).unwrap();
        pwrite(&f, &[3; 2], 4095).unwrap();
        ftruncate(&f, n as i64 + 1).unwrap();
        forget_pages(&f);
        t.note(&format!("{n} bytes"), content(t.p(&name)));
        t.note(&format!("{n} stat"), fstat(&f).st_size);
    }
}
