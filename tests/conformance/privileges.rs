//! Set-user-id, set-group-id and capabilities: what makes them fall.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use crate::Run;
use crate::sys::*;

pub const CASES: &[(&str, Run)] = &[
    ("privileges_on_write", privileges_on_write),
    ("privileges_on_write_by_root", privileges_on_write_by_root),
    ("privileges_on_write_by_others", privileges_on_write_by_others),
    ("privileges_on_chown", privileges_on_chown),
    ("capabilities", capabilities),
];

fn suid_file(t: &Case, name: &str, mode: u32) -> OwnedFd {
    let f = new_file(t.p(name));
    write(&f, &[1; 8192]).unwrap();
    fsync(&f).unwrap();
    lchown(t.p(name), 12_345, 12_345).unwrap();
    chmod(t.p(name), mode).unwrap();
    f
}

type Change = fn(&OwnedFd, &Path) -> R<()>;

const CHANGES: &[(&str, Change)] = &[
    ("write", |f, _| pwrite(f, b"x", 0).map(drop)),
    ("append", |f, _| pwrite(f, b"x", 8192).map(drop)),
    ("write of nothing", |f, _| pwrite(f, b"", 0).map(drop)),
    ("ftruncate", |f, _| ftruncate(f, 100)),
    ("ftruncate same", |f, _| ftruncate(f, 8192)),
    ("truncate", |_, p| truncate(p, 100)),
    ("truncate up", |_, p| truncate(p, 10_000)),
    ("open trunc", |_, p| open(p, libc::O_WRONLY | libc::O_TRUNC).map(drop)),
    ("fallocate", |f, _| fallocate(f, 0, 0, 10_000)),
    ("fallocate keep", |f, _| fallocate(f, libc::FALLOC_FL_KEEP_SIZE, 0, 10_000)),
    ("punch", |f, _| fallocate(f, libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE, 0, 4096)),
    ("zero", |f, _| fallocate(f, libc::FALLOC_FL_ZERO_RANGE, 0, 4096)),
    ("mmap", |f, _| {
        let m = Map::new(f, 4096)?;
        m.set(0, 9);
        m.sync()
    }),
    ("direct", |_, p| {
        let d = open(p, libc::O_RDWR | libc::O_DIRECT)?;
        pwrite(&d, Aligned::new(4096, 7).bytes(), 0).map(drop)
    }),
    ("copy_file_range", |f, p| {
        let from = open(p.with_file_name("source"), libc::O_RDONLY)?;
        ok(unsafe { libc::copy_file_range(from.as_raw_fd(), &mut 0, f.as_raw_fd(), &mut 0, 4096, 0) } as i64)
            .map(drop)
    }),
    ("splice", |f, _| {
        let mut p = [0; 2];
        unit(unsafe { libc::pipe(p.as_mut_ptr()) })?;
        unsafe { libc::write(p[1], b"abc".as_ptr().cast(), 3) };
        let n = unsafe { libc::splice(p[0], std::ptr::null_mut(), f.as_raw_fd(), &mut 0, 3, 0) };
        unsafe { (libc::close(p[0]), libc::close(p[1])) };
        ok(n as i64).map(drop)
    }),
    ("utimens", |_, p| utimens(p, (1, 1), (1, 1))),
    ("setxattr", |_, p| setxattr(p, "user.a", b"1", 0)),
    ("rename", |_, p| rename(p, p.with_extension("r"), 0).and_then(|()| rename(p.with_extension("r"), p, 0))),
    ("link", |_, p| link(p, p.with_extension("l"))),
];

/// Who changes a file of user and group 12345.
struct Who {
    name: &'static str,
    uid: u32,
    gid: u32,
    groups: &'static [u32],
    /// The capabilities that are in force; `None` for those that the user has anyway.
    capabilities: Option<u64>,
}

const fn user(name: &'static str, uid: u32, gid: u32, groups: &'static [u32]) -> Who {
    Who { name, uid, gid, groups, capabilities: None }
}

const FSETID: u64 = 1 << 4;

const OTHERS: &[Who] = &[
    user("owner in another group", 12_345, 12_346, &[]),
    user("owner in the group besides", 12_345, 12_346, &[7, 12_345]),
    user("stranger", 12_346, 12_346, &[7]),
    user("stranger in the group", 12_346, 12_345, &[]),
    user("stranger in the group besides", 12_346, 12_346, &[7, 12_345, 9]),
    Who { capabilities: Some(!FSETID), ..user("root without the right", 0, 0, &[]) },
    Who { capabilities: Some(!FSETID), ..user("root without the right, in the group", 0, 0, &[12_345]) },
    Who { capabilities: Some(FSETID), ..user("stranger with the right", 12_346, 12_346, &[]) },
];

/// `who`: nobody but root as it is when there is none.
fn privileges(t: &mut Case, who: Option<&Who>, modes: &[u32]) {
    drop(new_file(t.p("source")));
    fs::write(t.p("source"), [5; 4096]).unwrap();
    chmod(&t.dir, 0o777).unwrap();
    for (i, (key, change)) in CHANGES.iter().enumerate() {
        for mode_before in modes {
            let name = format!("f{i}-{mode_before:o}");
            let f = suid_file(t, &name, *mode_before);
            let p = t.p(&name);
            let done = if let Some(who) = who {
                // Opened by the one who writes: the right to keep the bits is looked up in him.
                as_user_with(who.uid, who.gid, who.groups, who.capabilities, || {
                    let f = open(&p, libc::O_RDWR)?;
                    change(&f, &p)
                })
            } else {
                change(&f, &p)
            };
            let name = who.map_or(String::new(), |w| format!("{}: ", w.name));
            t.note(&format!("{name}{key} {mode_before:o}"), (done, mode(&p)));
            let _ = unlink(p.with_extension("l"));
            unlink(&p).unwrap();
        }
    }
}

const MODES: [u32; 5] = [0o6777, 0o2767, 0o4777, 0o2777, 0o6666];

fn privileges_on_write(t: &mut Case) {
    privileges(t, Some(&user("user", 12_345, 12_345, &[])), &MODES);
}

fn privileges_on_write_by_root(t: &mut Case) {
    privileges(t, None, &MODES);
}

fn privileges_on_write_by_others(t: &mut Case) {
    for who in OTHERS {
        // With and without the right of the group to execute, and of others, as xfstests has them.
        privileges(t, Some(who), &[0o6777, 0o6766, 0o6676, 0o6666, 0o2666, 0o2676, 0o4666]);
    }
}

fn privileges_on_chown(t: &mut Case) {
    let users: [(&str, Option<&[u32]>); 3] =
        [("root", None), ("user", Some(&[777])), ("user in no group", Some(&[]))];
    for (who, groups) in users {
        for before in [0o6755, 0o2745, 0o4711, 0o6777, 0o2777] {
            for (how, uid, gid) in
                [("gid", u32::MAX, 777), ("same", 12_345, 12_345), ("none", u32::MAX, u32::MAX)]
            {
                let name = format!("{who}-{before:o}-{how}");
                drop(suid_file(t, &name, before));
                let p = t.p(&name);
                let done = match groups {
                    None => lchown(&p, uid, gid),
                    Some(g) => as_user(12_345, own_group(g), g, || lchown(&p, uid, gid)),
                };
                t.note(&name, (done, mode(&p)));
            }
        }
        let name = format!("{who}-dir");
        mkdir(t.p(&name), 0o755).unwrap();
        lchown(t.p(&name), 12_345, 12_345).unwrap();
        chmod(t.p(&name), 0o6755).unwrap();
        let p = t.p(&name);
        let done = match groups {
            None => lchown(&p, u32::MAX, 777),
            Some(g) => as_user(12_345, 12_345, g, || lchown(&p, u32::MAX, 777)),
        };
        t.note(&name, (done, mode(&p)));
    }
}

/// The group of a user with these groups besides: not the file's when there are none.
fn own_group(groups: &[u32]) -> u32 {
    if groups.is_empty() { 12_346 } else { 12_345 }
}

/// `cap_net_raw` permitted, as the kernel stores it (version 2).
const CAPS: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn capabilities(t: &mut Case) {
    fs::write(t.p("source"), [5; 4096]).unwrap();
    chmod(&t.dir, 0o777).unwrap();
    for (i, (key, change)) in CHANGES.iter().enumerate() {
        for (user, before) in [(false, 0o777), (true, 0o777), (false, 0o6777), (true, 0o6767)] {
            let name = format!("f{i}-{user}-{before:o}");
            let f = suid_file(t, &name, before);
            let p = t.p(&name);
            setxattr(&p, "security.capability", &CAPS, 0).unwrap();
            let done = if user {
                as_user(12_345, 12_345, &[], || {
                    let f = open(&p, libc::O_RDWR)?;
                    change(&f, &p)
                })
            } else {
                change(&f, &p)
            };
            let has = getxattr(&p, "security.capability").is_ok();
            t.note(&format!("{key} user={user} {before:o}"), (done, has, mode(&p)));
        }
    }
    for (how, uid, gid) in [("gid", u32::MAX, 777), ("none", u32::MAX, u32::MAX)] {
        drop(suid_file(t, how, 0o777));
        setxattr(t.p(how), "security.capability", &CAPS, 0).unwrap();
        t.note(
            &format!("chown {how}"),
            (lchown(t.p(how), uid, gid), getxattr(t.p(how), "security.capability").is_ok()),
        );
    }
    drop(suid_file(t, "bad", 0o777));
    t.note("bad value", setxattr(t.p("bad"), "security.capability", b"x", 0));
    let p = t.p("bad");
    t.note("by a user", as_nobody(|| setxattr(&p, "security.capability", &CAPS, 0)));
    t.note("read back", {
        setxattr(&p, "security.capability", &CAPS, 0).unwrap();
        getxattr(&p, "security.capability")
    });
}
