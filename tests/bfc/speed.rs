//! How long packing takes, compared with tar and zstd on the same machine at the same time; memory.
//!
//! Figures are ratios, and of a large file ratios of processor time: a slow or busy machine passes. How much depends on the
//! build, which for `make test` is not optimized. `BFC_LONG=1` with an optimized program (`LXCRI_BIN`) asserts the absolute
//! figures, too: `make bench` does.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{ok, temp};

fn long() -> bool {
    std::env::var_os("BFC_LONG").is_some()
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

/// Processor time of all children that have ended: user and system, to a hundredth of a second.
fn children() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks = |n: usize| fields[n].parse::<u64>().unwrap();
    Duration::from_millis((ticks(13) + ticks(14)) * 10)
}

/// Processor time that the children of `work` take, and the time that it takes.
fn measured(work: impl FnOnce()) -> (Duration, Duration) {
    let before = children();
    let elapsed = timed(work);
    (children() - before, elapsed)
}

fn small_files(folder: &Path, count: usize) {
    for n in 0..count {
        let sub = folder.join(format!("d{:03}", n / 400));
        if n % 400 == 0 {
            std::fs::create_dir_all(&sub).unwrap();
        }
        std::fs::write(sub.join(format!("file-{n}")), format!("{n} some small content {n}\n").repeat(4)).unwrap();
    }
}

#[test]
fn many_small_files_take_time_by_their_number() {
    let (_dir, dir) = temp();
    let mut took = Vec::new();
    for count in [10_000, 40_000] {
        let (input, out) = (dir.join(format!("in{count}")), dir.join(format!("{count}.bfc")));
        small_files(input.as_std_path(), count);
        let pack = timed(|| drop(ok(&["create", "-q", "-c", "zstd", out.as_str(), input.as_str()])));
        let list = timed(|| assert_eq!(ok(&["list", out.as_str()]).lines().count(), 1 + count / 400 + count));
        println!("figure: {count} files: pack {:.2} s, list {:.3} s", pack.as_secs_f64(), list.as_secs_f64());
        took.push((pack, list));
    }
    // Four times as many: twice that for noise. Work that grows with the square would take sixteen times as long.
    assert!(took[1].0 < took[0].0 * 8, "packing: {took:?}");
    assert!(took[1].1 < took[0].1 * 8 + Duration::from_millis(300), "listing: {took:?}");
    if long() {
        assert!(took[1].0 < Duration::from_secs(5) && took[1].1 < Duration::from_millis(200), "{took:?}");
    }
}

/// Half of it can be compressed, in pieces.
fn big_file(path: &Path, size: usize) {
    use std::io::Write;
    let mut file = std::io::BufWriter::new(std::fs::File::create(path).unwrap());
    let (mut state, mut written) = (1_u64, 0);
    let mut piece = vec![0_u8; 64 << 10];
    while written < size {
        for chunk in piece.chunks_mut(16) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            chunk[..8].copy_from_slice(&state.to_le_bytes());
            chunk[8..].copy_from_slice(b"the same");
        }
        file.write_all(&piece).unwrap();
        written += piece.len();
    }
    file.flush().unwrap();
}

/// Runs `bfc ARGS` with at most so much memory for data (the kernel fails what wants more).
fn within(mib: u64, args: &[&str]) -> (Duration, Duration) {
    let program = std::env::var_os("LXCRI_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_proxmox-lxcri").into());
    let mut command = Command::new(program);
    command.arg("bfc").args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    let limit = rustix::process::Rlimit { current: Some(mib << 20), maximum: Some(mib << 20) };
    // SAFETY: setrlimit(2) is a plain system call; nothing is allocated between fork and exec.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(move || Ok(rustix::process::setrlimit(rustix::process::Resource::Data, limit)?));
    }
    measured(|| {
        let out = command.output().unwrap();
        assert!(out.status.success(), "bfc {args:?}: {}", super::support::describe(&out));
    })
}

fn run(program: &str, args: &[&str]) -> (Duration, Duration) {
    measured(|| {
        let out = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
        assert!(out.status.success(), "{program} {args:?}: {}", super::support::describe(&out));
    })
}

#[test]
fn a_large_file_takes_little_more_than_zstd_and_little_memory() {
    let (_dir, dir) = temp();
    let path = |name: &str| dir.join(name).into_string();
    let size = if long() { 1 << 30 } else { 96 << 20 };
    big_file(dir.join("big").as_std_path(), size);
    super::private(&dir.join("key"), &[1; 32]);
    // Data and stacks of all threads, the runtime's among them; nothing of a file's size.
    let limit = 64;
    let zstd = run("zstd", &["-q", "-3", "--single-thread", "-f", &path("big"), "-o", &path("big.zst")]);
    let pack = within(limit, &["create", "-q", "-c", "zstd", &path("a.bfc"), &path("big")]);
    let unzstd = run("zstd", &["-q", "-d", "-f", &path("big.zst"), "-o", &path("big.out")]);
    std::fs::create_dir(dir.join("out")).unwrap();
    let unpack = within(limit, &["extract", "-q", "-C", &path("out"), &path("a.bfc")]);
    let same = |other: &str| run("cmp", &[&path("big"), &path(other)]);
    same("out/big");
    let ratio = |a: (Duration, Duration), b: (Duration, Duration)| a.0.as_secs_f64() / b.0.as_secs_f64();
    let show = |what: &str, (cpu, elapsed): (Duration, Duration)| {
        println!(
            "figure: {} MiB, {what}: {:.2} s of processor time in {:.2} s",
            size >> 20,
            cpu.as_secs_f64(),
            elapsed.as_secs_f64()
        );
    };
    show("zstd -3", zstd);
    show("pack, synced", pack);
    show("zstd -d", unzstd);
    show("unpack", unpack);
    std::fs::remove_file(dir.join("out/big")).unwrap();
    let seal = within(limit, &["create", "-q", "-k", &path("key"), &path("k.bfc"), &path("big")]);
    let open = within(limit, &["extract", "-q", "-K", &path("key"), "-C", &path("out"), &path("k.bfc")]);
    same("out/big");
    show("pack encrypted, synced", seal);
    show("unpack encrypted, in two passes", open);
    // An unoptimized build takes longer, and its start counts.
    let (most, slack) = if long() { (1.5, Duration::ZERO) } else { (5.0, Duration::from_secs(2)) };
    assert!(pack.0 < zstd.0.mul_f64(most) + slack, "packing takes {:.2} times what zstd does", ratio(pack, zstd));
    assert!(
        unpack.0 < unzstd.0.mul_f64(most) + slack,
        "unpacking takes {:.2} times what zstd does",
        ratio(unpack, unzstd)
    );
}
