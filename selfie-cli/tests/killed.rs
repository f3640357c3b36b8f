//! Runs that are killed at random moments, again and again, end with the bytes of the run that was not.
//!
//! `SELFIE_KILLS` says how many kills each case takes (10 unless told), `SELFIE_KILL_SEED` repeats a failed one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::support::moments::{Moments, number};
use crate::support::traces::assert_same;
use crate::support::{selfie, text, works, write, write_images};

/// Runs `command --out FOLDER` to the end on one thread, then on two with kills, and compares. As many kills as are asked
/// for, and more until one came behind a checkpoint: with few, all may come before.
#[track_caller]
fn survives(folder: &Path, command: &str) {
    let (whole, killed) = (folder.join("whole"), folder.join("killed"));
    let began = Instant::now();
    works(&format!("{command} --out {} --threads 1 --workers 0", text(&whole)));
    // Several kills for a run: whoever is killed only near the end shows little.
    let span = began.elapsed().as_secs_f64() / 2.0;

    let mut moments = Moments::new();
    let kills = number("SELFIE_KILLS").unwrap_or(10);
    let (mut done, mut resumed) = (0, false);
    while done < kills || !resumed {
        assert!(done < kills + 30, "no kill came behind a checkpoint");
        let threads = 1 + done % 2;
        let line = format!("{command} --out {} --threads {threads} --workers {}", text(&killed), done % 3);
        let mut child = selfie(&line).stderr(Stdio::null()).spawn().expect("it starts");
        std::thread::sleep(Duration::from_secs_f64(span * moments.next()));
        if child.try_wait().expect("it is ours").is_some() {
            // It was at its end: compared, and once more from the beginning.
            assert_same(&whole, &killed);
            fs::remove_dir_all(&killed).expect("ours");
            continue;
        }
        child.kill().expect("it runs");
        child.wait().expect("it ended");
        done += 1;
        resumed |= killed.join("state/last").exists();
    }
    works(&format!("{command} --out {} --threads 2", text(&killed)));
    assert_same(&whole, &killed);
}

const SCHEDULE: &str = "--preset tiny --batch 8 --steps 40 --log-every 1 --eval-every 6 --save-every 4 --seed 5";

#[test]
fn pretraining() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    survives(folder.path(), &format!("pretrain --data synthetic:train=60,test=20,classes=4 {SCHEDULE}"));
}

#[test]
fn finetuning() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (data, pre) = ("synthetic:train=60,test=20,classes=4", folder.path().join("pre"));
    works(&format!("pretrain --data {data} --out {} --preset tiny --batch 8 --steps 4", text(&pre)));
    let more = format!("--init {} --labels 10 --validation 0.2 --accumulate 2", text(&pre));
    survives(folder.path(), &format!("finetune --data {data} {more} {SCHEDULE}"));
}

/// Bad files are met again, counted once and listed once.
#[test]
fn files_of_which_some_are_bad() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("data");
    write_images(&data, 24);
    for name in ["a/broken.png", "b/empty.jpg"] {
        write(&data.join(name), b"");
    }
    let more = "--image-size 32 --holdout 0.2 --max-bad 0.2";
    survives(folder.path(), &format!("pretrain --data {} {more} {SCHEDULE}", text(&data)));
    let skipped = fs::read_to_string(folder.path().join("killed/skipped.txt")).expect("the list");
    assert_eq!(skipped.lines().count(), 2, "{skipped}");
}

#[test]
#[ignore = "needs SELFIE_DATA"]
fn photographs() {
    let beside = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data"));
    let data = std::env::var_os("SELFIE_DATA").map_or_else(beside, PathBuf::from).join("imagenette-224.tar");
    let schedule = "--preset tiny --batch 8 --steps 12 --log-every 1 --eval-every 4 --save-every 3 --limit 60";
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (pre, fine) = (folder.path().join("pre"), folder.path().join("fine"));
    survives(&pre, &format!("pretrain --data {} {schedule}", text(&data)));
    let init = pre.join("whole");
    survives(&fine, &format!("finetune --data {} --labels 3 --init {} {schedule}", text(&data), text(&init)));
}
