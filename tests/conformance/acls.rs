//! Access control lists.

use std::path::Path;
use std::process::Command;

use crate::Run;
use crate::sys::*;

pub const CASES: &[(&str, Run)] = &[
    ("acl_forms", acl_forms),
    ("acl_and_mode", acl_and_mode),
    ("acl_kinds", acl_kinds),
    ("acl_enforced", acl_enforced),
    ("acl_inherited", acl_inherited),
    ("acl_setgid", acl_setgid),
    ("acl_rights", acl_rights),
    ("acl_tools", acl_tools),
    ("acl_times", acl_times),
];

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";
const NOBODY: u32 = u32::MAX;

/// A list out of tag, permissions and id.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut out = 2_u32.to_le_bytes().to_vec();
    for (tag, perm, id) in entries {
        out.extend_from_slice(&tag.to_le_bytes());
        out.extend_from_slice(&perm.to_le_bytes());
        out.extend_from_slice(&id.to_le_bytes());
    }
    out
}

/// Owner `u`, named user 12345 with `n`, group `g`, mask `m`, others `o`.
fn named(u: u16, n: u16, g: u16, m: u16, o: u16) -> Vec<u8> {
    acl(&[(1, u, NOBODY), (2, n, 12_345), (4, g, NOBODY), (0x10, m, NOBODY), (0x20, o, NOBODY)])
}

fn minimal(u: u16, g: u16, o: u16) -> Vec<u8> {
    acl(&[(1, u, NOBODY), (4, g, NOBODY), (0x20, o, NOBODY)])
}

fn acl_forms(t: &mut Case) {
    drop(new_file(t.p("f")));
    mkdir(t.p("d"), 0o755).unwrap();
    let all: &[(&str, Vec<u8>)] = &[
        ("named", named(7, 6, 5, 4, 1)),
        ("minimal", minimal(6, 4, 0)),
        ("empty", vec![]),
        ("header only", acl(&[])),
        ("short header", vec![2, 0]),
        ("version 1", {
            let mut a = minimal(6, 4, 0);
            a[0] = 1;
            a
        }),
        ("cut", {
            let mut a = minimal(6, 4, 0);
            a.pop();
            a
        }),
        ("no others", acl(&[(1, 7, NOBODY), (4, 7, NOBODY)])),
        ("wrong order", acl(&[(4, 7, NOBODY), (1, 7, NOBODY), (0x20, 0, NOBODY)])),
        ("named without mask", acl(&[(1, 7, NOBODY), (2, 7, 5), (4, 7, NOBODY), (0x20, 0, NOBODY)])),
        ("mask without named", acl(&[(1, 7, NOBODY), (4, 7, NOBODY), (0x10, 5, NOBODY), (0x20, 0, NOBODY)])),
        ("unknown tag", acl(&[(1, 7, NOBODY), (4, 7, NOBODY), (0x20, 0, NOBODY), (0x40, 0, NOBODY)])),
        ("too many bits", acl(&[(1, 8, NOBODY), (4, 7, NOBODY), (0x20, 0, NOBODY)])),
        (
            "twice the same user",
            acl(&[
                (1, 7, NOBODY),
                (2, 7, 5),
                (2, 6, 5),
                (4, 7, NOBODY),
                (0x10, 7, NOBODY),
                (0x20, 0, NOBODY),
            ]),
        ),
        (
            "users not sorted",
            acl(&[
                (1, 7, NOBODY),
                (2, 7, 9),
                (2, 6, 5),
                (4, 7, NOBODY),
                (0x10, 7, NOBODY),
                (0x20, 0, NOBODY),
            ]),
        ),
        (
            "nobody named",
            acl(&[(1, 7, NOBODY), (2, 7, NOBODY), (4, 7, NOBODY), (0x10, 7, NOBODY), (0x20, 0, NOBODY)]),
        ),
        ("odd ids", acl(&[(1, 7, 3), (4, 7, 4), (0x20, 0, 5)])),
        ("long", {
            let mut e = vec![(1, 7, NOBODY)];
            e.extend((0..200).map(|i| (2, 5, 1000 + i)));
            e.extend([(4, 7, NOBODY), (0x10, 7, NOBODY), (0x20, 0, NOBODY)]);
            acl(&e)
        }),
    ];
    for (key, value) in all {
        for (name, which) in [("f", ACCESS), ("d", ACCESS), ("d", DEFAULT), ("f", DEFAULT)] {
            let short = if which == ACCESS { "access" } else { "default" };
            let done = setxattr(t.p(name), which, value, 0);
            t.note(&format!("{key}: {name} {short}"), (done, getxattr(t.p(name), which), mode(t.p(name))));
        }
    }
    t.note("list", (listxattr(t.p("f")), listxattr(t.p("d"))));
    for (name, which) in [("f", ACCESS), ("d", ACCESS), ("d", DEFAULT), ("f", DEFAULT)] {
        let key = format!("remove {name} {which}");
        t.note(&key, (removexattr(t.p(name), which), removexattr(t.p(name), which), mode(t.p(name))));
    }
    t.note("list at last", (listxattr(t.p("f")), listxattr(t.p("d"))));
    t.note("create flag", setxattr(t.p("f"), ACCESS, &named(7, 7, 7, 7, 7), libc::XATTR_CREATE));
    t.note("create flag again", setxattr(t.p("f"), ACCESS, &named(7, 7, 7, 7, 6), libc::XATTR_CREATE));
    t.note("replace flag", setxattr(t.p("d"), ACCESS, &named(7, 7, 7, 7, 6), libc::XATTR_REPLACE));
    t.note(
        "other system names",
        (setxattr(t.p("f"), "system.posix_acl", b"x", 0), getxattr(t.p("f"), "system.posix_acl_x")),
    );
}

fn acl_and_mode(t: &mut Case) {
    drop(new_file(t.p("f")));
    let f = t.p("f");
    setxattr(&f, ACCESS, &named(7, 6, 5, 4, 1), 0).unwrap();
    t.note("mode shows the mask", mode(&f));
    for m in [0o777, 0o700, 0o4640, 0o1666, 0o000, 0o2755] {
        t.note(&format!("chmod {m:o}"), (chmod(&f, m), mode(&f), getxattr(&f, ACCESS)));
    }
    setxattr(&f, ACCESS, &minimal(6, 4, 0), 0).unwrap();
    t.note("minimal", (mode(&f), getxattr(&f, ACCESS), listxattr(&f)));
    setxattr(&f, ACCESS, &named(7, 7, 7, 0, 7), 0).unwrap();
    lchown(&f, 5, 6).unwrap();
    t.note("chown", (mode(&f), getxattr(&f, ACCESS)));
    t.note("removed", (removexattr(&f, ACCESS), mode(&f)));
    setxattr(&f, ACCESS, &named(7, 6, 5, 4, 1), 0).unwrap();
    drop_caches(&t.root);
    t.note("after drop", (mode(&f), getxattr(&f, ACCESS)));
    link(&f, t.p("g")).unwrap();
    rename(&f, t.p("h"), 0).unwrap();
    t.note("by other names", (getxattr(t.p("g"), ACCESS), getxattr(t.p("h"), ACCESS)));
    chmod(t.p("g"), 0o750).unwrap();
    t.note("chmod by one, seen by the other", (mode(t.p("h")), getxattr(t.p("h"), ACCESS)));
}

fn acl_kinds(t: &mut Case) {
    mknod(t.p("fifo"), libc::S_IFIFO | 0o600, 0).unwrap();
    symlink("fifo", t.p("l")).unwrap();
    for n in ["fifo", "l"] {
        t.note(
            &format!("{n} access"),
            (setxattr(t.p(n), ACCESS, &named(6, 6, 6, 6, 6), 0), getxattr(t.p(n), ACCESS), mode(t.p(n))),
        );
        t.note(&format!("{n} default"), setxattr(t.p(n), DEFAULT, &named(6, 6, 6, 6, 6), 0));
        t.note(&format!("{n} list"), listxattr(t.p(n)));
    }
}

fn may(p: &Path) -> String {
    [("r", libc::R_OK), ("w", libc::W_OK), ("x", libc::X_OK)]
        .iter()
        .map(|(c_, how)| {
            if unsafe {
                libc::syscall(libc::SYS_faccessat2, libc::AT_FDCWD, c(p).as_ptr(), *how, libc::AT_EACCESS)
            } == 0
            {
                *c_
            } else {
                "-"
            }
        })
        .collect()
}

fn acl_enforced(t: &mut Case) {
    let f = t.p("f");
    drop(new_file(&f));
    lchown(&f, 50, 60).unwrap();
    // Owner, named user, named group, owning group, mask, others.
    let list = |mask| {
        acl(&[
            (1, 6, NOBODY),
            (2, 7, 12_345),
            (2, 0, 12_346),
            (4, 4, NOBODY),
            (8, 3, 777),
            (0x10, mask, NOBODY),
            (0x20, 1, NOBODY),
        ])
    };
    for mask in [7, 5, 0] {
        setxattr(&f, ACCESS, &list(mask), 0).unwrap();
        let who: [(&str, u32, u32, &[u32]); 7] = [
            ("owner", 50, 1, &[]),
            ("named", 12_345, 1, &[]),
            ("named with nothing", 12_346, 60, &[777]),
            ("owning group", 99, 60, &[]),
            ("named group", 99, 98, &[777]),
            ("both groups", 99, 60, &[777]),
            ("others", 99, 98, &[]),
        ];
        for (key, uid, gid, groups) in who {
            t.note(&format!("{key}, mask {mask}"), as_user(uid, gid, groups, || may(&f)));
        }
        t.note(&format!("root, mask {mask}"), may(&f));
    }
    // A right that is given and taken away is seen at once, also in a directory on the way.
    mkdir(t.p("d"), 0o700).unwrap();
    drop(new_file(t.p("d/x")));
    let x = t.p("d/x");
    t.note("closed", as_nobody(|| stat(&x).map(|_| ())));
    setxattr(t.p("d"), ACCESS, &named(7, 5, 0, 5, 0), 0).unwrap();
    t.note(
        "opened",
        as_nobody(|| {
            (
                stat(&x).map(|_| ()),
                std::fs::read_dir(x.parent().unwrap()).is_ok(),
                open(x.with_file_name("y"), libc::O_CREAT | libc::O_WRONLY).map(drop),
            )
        }),
    );
    chmod(t.p("d"), 0o710).unwrap();
    t.note(
        "cut by chmod",
        as_nobody(|| (stat(&x).map(|_| ()), std::fs::read_dir(x.parent().unwrap()).is_ok())),
    );
    removexattr(t.p("d"), ACCESS).unwrap();
    t.note("taken away", as_nobody(|| stat(&x).map(|_| ())));
    setxattr(t.p("d"), ACCESS, &named(7, 7, 0, 7, 0), 0).unwrap();
    drop_caches(&t.root);
    t.note("after drop", as_nobody(|| open(x.with_file_name("y"), libc::O_CREAT | libc::O_WRONLY).map(drop)));
    t.note("unlink", as_nobody(|| unlink(&x)));
}

fn show(p: &Path) -> (R<String>, R<Vec<u8>>, R<Vec<u8>>) {
    (mode(p), getxattr(p, ACCESS), getxattr(p, DEFAULT))
}

fn make_all(dir: &Path, mask: u32, tag: &str) {
    let dir = dir.to_owned();
    let tag = tag.to_owned();
    std::thread::spawn(move || {
        unit(unsafe { libc::unshare(libc::CLONE_FS) }).unwrap();
        unsafe { libc::umask(mask) };
        let n = |k: &str| dir.join(format!("{k}{tag}"));
        open_mode(n("f666-"), libc::O_CREAT | libc::O_WRONLY, 0o666).unwrap();
        open_mode(n("f600-"), libc::O_CREAT | libc::O_WRONLY, 0o600).unwrap();
        open_mode(n("f6755-"), libc::O_CREAT | libc::O_WRONLY, 0o6755).unwrap();
        mkdir(n("d777-"), 0o777).unwrap();
        mkdir(n("d700-"), 0o700).unwrap();
        mknod(n("p666-"), libc::S_IFIFO | 0o666, 0).unwrap();
        mknod(n("r644-"), libc::S_IFREG | 0o644, 0).unwrap();
        symlink("x", n("l-")).unwrap();
        mkdir(n("d777-").join("deep"), 0o777).unwrap();
    })
    .join()
    .unwrap();
}

fn acl_inherited(t: &mut Case) {
    for (i, (key, default)) in [
        ("named", named(7, 6, 5, 7, 1)),
        ("narrow mask", named(7, 6, 5, 4, 0)),
        ("minimal", minimal(7, 5, 0)),
        ("mask only", acl(&[(1, 7, NOBODY), (4, 7, NOBODY), (0x10, 5, NOBODY), (0x20, 4, NOBODY)])),
    ]
    .into_iter()
    .enumerate()
    {
        let d = t.p(&format!("d{i}"));
        mkdir(&d, 0o755).unwrap();
        setxattr(&d, DEFAULT, &default, 0).unwrap();
        for mask in [0o022, 0o077] {
            let tag = format!("{mask:o}");
            make_all(&d, mask, &tag);
            for n in ["f666-", "f600-", "f6755-", "d777-", "d700-", "p666-", "r644-", "l-"] {
                t.note(&format!("{key}: {n}{tag}"), show(&d.join(format!("{n}{tag}"))));
            }
            t.note(&format!("{key}: deep {tag}"), show(&d.join(format!("d777-{tag}/deep"))));
        }
        t.note(&format!("{key}: list"), listxattr(d.join("f666-22")));
        removexattr(&d, DEFAULT).unwrap();
        make_all(&d, 0o022, "after");
        t.note(&format!("{key}: no longer"), (show(&d.join("f666-after")), show(&d.join("d777-after"))));
        // Moving in inherits nothing.
        setxattr(&d, DEFAULT, &default, 0).unwrap();
        let m = t.p(&format!("moved{i}"));
        drop(new_file(&m));
        rename(&m, d.join("moved"), 0).unwrap();
        t.note(&format!("{key}: moved in"), show(&d.join("moved")));
    }
}

fn acl_setgid(t: &mut Case) {
    for (key, gid, groups) in
        [("member", 777, &[777][..]), ("outsider", 777, &[][..]), ("own group", 12_345, &[][..])]
    {
        let f = t.p(key);
        drop(new_file(&f));
        lchown(&f, 12_345, gid).unwrap();
        chmod(&f, 0o2755).unwrap();
        let done = as_user(12_345, 12_345, groups, || setxattr(&f, ACCESS, &named(7, 5, 5, 5, 5), 0));
        t.note(key, (done, mode(&f)));
    }
    let f = t.p("root");
    drop(new_file(&f));
    lchown(&f, 12_345, 777).unwrap();
    chmod(&f, 0o6755).unwrap();
    t.note("root", (setxattr(&f, ACCESS, &named(7, 5, 5, 5, 5), 0), mode(&f)));
    let d = t.p("d");
    mkdir(&d, 0o755).unwrap();
    lchown(&d, 12_345, 777).unwrap();
    chmod(&d, 0o2755).unwrap();
    let done = as_user(12_345, 12_345, &[], || {
        (setxattr(&d, DEFAULT, &named(7, 5, 5, 5, 5), 0), setxattr(&d, ACCESS, &named(7, 5, 5, 5, 5), 0))
    });
    t.note("directory", (done, mode(&d)));
}

fn acl_rights(t: &mut Case) {
    let f = t.p("f");
    drop(new_file(&f));
    setxattr(&f, ACCESS, &named(6, 6, 6, 6, 6), 0).unwrap();
    t.note(
        "another",
        as_nobody(|| {
            (
                getxattr(&f, ACCESS).is_ok(),
                setxattr(&f, ACCESS, &minimal(6, 6, 6), 0),
                removexattr(&f, ACCESS),
                listxattr(&f),
            )
        }),
    );
    lchown(&f, 12_345, 12_345).unwrap();
    t.note("owner", as_nobody(|| (setxattr(&f, ACCESS, &named(6, 4, 4, 4, 4), 0), removexattr(&f, ACCESS))));
}

fn acl_tools(t: &mut Case) {
    if Command::new("setfacl").arg("--version").output().is_err() {
        return println!("SKIPPED: setfacl and getfacl (package acl)");
    }
    let run = |line: &str| {
        let out = Command::new("sh").arg("-c").arg(line).current_dir(&t.dir).output().unwrap();
        let all = [out.stdout, out.stderr].concat();
        (out.status.code(), String::from_utf8(all).unwrap())
    };
    let steps = [
        "umask 022; mkdir d; touch d/f; setfacl -m u:12345:rwx,g:777:r d/f; getfacl -cn d/f",
        "setfacl -d -m u:12345:rw,o::- d; getfacl -cn d",
        "umask 077; touch d/new; mkdir d/sub; getfacl -cn d/new d/sub",
        "chmod g=r d/new; getfacl -cn d/new",
        "setfacl -x u:12345 d/f; getfacl -cn d/f",
        "setfacl -b d/f; getfacl -cn d/f; ls -l d/f | cut -c1-11",
        "setfacl -k d; getfacl -cn d",
        "setfacl -m u:1:r d/f; cp -a d/f d/copy; getfacl -cn d/copy; ls -l d/copy | cut -c1-11",
        "setfacl -m u:nonsense_user:r d/f",
        "getfacl -Rn d > list; setfacl -Rb d; setfacl --restore=list; getfacl -Rn d | diff - list",
        "setfacl -R -m g:5:rX d; find d | sort | xargs getfacl -cn",
        "tar --acls -cf t.tar d && mkdir x && tar --acls -xf t.tar -C x && find d | sort | xargs getfacl -n > l1; cd x; find d | sort | xargs getfacl -n | diff ../l1 -",
    ];
    let told: Vec<_> = steps.iter().map(|s| run(s)).collect();
    for (step, told) in steps.iter().zip(told) {
        t.note(step, told);
    }
}

fn acl_times(t: &mut Case) {
    let f = t.p("f");
    drop(new_file(&f));
    let times = || {
        let s = stat(&f).unwrap();
        ((s.st_mtime, s.st_mtime_nsec), (s.st_ctime, s.st_ctime_nsec))
    };
    let mut notes = Vec::new();
    for (key, what) in [
        ("set", named(6, 6, 6, 6, 6)),
        ("set same mode", named(6, 4, 6, 6, 6)),
        ("minimal", minimal(6, 4, 4)),
    ] {
        let before = times();
        nap();
        setxattr(&f, ACCESS, &what, 0).unwrap();
        let after = times();
        notes.push((key, (after.0 == before.0, after.1 > before.1)));
    }
    setxattr(&f, ACCESS, &named(6, 6, 6, 6, 6), 0).unwrap();
    let before = times();
    nap();
    removexattr(&f, ACCESS).unwrap();
    notes.push(("remove", (times().0 == before.0, times().1 > before.1)));
    for (key, what) in notes {
        t.note(key, what);
    }
}
