//! Real servers under load: each in turn is killed, hung and cut off, while programs write and read.
//!
//! What they notice is measured and printed; afterwards all replicas are equal, and each alone brings everything back.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mirrorfs::replica::{ReplicaSpec, Store};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use support::azurite::{ACCOUNT, Azurite};
use support::gcs::GcsDouble;
use support::moto::Moto;
use support::mount::{How, Mount, Volume, drop_page_cache};
use support::proxy::Proxy;
use support::run::{seed, wait_until};
use support::s3::S3Server;
use support::tree::{Content, Snapshot};

/// How long each fault lasts: longer than a call may take, so that calls do time out.
const FAULT: Duration = Duration::from_millis(3500);
/// The time between two faults.
const REST: Duration = Duration::from_millis(1200);
/// Nobody may wait longer than this for anything. Generous: the machine may be slow, the network is not waited for.
const BOUND: Duration = Duration::from_secs(20);
/// Files that are read without being cached, and their size: more than the cache holds.
const COLD: (u64, usize) = (20, 2 << 20);

/// What is broken, and how.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Break {
    Kill,
    Hang,
    Blackhole,
}

/// The servers of a volume, each behind a proxy.
struct Servers {
    moto: Option<(Moto, Proxy)>,
    azure: Option<(Azurite, Proxy)>,
    gcs: (GcsDouble, Proxy),
    folder: PathBuf,
}

impl Servers {
    fn start(v: &mut Volume) -> Self {
        let patience = [("timeout", "2s"), ("connect_timeout", "1s")];
        let moto = Moto::start("servers").map(|moto| {
            let proxy = Proxy::start(moto.addr());
            v.spec(&moto.spec("s3", &proxy.url(), "mirror", &patience));
            (moto, proxy)
        });
        let azure = Azurite::start("servers").map(|azure| {
            let proxy = Proxy::start(azure.addr());
            let endpoint = format!("{}/{ACCOUNT}", proxy.url());
            let more = [patience[0], patience[1], ("endpoint", &endpoint)];
            v.spec(&azure.spec("azure", "mirror", &more));
            (azure, proxy)
        });
        let gcs = GcsDouble::start();
        let proxy = Proxy::start(gcs.http.addr());
        let url = proxy.url();
        v.spec(&gcs.spec("gcs", "mirror", &[patience[0], patience[1], ("base_url", &url)]));
        let folder = v.folder("dir");
        Self { moto, azure, gcs: (gcs, proxy), folder }
    }

    fn names(&self) -> Vec<&'static str> {
        let found =
            [("s3", self.moto.is_some()), ("azure", self.azure.is_some()), ("gcs", true), ("dir", true)];
        found.into_iter().filter(|f| f.1).map(|f| f.0).collect()
    }

    fn proxy(&self, name: &str) -> Option<&Proxy> {
        match name {
            "s3" => self.moto.as_ref().map(|m| &m.1),
            "azure" => self.azure.as_ref().map(|a| &a.1),
            "gcs" => Some(&self.gcs.1),
            _ => None,
        }
    }

    /// All that can be done to a replica. A folder can only be taken away.
    fn phases(&self) -> Vec<(&'static str, Break)> {
        let mut phases = Vec::new();
        for how in [Break::Kill, Break::Hang, Break::Blackhole] {
            let breaks = self.names().into_iter().filter(|n| *n != "dir" || how == Break::Kill);
            phases.extend(breaks.map(|n| (n, how)));
        }
        phases
    }

    fn break_it(&mut self, name: &str, how: Break) {
        if let (Break::Blackhole, Some(proxy)) = (how, self.proxy(name)) {
            proxy.faults.blackhole.store(true, Ordering::Relaxed);
            return;
        }
        match (name, how) {
            ("s3", Break::Kill) => self.moto.as_mut().unwrap().0.kill9(),
            ("s3", _) => self.moto.as_ref().unwrap().0.hang(true),
            ("azure", Break::Kill) => self.azure.as_mut().unwrap().0.kill9(),
            ("azure", _) => self.azure.as_ref().unwrap().0.hang(true),
            ("gcs", Break::Kill) => self.gcs.0.http.stop(),
            ("gcs", _) => self.gcs.0.http.hang(true),
            _ => fs::rename(&self.folder, away(&self.folder)).unwrap(),
        }
    }

    fn mend(&mut self, name: &str, how: Break) {
        if let (Break::Blackhole, Some(proxy)) = (how, self.proxy(name)) {
            proxy.faults.blackhole.store(false, Ordering::Relaxed);
            return;
        }
        match (name, how) {
            ("s3", Break::Kill) => self.moto_apart(Moto::restart),
            ("s3", _) => self.moto.as_ref().unwrap().0.hang(false),
            ("azure", Break::Kill) => self.azure.as_mut().unwrap().0.restart(),
            ("azure", _) => self.azure.as_ref().unwrap().0.hang(false),
            ("gcs", Break::Kill) => self.gcs.0.http.restart(),
            ("gcs", _) => self.gcs.0.http.hang(false),
            _ => {
                // The daemon may have made it anew and filled it: then the old one is not put in its place.
                if fs::rename(away(&self.folder), &self.folder).is_err() {
                    fs::remove_dir_all(away(&self.folder)).unwrap();
                }
            }
        }
    }

    /// Does something to moto while the mount does not talk to it.
    fn moto_apart(&mut self, what: impl FnOnce(&mut Moto)) {
        let (moto, proxy) = self.moto.as_mut().unwrap();
        proxy.faults.refuse.store(true, Ordering::Relaxed);
        what(moto);
        proxy.faults.refuse.store(false, Ordering::Relaxed);
    }

    /// Every replica's store, without proxies.
    fn stores(&self) -> Vec<(&'static str, Store)> {
        let spec = |name: &'static str, spec: ReplicaSpec| (name, spec.store().unwrap());
        let mut stores = Vec::new();
        if let Some((moto, _)) = &self.moto {
            stores.push(spec("s3", moto.spec("s3", &format!("http://{}", moto.addr()), "mirror", &[])));
        }
        if let Some((azure, _)) = &self.azure {
            stores.push(spec("azure", azure.spec("azure", "mirror", &[])));
        }
        stores.push(spec("gcs", self.gcs.0.spec("gcs", "mirror", &[])));
        stores.push(spec("dir", support::spec("dir", self.folder.to_str().unwrap(), &[])));
        stores
    }
}

fn away(folder: &Path) -> PathBuf {
    folder.with_extension("away")
}

/// What the load did and how long it took.
#[derive(Default)]
struct Load {
    stop: AtomicBool,
    phase: AtomicUsize,
    took: Mutex<BTreeMap<(usize, &'static str), Vec<Duration>>>,
    /// Content of every file that is complete, by its seed.
    small: Mutex<BTreeMap<String, u64>>,
}

impl Load {
    fn running(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn timed<T>(&self, what: &'static str, work: impl FnOnce() -> T) -> T {
        let (phase, began) = (self.phase.load(Ordering::Relaxed), Instant::now());
        let done = work();
        self.took.lock().unwrap().entry((phase, what)).or_default().push(began.elapsed());
        done
    }

    /// Small files, made and made again, every tenth synced.
    fn small_files(&self, root: &Path, seed: u64) {
        let dir = root.join(format!("small-{seed}"));
        fs::create_dir(&dir).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for n in 0.. {
            if !self.running() {
                return;
            }
            let name = format!("f{}", rng.random_range(0..300));
            let path = dir.join(&name);
            self.timed("write", || {
                let mut f = File::create(&path).unwrap();
                f.write_all(&small_content(seed + n)).unwrap();
            });
            self.small.lock().unwrap().insert(format!("small-{seed}/{name}"), seed + n);
            if n % 10 == 0 {
                self.timed("fsync", || File::open(&path).unwrap().sync_all().unwrap());
            }
            thread::sleep(Duration::from_millis(8));
        }
    }

    /// One big file, overwritten piece by piece. Gives what it must hold.
    fn big_file(&self, root: &Path, seed: u64) -> Vec<u8> {
        const PIECE: usize = 96 << 10;
        let mut expected = vec![0; 12 << 20];
        let f = OpenOptions::new().create(true).truncate(true).write(true).open(root.join("big")).unwrap();
        f.write_all_at(&expected, 0).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for n in 0u64.. {
            if !self.running() {
                break;
            }
            let at = rng.random_range(0..expected.len() - PIECE);
            let piece = Content::new(seed + n).take(PIECE);
            self.timed("write", || f.write_all_at(&piece, at as u64).unwrap());
            expected[at..at + PIECE].copy_from_slice(&piece);
            if n % 8 == 0 {
                self.timed("fsync", || f.sync_all().unwrap());
            }
            thread::sleep(Duration::from_millis(80));
        }
        expected
    }

    /// Reads pieces of files that are hardly ever cached, and compares them.
    fn cold_reads(&self, what: &'static str, root: &Path, seed: u64) {
        let contents: Vec<_> = (0..COLD.0).map(cold_content).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        while self.running() {
            let i = rng.random_range(0..COLD.0);
            let path = root.join(cold_name(i));
            // Otherwise the kernel would answer.
            drop_page_cache(&path);
            let at = rng.random_range(0..COLD.1 - 4096);
            let mut got = vec![0; 4096];
            self.timed(what, || File::open(&path).unwrap().read_exact_at(&mut got, at as u64).unwrap());
            assert!(got == contents[i as usize][at..at + 4096], "wrong bytes in {} at {at}", path.display());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Prints what each phase was like, and gives the longest time of all.
    fn report(&self, phases: &[String]) -> Duration {
        let mut worst = Duration::ZERO;
        println!("{:24} {:>8} {:>8} {:>10} {:>10}", "phase", "", "number", "p99 ms", "max ms");
        for ((phase, what), took) in self.took.lock().unwrap().iter_mut() {
            took.sort();
            let p99 = took[(took.len() - 1) * 99 / 100];
            let max = took[took.len() - 1];
            let ms = |d: Duration| d.as_secs_f64() * 1e3;
            let phase = &phases[*phase];
            println!("{phase:24} {what:>8} {:8} {:10.1} {:10.1}", took.len(), ms(p99), ms(max));
            worst = worst.max(max);
        }
        worst
    }
}

fn small_content(seed: u64) -> Vec<u8> {
    // Some live in their inode, some in a block.
    Content::new(seed).take(200 + (seed % 7) as usize * 1500)
}

fn cold_content(i: u64) -> Vec<u8> {
    Content::new(i * 4).take(COLD.1)
}

fn cold_name(i: u64) -> String {
    format!("cold-{i}")
}

/// Waits until all replicas hold the same, everything.
fn wait_equal(m: &Mount, what: &str) -> Duration {
    let began = Instant::now();
    wait_until(Duration::from_secs(120), what, || {
        let status = m.status();
        let replicas = status["replicas"].as_array().unwrap();
        let (lag, cursor) = (|r: &serde_json::Value| r["lag_segments"] == 0, &replicas[0]["cursor"]);
        replicas.iter().all(|r| lag(r) && r["cursor"] == *cursor && r["state"] == "healthy")
    });
    began.elapsed()
}

/// All segments of all replicas, byte for byte.
fn assert_same_segments(servers: &Servers) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut first: Option<(&str, BTreeMap<String, bytes::Bytes>)> = None;
    for (name, store) in servers.stores() {
        let objects: BTreeMap<_, _> = runtime.block_on(async {
            let mut objects = BTreeMap::new();
            for o in store.list("segments").await.unwrap() {
                let bytes = store.get(&o.path).await.unwrap();
                objects.insert(o.path, bytes);
            }
            objects
        });
        let Some((other, expected)) = &first else {
            println!(
                "{} segments, {} bytes",
                objects.len(),
                objects.values().map(|b| b.len()).sum::<usize>()
            );
            first = Some((name, objects));
            continue;
        };
        let (a, b): (Vec<_>, Vec<_>) = (expected.keys().collect(), objects.keys().collect());
        assert_eq!(a, b, "segments on {other} and {name}");
        let differing: Vec<_> = expected.iter().filter(|(k, v)| objects[*k] != **v).map(|(k, _)| k).collect();
        assert!(differing.is_empty(), "{other} and {name} differ in {differing:?}");
    }
}

#[test]
fn servers_killed_hung_and_cut_off_under_load() {
    let Some(mut v) = Volume::new("servers") else { return };
    let seed = seed("servers") % (1 << 32);
    let began = Instant::now();
    let mut servers = Servers::start(&mut v);
    v.setting("cache_size = \"20MiB\"\nblock_size = \"256KiB\"\ncommit_interval = \"1s\"");
    let m = v.mount();
    for i in 0..COLD.0 {
        fs::write(m.path(cold_name(i)), cold_content(i)).unwrap();
    }
    m.sync();
    // One more mount knows the servers alone: its reads cannot fall back on the folder, which is faster than all of them.
    let others: Vec<_> = servers.names().into_iter().filter(|n| *n != "dir").collect();
    let far = v.mount_as(&How::usual().state("far").only(&others).arg("--read-only"));
    println!("ready after {:?}", began.elapsed());

    let phases = servers.phases();
    let mut names = vec!["all well".to_owned()];
    names.extend(phases.iter().map(|(name, how)| format!("{name} {how:?}").to_lowercase()));
    names.push("wrong credentials".to_owned());
    let load = Load::default();
    let big = thread::scope(|scope| {
        let (load, root, far) = (&load, m.root(), &far);
        scope.spawn(move || load.small_files(root, seed));
        scope.spawn(move || load.cold_reads("read", root, seed));
        scope.spawn(move || load.cold_reads("far read", far.root(), seed + 1));
        let big = scope.spawn(move || load.big_file(root, seed));
        // Whatever fails below, the load must end.
        let stop = StopAtEnd(&load.stop);
        thread::sleep(FAULT);
        for (i, (name, how)) in phases.iter().enumerate() {
            load.phase.store(i + 1, Ordering::Relaxed);
            servers.break_it(name, *how);
            thread::sleep(FAULT);
            servers.mend(name, *how);
            thread::sleep(REST);
        }
        load.phase.store(phases.len() + 1, Ordering::Relaxed);
        if servers.moto.is_some() {
            credentials_that_stop_working(&m, &mut servers);
        }
        drop(stop);
        big.join().unwrap()
    });
    let worst = load.report(&names);
    println!("load ended after {:?}", began.elapsed());
    m.ask(&["sync"], &["--replicas", "1", "--timeout", "60"]).ok();
    println!("all replicas equal {:?} later", wait_equal(&m, "all replicas converge"));

    assert!(fs::read(m.path("big")).unwrap() == big, "the big file");
    for (name, seed) in load.small.lock().unwrap().iter() {
        assert!(fs::read(m.path(name)).unwrap() == small_content(*seed), "{name}");
    }
    let expected = Snapshot::take(m.root());
    far.unmount();
    m.unmount();
    assert_same_segments(&servers);
    for name in servers.names() {
        let to = v.restore(name, &format!("restored-{name}"));
        expected.assert_same(&Snapshot::take(&to), &format!("restored from {name}"));
        fs::remove_dir_all(to).unwrap();
    }
    println!("done after {:?}", began.elapsed());
    assert!(worst < BOUND, "somebody waited {worst:?}");
}

/// The key is deleted, and comes back.
fn credentials_that_stop_working(m: &Mount, servers: &mut Servers) {
    servers.moto.as_ref().unwrap().0.delete_key();
    let mut seen = serde_json::Value::Null;
    wait_until(Duration::from_secs(60), "deleted credentials are reported as denied", || {
        seen = m.replica_status("s3");
        seen["state"] == "denied"
    });
    let text = seen["last_error"]["text"].as_str().unwrap_or_default();
    assert!(text.contains("credentials"), "{seen}");
    assert_eq!(seen["last_error"]["kind"], "denied", "{seen}");
    servers.moto_apart(Moto::create_key);
    wait_until(Duration::from_secs(60), "it goes on with credentials that work again", || {
        m.replica_status("s3")["state"] == "healthy"
    });
}

struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// No test: the S3 double as a server for `scripts/bench-behind`, until its standard input ends.
#[test]
#[ignore = "a server for scripts/bench-behind"]
fn serve_s3() {
    let server = S3Server::start();
    println!("\nserving {}", server.http.url());
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).unwrap();
}
