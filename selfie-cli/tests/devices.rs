//! Machines without a GPU that can be used: no driver, and drivers that are broken in every way, which a library of our own
//! plays (`support/libcuda.rs`).
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::support::{Ran, ran, selfie, text, write};

/// The names under which cudarc and the system look for a driver.
const NAMES: [&str; 2] = ["libcuda.so", "libcuda.so.1"];

/// The playing library, compiled once.
fn library() -> &'static [u8] {
    static LIBRARY: OnceLock<Vec<u8>> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("libcuda.so");
        let compiler = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/libcuda.rs");
        let mut compile = Command::new(&compiler);
        compile.args([
            "--crate-type",
            "cdylib",
            "--edition",
            "2021",
            "-C",
            "debuginfo=0",
            "-C",
            "panic=abort",
            "-C",
            "strip=symbols",
        ]);
        let compiled = compile.arg("-o").arg(&file).arg(&source).output();
        let compiled =
            compiled.unwrap_or_else(|error| panic!("{} (or RUSTC) cannot be run: {error}", compiler.display()));
        assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
        fs::read(&file).expect("it was compiled")
    })
}

/// A machine whose loader finds this driver first.
struct Machine {
    folder: tempfile::TempDir,
    behaviour: String,
}

impl Machine {
    /// With the playing library, told how to behave.
    fn that(behaviour: &str) -> Self {
        Self::with(library(), behaviour)
    }

    fn with(library: &[u8], behaviour: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for name in NAMES {
            write(&folder.path().join(name), library);
        }
        Self { folder, behaviour: behaviour.to_owned() }
    }

    /// With a driver that lacks a function: its name in the library is another.
    fn without(function: &str) -> Self {
        let mut bytes = library().to_vec();
        let name = format!("\0{function}\0");
        let places: Vec<usize> = (0..bytes.len()).filter(|&at| bytes[at..].starts_with(name.as_bytes())).collect();
        assert!(!places.is_empty(), "the library has no {function}");
        places.iter().for_each(|at| bytes[at + 1] = b'x');
        Self::with(&bytes, "")
    }

    /// The binary there; `FAKE_CUDA` is for the library.
    fn command(&self, line: &str) -> Command {
        let mut command = selfie(line);
        command.env("LD_LIBRARY_PATH", self.folder.path()).env("FAKE_CUDA", &self.behaviour);
        command.env("XDG_CACHE_HOME", self.folder.path().join("cache"));
        command
    }

    /// Runs it.
    fn runs(&self, line: &str) -> Ran {
        let mut command = self.command(line);
        if self.behaviour.starts_with("hang") {
            command.env("SELFIE_CUDA_PROBE_SECONDS", "1");
        }
        let began = Instant::now();
        let ran = ran(&mut command);
        assert!(began.elapsed() < Duration::from_secs(60), "{line} with {}: took too long", self.behaviour);
        assert!(!ran.err.contains("a bug") && !ran.err.contains("panicked"), "{line}: {}", ran.err);
        ran
    }

    /// Asserts that commands which ask for a GPU fail with the code and a line that has all of `words`.
    #[track_caller]
    fn refuses(&self, device: &str, code: i32, words: &[&str]) {
        let ran = self.runs(&format!("doctor --device {device}"));
        assert_eq!(ran.code, Some(code), "{}{}", ran.out, ran.err);
        let lines: Vec<&str> = ran.err.lines().collect();
        assert!(matches!(lines[..], [line] if line.starts_with("error: ")), "one line: {}", ran.err);
        ran.says(words);
    }

    /// Asserts that no GPU can be used here, and that everyone says so, with `words`.
    #[track_caller]
    fn has_no_gpu(&self, words: &[&str]) {
        let ran = self.runs("doctor");
        assert_eq!(ran.code, Some(0), "{}{}", ran.out, ran.err);
        let saying = |line: &&str| words.iter().all(|word| line.contains(word));
        assert_eq!(ran.out.lines().filter(saying).count(), 1, "said in one line, {words:?}: {}", ran.out);
        assert!(ran.out.lines().any(|line| line.starts_with("uses      CPU")), "{}", ran.out);

        let ran = self.runs("doctor --json");
        assert_eq!(ran.code, Some(0), "{}{}", ran.out, ran.err);
        let value = ran.json();
        let problem = value["cuda"]["problem"].as_str().unwrap_or_default();
        assert!(words.iter().all(|word| problem.contains(word)) && !problem.contains('\n'), "{problem}");
        assert_eq!(value["uses"]["device"], "cpu");
        // `auto` says why it is not the GPU.
        assert!(value["uses"]["notes"].to_string().contains("as no GPU can be used: "), "{value:#}");

        let words: Vec<&str> = words.iter().copied().chain(["--device cpu"]).collect();
        self.refuses("cuda", 1, &words);
    }
}

#[test]
fn libraries_that_are_no_drivers() {
    let machine = Machine::without("cuInit");
    machine.has_no_gpu(&["has no cuInit"]);
    machine.refuses("cuda:7", 1, &["has no cuInit"]);
    // A file that cannot be loaded hides no driver that lies elsewhere.
    let elsewhere = ran(&mut selfie("doctor --json")).json()["cuda"]["library"].as_str().map(PathBuf::from);
    let machine = Machine::with(b"", "");
    match elsewhere {
        None => {
            machine.has_no_gpu(&["cannot be loaded", "file too short"]);
            machine.refuses("cuda:7", 1, &["cannot be loaded"]);
        }
        Some(_) => assert_ne!(machine.runs("doctor --json").json()["cuda"]["library"], serde_json::Value::Null),
    }
}

#[test]
fn no_driver_at_all() {
    if ran(&mut selfie("doctor --json")).json()["cuda"]["library"].is_string() {
        eprintln!("not tried: this machine has a driver");
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let machine = Machine { folder, behaviour: String::new() };
    machine.has_no_gpu(&["no NVIDIA driver", "libcuda.so.1"]);
    machine.refuses("cuda:7", 1, &["no NVIDIA driver"]);
}

#[test]
fn drivers_that_do_not_begin() {
    for (behaviour, words) in [
        ("init=100", &["no GPU", "CUDA_VISIBLE_DEVICES"][..]),
        ("init=999", &["999", "nvidia-smi"]),
        ("init=803", &["different versions", "restart"]),
        ("init=34", &["stub"]),
        ("init=12345", &["cuInit fails with error 12345"]),
        ("version=11040", &["CUDA 11.4", "need 12.4", "update"]),
        ("devices=0", &["no GPU"]),
        ("devices=-1", &["no GPU"]),
        ("capability=75", &["Fake GPU", "compute capability 7.5", "need 8.0"]),
    ] {
        let machine = Machine::that(behaviour);
        machine.has_no_gpu(words);
        if !behaviour.starts_with("capability") {
            machine.refuses("cuda:7", 1, words);
        }
    }
}

#[test]
fn drivers_that_hang() {
    for place in ["init", "context"] {
        let machine = Machine::that(&format!("hang={place}"));
        let began = Instant::now();
        machine.has_no_gpu(&["did not answer within 1 s", "SELFIE_CUDA_PROBE_SECONDS"]);
        assert!(began.elapsed() >= Duration::from_secs(3), "each of three commands gave it its second");
    }
}

/// cudarc looks a function up when it is first called, and panics where there is none.
#[test]
fn drivers_that_lack_a_function() {
    let source = include_str!("support/libcuda.rs");
    let (source, _) =
        source.split_once("// What only kernels for Hopper need").expect("what need not be there comes last");
    let functions: Vec<&str> = source
        .lines()
        .filter_map(|line| line.strip_prefix("    cu"))
        .filter_map(|line| line.split_once('(').map(|(name, _)| name))
        .collect();
    assert!(functions.len() > 40, "{functions:?}");
    for function in functions {
        let machine = Machine::without(&format!("cu{function}"));
        let problem = machine.runs("doctor --json").json()["cuda"]["problem"].to_string();
        assert!(problem.contains(&format!("has no cu{function}")), "{function}: {problem}");
    }
    Machine::without("cuGraphLaunch").has_no_gpu(&["has no cuGraphLaunch"]);
}

/// A driver with the functions that the look asks for, and none besides, is enough for all that training calls: nothing
/// panics. That its kernels do nothing is found out.
#[test]
fn a_driver_that_computes_nothing() {
    let machine = Machine::that("");
    let value = machine.runs("doctor --json").json();
    assert_eq!(value["uses"]["device"], "cuda");
    assert_eq!(value["uses"]["precision"], "bf16", "auto on a GPU");
    assert_eq!(value["cuda"]["gpus"][0]["name"], "Fake GPU");
    let library = machine.folder.path().canonicalize().expect("it is there").join(NAMES[0]);
    assert_eq!(value["cuda"]["library"], text(&library), "the file that is used");
    machine.refuses("cuda:7", 1, &["GPU 7", "there is one, number 0"]);

    let parity = machine.runs("doctor --parity --device cuda --precision f32");
    assert_eq!(parity.code, Some(1), "{}{}", parity.out, parity.err);
    assert!(parity.out.contains("too far from f64"), "{}", parity.out);

    let pretrain = machine.runs(&pretrain(machine.folder.path(), "cuda"));
    assert_eq!(pretrain.code, Some(4), "not one step is finite: {}{}", pretrain.out, pretrain.err);
}

#[test]
fn kernels_are_machine_code_or_ptx() {
    for (behaviour, files, words) in [
        ("capability=90", 22, &["machine code for sm_90a"][..]),
        ("capability=80", 17, &["machine code for sm_80"]),
        ("capability=89", 17, &["machine code for sm_86"]),
        ("capability=87", 17, &["PTX", "no machine code for compute capability 8.7"]),
        (
            "code=209",
            22,
            &["PTX", "machine code for sm_90a cannot be loaded: the driver refuses it: CUDA_ERROR_NO_BINARY_FOR_GPU"],
        ),
    ] {
        let machine = Machine::that(behaviour);
        let value = machine.runs("doctor --json").json();
        let loaded = value["kernels"]["files"].as_object().unwrap_or_else(|| panic!("{behaviour}: {value:#}"));
        let all: Vec<_> = loaded.iter().map(|(form, files)| (form, files.as_array().map_or(0, Vec::len))).collect();
        assert!(
            matches!(all[..], [(form, count)] if count == files && words.iter().all(|word| form.contains(word))),
            "{all:?}"
        );
        let told = value["uses"]["notes"].to_string().contains("kernels as PTX");
        assert_eq!(told, words[0] == "PTX", "{behaviour}: {value:#}");
        let line = format!("kernels   {files} files, {}", words[0]);
        assert!(machine.runs("doctor").out.contains(&line), "{behaviour}: {line}");
    }
    Machine::that("module=222").has_no_gpu(&["kernels bn_commit.cu", "UNSUPPORTED_PTX_VERSION", "newer"]);
}

/// The playing driver refuses the launch of a kernel that would begin early and does not wait; of one that does it answers
/// what `early` says.
#[test]
fn kernels_that_wait_begin_early() {
    for (behaviour, early, code) in [
        ("capability=90", true, 1),
        ("capability=120", true, 1),
        ("capability=80", false, 4),
        // PTX for 9.0 waits, that of the other kernels does not.
        ("code=209", false, 1),
        ("code=209,capability=120", false, 4),
    ] {
        let machine = Machine::that(&format!("{behaviour},early=719"));
        assert_eq!(machine.runs("doctor --json").json()["kernels"]["begin_early"], early, "{behaviour}");
        let ran = machine.runs(&pretrain(machine.folder.path(), "cuda").replace("tiny", "small"));
        assert_eq!(ran.code, Some(code), "{behaviour}: {}{}", ran.out, ran.err);
    }
    let machine = Machine::that("early=719");
    let mut plainly = machine.command("doctor --json");
    assert_eq!(ran(plainly.env("SELFIE_OVERLAP", "0")).json()["kernels"]["begin_early"], false);
    let mut plainly = machine.command(&pretrain(machine.folder.path(), "cuda"));
    assert_eq!(ran(plainly.env("SELFIE_OVERLAP", "0")).code, Some(4));
}

/// The driver only knows that a launch failed; where its threads waited is what the kernel has told.
#[test]
fn a_kernel_that_is_stuck() {
    let machine = Machine::that("stuck=1,replay=719");
    let line = pretrain(machine.folder.path(), "cuda").replace("tiny", "small");
    let ran = machine.runs(&line);
    assert_eq!(ran.code, Some(1), "{}{}", ran.out, ran.err);
    assert_eq!(ran.err.matches("error:").count(), 1, "{}", ran.err);
    ran.says(&[
        "_sm90.cu",
        "stuck",
        "threads of block [5, 0, 0]",
        "wait: 128 for parity 1 of the mbarrier",
        "start again",
    ]);
}

/// The choices of a run, by its `env.json`.
fn choices(run: &Path) -> serde_json::Value {
    let text = fs::read(run.join("env.json")).expect("a run was begun");
    serde_json::from_slice::<serde_json::Value>(&text).expect("JSON")["choices"].clone()
}

/// By the rules the networks here are computed by narrow kernels.
#[test]
fn a_gpu_is_tuned_and_runs_keep_their_tables() {
    let mut machine = Machine::that("slow=narrow");
    let [early, run] = ["early", "run"].map(|name| machine.folder.path().join(name));
    // Kernels that compute nothing: no step is finite.
    let begins = |machine: &Machine, run: &Path| {
        let line = pretrain(machine.folder.path(), "cuda");
        let ran = machine.runs(&line.replace(text(&machine.folder.path().join("run")), text(run)));
        assert_eq!(ran.code, Some(4), "{}{}", ran.out, ran.err);
        ran
    };
    begins(&machine, &early);
    assert_eq!(choices(&early), serde_json::Value::Null);
    assert!(machine.runs("doctor").out.contains("(kernels by the rules: selfie bench --tune"));

    let bench = "bench --tune --preset tiny --batch 4 --device cuda --seconds 1";
    machine.behaviour = "slow=narrow,finite=1".into();
    let tuned = machine.runs(&format!("{bench} --json"));
    assert_eq!(tuned.code, Some(0), "{}{}", tuned.out, tuned.err);
    let tuned = tuned.json();
    let contests = tuned["contests"].as_array().expect("a list");
    let won: Vec<_> = contests.iter().filter_map(|contest| contest["fastest"].as_str()).collect();
    assert!(!won.is_empty() && won.iter().all(|name| !name.contains("narrow")), "{tuned:#}");
    assert_eq!(tuned["entries"], won.len());
    let file = PathBuf::from(tuned["file"].as_str().expect("it was worth it"));
    assert!(file.starts_with(machine.folder.path().join("cache/selfie/choices")), "{}", file.display());
    let table = fs::read_to_string(&file).expect("written");
    assert!(table.contains("Fake GPU, 4 multiprocessors") && table.contains("CUDA 12.8"), "{table}");

    // Once more, in words, to the same table.
    let again = machine.runs(bench);
    assert!(again.out.contains(text(&file)) && again.out.contains("used from now on"), "{}", again.out);
    assert_eq!(fs::read_to_string(&file).expect("written"), table);
    machine.behaviour = "slow=narrow".into();

    let name = file.file_stem().expect("it has a name").to_str().expect("a plain one");
    let begun = begins(&machine, &run);
    begun.says(&[&format!("(kernels by the table {name}, {} entries)", won.len())]);
    let kept = choices(&run);
    assert_eq!((&kept["name"], &kept["entries"]), (&name.into(), &won.len().into()));
    assert_eq!(fs::read_to_string(run.join("choices.toml")).expect("a copy"), table);
    let told = machine.runs("doctor --json").json();
    assert_eq!(told["uses"]["table"], kept);

    // A run that was begun without a table goes on without; one that has its own needs no other.
    begins(&machine, &early);
    assert_eq!(choices(&early), serde_json::Value::Null);
    write(&file, table.replace("CUDA 12.8", "CUDA 12.6").as_bytes());
    machine
        .runs("doctor")
        .out
        .lines()
        .find(|line| line.contains("is of Fake GPU, 4 multiprocessors, CUDA 12.6"))
        .expect("a line");
    write(&file, b"kernels");
    let broken = machine.runs("doctor");
    assert!(broken.code == Some(0) && broken.out.contains("is no table of kernels"), "{}", broken.out);
    begins(&machine, &run);
    assert_eq!(choices(&run), kept);
    write(&run.join("choices.toml"), table.replace("Fake GPU", "Other GPU").as_bytes());
    begins(&machine, &run).says(&["is of Other GPU", "here is Fake GPU"]);
    assert_eq!(choices(&run), serde_json::Value::Null);
    // A name of a kernel that there is no more.
    let unknown = won.iter().fold(table, |table, name| table.replace(&format!("= \"{name}\""), "= \"of_yesterday\""));
    write(&run.join("choices.toml"), unknown.as_bytes());
    let ran = begins(&machine, &run);
    assert_eq!(ran.err.matches("\"of_yesterday\"").count(), 1, "{}", ran.err);
}

#[test]
fn gpus_that_fail_on_the_way() {
    for (behaviour, code, words) in [
        ("alloc=2", 5, &["out of memory", "Fake GPU"][..]),
        ("module=222", 1, &["UNSUPPORTED_PTX_VERSION", "newer"]),
        ("launch=719", 1, &["LAUNCH_FAILED", "start again"]),
        ("replay=700", 1, &["ILLEGAL_ADDRESS", "start again"]),
    ] {
        let machine = Machine::that(behaviour);
        let ran = machine.runs(&pretrain(machine.folder.path(), "cuda"));
        assert_eq!(ran.code, Some(code), "{behaviour}: {}{}", ran.out, ran.err);
        assert_eq!(ran.err.matches("error:").count(), 1, "{behaviour}: {}", ran.err);
        ran.says(words);
    }
}

#[test]
fn auto_trains_on_the_cpu_and_says_why() {
    let machine = Machine::that("hang=context");
    let ran = machine.runs(&pretrain(machine.folder.path(), "auto"));
    assert_eq!(ran.code, Some(0), "{}{}", ran.out, ran.err);
    ran.says(&["the CPU, as no GPU can be used: ", "did not answer within 1 s"]);
    let machine = Machine::that("init=999");
    let ran = machine.runs(&pretrain(machine.folder.path(), "cuda"));
    assert_eq!(ran.code, Some(1), "{}{}", ran.out, ran.err);
    ran.says(&["error 999", "--device cpu"]);
    assert!(!machine.folder.path().join("run").exists(), "nothing was begun");
}

#[test]
fn the_cpu_is_sound() {
    let ran = Machine::that("init=999").runs("doctor --parity --device cpu");
    assert_eq!(ran.code, Some(0), "{}{}", ran.out, ran.err);
    assert!(ran.out.contains("as near to f64 as the CPU is"), "{}", ran.out);
}

/// A line of a short run.
fn pretrain(folder: &Path, device: &str) -> String {
    let out = folder.join("run");
    format!(
        "pretrain --data synthetic:train=40,test=10 --preset tiny --batch 4 --steps 4 --out {} --device {device}",
        text(&out)
    )
}
