//! `mount -o remount,…`: changes the flags of a live mount.
//!
//! The kernel's flags are all that can change while files are open. A volume that was mounted read-only claims nothing and
//! cannot be written; to make it writable its daemon unmounts, opens it anew, and mounts again.

use std::path::Path;
use std::time::{Duration, Instant};

use super::locate::{self, Located, alive};
use super::{CommandError, Outcome, output, runtime};
use crate::config::layer::{MountList, mount_list};
use crate::config::{Env, settings};
use crate::control::Status;
use crate::daemon::MOUNTED_READ_ONLY;
use crate::exit::Exit;
use crate::fuse;

/// How long a volume may take to be opened anew.
const REOPENING: Duration = Duration::from_secs(300);

pub(super) fn run(mountpoint: &Path, options: Vec<String>) -> Outcome {
    let env = Env::current()?;
    let said = |word: &str| options.iter().any(|o| o == word);
    // Words of no meaning to a filesystem come along from fstab and the list of mounts.
    let atime = ["atime", "relatime", "strictatime"].into_iter().any(said);
    let joined: Vec<String> = options.iter().map(|o| o.replace('\\', "\\\\").replace(',', "\\,")).collect();
    let list = mount_list(&[joined.join(",")], &env.cwd)?;
    let located = locate::find(mountpoint, false)?;
    let flags = flags(&list);
    let stays = not_in_force(&list, &env, &located)?;
    if !flags.read_only {
        make_writable(&located)?;
    }
    fuse::remount(&located.mountpoint, &flags, atime && !flags.noatime && !flags.strictatime)
        .map_err(|error| refused(&located.mountpoint, &flags, &error))?;
    if !stays.is_empty() {
        let stays = stays.join(", ");
        output::note(&format!(
            "mirrorfs: a remount does not change {stays}: that takes effect at the next mount"
        ));
    }
    Ok(())
}

/// What the list asks for, of all that a remount does not change, and is not in force. mount(8)
/// gives the whole line of fstab back, or what the kernel shows of the mount: most of it is.
fn not_in_force(list: &MountList, env: &Env, located: &Located) -> Result<Vec<String>, CommandError> {
    let (asked, replicas) = settings::asked_for(list, env)?;
    if asked.is_empty() && replicas.is_empty() {
        return Ok(Vec::new());
    }
    // Of a daemon that cannot be asked nothing is known: then all is named.
    let status = located.client().and_then(|client| Ok(runtime()?.block_on(client.status())?)).ok();
    let in_force = status.as_ref().map(|s| s.settings.clone()).unwrap_or_default();
    let mut stays: Vec<String> =
        settings::not_in_force(&asked, &in_force).into_iter().map(str::to_owned).collect();
    let works = |url: &str| status.iter().flat_map(|s| &s.replicas).any(|r| r.url == url);
    if replicas.values().any(|url| !works(url)) {
        stays.push("the list of replicas".to_owned());
    }
    Ok(stays)
}

fn flags(list: &MountList) -> fuse::MountOptions {
    let on = |key: &str| list.layer.values.get(key).is_some_and(|given| given.text == "true");
    fuse::MountOptions {
        read_only: on("read_only"),
        suid: !on("nosuid"),
        dev: !on("nodev"),
        noexec: on("noexec"),
        noatime: on("noatime"),
        strictatime: on("strictatime"),
        nodiratime: on("nodiratime"),
        nosymfollow: on("nosymfollow"),
        sync: on("sync"),
        dirsync: on("dirsync"),
        ..fuse::MountOptions::default()
    }
}

fn refused(mountpoint: &Path, flags: &fuse::MountOptions, error: &std::io::Error) -> CommandError {
    let shown = mountpoint.display();
    let why = match error.kind() {
        std::io::ErrorKind::ResourceBusy if flags.read_only => {
            format!("a file is open for writing there; find out by whom with: fuser -vm {shown}")
        }
        std::io::ErrorKind::PermissionDenied => "only root can; unmount and mount again instead".to_owned(),
        _ => error.to_string(),
    };
    CommandError::new(Exit::Failure, format!("cannot change the flags of the mount on {shown}: {why}"))
}

/// Makes sure that the daemon can write before the kernel lets programs try.
fn make_writable(located: &Located) -> Outcome {
    let client = located.client()?;
    let ask = || runtime()?.block_on(client.status()).map_err(CommandError::from);
    let status = ask()?;
    match status.read_only.as_deref() {
        None => Ok(()),
        Some(MOUNTED_READ_ONLY) => {
            runtime()?.block_on(client.reopen())?;
            wait_for_reopening(&status, ask)
        }
        Some(why) => Err(CommandError::new(
            Exit::Failure,
            format!(
                "{} cannot be made writable: {why}; unmount and mount again",
                located.mountpoint.display()
            ),
        )),
    }
}

/// Waits until the daemon, the same process, has mounted again.
fn wait_for_reopening(before: &Status, ask: impl Fn() -> Result<Status, CommandError>) -> Outcome {
    let begin = Instant::now();
    let failed = |exit, why: &str| {
        let message = format!("{} cannot be made writable: {why}", before.mountpoint);
        Err(CommandError::new(exit, message))
    };
    let log = format!("see {}/{}", before.state, super::background::LOG);
    while begin.elapsed() < REOPENING {
        std::thread::sleep(Duration::from_millis(20));
        match ask() {
            Ok(now) if now.started_at > before.started_at => {
                return match now.read_only {
                    None => Ok(()),
                    Some(_) => failed(Exit::Failure, &format!("it was mounted read-only again; {log}")),
                };
            }
            _ if !alive(before.pid) => return failed(Exit::Failure, &format!("its daemon ended; {log}")),
            _ => {}
        }
    }
    failed(Exit::TimedOut, &format!("it is still being opened; {log}"))
}
