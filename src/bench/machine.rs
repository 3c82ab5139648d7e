//! Where figures were taken, and whether the machine has anything else to do.
//!
//! Owns the reading of `/proc`; the parsers are pure.

use std::fs;
use std::time::{Duration, Instant};

use serde::Serialize;

/// What figures depend on beside the program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// The processor's model; empty when the system does not say.
    pub cpu: String,
    /// How many of them this process may use.
    pub cpus: usize,
    /// Bytes of memory.
    pub memory: u64,
    /// The kernel: `Linux 6.18.5`.
    pub kernel: String,
}

impl Machine {
    /// This one.
    #[must_use]
    pub fn here() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let kernel = read("/proc/sys/kernel/ostype").trim().to_owned();
        Self {
            cpu: cpu_model(&read("/proc/cpuinfo")),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory: memory(&read("/proc/meminfo")),
            kernel: format!("{kernel} {}", read("/proc/sys/kernel/osrelease").trim()),
        }
    }
}

fn cpu_model(cpuinfo: &str) -> String {
    let named = |name: &str| {
        let lines = cpuinfo.lines().filter_map(|line| line.split_once(':'));
        lines.map(|(key, value)| (key.trim(), value.trim())).find(|(key, _)| *key == name).map(|(_, v)| v)
    };
    named("model name").or_else(|| named("Model")).unwrap_or_default().to_owned()
}

fn memory(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).map_or(0, |kib| kib << 10)
}

/// Share of the time in which at least this much of the CPUs does nothing: then a machine counts as idle.
const IDLE: f64 = 0.85;
const WINDOW: Duration = Duration::from_millis(100);

/// Waits until the CPUs have nothing to do and wait for no disk, at most `most`; answers whether they came to that. With no time at all it
/// does not look, and answers yes.
pub(super) fn wait_idle(most: Duration) -> bool {
    if most.is_zero() {
        return true;
    }
    let begin = Instant::now();
    let look = || fs::read_to_string("/proc/stat").ok().and_then(|text| cpu_times(&text));
    let Some(mut before) = look() else { return true };
    loop {
        std::thread::sleep(WINDOW);
        let Some(now) = look() else { return true };
        if idle_share(before, now) >= IDLE {
            return true;
        }
        if begin.elapsed() >= most {
            return false;
        }
        before = now;
    }
}

/// Ticks of all CPUs since the start: idle, and in all. Waiting for a disk is not idle.
fn cpu_times(stat: &str) -> Option<(u64, u64)> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<u64> = line.split_whitespace().take(8).map_while(|n| n.parse().ok()).collect();
    Some((*ticks.get(3)?, ticks.iter().sum()))
}

fn idle_share(before: (u64, u64), now: (u64, u64)) -> f64 {
    let all = now.1.saturating_sub(before.1);
    if all == 0 { 1.0 } else { now.0.saturating_sub(before.0) as f64 / all as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_is_understood() {
        let x86 = "processor\t: 0\nmodel\t\t: 106\nmodel name\t: Some CPU @ 2.9\n\nprocessor\t: 1\nmodel name\t: Other\n";
        assert_eq!(cpu_model(x86), "Some CPU @ 2.9");
        assert_eq!(cpu_model("processor: 0\nModel : Raspberry\n"), "Raspberry");
        assert_eq!(cpu_model(""), "");
        assert_eq!(memory("MemFree: 1 kB\nMemTotal:       24684000 kB\n"), 24_684_000 << 10);
        assert_eq!(memory("nothing"), 0);
        assert_eq!(cpu_times("cpu  1 2 3 10 20 5 6 7 8 9\ncpu0 1 1 1 1\n"), Some((10, 54)));
        assert_eq!(cpu_times("intr 5\n"), None);
    }

    #[test]
    fn idle_is_what_neither_works_nor_waits_for_a_disk() {
        assert!((idle_share((10, 100), (29, 120)) - 0.95).abs() < 1e-9);
        assert!(idle_share((10, 100), (15, 120)) < IDLE);
        assert!((idle_share((10, 100), (10, 100)) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn this_machine_says_what_it_is() {
        let here = Machine::here();
        assert!(here.cpus > 0 && here.memory > 1 << 20 && here.kernel.starts_with("Linux "), "{here:?}");
    }
}
