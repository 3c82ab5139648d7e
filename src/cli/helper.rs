//! `mount.mirrorfs`: the form in which `mount(8)` and systemd call a filesystem named in fstab.
//!
//! `mount.mirrorfs SOURCE MOUNTPOINT [-sfnv] [-N ns] [-t type] [-o options]`, where SOURCE is a configuration file, a
//! replica or `none`. Installed as symbolic links to the program, `/sbin/mount.mirrorfs` and `/sbin/mount.fuse.mirrorfs`. The
//! general helper for FUSE, `mount.fuse3`, calls `mirrorfs SOURCE MOUNTPOINT -o options`, which is the same.
//!
//! Owns the translation of such a call into ours, and of our exit codes into those of mount(8).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use crate::config::layer::{SLOPPY, escape_value, split_list};
use crate::exit::Exit;

/// The names under which the program is a mount helper.
const NAMES: [&str; 2] = ["mount.mirrorfs", "mount.fuse.mirrorfs"];

/// How the program was called.
#[derive(Debug, PartialEq)]
pub(super) enum Call {
    /// With a command line of our own.
    Own(Vec<OsString>),
    /// By mount(8), to mount: the same as `mirrorfs` with these arguments.
    Mount {
        /// `mirrorfs mount …`
        arguments: Vec<OsString>,
        /// Everything but the mount itself (`-f`).
        fake: bool,
    },
    /// By mount(8), to change the flags of a mount.
    Remount {
        /// Where it is mounted.
        mountpoint: OsString,
        /// Every word of the lists of options but `remount`.
        options: Vec<String>,
    },
    /// By mount(8), in a way that we do not understand.
    Wrong(String),
}

/// Tells whether these are our own arguments or those of a mount helper.
pub(super) fn translate(arguments: Vec<OsString>) -> Call {
    let called = arguments.first().and_then(|a| Path::new(a).file_name());
    let by_name = NAMES.iter().any(|name| called == Some(OsStr::new(name)));
    if by_name || by_mount_fuse(&arguments) {
        return as_helper(arguments.into_iter().skip(1)).unwrap_or_else(Call::Wrong);
    }
    Call::Own(arguments)
}

/// `mirrorfs SOURCE MOUNTPOINT -o options`; no command of ours takes that form.
fn by_mount_fuse(arguments: &[OsString]) -> bool {
    let command = |word: &OsString| {
        let word = word.to_string_lossy();
        word.starts_with('-') || super::is_command(&word)
    };
    matches!(arguments, [_, source, place, option, _] if option == "-o" && !command(source) && !command(place))
}

fn as_helper(mut rest: impl Iterator<Item = OsString>) -> Result<Call, String> {
    let (mut places, mut options) = (Vec::new(), Vec::new());
    let (mut fake, mut sloppy, mut verbose) = (false, false, false);
    while let Some(argument) = rest.next() {
        match argument.as_bytes() {
            b"-o" | b"-t" | b"-N" => {
                let shown = argument.to_string_lossy().into_owned();
                let value = rest.next().ok_or_else(|| format!("{shown} needs a value"))?;
                if shown == "-o" {
                    let text = value.into_string().map_err(|_| "the list of options is not valid text")?;
                    options.extend(split_list(&text));
                }
            }
            [b'-', flags @ ..] if !flags.is_empty() && flags.iter().all(|f| b"sfnvrw".contains(f)) => {
                for flag in flags {
                    match flag {
                        b's' => sloppy = true,
                        b'f' => fake = true,
                        b'v' => verbose = true,
                        b'r' => options.push("ro".into()),
                        b'w' => options.push("rw".into()),
                        // No mtab: there is none.
                        _ => {}
                    }
                }
            }
            [b'-', _, ..] => return Err(format!("unknown flag {}", argument.to_string_lossy())),
            _ => places.push(argument),
        }
    }
    let [source, mountpoint] = <[OsString; 2]>::try_from(places).map_err(|places| {
        format!("usage: mount.mirrorfs SOURCE MOUNTPOINT [-sfnv] [-o OPTIONS]; {} given", places.len())
    })?;
    if options.iter().any(|o| o == "remount") {
        options.retain(|o| o != "remount");
        return Ok(Call::Remount { mountpoint, options });
    }
    // mount(8) always says one of them, whether it was asked to or not: what the configuration says is to hold.
    let read_only =
        options.iter().rev().find(|o| matches!(o.as_str(), "ro" | "rw")).is_some_and(|o| o == "ro");
    options.retain(|o| !matches!(o.as_str(), "ro" | "rw"));
    if read_only {
        options.push("ro".into());
    }
    if sloppy {
        options.push(SLOPPY.into());
    }
    let mut arguments: Vec<OsString> = vec!["mirrorfs".into(), "mount".into()];
    if !verbose {
        arguments.push("--quiet".into());
    }
    // What is shown as mounted is what was named, so that `mount -a` and `umount SOURCE` know it again.
    let text = source.to_string_lossy().into_owned();
    let mut list = vec![format!("fsname={}", escape_value(&text))];
    if source != "none" && source != "mirrorfs" {
        if is_config(&source) {
            arguments.extend(["--config".into(), as_path(source)]);
        } else if source.to_str().is_some() {
            // Beside others that the list may name.
            list.push(format!("replica={}", escape_value(&text)));
        } else {
            return Err(format!("the replica {text} is not valid text"));
        }
    }
    list.extend(options.iter().map(|o| escape_option(o)));
    arguments.extend(["-o".into(), list.join(",").into()]);
    arguments.push(as_path(mountpoint));
    Ok(Call::Mount { arguments, fake })
}

/// The word as [`split_list`] reads it back.
fn escape_option(word: &str) -> String {
    match word.split_once('=') {
        Some((key, value)) => format!("{key}={}", escape_value(value)),
        None => escape_value(word),
    }
}

/// A file, or what can only be meant as one.
fn is_config(source: &OsStr) -> bool {
    let path = Path::new(source);
    path.extension() == Some(OsStr::new("toml")) || path.is_file()
}

/// A path that cannot be taken for a flag.
fn as_path(word: OsString) -> OsString {
    if word.as_bytes().first() != Some(&b'-') {
        return word;
    }
    let mut path = b"./".to_vec();
    path.extend(word.into_vec());
    OsString::from_vec(path)
}

/// The code with which a mount helper ends, in the terms of mount(8): 1 for a wrong call, 32 for a mount that failed.
pub(super) fn exit_code(exit: Exit) -> u8 {
    match exit {
        Exit::Done => 0,
        Exit::Usage => 1,
        _ => 32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(text: &str) -> Call {
        translate(text.split(' ').map(OsString::from).collect())
    }

    fn words(text: &str) -> String {
        match call(text) {
            Call::Own(arguments) | Call::Mount { arguments, .. } => {
                arguments.iter().map(|a| a.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
            }
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn the_helper_s_arguments_become_ours() {
        for (given, taken) in [
            ("mirrorfs mount /m -o ro", "mirrorfs mount /m -o ro"),
            ("mirrorfs status /m", "mirrorfs status /m"),
            (
                "/sbin/mount.mirrorfs /etc/m.toml /m",
                "mirrorfs mount --quiet --config /etc/m.toml -o fsname=/etc/m.toml /m",
            ),
            (
                "mount.mirrorfs s3://b/p /m -n -t mirrorfs -o rw,noauto",
                "mirrorfs mount --quiet -o fsname=s3://b/p,replica=s3://b/p,noauto /m",
            ),
            (
                "mount.fuse.mirrorfs none /m -sv -o config=/c",
                "mirrorfs mount -o fsname=none,config=/c,x-mirrorfs.sloppy /m",
            ),
            (
                "mount.fuse.mirrorfs /a,b /m -o ro,replica=x\\,y",
                "mirrorfs mount --quiet -o fsname=/a\\,b,replica=/a\\,b,replica=x\\,y,ro /m",
            ),
            // As mount.fuse3 does.
            ("mirrorfs /r /m -o rw,dev,suid", "mirrorfs mount --quiet -o fsname=/r,replica=/r,dev,suid /m"),
            ("mount.mirrorfs -x /m -f", "Wrong(\"unknown flag -x\")"),
        ] {
            assert_eq!(words(given), taken, "{given}");
        }
        assert!(matches!(call("mount.mirrorfs /r /m -fn"), Call::Mount { fake: true, .. }));
        assert!(matches!(call("mount.mirrorfs /r"), Call::Wrong(why) if why.contains("1 given")));
        assert!(matches!(call("mount.mirrorfs /r /m -o"), Call::Wrong(why) if why == "-o needs a value"));
    }

    #[test]
    fn a_remount_is_told_apart() {
        let wanted = Call::Remount { mountpoint: "/m".into(), options: vec!["ro".into(), "noatime".into()] };
        assert_eq!(call("mount.mirrorfs /r /m -o ro,remount,noatime"), wanted);
    }

    #[test]
    fn codes_are_those_of_mount() {
        assert_eq!([Exit::Done, Exit::Usage, Exit::InUse, Exit::Failure].map(exit_code), [0, 1, 32, 32]);
    }
}
