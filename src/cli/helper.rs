//! `mount.mirrorfs`: the form in which `mount(8)` and systemd call a filesystem named in fstab.
//!
//! `mount.mirrorfs SOURCE MOUNTPOINT [-sfnv] [-N ns] [-t type] [-o options]`, where SOURCE is a configuration file, a
//! replica or `none`. Installed as a symbolic link to the program in `/sbin`.

use std::ffi::{OsStr, OsString};
use std::path::Path;

/// The arguments of `mirrorfs mount` when the program was called as a mount helper; else `arguments` as they are.
pub(super) fn translate(arguments: Vec<OsString>) -> Vec<OsString> {
    let called = arguments.first().and_then(|a| Path::new(a).file_name());
    if called != Some(OsStr::new("mount.mirrorfs")) {
        return arguments;
    }
    let mut out: Vec<OsString> = vec!["mirrorfs".into(), "mount".into()];
    let mut places = Vec::new();
    let mut rest = arguments.into_iter().skip(1);
    while let Some(argument) = rest.next() {
        match argument.to_str() {
            Some("-o") => {
                out.push(argument);
                out.extend(rest.next());
            }
            Some("-t" | "-N") => {
                rest.next();
            }
            // Asked to be lenient, not to write mtab, to be verbose: nothing of it concerns us.
            Some("-s" | "-n" | "-v") => {}
            _ => places.push(argument),
        }
    }
    let mut places = places.into_iter();
    if let Some(source) = places.next().filter(|s| s != OsStr::new("none") && s != OsStr::new("mirrorfs")) {
        let is_config = Path::new(&source).extension() == Some(OsStr::new("toml"));
        out.push(if is_config { "--config".into() } else { "--replica".into() });
        out.push(source);
    }
    out.extend(places);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> String {
        let arguments = text.split(' ').map(OsString::from).collect();
        translate(arguments).iter().map(|a| a.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_helper_s_arguments_become_ours() {
        for (given, taken) in [
            ("mirrorfs mount /m -o ro", "mirrorfs mount /m -o ro"),
            ("/sbin/mount.mirrorfs /etc/m.toml /m", "mirrorfs mount --config /etc/m.toml /m"),
            (
                "mount.mirrorfs s3://b/p /m -n -t mirrorfs -o rw,noauto",
                "mirrorfs mount -o rw,noauto --replica s3://b/p /m",
            ),
            ("mount.mirrorfs none /m -s -v -o config=/c", "mirrorfs mount -o config=/c /m"),
        ] {
            assert_eq!(words(given), taken);
        }
    }
}
