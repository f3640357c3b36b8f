//! What a run was given lies elsewhere when it goes on: images, first weights, the list of labels. And the commands that
//! a run prints, wherever it is.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::traces::assert_same;
use crate::support::{fails, ran, selfie, text, works, write, write_images};

const SCHEDULE: &str = "--preset tiny --batch 4 --image-size 32 --log-every 1 --eval-every 0 --save-every 2";

#[test]
fn images_that_moved() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (photos, pictures) = (folder.path().join("photos"), folder.path().join("pictures"));
    write_images(&photos, 12);
    let out = folder.path().join("out");
    let pretrain = |data: &Path, out: &Path, steps| {
        format!("pretrain {SCHEDULE} --data {} --out {} --steps {steps}", text(data), text(out))
    };
    works(&pretrain(&photos, &out, 4));
    fs::rename(&photos, &pictures).expect("moved");
    // Left out, the run's own value is asked for; the message has the way out.
    let left_out = format!("pretrain --out {} --steps 8", text(&out));
    fails(&left_out, 3, &[text(&photos), "in another place now", "config.toml; --data"]);
    let again = works(&pretrain(&pictures, &out, 8));
    again.says(&["data.path", text(&pictures), text(&photos), "the same, in another place", "continuing"]);
    // From now on it is the run's own.
    works(&format!("pretrain --out {} --steps 10", text(&out))).says(&["continuing"]);
    let steps = |out: &Path| -> Vec<u64> {
        let lines = fs::read_to_string(out.join("metrics.jsonl")).expect("metrics");
        let lines = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON lines"));
        lines.filter(|line| line.get("loss").is_some()).map(|line| line["step"].as_u64().expect("a step")).collect()
    };
    assert_eq!(steps(&out), (1..=10).collect::<Vec<_>>(), "no step twice, none left out");

    // Others are refused, with both places and what differs.
    let more = folder.path().join("more");
    write_images(&more, 13);
    let differs = ["data.path", text(&more), text(&pictures), "train.images was 12, now it is 13", "another --out"];
    fails(&pretrain(&more, &out, 12), 2, &differs);
    let renamed = folder.path().join("renamed");
    write_images(&renamed, 12);
    fs::rename(renamed.join("b"), renamed.join("c")).expect("another class");
    fails(&pretrain(&renamed, &out, 12), 2, &["classes was [\"a\",\"b\"]"]);
    let smaller = pretrain(&pictures, &out, 12).replace("--image-size 32", "--image-size 16");
    fails(&smaller, 2, &["data.image_size = 16", "32"]);
    fails(&format!("pretrain --data synthetic:train=12 --out {} --steps 12", text(&out)), 2, &["data.path"]);
    // And what they were refused for is not written.
    works(&format!("pretrain --out {} --steps 11", text(&out))).says(&["continuing"]);
}

/// The same run with the same bytes, though its images moved in the middle.
#[test]
fn the_bytes_do_not_depend_on_the_place() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (photos, pictures) = (folder.path().join("photos"), folder.path().join("pictures"));
    write_images(&photos, 12);
    let (whole, out) = (folder.path().join("whole"), folder.path().join("out"));
    let pretrain = |data: &Path, out: &Path, steps| {
        works(&format!("pretrain {SCHEDULE} --data {} --out {} --steps {steps}", text(data), text(out)));
    };
    // The course of the learning rate is that of its length: both are extended alike.
    pretrain(&photos, &whole, 4);
    pretrain(&photos, &out, 4);
    pretrain(&photos, &whole, 8);
    fs::rename(&photos, &pictures).expect("moved");
    pretrain(&pictures, &out, 8);
    assert_same(&whole, &out);
}

#[test]
fn images_that_changed_in_their_place() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (data, out) = (folder.path().join("data"), folder.path().join("out"));
    write_images(&data, 12);
    let line = |steps| format!("pretrain {SCHEDULE} --data {} --out {} --steps {steps}", text(&data), text(&out));
    works(&line(2));
    write_images(&data, 13);
    fails(&line(4), 3, &["the data changed since the run began", "train.images was 12, now it is 13", "restore"]);
    fs::remove_file(data.join("a/12.bmp")).expect("the new one");
    fs::rename(data.join("b"), data.join("c")).expect("another class");
    fails(&line(4), 3, &["the data changed since the run began", "classes was [\"a\",\"b\"]", "restore"]);
    fs::rename(data.join("c"), data.join("b")).expect("restored");
    works(&line(4)).says(&["continuing"]);
}

#[test]
fn first_weights_and_lists_that_moved() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| folder.path().join(name);
    let data = "synthetic:train=24,test=8,classes=2";
    let common = "--preset tiny --batch 8 --save-every 1";
    for (out, seed) in [("pre", 0), ("other", 1)] {
        works(&format!("pretrain --data {data} {common} --steps 1 --seed {seed} --out {}", text(&at(out))));
    }
    let finetune = |init: &str, more: &str, steps: u32| {
        format!("finetune --data {data} {common} --steps {steps} --out {} {init} {more}", text(&at("fine")))
    };
    let init = |name: &str| format!("--init {}", text(&at(name)));
    // A list that a first run wrote is another's.
    works(&format!("finetune --data {data} {common} --labels 4 --init scratch --steps 1 --out {}", text(&at("list"))));
    fs::rename(at("list/labels.txt"), at("ours.txt")).expect("there");
    let labels = |name: &str| format!("--labels {}", text(&at(name)));
    works(&finetune(&init("pre"), &labels("ours.txt"), 1));

    fs::rename(at("pre"), at("moved")).expect("moved");
    fs::rename(at("ours.txt"), at("there.txt")).expect("moved");
    let list_is_gone = finetune("", "", 2);
    fails(&list_is_gone, 3, &["ours.txt", "in another place now", "config.toml; --labels"]);
    works(&finetune(&init("moved"), &labels("there.txt"), 2)).says(&["train.init", "data.labels", "in another place"]);
    // The run folder and the file in it are the same weights.
    let file = format!("{}/weights/model.safetensors", init("moved"));
    works(&finetune(&file, "", 3)).says(&["train.init", "in another place"]);
    // Others are refused, and what the message says works.
    fails(&finetune(&init("other"), "", 4), 2, &["train.init", "other weights", "leave this one out"]);
    fails(&finetune("--init scratch", "", 4), 2, &["train.init = \"scratch\"", "leave this one out"]);
    fs::remove_dir_all(at("moved")).expect("ours");
    works(&finetune("", "", 4)).says(&["continuing"]);
    let shorter = fs::read_to_string(at("there.txt")).expect("the list").lines().skip(1).collect::<Vec<_>>().join("\n");
    write(&at("shorter.txt"), shorter.as_bytes());
    fails(&finetune("", &labels("shorter.txt"), 5), 2, &["data.labels", "labels.txt"]);

    // Gone before there was a checkpoint: the weights are needed, and the message says so.
    let line = format!("finetune --data {data} {common} --steps 1 --out {} {}", text(&at("new")), init("gone"));
    fails(&line, 3, &["gone", "in another place now", "--init"]);
}

/// Everything that looks like a command is one, in folders whose names a shell takes apart.
#[cfg(unix)]
#[test]
fn printed_commands_can_be_pasted() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let place = folder.path().join("it's a (new) $place");
    write_images(&place.join("my photos"), 12);
    let run = |line: &str| {
        let mut shell = crate::support::behind(&format!("selfie() {{ \"$0\" \"$@\"; }}; {line}"), &selfie(""));
        // As short as it can be; a command that is printed does not say how long it takes.
        shell.envs([("SELFIE_TRAIN_STEPS", "2"), ("SELFIE_TRAIN_BATCH", "4")]);
        let ran = ran(shell.current_dir(&place));
        assert_eq!(ran.code, Some(0), "{line}: {}{}", ran.out, ran.err);
        ran
    };
    let commands = |text: &str| -> Vec<String> {
        text.lines().filter_map(|line| Some(line[line.find("selfie ")?..].to_string())).collect()
    };
    let pretrain = "selfie pretrain --data 'my photos' --out \"my runs/pre\" --preset tiny --image-size 32 --holdout 0";
    let first = run(pretrain);
    let next = commands(&first.err);
    let [inspect, finetune] = &next[..] else { panic!("{next:?}") };
    let inspect = inspect.strip_suffix(')').expect("in parentheses");
    assert!(finetune.starts_with("selfie finetune --data 'my photos' --init 'my runs/pre'"), "{finetune}");
    let inspected = run(inspect);
    let [again] = &commands(&inspected.out)[..] else { panic!("{}", inspected.out) };
    assert_eq!(again, finetune);
    let finetuned = run(finetune);
    let [evaluate] = &commands(&finetuned.err)[..] else { panic!("{}", finetuned.err) };
    run(evaluate);
    // What is there is not taken for what comes.
    let inspected = run(inspect);
    let [second] = &commands(&inspected.out)[..] else { panic!("{}", inspected.out) };
    assert_ne!(second, finetune);
    run(second);
    // A finished run says how it goes on.
    let finished = run(pretrain);
    let [longer] = &commands(&finished.err)[..] else { panic!("{}", finished.err) };
    assert!(longer.ends_with("--steps 4"), "{longer}");
    run(&format!("unset SELFIE_TRAIN_STEPS SELFIE_TRAIN_BATCH; {longer}"));
    // What was typed is kept so that it can be typed again.
    let typed = fs::read_to_string(place.join("my runs/pre/command.txt")).expect("the commands");
    let words = typed.lines().next().and_then(|line| line.split_once(' ')).expect("a command").1;
    run(&format!("selfie {words}"));
}

/// Tensors that a network has no use for are passed over, whatever their type, and named.
#[test]
fn weights_with_tensors_of_another_type() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| -> PathBuf { folder.path().join(name) };
    let data = "synthetic:train=24,test=8,classes=2";
    works(&format!("pretrain --data {data} --preset tiny --batch 8 --steps 1 --out {}", text(&at("pre"))));
    let sound = fs::read(at("pre/weights/model.safetensors")).expect("weights");
    let others = serde_json::json!({
        "queue_ptr": ["I64", [1]], "mask": ["BOOL", [3]], "scale": ["F8_E4M3", [2]], "stages.0.blocks.0.seen": ["U8", [1]],
    });
    write(&at("more.safetensors"), &with_tensors(&sound, &others));
    let finetune = |init: &str, out: &str| {
        format!(
            "finetune --data {data} --preset tiny --batch 8 --steps 1 --init {} --out {}",
            text(&at(init)),
            text(&at(out))
        )
    };
    works(&finetune("more.safetensors", "fine")).says(&["not used: mask, norm, queue_ptr, scale, stages.0"]);
    let seen = works(&format!("inspect {}", text(&at("more.safetensors")))).out;
    assert!(seen.contains("queue_ptr") && seen.contains("[1]  I64, not used"), "{seen}");
    let seen = works(&format!("inspect {} --json", text(&at("more.safetensors")))).json();
    assert_eq!(seen["files"][0]["not_used"]["mask"], serde_json::json!(["BOOL", [3]]));
    // A run's own weights, with something added.
    let weights = at("fine/weights/model.safetensors");
    write(&weights, &with_tensors(&fs::read(&weights).expect("weights"), &others));
    works(&format!("evaluate {}", text(&at("fine")))).says(&["`queue_ptr`, which is not used"]);
    // One that the network needs is not passed over.
    let name = "stem.conv.weight";
    let text_of = String::from_utf8_lossy(&sound).into_owned();
    assert!(text_of.contains(name));
    let cut = with_tensors(&without(&sound, name), &serde_json::json!({ name: ["I32", [8, 3, 3, 3]] }));
    write(&at("whole-numbers.safetensors"), &cut);
    let words = [name, "expected F16, BF16, F32 or F64", "I32", "convert it"];
    fails(&finetune("whole-numbers.safetensors", "cut"), 3, &words);
}

/// Header and body of a safetensors file.
fn parts(file: &[u8]) -> (serde_json::Map<String, serde_json::Value>, &[u8]) {
    let (size, rest) = file.split_at(8);
    let size = u64::from_le_bytes(size.try_into().expect("eight bytes")) as usize;
    (serde_json::from_slice(&rest[..size]).expect("a header"), &rest[size..])
}

fn joined(header: &serde_json::Map<String, serde_json::Value>, body: &[u8]) -> Vec<u8> {
    let header = serde_json::to_vec(header).expect("plain values");
    [&(header.len() as u64).to_le_bytes()[..], &header, body].concat()
}

/// The file with tensors of zeros, `{name: [type, shape]}`, after its own.
fn with_tensors(file: &[u8], tensors: &serde_json::Value) -> Vec<u8> {
    let (mut header, body) = parts(file);
    let mut body = body.to_vec();
    for (name, tensor) in tensors.as_object().expect("a table") {
        let (dtype, shape) = (tensor[0].as_str().expect("a type"), &tensor[1]);
        let elements: u64 =
            shape.as_array().expect("a shape").iter().map(|side| side.as_u64().expect("a side")).product();
        let width = match dtype {
            "I64" => 8,
            "I32" => 4,
            _ => 1,
        };
        let begin = body.len();
        body.resize(begin + elements as usize * width, 0);
        let described = serde_json::json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, body.len()] });
        header.insert(name.clone(), described);
    }
    joined(&header, &body)
}

/// The file with a tensor under another name.
fn without(file: &[u8], name: &str) -> Vec<u8> {
    let (mut header, body) = parts(file);
    let tensor = header.remove(name).expect("it is there");
    header.insert("something.else".into(), tensor);
    joined(&header, body)
}

/// A run that moves as a whole, to the same bytes.
#[test]
fn a_run_folder_that_moved() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (one, other, whole) = (folder.path().join("one"), folder.path().join("other"), folder.path().join("whole"));
    let line = |out: &Path, steps| {
        format!("pretrain --data synthetic:train=24,test=8 {SCHEDULE} --out {} --steps {steps}", text(out))
    };
    works(&line(&one, 4));
    works(&line(&whole, 4));
    fs::rename(&one, &other).expect("moved");
    works(&line(&other, 8)).says(&["continuing"]);
    works(&line(&whole, 8));
    assert_same(&whole, &other);
}
