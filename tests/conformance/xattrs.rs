//! Extended attributes.

use std::fs;

use crate::Run;
use crate::sys::*;

pub const CASES: &[(&str, Run)] = &[
    ("xattr_rules", xattr_rules),
    ("xattr_kinds", xattr_kinds),
    ("xattr_namespaces", xattr_namespaces),
    ("xattr_permissions", xattr_permissions),
    ("xattr_many", xattr_many),
];

fn xattr_rules(t: &mut Case) {
    drop(new_file(t.p("f")));
    let f = t.p("f");
    t.note("missing", getxattr(&f, "user.none"));
    t.note("empty list", listxattr(&f));
    t.note("empty value", (setxattr(&f, "user.e", b"", 0), getxattr(&f, "user.e")));
    t.note("create", setxattr(&f, "user.a", b"1", libc::XATTR_CREATE));
    t.note("create again", setxattr(&f, "user.a", b"1", libc::XATTR_CREATE));
    t.note("replace", (setxattr(&f, "user.a", b"longer", libc::XATTR_REPLACE), getxattr(&f, "user.a")));
    t.note("replace missing", setxattr(&f, "user.b", b"1", libc::XATTR_REPLACE));
    t.note("both flags", setxattr(&f, "user.a", b"1", 3));
    t.note("both flags, missing", setxattr(&f, "user.q", b"1", 3));
    t.note("unknown flags", setxattr(&f, "user.a", b"1", 8));
    t.note("remove missing", removexattr(&f, "user.none"));
    for n in [1, 200, 249, 250, 251] {
        t.note(&format!("name of {n}"), setxattr(&f, &format!("user.{}", "n".repeat(n)), b"x", 0));
    }
    t.note("no name", setxattr(&f, "", b"x", 0));
    t.note("prefix only", setxattr(&f, "user.", b"x", 0));
    t.note("get prefix only", getxattr(&f, "user."));
    t.note("no prefix", setxattr(&f, "plain", b"x", 0));
    t.note("get no prefix", getxattr(&f, "plain"));
    t.note("unknown prefix", setxattr(&f, "odd.name", b"x", 0));
    t.note("get unknown prefix", getxattr(&f, "odd.name"));
    t.note("remove unknown prefix", removexattr(&f, "odd.name"));
    t.note("system", setxattr(&f, "system.odd", b"x", 0));
    t.note("get system", getxattr(&f, "system.odd"));
    t.note(
        "3000 bytes",
        (setxattr(&f, "user.big", &[7; 3000], 0), getxattr(&f, "user.big").map(|v| runs(&v))),
    );
    t.note("above 64 KiB", setxattr(&f, "user.huge", &[7; 65537], 0));
    t.note("small buffer", {
        let mut room = [0_u8; 3];
        let n = unsafe { libc::getxattr(c(&f).as_ptr(), c"user.a".as_ptr(), room.as_mut_ptr().cast(), 3) };
        ok(n as i64)
    });
    t.note("small list", {
        let mut room = [0_u8; 3];
        ok(unsafe { libc::listxattr(c(&f).as_ptr(), room.as_mut_ptr().cast(), 3) } as i64)
    });
    t.note("list", listxattr(&f).map(|l| l.len()));
    drop_caches(&t.root);
    t.note("after drop", getxattr(&f, "user.a"));
    link(&f, t.p("g")).unwrap();
    t.note("by another name", getxattr(t.p("g"), "user.a"));
    rename(&f, t.p("h"), 0).unwrap();
    t.note("after rename", getxattr(t.p("h"), "user.a"));
    t.note("missing file", getxattr(t.p("none"), "user.a"));
}

fn xattr_kinds(t: &mut Case) {
    mkdir(t.p("d"), 0o755).unwrap();
    symlink("d", t.p("l")).unwrap();
    mknod(t.p("p"), libc::S_IFIFO | 0o600, 0).unwrap();
    mknod(t.p("c"), libc::S_IFCHR | 0o600, libc::makedev(1, 3)).unwrap();
    mknod(t.p("s"), libc::S_IFSOCK | 0o600, 0).unwrap();
    for n in ["d", "l", "p", "c", "s"] {
        for ns in ["user", "trusted", "security"] {
            let name = format!("{ns}.x");
            t.note(
                &format!("{n} {ns}"),
                (setxattr(t.p(n), &name, b"v", 0), getxattr(t.p(n), &name), removexattr(t.p(n), &name)),
            );
        }
        t.note(&format!("{n} list"), listxattr(t.p(n)));
    }
}

fn xattr_namespaces(t: &mut Case) {
    drop(new_file(t.p("f")));
    chmod(t.p("f"), 0o666).unwrap();
    let f = t.p("f");
    for ns in ["user", "trusted", "security"] {
        setxattr(&f, &format!("{ns}.x"), b"v", 0).unwrap();
    }
    t.note("root lists", listxattr(&f));
    let told = as_nobody(|| {
        (
            listxattr(&f),
            getxattr(&f, "trusted.x"),
            setxattr(&f, "trusted.y", b"1", 0),
            removexattr(&f, "trusted.x"),
            getxattr(&f, "security.x"),
            setxattr(&f, "security.y", b"1", 0),
            removexattr(&f, "security.x"),
            getxattr(&f, "user.x"),
        )
    });
    t.note("user", told);
}

fn xattr_permissions(t: &mut Case) {
    drop(new_file(t.p("f")));
    let f = t.p("f");
    setxattr(&f, "user.x", b"v", 0).unwrap();
    for m in [0o600, 0o644, 0o666, 0o622] {
        chmod(&f, m).unwrap();
        t.note(
            &format!("{m:o}"),
            as_nobody(|| (getxattr(&f, "user.x"), setxattr(&f, "user.y", b"1", 0), listxattr(&f))),
        );
    }
    // Only its owner may put attributes on a sticky directory.
    mkdir(t.p("d"), 0o1777).unwrap();
    chmod(t.p("d"), 0o1777).unwrap();
    let d = t.p("d");
    t.note("sticky directory", as_nobody(|| setxattr(&d, "user.y", b"1", 0)));
    let fd = open(&f, libc::O_RDONLY).unwrap();
    let done = unsafe {
        use std::os::fd::AsRawFd;
        unit(libc::fsetxattr(fd.as_raw_fd(), c"user.z".as_ptr(), b"1".as_ptr().cast(), 1, 0))
    };
    t.note("by descriptor of read", done);
    unlink(&f).unwrap();
    let done = unsafe {
        use std::os::fd::AsRawFd;
        unit(libc::fsetxattr(fd.as_raw_fd(), c"user.w".as_ptr(), b"1".as_ptr().cast(), 1, 0))
    };
    t.note("without a name", done);
}

fn xattr_many(t: &mut Case) {
    drop(new_file(t.p("f")));
    for i in 0..40 {
        setxattr(t.p("f"), &format!("user.attribute-{i:02}"), &[i; 20], 0).unwrap();
    }
    let all = listxattr(t.p("f")).unwrap();
    t.note("list", all);
    for i in (0..40).step_by(2) {
        removexattr(t.p("f"), &format!("user.attribute-{i:02}")).unwrap();
    }
    drop_caches(&t.root);
    t.note("half", listxattr(t.p("f")).map(|l| l.len()));
    t.note(
        "right",
        (1..40).step_by(2).all(|i| getxattr(t.p("f"), &format!("user.attribute-{i:02}")) == Ok(vec![i; 20])),
    );
    fs::copy(t.p("f"), t.p("g")).unwrap();
    let cp = std::process::Command::new("cp").args(["-a"]).arg(t.p("f")).arg(t.p("h")).status().unwrap();
    t.note("cp -a", (cp.success(), listxattr(t.p("h")).map(|l| l.len())));
}
