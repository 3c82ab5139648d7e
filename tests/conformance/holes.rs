//! Holes: SEEK_DATA and SEEK_HOLE, fallocate's modes.

use std::fs;
use std::os::fd::OwnedFd;

use crate::Run;
use crate::sys::*;

pub const CASES: &[(&str, Run)] = &[
    ("seek_rules", seek_rules),
    ("seek_unflushed", seek_unflushed),
    ("seek_small", seek_small),
    ("seek_punched", seek_punched),
    ("fallocate_modes", fallocate_modes),
    ("fallocate_and_truncate", fallocate_and_truncate),
    ("punch_edges", punch_edges),
    ("sparse_copy", sparse_copy),
];

const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;

/// The stretches of data: what must be data is inside, what is said to be a hole must read as zeros.
fn stretches(f: &OwnedFd) -> Vec<(i64, i64)> {
    let mut all = Vec::new();
    let mut at = 0;
    while let Ok(data) = seek(f, at, libc::SEEK_DATA) {
        let hole = seek(f, data, libc::SEEK_HOLE).unwrap();
        assert!(hole > data, "an empty stretch at {data}");
        // How finely holes are kept is the filesystem's affair (ours: blocks of 1 MiB). What counts is that none holds data.
        let (data, end) = (data & !0xf_ffff, (hole + 0xf_ffff) & !0xf_ffff);
        match all.last_mut() {
            Some((_, last)) if *last >= data => *last = end,
            _ => all.push((data, end)),
        }
        let between = pread(f, (data - at).max(0) as usize, at).unwrap();
        assert!(between.iter().all(|b| *b == 0), "data in a hole before {data}");
        at = hole;
    }
    all
}

fn seek_rules(t: &mut Case) {
    let f = new_file(t.p("f"));
    t.note("empty data", seek(&f, 0, libc::SEEK_DATA));
    t.note("empty hole", seek(&f, 0, libc::SEEK_HOLE));
    ftruncate(&f, 4 << 20).unwrap();
    t.note("hole only, data", seek(&f, 0, libc::SEEK_DATA));
    t.note("hole only, hole", seek(&f, 100, libc::SEEK_HOLE));
    pwrite(&f, &[1; 4096], 1 << 20).unwrap();
    fsync(&f).unwrap();
    for at in [
        0,
        4095,
        1 << 20,
        (1 << 20) + 1,
        (1 << 20) + 4095,
        (1 << 20) + 4096,
        (4 << 20) - 1,
        4 << 20,
        (4 << 20) + 1,
        -1,
    ] {
        t.note(&format!("data {at}"), seek(&f, at, libc::SEEK_DATA));
        t.note(&format!("hole {at}"), seek(&f, at, libc::SEEK_HOLE));
    }
    seek(&f, 77, libc::SEEK_SET).unwrap();
    t.note("a failed seek moves nothing", (seek(&f, 5 << 20, libc::SEEK_DATA), seek(&f, 0, libc::SEEK_CUR)));
    t.note("position after", (seek(&f, 0, libc::SEEK_DATA), seek(&f, 0, libc::SEEK_CUR)));
    let d = open(&t.dir, libc::O_RDONLY).unwrap();
    t.note("directory is refused or not", seek(&d, 0, libc::SEEK_DATA).is_ok_and(|n| n > 0));
}

fn seek_unflushed(t: &mut Case) {
    for (name, at, len) in [
        ("start", 0_i64, 4096_usize),
        ("middle", 1 << 20, 8192),
        ("far", 3 << 20, 4096),
        ("across", (1 << 20) - 4096, 8192),
    ] {
        let f = new_file(t.p(name));
        pwrite(&f, &vec![1; len], at).unwrap();
        t.note(name, stretches(&f));
        fsync(&f).unwrap();
        t.note(&format!("{name} synced"), stretches(&f));
        // By another descriptor, for reading only, while pages wait.
        pwrite(&f, &vec![1; len], at + (8 << 20)).unwrap();
        t.note(&format!("{name} read only"), stretches(&open(t.p(name), libc::O_RDONLY).unwrap()));
    }
    let f = new_file(t.p("map"));
    ftruncate(&f, 4 << 20).unwrap();
    let map = Map::new(&f, 4 << 20).unwrap();
    map.set(2 << 20, 1);
    t.note("mapped", stretches(&f));
    drop(f);
    let f = open(t.p("map"), libc::O_RDONLY).unwrap();
    map.set(3 << 20, 1);
    t.note("mapped, closed", stretches(&f));
}

fn seek_small(t: &mut Case) {
    for n in [1_i64, 100, 4095, 4096, 4097, 10_000] {
        let f = new_file(t.p(&format!("w{n}")));
        pwrite(&f, &vec![1; n as usize], 0).unwrap();
        t.note(&format!("written {n}"), stretches(&f));
        forget_pages(&f);
        t.note(&format!("synced {n}"), stretches(&f));
        let f = new_file(t.p(&format!("h{n}")));
        ftruncate(&f, n).unwrap();
        t.note(&format!("hole {n}"), stretches(&f));
        pwrite(&f, b"x", n - 1).unwrap();
        t.note(&format!("last byte of {n}"), stretches(&f));
    }
    let f = new_file(t.p("tail"));
    pwrite(&f, b"x", 0).unwrap();
    ftruncate(&f, 3 << 20).unwrap();
    t.note("a byte and a hole", stretches(&f));
}

fn seek_punched(t: &mut Case) {
    let f = new_file(t.p("f"));
    write(&f, &vec![1; 4 << 20]).unwrap();
    fsync(&f).unwrap();
    fallocate(&f, PUNCH | KEEP, 1 << 20, 1 << 20).unwrap();
    t.note("a block", stretches(&f));
    fallocate(&f, PUNCH | KEEP, 3 << 20, 4096).unwrap();
    t.note("a page", stretches(&f));
    fallocate(&f, PUNCH | KEEP, (2 << 20) + 100, 200).unwrap();
    t.note("less than a page", stretches(&f));
    fallocate(&f, PUNCH | KEEP, 0, 4 << 20).unwrap();
    t.note("all", stretches(&f));
}

fn fallocate_modes(t: &mut Case) {
    let modes = [
        ("plain", 0),
        ("keep", KEEP),
        ("punch", PUNCH),
        ("punch keep", PUNCH | KEEP),
        ("zero", ZERO),
        ("zero keep", ZERO | KEEP),
        ("zero punch", ZERO | PUNCH | KEEP),
        ("collapse", libc::FALLOC_FL_COLLAPSE_RANGE),
        ("insert", libc::FALLOC_FL_INSERT_RANGE),
        ("unshare", libc::FALLOC_FL_UNSHARE_RANGE),
        ("collapse keep", libc::FALLOC_FL_COLLAPSE_RANGE | KEEP),
        ("unknown", 0x4000),
    ];
    mkdir(t.p("d"), 0o755).unwrap();
    mknod(t.p("fifo"), libc::S_IFIFO | 0o600, 0).unwrap();
    for (key, mode) in modes {
        let f = new_file(t.p(key));
        write(&f, &vec![1; 40_000]).unwrap();
        fsync(&f).unwrap();
        t.note(&format!("{key}: inside"), fallocate(&f, mode, 8192, 4096));
        t.note(&format!("{key}: content"), runs(&fs::read(t.p(key)).unwrap()));
        t.note(&format!("{key}: across the end"), (fallocate(&f, mode, 36_864, 8192), fstat(&f).st_size));
        t.note(&format!("{key}: behind the end"), (fallocate(&f, mode, 81_920, 8192), fstat(&f).st_size));
        t.note(&format!("{key}: unaligned"), fallocate(&f, mode, 5, 77));
        t.note(&format!("{key}: nothing"), fallocate(&f, mode, 0, 0));
        t.note(&format!("{key}: negative"), fallocate(&f, mode, -5, 10));
        t.note(
            &format!("{key}: read only"),
            fallocate(&open(t.p(key), libc::O_RDONLY).unwrap(), mode, 0, 10),
        );
        t.note(
            &format!("{key}: directory"),
            fallocate(&open(t.p("d"), libc::O_RDONLY).unwrap(), mode, 0, 10),
        );
        t.note(&format!("{key}: fifo"), fallocate(&open(t.p("fifo"), libc::O_RDWR).unwrap(), mode, 0, 10));
        t.note(&format!("{key}: at last"), runs(&fs::read(t.p(key)).unwrap()));
        let a = open(t.p(key), libc::O_WRONLY | libc::O_APPEND).unwrap();
        t.note(&format!("{key}: append only descriptor"), fallocate(&a, mode, 0, 4096));
    }
}

fn fallocate_and_truncate(t: &mut Case) {
    let f = new_file(t.p("f"));
    fallocate(&f, 0, 0, 1 << 20).unwrap();
    t.note("zeros", runs(&fs::read(t.p("f")).unwrap()));
    t.note("takes space", fstat(&f).st_blocks >= 2048);
    write(&f, &[1; 100]).unwrap();
    ftruncate(&f, 50).unwrap();
    ftruncate(&f, 200).unwrap();
    t.note("cut", runs(&fs::read(t.p("f")).unwrap()));
    fallocate(&f, KEEP, 0, 2 << 20).unwrap();
    t.note("kept size", fstat(&f).st_size);
    pwrite(&f, b"z", 1 << 20).unwrap();
    t.note("written in it", runs(&fs::read(t.p("f")).unwrap()));
}

fn punch_edges(t: &mut Case) {
    let mb = 1_i64 << 20;
    for (key, at, len) in [
        ("in a page", 100_i64, 50_i64),
        ("across pages", 4000, 300),
        ("across blocks", mb - 100, 200),
        ("a block and edges", mb - 1, mb + 2),
        ("to the end", 2 * mb, 2 * mb),
        ("over the end", 3 * mb - 10, mb),
        ("behind the end", 4 * mb, mb),
    ] {
        let f = new_file(t.p(key));
        write(&f, &vec![1; 3 * mb as usize]).unwrap();
        t.note(
            &format!("{key}: cached"),
            (fallocate(&f, PUNCH | KEEP, at, len), runs(&fs::read(t.p(key)).unwrap())),
        );
        forget_pages(&f);
        t.note(&format!("{key}: dropped"), (runs(&fs::read(t.p(key)).unwrap()), fstat(&f).st_size));
        pwrite(&f, &[2; 10], at + 20).unwrap();
        t.note(&format!("{key}: written"), runs(&fs::read(t.p(key)).unwrap()));
    }
}

fn sparse_copy(t: &mut Case) {
    let f = new_file(t.p("f"));
    pwrite(&f, &[1; 5000], 2 << 20).unwrap();
    pwrite(&f, &[2; 5000], 9 << 20).unwrap();
    ftruncate(&f, 20 << 20).unwrap();
    for how in ["auto", "always", "never"] {
        let to = t.p(how);
        let done = std::process::Command::new("cp")
            .arg(format!("--sparse={how}"))
            .arg(t.p("f"))
            .arg(&to)
            .status()
            .unwrap();
        t.note(how, (done.success(), runs(&fs::read(&to).unwrap())));
    }
    t.note("auto is sparse", stat(t.p("auto")).unwrap().st_blocks < 16_000);
}
