//! Limits of speed and of patience, through the program: what `status` shows, what a sync takes, how a read ends when nobody answers.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;
use std::time::{Duration, Instant};

use support::mount::{How, Volume, drop_page_cache};
use support::run::wait_until;
use support::s3::S3Server;
use support::tree::Content;

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn an_upload_limit_holds_and_shows() {
    let Some(mut volume) = Volume::new("limits") else { return };
    let folder = volume.path("replica-a");
    fs::create_dir(&folder).unwrap();
    volume.replica("a", folder.to_str().unwrap(), &[("upload_limit", "00:00,300KiB 12:00,300KiB")]);
    let arg = "--replica-option=a.download_limit=1GiB/s";
    let mount = volume.mount_as(&How::usual().arg(arg).arg("--commit-interval=100ms"));
    let started = Instant::now();
    // Several segments, of which the last may run into debt and the first is free.
    for i in 0..4 {
        fs::write(mount.path(format!("f{i}")), Content::new(4 * i).take(400_000)).unwrap();
        let done = mount.ask(&["sync"], &["--timeout", "60"]);
        assert_eq!(done.code, Some(0), "{}", done.stderr);
    }
    // 1200 KB behind the first one, at 300 KiB/s.
    assert!(started.elapsed() > Duration::from_millis(2500), "{:?}", started.elapsed());
    let status = mount.replica_status("a");
    assert_eq!(status["upload_limit"], 300 << 10, "{status}");
    assert_eq!(status["download_limit"], 1u64 << 30, "{status}");
    assert_eq!(status["state"], "healthy", "waiting for a limit is no fault of the replica: {status}");
    assert!(status["last_error"].is_null(), "{status}");
    mount.unmount();
}

#[test]
fn a_read_that_nobody_answers_ends_in_time_and_names_the_file() {
    let Some(mut volume) = Volume::new("nobody") else { return };
    let mut s3 = S3Server::start();
    let mut options = S3Server::options(&s3.http.url());
    options.push(("connect_timeout".into(), "1s".into()));
    let options: Vec<(&str, &str)> = options.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    volume.replica("a", "s3://bucket/p", &options);
    let mount = volume.mount();
    fs::create_dir_all(mount.path("some/where")).unwrap();
    // Whole blocks: small ones would come along with the first that is read.
    let content: Vec<Vec<u8>> = (0..4).map(|i| Content::new(4 * i).take(3 << 20)).collect();
    for (i, bytes) in content.iter().enumerate() {
        fs::write(mount.path(format!("some/where/file {i}")), bytes).unwrap();
    }
    mount.sync();
    mount.unmount();

    // Another machine, which has nothing of it yet.
    let mount = volume.mount_as(&How::usual().state("other").arg("--read-timeout=2s"));
    let read = |i: usize| {
        let path = mount.path(format!("some/where/file {i}"));
        drop_page_cache(&path);
        let started = Instant::now();
        (fs::read(&path), started.elapsed())
    };
    assert_eq!(read(0).0.unwrap(), content[0]);
    s3.http.stop();
    let (failed, took) = read(1);
    assert_eq!(failed.unwrap_err().raw_os_error(), Some(libc::EIO));
    assert!(took > Duration::from_millis(1500) && took < LIMIT, "{took:?}");
    wait_until(LIMIT, "the file is named", || {
        mount.told().contains("/some/where/file 1 (inode") && mount.told().contains("replica a")
    });
    // What has been away for long is not waited for.
    wait_until(LIMIT, "reads fail at once", || {
        let (failed, took) = read(2);
        assert_eq!(failed.unwrap_err().raw_os_error(), Some(libc::EIO));
        took < Duration::from_secs(1)
    });
    assert_eq!(read(0).0.unwrap(), content[0], "what is here can be read");
    s3.http.restart();
    let (found, took) = read(3);
    assert_eq!(found.unwrap(), content[3], "at once when it is back, after {took:?}");
    mount.unmount();
}
