//! The `mirrorfs` program: hands over to [`mirrorfs::cli`].
//!
//! With jemalloc in place of the system's allocator: a daemon runs for months with many threads, and glibc's arenas
//! kept twice the memory that was in use (519 MB against 260 MB after creating a million files).

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// jemalloc's settings, which it looks for under this name: memory that was freed goes back to the system
/// after two seconds, also while nothing is allocated; few arenas, since threads here mostly wait.
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static MALLOC_CONF: &[u8] = b"background_thread:true,dirty_decay_ms:2000,muzzy_decay_ms:0,narenas:4\0";

fn main() -> std::process::ExitCode {
    mirrorfs::cli::main()
}
