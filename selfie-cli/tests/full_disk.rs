//! A disk that is full, whenever it happens to be: the run says so, nothing already saved is damaged, and the same
//! command goes on once there is room.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::support::traces::assert_same;
use crate::support::{ran, selfie, text, works};

const DATA: &str = "synthetic:train=40,test=8,classes=4";

fn pretrain(out: &Path) -> String {
    format!(
        "pretrain --data {DATA} --out {} --preset tiny --batch 8 --steps 3 --log-every 1 --eval-every 2 --save-every 1 \
         --keep 1 --threads 1 --workers 0",
        text(out)
    )
}

/// Refuses every write, flush, rename and new folder of a run in turn.
#[cfg(debug_assertions)]
#[test]
fn every_write_may_fail() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (whole, out) = (folder.path().join("whole"), folder.path().join("out"));
    works(&pretrain(&whole));
    let mut refused = 0;
    for fault in 1.. {
        let _ = fs::remove_dir_all(&out);
        let ran = ran(selfie(&pretrain(&out)).env("SELFIE_FAULT", fault.to_string()));
        if ran.code == Some(0) {
            break;
        }
        refused += 1;
        assert_eq!(ran.code, Some(1), "fault {fault}: {}", ran.err);
        assert_eq!(ran.err.matches("error:").count(), 1, "fault {fault}: {}", ran.err);
        ran.says(&["cannot write", "no storage space", "the same command goes on"]);
        works(&pretrain(&out));
        assert_same(&whole, &out);
        assert_eq!(unfinished(&out), Vec::<String>::new(), "fault {fault}");
    }
    assert!(refused > 40, "only {refused} writes: not all of them pass the one place that fails on demand");
}

/// Names of unfinished things in a run.
fn unfinished(out: &Path) -> Vec<String> {
    let names = |folder: &Path| {
        let entries = fs::read_dir(folder).into_iter().flatten();
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect::<Vec<_>>()
    };
    let all = [out.to_path_buf(), out.join("state"), out.join("weights")];
    all.iter().flat_map(|folder| names(folder)).filter(|name| name.starts_with(".unfinished")).collect()
}

/// A small file system in memory, unmounted when dropped.
#[cfg(target_os = "linux")]
struct SmallDisk<'a>(&'a Path);

#[cfg(target_os = "linux")]
impl SmallDisk<'_> {
    fn mount(at: &Path, options: &str) {
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", options, "selfie-test"]).arg(at);
        assert!(command.status().expect("mount runs").success(), "mounting needs root");
    }

    fn remount(&self, options: &str) {
        Self::mount(self.0, &format!("remount,{options}"));
    }
}

#[cfg(target_os = "linux")]
impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

#[cfg(target_os = "linux")]
#[test]
#[ignore = "needs root, to mount a file system"]
fn a_disk_of_a_megabyte_and_one_that_is_read_only() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (whole, mount) = (folder.path().join("whole"), folder.path().join("disk"));
    works(&pretrain(&whole));
    let bytes: u64 = sizes(&whole);
    fs::create_dir(&mount).expect("a folder");
    // From too small for the first checkpoint to large enough for all but the last save.
    for percent in [2, 20, 40, 60, 80, 95] {
        SmallDisk::mount(&mount, &format!("size={}", bytes * percent / 100));
        let disk = SmallDisk(&mount);
        let out = mount.join("run");
        let full = ran(&mut selfie(&pretrain(&out)));
        assert_eq!(full.code, Some(1), "{percent}%: {}", full.err);
        full.says(&["No space left on device", "the same command goes on"]);
        disk.remount("ro");
        let refused = ran(&mut selfie(&pretrain(&out)));
        assert_eq!(refused.code, Some(1), "{percent}%: {}", refused.err);
        refused.says(&["Read-only file system"]);
        disk.remount("rw,size=50m");
        works(&pretrain(&out));
        assert_same(&whole, &out);
    }
}

/// Bytes of all files below a folder.
#[cfg(target_os = "linux")]
fn sizes(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("readable").path());
    entries.map(|path| if path.is_dir() { sizes(&path) } else { fs::metadata(path).expect("a file").len() }).sum()
}
