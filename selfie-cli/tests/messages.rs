//! Messages that nobody reads: the reader is gone, asleep or full. No run ends or waits for it, and what a run says of
//! itself in its folder is true.
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{behind, selfie, text, works};
use serde_json::Value;

const DATA: &str = "synthetic:train=60,test=20,classes=4";

/// Steps that no test waits for.
const ENDLESS: u64 = 1_000_000;

fn pretrain(out: &Path, steps: u64) -> Command {
    selfie(&format!(
        "pretrain --data {DATA} --out {} --preset tiny --batch 8 --steps {steps} --log-every 1 --eval-every 6 \
         --save-every 4",
        text(out)
    ))
}

fn status(out: &Path) -> Value {
    serde_json::from_slice(&fs::read(out.join("status.json")).expect("a status")).expect("JSON")
}

/// The exit code, and how long it took to come.
fn ended(mut child: Child) -> (Option<i32>, Duration) {
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(120) {
        if let Some(ended) = child.try_wait().expect("it is ours") {
            return (ended.code(), began.elapsed());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().expect("it runs");
    panic!("it never ended");
}

fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args(["-s", name, &child.id().to_string()]).status();
    assert!(sent.expect("kill runs").success());
}

#[track_caller]
fn wait_until(what: impl Fn() -> bool) {
    let began = Instant::now();
    while !what() {
        assert!(began.elapsed() < Duration::from_secs(120), "it never came");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A pipe that takes no byte more, and whose reader sleeps.
#[cfg(target_os = "linux")]
fn full_pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let (done, filled) = std::sync::mpsc::channel();
    let mut clone = writer.try_clone().expect("the same pipe");
    // The thread ends in the write that does not return; the process does not wait for it.
    std::thread::spawn(move || {
        for _ in 0.. {
            if clone.write_all(&[b'\n'; 512]).and_then(|()| done.send(()).map_err(std::io::Error::other)).is_err() {
                return;
            }
        }
    });
    while filled.recv_timeout(Duration::from_millis(200)).is_ok() {}
    (reader, writer)
}

#[test]
fn a_reader_that_is_gone() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("pipe");
    let mut child = pretrain(&out, 20).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("it starts");
    let mut reader = BufReader::new(child.stderr.take().expect("piped"));
    reader.read_line(&mut String::new()).expect("it says something");
    drop(reader);
    assert_eq!(ended(child).0, Some(0));
    assert_eq!(status(&out)["state"], "finished");

    #[cfg(target_os = "linux")]
    {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("a full disk");
        let out = folder.path().join("full");
        let child = pretrain(&out, 20).stdout(Stdio::null()).stderr(full).spawn().expect("it starts");
        assert_eq!(ended(child).0, Some(0));
        assert_eq!(status(&out)["state"], "finished");
    }
}

/// A pager that waits for a key, a terminal that was stopped.
#[cfg(target_os = "linux")]
#[test]
fn a_reader_that_sleeps() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("run");
    let (_reader, writer) = full_pipe();
    let child = pretrain(&out, 20).stdout(Stdio::null()).stderr(writer).spawn().expect("it starts");
    assert_eq!(ended(child).0, Some(0));
    assert_eq!(status(&out)["state"], "finished");

    let out = folder.path().join("stopped");
    let (_reader, writer) = full_pipe();
    let child = pretrain(&out, ENDLESS).stdout(Stdio::null()).stderr(writer).spawn().expect("it starts");
    wait_until(|| out.join("state/last").exists());
    signal(&child, "TERM");
    assert_eq!(ended(child).0, Some(75));
    assert_eq!(status(&out)["state"], "stopped");
}

/// The terminal hangs up, and takes the reader with it; `tee` ends by the Ctrl-C that asks for a stop.
#[test]
fn a_signal_saves_though_the_reader_is_gone() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for name in ["HUP", "INT", "TERM", "USR1"] {
        let out = folder.path().join(name);
        // Standard output is gone, too, and would have had the answer.
        let mut run = pretrain(&out, ENDLESS);
        let mut child = run.arg("--json").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        drop((child.stdout.take(), child.stderr.take()));
        wait_until(|| out.join("state/last").exists());
        signal(&child, name);
        assert_eq!(ended(child).0, Some(75), "SIG{name}");
        assert_eq!(status(&out)["state"], "stopped", "SIG{name}");
        let step = status(&out)["step"].as_u64().expect("a number");
        assert!(out.join(format!("state/step-{step:08}/manifest.json")).exists(), "SIG{name}");
    }
}

/// `nohup` lets a run survive the session that it was started in.
#[cfg(target_os = "linux")]
#[test]
fn a_hang_up_that_is_ignored() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("run");
    let mut ignoring = behind("trap '' HUP; exec \"$0\" \"$@\"", &pretrain(&out, 30));
    let child = ignoring.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    wait_until(|| out.join("state/last").exists());
    signal(&child, "HUP");
    assert_eq!(ended(child).0, Some(0));
    assert_eq!(status(&out)["state"], "finished");
}

/// `timeout` sends its signal to the process and again to the group: that is no second wish.
#[test]
fn a_signal_that_comes_twice_at_once_saves() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("run");
    let child = pretrain(&out, ENDLESS).stderr(Stdio::null()).spawn().expect("it starts");
    wait_until(|| out.join("state/last").exists());
    let id = child.id();
    let twice = format!("kill -s USR1 {id}; kill -s TERM {id}; kill -s TERM {id}");
    assert!(Command::new("sh").args(["-c", &twice]).status().expect("a shell").success());
    assert_eq!(ended(child).0, Some(75));
    assert_eq!(status(&out)["state"], "stopped");
}

/// What is measured is on disk already: nothing has to be waited for.
#[test]
fn a_signal_ends_evaluations_and_final_tests() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    // Minutes of held-out images.
    let data = "synthetic:train=60,test=400000,classes=4";
    for (command, steps) in
        [("pretrain --eval-every 0", 2), ("finetune --init scratch", 2), ("pretrain --eval-every 2", 4)]
    {
        let out = folder.path().join(command.replace(' ', "_"));
        let line = format!(
            "{command} --data {data} --out {} --preset tiny --batch 8 --steps {steps} --eval-images 400000 --json",
            text(&out)
        );
        let child = selfie(&line).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let mut child = child.expect("it starts");
        let mut answer = child.stdout.take().expect("piped");
        wait_until(|| out.join("state/step-00000002/manifest.json").exists());
        std::thread::sleep(Duration::from_millis(500));
        signal(&child, "TERM");
        let (code, took) = ended(child);
        assert_eq!(code, Some(75), "{command}");
        assert!(took < Duration::from_secs(2), "{command}: {took:?}");
        assert_eq!((&status(&out)["state"], &status(&out)["step"]), (&"stopped".into(), &2.into()), "{command}");
        let mut said = String::new();
        answer.read_to_string(&mut said).expect("text");
        let said: Value = serde_json::from_str(&said).expect("one JSON object");
        assert_eq!(said["state"], "stopped", "{command}");
    }
}

/// Stopped in the middle of an evaluation, a run goes on to the bytes of the one that was not.
#[test]
fn an_evaluation_that_was_stopped_is_made_again() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (whole, out) = (folder.path().join("whole"), folder.path().join("out"));
    let line = |out: &Path| {
        format!(
            "pretrain --data synthetic:train=60,test=4000,classes=4 --out {} --preset tiny --batch 8 --steps 4 \
             --eval-every 2 --save-every 0 --log-every 1 --seed 5",
            text(out)
        )
    };
    works(&line(&whole));
    let child = selfie(&line(&out)).stderr(Stdio::null()).spawn().expect("it starts");
    wait_until(|| out.join("state/step-00000002/manifest.json").exists());
    signal(&child, "INT");
    assert_eq!(ended(child).0, Some(75));
    works(&line(&out));
    crate::support::traces::assert_same(&whole, &out);
}

#[test]
fn answers_that_nobody_reads() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let gone = |command: &mut Command| {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        drop((child.stdout.take(), child.stderr.take()));
        ended(child).0
    };
    assert_eq!(gone(&mut selfie("config init")), Some(0));
    assert_eq!(gone(&mut selfie("config show")), Some(0));
    assert_eq!(gone(&mut selfie("--help")), Some(0));
    assert_eq!(gone(&mut selfie("data check --data synthetic:train=8,test=8")), Some(0));
    // An error keeps its code, though nobody hears of it.
    assert_eq!(gone(&mut selfie("inspect nowhere")), Some(3));
    assert_eq!(gone(&mut selfie("pretrain --seed x")), Some(2));
    // An answer that was asked for, and is on no disk, is a failure, and said.
    #[cfg(target_os = "linux")]
    {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("a full disk");
        let output = selfie("config init").stdout(full).stderr(Stdio::piped()).output().expect("it starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("standard output") && said.contains("No space left"), "{said}");
        // Not of a run: its folder has all of it, and a stop stays one.
        let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("a full disk");
        let out = folder.path().join("run");
        let child = pretrain(&out, ENDLESS).arg("--json").stdout(full).stderr(Stdio::null()).spawn();
        let child = child.expect("it starts");
        wait_until(|| out.join("state/last").exists());
        signal(&child, "TERM");
        assert_eq!(ended(child).0, Some(75));
    }
}

/// A terminal with a bar, which goes away in the middle.
#[cfg(target_os = "linux")]
#[test]
fn a_terminal_that_goes_away() {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("run");
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
    grantpt(&ours).and_then(|()| unlockpt(&ours)).expect("ours");
    let size = rustix::termios::Winsize { ws_row: 24, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&ours, size).expect("a size");
    let name = ptsname(&ours, Vec::new()).expect("a name").into_string().expect("text");
    let theirs = || fs::OpenOptions::new().read(true).write(true).open(&name).expect("the other side");
    let child = pretrain(&out, 60).stdout(theirs()).stderr(theirs()).spawn().expect("it starts");
    let mut terminal = fs::File::from(ours);
    let mut seen = String::new();
    let mut bytes = [0; 256];
    while !seen.contains("pretrain [") {
        let count = terminal.read(&mut bytes).expect("it is there");
        seen += &String::from_utf8_lossy(&bytes[..count]);
    }
    drop(terminal);
    assert_eq!(ended(child).0, Some(0), "{seen}");
    assert_eq!(status(&out)["state"], "finished");
}
